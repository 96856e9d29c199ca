"""The least time of an op: its bytes at the rate of a large copy, or its FLOPs at the rate of a large product.

The rates are measured in the process that times the op (``benchmarks/machine.py``). Products are compared with the
ceiling of their own arithmetic: one TF32 pass with TF32, three passes with a third of that, full fp32 with full fp32.
"""

from __future__ import annotations

from collections.abc import Mapping

# Arithmetic -> (name of the measured ceiling, number of passes per product).
_PRODUCTS = {
    "ieee": ("matmul_fp32_tflops", 1),
    "tf32x3": ("matmul_tf32_tflops", 3),
    "tf32": ("matmul_tf32_tflops", 1),
    "bf16": ("matmul_bf16_tflops", 1),
    "fp16": ("matmul_bf16_tflops", 1),
}


def matmul_ceiling(arithmetic: str, ceilings: Mapping[str, float]) -> float | None:
    """The best TFLOP/s of products in ``arithmetic``, ``None`` if it was not measured.

    Raises:
        ValueError: unknown arithmetic.
    """
    if arithmetic not in _PRODUCTS:
        raise ValueError(f"arithmetic: got {arithmetic!r}, expected one of {', '.join(map(repr, _PRODUCTS))}")
    name, passes = _PRODUCTS[arithmetic]
    return ceilings[name] / passes if name in ceilings else None


def floor(
    bytes: int | None, flops: int | None, arithmetic: str, ceilings: Mapping[str, float]
) -> tuple[float | None, str | None]:
    """Seconds, and which of ``"bytes"`` or ``"flops"`` decides them; ``None`` if a needed ceiling is missing."""
    times: dict[str, float] = {}
    if bytes:
        if "copy_gbs" not in ceilings:
            return None, None
        times["bytes"] = bytes / (ceilings["copy_gbs"] * 1e9)
    if flops:
        tflops = matmul_ceiling(arithmetic, ceilings)
        if tflops is None:
            return None, None
        times["flops"] = flops / (tflops * 1e12)
    if not times:
        return None, None
    by = max(times, key=lambda what: times[what])
    return times[by], by
