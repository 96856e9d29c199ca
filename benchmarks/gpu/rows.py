"""Checks the ops on rows at odd and real shapes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.cases import DTYPES, Case, against_formula
from hpdm_kernels import bias_gelu, gated_residual, modulated_norm
from hpdm_kernels.testing import Comparison

Shape = tuple[int, int, int]
SHAPES = ((2, 19, 33), (3, 1, 7), (1, 4096, 1024), (24, 768, 512), (2, 100, 3072), (2, 70, 4096))


def norm(shape: Shape, dtype: str, number: int, device: torch.device, generator: torch.Generator) -> Comparison:
    """``modulated_norm`` of the first ``number`` of its tensors: alone, after a branch, after a gated one."""
    vector = (shape[0], shape[2])
    inputs = [torch.randn(size, generator=generator) for size in (shape, vector, vector, shape, vector)]

    def both(backend: str, *tensors: Tensor) -> Tensor:
        result = modulated_norm(*tensors, backend=backend)
        return result if isinstance(result, Tensor) else torch.stack(result)

    return against_formula(
        partial(both, "triton"), partial(both, "reference"), [t.to(device, DTYPES[dtype]) for t in inputs[:number]]
    )


def residual(shape: Shape, dtype: str, device: torch.device, generator: torch.Generator) -> Comparison:
    """``gated_residual``."""
    inputs = [torch.randn(size, generator=generator) for size in (shape, shape, (shape[0], shape[2]))]
    return against_formula(
        partial(gated_residual, backend="triton"),
        partial(gated_residual, backend="reference"),
        [t.to(device, DTYPES[dtype]) for t in inputs],
    )


def gelu(shape: Shape, dtype: str, device: torch.device, generator: torch.Generator) -> Comparison:
    """``bias_gelu``."""
    inputs = [torch.randn(size, generator=generator) for size in (shape, shape[2:])]
    return against_formula(
        partial(bias_gelu, backend="triton"),
        partial(bias_gelu, backend="reference"),
        [t.to(device, DTYPES[dtype]) for t in inputs],
    )


def cases() -> Iterator[Case]:
    """All cases."""
    for shape in SHAPES:
        for dtype in DTYPES:
            name = f"{'x'.join(map(str, shape))}-{dtype}"
            for number, kind in {3: "alone", 4: "branch", 5: "gate"}.items():
                yield Case(f"modulated_norm[{name}-{kind}]", partial(norm, shape, dtype, number))
            yield Case(f"gated_residual[{name}]", partial(residual, shape, dtype))
            yield Case(f"bias_gelu[{name}]", partial(gelu, shape, dtype))
