"""Reads the PTX that Triton emits: instructions with operands, labels, parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass


class UnsupportedInstruction(Exception):
    """The executor does not know an instruction, or an operand of it."""


@dataclass(frozen=True)
class Address:
    """``[base + offset]``; ``base`` is a register or a number."""

    base: str
    offset: int


Operand = str | Address | tuple[str, ...]
"""A register, number or label; an address in brackets; or the registers in braces. Symbols are numbers already."""


@dataclass(frozen=True)
class Instruction:
    """One instruction of a kernel."""

    opcode: str
    """With all modifiers: ``mul.wide.s32``."""
    operands: tuple[Operand, ...]
    guard: str
    """Predicate register that must be true, empty for none."""
    negated: bool
    """Whether the guard must be false instead."""
    text: str
    """As it is written in the PTX, without the comment."""
    source: str
    """Line of the kernel's Python source: ``triton_kernels.py:149``."""

    @property
    def parts(self) -> list[str]:
        """The opcode and its modifiers."""
        return self.opcode.split(".")

    @property
    def registers(self) -> frozenset[str]:
        """Names of all registers in the operands and the guard."""
        names: list[str] = [self.guard] if self.guard else []
        for operand in self.operands:
            if isinstance(operand, Address):
                names.append(operand.base)
            elif isinstance(operand, tuple):
                names += operand
            else:
                names += operand.split("|")
        return frozenset(name for name in names if name.startswith("%"))

    @property
    def written(self) -> frozenset[str]:
        """Names of the registers that it writes."""
        if self.parts[0] in ("st", "stmatrix", "bra", "ret", "bar", "cp", "fence") or not self.operands:
            return frozenset()
        first = self.operands[0]
        names = first if isinstance(first, tuple) else () if isinstance(first, Address) else first.split("|")
        return frozenset(name for name in names if name.startswith("%"))


@dataclass(frozen=True)
class Program:
    """One kernel."""

    name: str
    parameters: tuple[tuple[str, int], ...]
    """Type (``u64``, ``f32``) of each parameter, and where it is in the memory of parameters."""
    threads: int
    """Threads per block."""
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    """Label to index of the instruction behind it."""


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*(.*?)\{", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)\s+(?:\.ptr\s+)?(?:\.\w+\s+|\d+\s+)*?([\w$]+)\s*(?:,|$)", re.MULTILINE)
_LABEL = re.compile(r"^([A-Za-z_$][\w$]*):\s*")
_GUARD = re.compile(r"^@(!?)(%\w+)\s+")
_LOCATION = re.compile(r"^\.loc\b.*//\s*([\w.]+:\d+)")


def parse(ptx: str) -> Program:
    """Parses PTX with one kernel.

    Raises:
        ValueError: no kernel, or one without ``.reqntid``.
    """
    entry = _ENTRY.search(ptx)
    threads = re.search(r"\.reqntid\s+(\d+)", entry[3]) if entry else None
    if entry is None or threads is None:
        raise ValueError(f"ptx: got {ptx[:80]!r}, expected a kernel (.entry) with its number of threads (.reqntid)")
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    parameters: list[tuple[str, int]] = []
    symbols, end = {"global_smem": "0"}, 0
    for kind, name in _PARAMETER.findall(entry[2]):
        size = int(kind[1:]) // 8
        start = -(-end // size) * size
        parameters.append((kind, start))
        symbols[name], end = str(start), start + size
    source, waiting = "", ""
    for raw in ptx[entry.end() :].splitlines():
        if raw.startswith("}"):  # the end of the kernel; debug information follows
            break
        location = _LOCATION.match(raw.strip())
        source = location[1] if location else source
        line = raw.partition("//")[0].strip()
        if re.match(r"\.(loc|file|reg|pragma)\b", line):
            continue
        *statements, waiting = f"{waiting} {line}".split(";")
        for statement in statements:
            text = _without_braces(statement)
            while label := _LABEL.match(text):
                labels[label[1]] = len(instructions)
                text = _without_braces(text[label.end() :])
            if text and not text.startswith("."):
                instructions.append(_instruction(text, source, symbols))
    return Program(
        name=entry[1],
        parameters=tuple(parameters),
        threads=int(threads[1]),
        instructions=tuple(instructions),
        labels=labels,
    )


def _without_braces(statement: str) -> str:
    """A statement on one line; inline assembly is in braces of its own."""
    return re.sub(r"^(?:[{}]\s*)+", "", " ".join(statement.split()))


def _instruction(text: str, source: str, symbols: dict[str, str]) -> Instruction:
    guard = _GUARD.match(text)
    opcode, _, rest = text[guard.end() if guard else 0 :].partition(" ")
    operands = (_operand(part.strip(), symbols) for part in re.findall(r"(?:\{[^}]*\}|\[[^]]*\]|[^,])+", rest))
    return Instruction(opcode, tuple(operands), guard[2] if guard else "", bool(guard and guard[1]), text, source)


def _operand(text: str, symbols: dict[str, str]) -> Operand:
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(symbols.get(base, base), int(offset or "0", 0))
    return symbols.get(text, text)
