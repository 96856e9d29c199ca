"""Reads compiled kernels: instructions in PTX and SASS, registers and stack in a ``cubin``; and tool versions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hpdm_kernels import _triton
from hpdm_kernels.aot.result import TARGETS

# Matrix instructions of PTX and their names in SASS.
_MATRIX_INSTRUCTIONS = {"tcgen05.mma": "UTCHMMA", "wgmma.mma_async": "HGMMA", "mma.sync": "HMMA"}
_MATRIX_OPERANDS = re.compile(r"\b(?:wg)?mma(?:_async)?\.sync\.aligned\.m\d+n\d+k\d+(?:\.(?:row|col))*\.\w+\.(\w+)")
_TCGEN05 = re.compile(r"\btcgen05\.mma\.\S*kind::(\w+)\s+\[[^]]*\],[^,]+,[^,]+,\s*(%\w+)")
# Bits 7 to 9 of tcgen05's instruction descriptor, per kind of product (PTX ISA, "Instruction descriptor").
_TCGEN05_TYPES = {("f16", 0): "F16", ("f16", 1): "BF16", ("tf32", 2): "TF32"}
_GLOBAL_LOAD = re.compile(r"\bld\.global(?:\.[\w:]+)*?(?:\.v(\d+))?\.[busf](\d+)\b")
_ASYNC_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?,\s*(0x[0-9a-f]+|\d+)\b")
_BULK_COPY = re.compile(r"\bcp\.async\.bulk\.(?:tensor\S*\.)?shared")
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


@dataclass(frozen=True)
class Code:
    """Counts of the instructions that decide a kernel's speed; ``Result`` documents the fields."""

    matrix: str
    loads: int
    wide_loads: int
    async_copies: int


def read_ptx(ptx: str) -> Code:
    """Counts instructions in PTX."""
    sizes = [int(vector or 1) * int(bits) // 8 for vector, bits in _GLOBAL_LOAD.findall(ptx)]
    copies = [int(size, 0) for size in _ASYNC_COPY.findall(ptx)]
    sizes += copies
    return Code(
        matrix=_joined(
            name for text, name in _MATRIX_INSTRUCTIONS.items() if re.search(rf"\b{re.escape(text)}\b", ptx)
        ),
        loads=len(sizes),
        wide_loads=sum(size >= 16 for size in sizes),
        async_copies=len(copies) + len(_BULK_COPY.findall(ptx)),
    )


def read_sass(sass: str) -> Code:
    """Counts instructions in SASS as ``nvdisasm -c`` prints it.

    Raises:
        ValueError: ``sass`` has no instructions.
    """
    opcodes = [opcode.split(".") for opcode in _OPCODE.findall(sass)]
    if not opcodes:
        raise ValueError(f"sass: got {sass[:80]!r}, expected lines such as '/*0000*/  LDG.E.128 R4, ... ;'")
    # LD is a load through a generic address, which may be global; LDGSTS loads into shared memory past the registers.
    loads = [parts for parts in opcodes if parts[0] in ("LDG", "LD", "LDGSTS")]
    return Code(
        matrix=_joined(parts[0] for parts in opcodes if parts[0].endswith("MMA")),
        loads=len(loads),
        wide_loads=sum(not {"128", "256"}.isdisjoint(parts) for parts in loads),
        async_copies=sum(parts[0] in ("LDGSTS", "UTMALDG", "UBLKCP") for parts in opcodes),
    )


def read_operands(ptx: str) -> str:
    """Operand types of the matrix instructions: ``TF32``, ``BF16``, ``F16``, joined by ``+``; ``-`` if there are none.

    Blackwell's instruction says ``kind::f16`` for both 16-bit types; its descriptor, a constant, tells them apart.
    """
    operands = [operand.upper() for operand in _MATRIX_OPERANDS.findall(ptx)]
    for kind, register in _TCGEN05.findall(ptx):
        constants = re.findall(rf"\bmov\.b32\s+{register},\s*(\d+);", ptx)
        types = {_TCGEN05_TYPES.get((kind, int(constant) >> 7 & 7)) for constant in constants}
        operand = types.pop() if len(types) == 1 else None
        operands.append(operand or f"kind::{kind}")
    return _joined(operands)


def _joined(names: Iterable[str]) -> str:
    return "+".join(sorted(set(names))) or "-"


def _tool(name: str) -> Path:
    return Path(_triton.triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def disassemble(cubin: bytes) -> str:
    """The SASS of a ``cubin``, by Triton's own ``nvdisasm``.

    Raises:
        RuntimeError: ``nvdisasm`` is missing or cannot read the file.
    """
    if not _tool("nvdisasm").exists():
        raise RuntimeError(f"nvdisasm: not found at {_tool('nvdisasm')}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # -ndf skips the data-flow analysis, which is slow and not needed to read opcodes.
        process = subprocess.run([_tool("nvdisasm"), "-c", "-ndf", file.name], capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"nvdisasm: exit status {process.returncode}: {process.stderr.strip()[:200]}")
    return process.stdout


def tool_versions() -> dict[str, str]:
    """Versions of Triton and of the tools that come with it, for the table's header."""
    from triton.backends.nvidia.compiler import get_ptxas

    assemblers: dict[str, list[str]] = {}
    for target in TARGETS:
        tool = get_ptxas(int(target.removeprefix("sm_")))
        assemblers.setdefault(f"{_version(tool.path)} ({Path(tool.path).name})", []).append(target)
    return {
        "triton": _triton.triton.__version__,
        "ptxas": ", ".join(f"{version} for {' and '.join(targets)}" for version, targets in assemblers.items()),
        "nvdisasm": _version(_tool("nvdisasm")) if _tool("nvdisasm").exists() else "not found",
    }


def _version(tool: str | Path) -> str:
    out = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"\bV(\d[\d.]*)", out)
    if version is None:
        raise RuntimeError(f"{tool} --version: got {out!r}, expected a version such as V13.1.80")
    return version[1]


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread, from the ``cubin`` by Triton's own ``cuobjdump``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = re.findall(r"REG:(\d+) STACK:(\d+)", out)
    if not usage:
        raise RuntimeError(f"cuobjdump -res-usage: got {out!r}, expected REG and STACK")
    return max(int(r) for r, _ in usage), max(int(s) for _, s in usage)
