"""Checks the attention kernels at odd and real shapes, in every arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.cases import ARITHMETIC, Case, against_formula
from benchmarks.harness import products_in
from hpdm_kernels import cross_attention, read_tokens, reference
from hpdm_kernels.testing import Comparison

Shape = tuple[int, int, int, int, int]
# (batch, heads, queries, keys, head width): degenerate, odd, and the paper's read and write (Table 8). A single key is
# left out: all gradients are then zero, and so is the plain implementation's error, which sets the budget.
SHAPES: tuple[Shape, ...] = (
    (1, 1, 1, 64, 16), (2, 3, 17, 33, 24), (1, 2, 130, 257, 64), (1, 2, 65, 127, 128), (1, 4, 768, 4096, 64),
    (1, 4, 4096, 768, 64), (1, 2, 100, 3, 32), (1, 4, 768, 12288, 64), (2, 8, 768, 768, 64),
    (2, 3, 33, 70, 160), (1, 2, 130, 257, 256),
)  # fmt: skip
MASKED_SHAPES: tuple[Shape, ...] = (
    (3, 2, 17, 33, 24), (3, 2, 130, 257, 64), (2, 4, 768, 4096, 64), (3, 2, 33, 70, 160),
)  # fmt: skip
READ_ROWS = {"parts of a sample": 100, "samples together": 8192}


def qkv(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Queries ``[B, h, M, d]``, keys and values ``[B, h, N, d]``."""
    b, h, m, n, d = shape
    return [torch.randn(b, h, rows, d, device=device).to(dtype) for rows in (m, n, n)]


def attention(shape: Shape, arithmetic: str, device: torch.device, generator: torch.Generator) -> Comparison:
    """``cross_attention`` of contiguous inputs."""
    dtype, precision, _ = ARITHMETIC[arithmetic]
    return against_formula(
        lambda q, k, v: cross_attention(q, k, v, precision=precision, backend="triton"),
        lambda q, k, v: reference.cross_attention(q, k, v, shape[-1] ** -0.5),
        qkv(shape, dtype, device),
        arithmetic,
    )


def strided(arithmetic: str, device: torch.device, generator: torch.Generator) -> Comparison:
    """``cross_attention`` of heads that are views of one projection, as in the modules."""
    dtype, precision, _ = ARITHMETIC[arithmetic]
    projected = torch.randn(2, 100, 3 * 4 * 64, device=device).to(dtype)
    return against_formula(
        lambda q, k, v: cross_attention(q, k, v, precision=precision, backend="triton"),
        lambda q, k, v: reference.cross_attention(q, k, v, 64**-0.5),
        [part.unflatten(-1, (4, 64)).transpose(1, 2) for part in projected.chunk(3, dim=-1)],
        arithmetic,
    )


def masked(shape: Shape, arithmetic: str, device: torch.device, generator: torch.Generator) -> Comparison:
    """Half of the keys are hidden; in the last sample all."""
    dtype, precision, _ = ARITHMETIC[arithmetic]
    mask = torch.rand(shape[0], shape[3], device=device) < 0.5
    mask[:-1, 0], mask[-1] = True, False
    return against_formula(
        lambda q, k, v: cross_attention(q, k, v, key_mask=mask, precision=precision, backend="triton"),
        lambda q, k, v: reference.cross_attention(q, k, v, shape[-1] ** -0.5, mask),
        qkv(shape, dtype, device),
        arithmetic,
    )


def read(rows: int, arithmetic: str, backend: str, device: torch.device, generator: torch.Generator) -> Comparison:
    """``read_tokens`` with chunks of ``rows`` tokens."""
    dtype, precision, _ = ARITHMETIC[arithmetic]
    q = torch.randn(3, 130, 4, 64, device=device).transpose(1, 2).to(dtype)
    tokens = torch.randn(3, 257, 96, device=device).to(dtype)
    weight = (torch.randn(2 * 4 * 64, 96, device=device) / 96**0.5).to(dtype)
    # The projection is PyTorch's own product.
    with products_in("tf32" if precision == "tf32" else "ieee"):
        return against_formula(
            lambda q, t, w: read_tokens(q, t, w, recompute=True, piece_rows=rows, precision=precision, backend=backend),
            lambda q, t, w: read_tokens(q, t, w, backend="reference"),
            (q, tokens, weight),
            arithmetic,
        )


def cases() -> Iterator[Case]:
    """All cases, by arithmetic."""
    for arithmetic, (_, precision, _) in ARITHMETIC.items():
        for shape in SHAPES:
            yield Case(f"cross_attention[{shape}-{arithmetic}]", partial(attention, shape, arithmetic))
        yield Case(f"strided_inputs[{arithmetic}]", partial(strided, arithmetic))
        for shape in MASKED_SHAPES:
            yield Case(f"key_mask[{shape}-{arithmetic}]", partial(masked, shape, arithmetic))
        for name, rows in READ_ROWS.items():
            for backend in ("torch", "triton"):
                # PyTorch's own products cannot take three passes: for "torch" the case would equal that of "ieee".
                if backend == "triton" or precision != "tf32x3":
                    yield Case(f"read_tokens[{name}-{arithmetic}-{backend}]", partial(read, rows, arithmetic, backend))
