"""The record of one compiled kernel, and the GPUs it is compiled for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hpdm_kernels._triton import SHARED_MEMORY_LIMITS, KernelSpec

TARGETS = ("sm_80", "sm_90", "sm_100")
"""The targets that every kernel is compiled for and that the committed table lists.

The others run the instructions of sm_80. For these only the configurations are compiled that sm_80 does not have.
"""

REGISTERS = 65_536
"""What a multiprocessor of any target holds (CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability")."""
WARPS_AND_BLOCKS = {
    "sm_80": (64, 32), "sm_86": (48, 16), "sm_89": (48, 24), "sm_90": (64, 32), "sm_100": (64, 32), "sm_120": (48, 24),
}  # fmt: skip
"""How many warps and blocks a multiprocessor holds (same source)."""

RESERVED_SHARED_MEMORY = 1024
"""Bytes of shared memory that the driver reserves per block. A multiprocessor has the limit of one block plus this."""


@dataclass(frozen=True)
class Result:
    """One kernel compiled for one target."""

    kernel: str
    target: str
    op: str = ""
    """The op family that it belongs to: ``attention``."""
    config: str = ""
    """Block sizes, warps and stages, as ``config_text`` writes them."""
    registers: int | None = None
    """Per thread."""
    stack: int | None = None
    """Bytes per thread; more than 0 means that registers were spilled."""
    shared: int | None = None
    """Bytes per block."""
    matrix: str = "-"
    """``HMMA`` (Ampere's), ``HGMMA`` (Hopper's), ``UTCHMMA`` (Blackwell's), several joined by ``+``, or ``-``."""
    operands: str = "-"
    """Operand types of the matrix instructions: ``TF32``, ``BF16``, ``F16``."""
    loads: int = 0
    """Loads from global memory in the code, asynchronous copies included."""
    wide_loads: int = 0
    """Loads of 16 bytes or more per thread."""
    async_copies: int = 0
    """Copies from global to shared memory that bypass the registers."""
    read_from: str = "PTX"
    """Where the instructions were counted: ``PTX`` or ``SASS``."""
    digest: str = ""
    """Digest of the code and configuration that were compiled, see :mod:`hpdm_kernels.aot.digest`."""
    seconds: float = 0.0
    problem: str = ""
    """Why this kernel must not be shipped; empty if it may be."""

    @property
    def blocks(self) -> int:
        """How many blocks a multiprocessor holds at once, by registers, shared memory and warps."""
        warps = int(self.config.rpartition(", ")[2].split(" x ")[0])
        most_warps, most_blocks = WARPS_AND_BLOCKS[self.target]
        # Registers are allocated to a warp in units of 256, eight per thread.
        registers_per_warp = -(-(self.registers or 0) // 8) * 256
        shared = SHARED_MEMORY_LIMITS[self.target] + RESERVED_SHARED_MEMORY
        return min(
            most_blocks,
            most_warps // warps,
            REGISTERS // registers_per_warp // warps,
            shared // ((self.shared or 0) + RESERVED_SHARED_MEMORY),
        )


def compilations(
    by_op: Mapping[str, Iterable[KernelSpec]], targets: Sequence[str] = ()
) -> list[tuple[str, KernelSpec, str]]:
    """What to compile, as ``(op family, spec, target)``: the specs of each op family, for the targets they are for.

    ``targets`` selects some; by default all kernels are compiled for :data:`TARGETS`, and for the other targets those
    in configurations that sm_80 does not have.
    """
    return [
        (op, spec, target)
        for target in targets or SHARED_MEMORY_LIMITS
        for op, specs in by_op.items()
        for spec in specs
        if target in (spec.targets or SHARED_MEMORY_LIMITS)
        if targets or target in TARGETS or is_own(spec, target)
    ]


def is_own(spec: KernelSpec, target: str) -> bool:
    """Whether ``target`` has this configuration and sm_80 has not."""
    return target in spec.targets and "sm_80" not in spec.targets


def config_text(spec: KernelSpec) -> str:
    """Block sizes, warps and stages: ``D64 M128 N64, 8 x 3`` has 8 warps and 3 stages."""
    blocks = [f"{name.removeprefix('BLOCK_')}{n}" for name, n in spec.constexprs.items() if name.startswith("BLOCK_")]
    return f"{' '.join(sorted(blocks)) or '-'}, {spec.num_warps} x {spec.num_stages}"
