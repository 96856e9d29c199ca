"""Which pointer arguments an address comes from, so that a pointer reaches its own tensor and no neighbor of it."""

from __future__ import annotations

from hpdm_kernels.aot.execution.program import Address, Instruction, Program

Origin = frozenset[int]
"""Numbers of parameters, pointers and numbers alike; empty for an address that was read from memory."""

_CARRIERS = frozenset({"add", "sub", "mad", "mov", "selp", "and", "or", "cvt", "mul", "shl"})
"""Instructions whose 64-bit result may be an address that is computed from an operand."""


def origins(program: Program) -> list[Origin]:
    """The origin of the global address of each instruction; empty for instructions without one."""
    at_place = {place: number for number, (_, place) in enumerate(program.parameters)}
    of_register: dict[str, Origin] = {}
    changed = True
    while changed:  # loops carry pointers around
        changed = False
        for instruction in program.instructions:
            found = _result(instruction, at_place, of_register)
            for name in instruction.written if found else ():
                if name.startswith("%rd") and not found <= of_register.get(name, frozenset()):
                    of_register[name] = of_register.get(name, frozenset()) | found
                    changed = True
    return [of_register.get(_base(i), frozenset()) for i in program.instructions]


def _result(instruction: Instruction, at_place: dict[int, int], of_register: dict[str, Origin]) -> Origin:
    kind, operands = instruction.parts[0], instruction.operands
    if instruction.opcode == "ld.param.b64" and isinstance(operands[1], Address):
        if operands[1].base.isdigit():
            return frozenset({at_place[int(operands[1].base)]})
        return frozenset(at_place.values())  # one of several parameters, chosen while the kernel runs
    if kind not in _CARRIERS:
        return frozenset()
    return frozenset[int]().union(
        *(of_register.get(name, frozenset()) for name in operands[1:] if isinstance(name, str))
    )


def _base(instruction: Instruction) -> str:
    """The register with the global address, empty if there is none."""
    if "global" not in instruction.parts:
        return ""
    addresses = [operand for operand in instruction.operands if isinstance(operand, Address)]
    return addresses[-1].base  # cp.async names the place in shared memory first
