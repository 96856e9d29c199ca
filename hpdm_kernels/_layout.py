"""The memory layout that kernels require of their arguments, Triton's and PyTorch's fused ones alike."""

from __future__ import annotations

from torch import Tensor


def dense_rows(x: Tensor) -> Tensor:
    """``x`` if its last axis has stride 1, as the kernels require; else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
