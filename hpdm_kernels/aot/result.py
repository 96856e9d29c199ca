"""The record of one compiled kernel, and the limits of the GPUs it is compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from hpdm_kernels._triton import KernelSpec

SHARED_MEMORY_LIMITS = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448}
"""Bytes of shared memory that one block may use; Triton does not check it when compiling ahead of time."""

TARGETS = tuple(SHARED_MEMORY_LIMITS)

REGISTERS, WARPS, BLOCKS = 65_536, 64, 32
"""What a multiprocessor of any target holds (CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability")."""

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
        # Registers are allocated to a warp in units of 256, eight per thread.
        registers_per_warp = -(-(self.registers or 0) // 8) * 256
        shared = SHARED_MEMORY_LIMITS[self.target] + RESERVED_SHARED_MEMORY
        return min(
            BLOCKS,
            WARPS // warps,
            REGISTERS // registers_per_warp // warps,
            shared // ((self.shared or 0) + RESERVED_SHARED_MEMORY),
        )


def config_text(spec: KernelSpec) -> str:
    """Block sizes, warps and stages: ``D64 M128 N64, 8 x 3`` has 8 warps and 3 stages."""
    blocks = [f"{name.removeprefix('BLOCK_')}{n}" for name, n in spec.constexprs.items() if name.startswith("BLOCK_")]
    return f"{' '.join(sorted(blocks)) or '-'}, {spec.num_warps} x {spec.num_stages}"
