"""The least time that operations can take on a GPU, from published rates: modeled, nothing here is measured.

An operation takes at least as long as its products need at the peak rate of the matrix unit, and at least as long as
its inputs and results need to be read and written once at the peak rate of the memory. One after another they take the
sum. So no schedule of the same operations is faster; fewer operations, fused into one, may be. Left out, all of which
make a real step slower: launches, gaps between them, ranges of the machine that stay idle, special functions, rates
below the peak.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """The rates of a GPU as its data sheet gives them, without sparsity."""

    name: str
    tf32_flops: float
    """FLOP/s of products of fp32 inputs, rounded to TF32."""
    bf16_flops: float
    """FLOP/s of products of bf16 inputs."""
    bytes_per_s: float
    """Memory."""
    nvlink_bytes_per_s: float
    """NVLink, in each direction: half of the data sheet's number, which counts both."""


GPUS = (
    GPU("A100 80GB SXM", 156e12, 312e12, 2.039e12, 300e9),
    GPU("H100 80GB SXM", 494.7e12, 989.4e12, 3.35e12, 450e9),
    GPU("H200 SXM", 494.7e12, 989.4e12, 4.8e12, 450e9),
)
"""From NVIDIA's data sheets."""


def gpu_named(device_name: str) -> GPU | None:
    """The GPU of a name that the CUDA driver gives, such as ``NVIDIA A100-SXM4-80GB``; ``None`` for others."""
    parts = device_name.upper().replace("-", " ").split()
    known = [gpu for gpu in GPUS if gpu.name.split()[0] in parts]
    # Cards for PCIe of the same names are slower.
    return known[0] if known and "PCIE" not in parts else None


def least_seconds(operations: Iterable[tuple[int, int]], gpu: GPU, precision: str = "fp32") -> float:
    """The least time of operations that run one after another.

    Args:
        operations: of each the FLOPs of its products, and the bytes that it reads and writes.
        gpu: where.
        precision: ``"fp32"``, whose products take one pass of TF32, or ``"bf16"``.
    """
    rate = gpu.bf16_flops if precision == "bf16" else gpu.tf32_flops
    return sum(max(flops / rate, moved / gpu.bytes_per_s) for flops, moved in operations)
