"""Checks temporal attention at odd and published shapes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.cases import DTYPES, Case, against_formula
from hpdm_kernels import temporal_attention
from hpdm_kernels.testing import Comparison

Size = tuple[int, int, int, int, int, int]
# Batch, frames, positions, heads, width of a head, farthest distance with an embedding of its own.
SIZES: tuple[Size, ...] = (
    (1, 1, 1, 1, 3, 0), (2, 5, 19, 3, 24, 2), (1, 4, 1024, 4, 64, 3), (2, 4, 256, 4, 128, 3), (2, 5, 64, 4, 192, 4),
    (8, 4, 16, 4, 256, 3), (1, 16, 1024, 4, 64, 15), (1, 16, 16, 4, 256, 15), (1, 64, 70, 2, 64, 3),
    (1, 25, 5, 1, 100, 40), (3, 8, 4096, 8, 40, 7),
)  # fmt: skip


def attention(size: Size, dtype: str, device: torch.device, generator: torch.Generator) -> Comparison:
    """``temporal_attention``."""
    batch, frames, positions, heads, width, farthest = size
    table = (2 * farthest + 1, width)
    shapes = ((batch, frames, positions, 3 * heads * width), table, table)
    return against_formula(
        partial(temporal_attention, backend="triton"),
        partial(temporal_attention, backend="reference"),
        [torch.randn(shape, generator=generator).to(device, DTYPES[dtype]) for shape in shapes],
    )


def cases() -> Iterator[Case]:
    """All cases."""
    for size in SIZES:
        for dtype in DTYPES:
            yield Case(f"temporal_attention[{'x'.join(map(str, size))}-{dtype}]", partial(attention, size, dtype))
