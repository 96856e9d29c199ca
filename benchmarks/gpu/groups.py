"""Checks group normalization at odd and real shapes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.cases import DTYPES, Case, against_formula
from hpdm_kernels import group_norm_act
from hpdm_kernels.testing import Comparison

Shape = tuple[int, int, int, int, int]
# With the number of groups: odd sizes, LVDM's U-Net on its first level, the autoencoder's decoder on its last one.
SHAPES: tuple[tuple[Shape, int], ...] = (
    ((2, 3, 5, 7, 33), 3), ((3, 1, 1, 1, 10), 5), ((1, 4, 32, 32, 256), 32), ((2, 16, 64, 64, 64), 32),
    ((1, 2, 9, 9, 1100), 1),
)  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "frame": {}, "clip": {"over": "clip"}, "plain": {"act": "none"}, "pad": {"pad": ((1, 1), (2, 0), (0, 3))},
}  # fmt: skip


def norm(
    shape: Shape, groups: int, dtype: str, kind: str, modulated: bool, device: torch.device, generator: torch.Generator
) -> Comparison:
    """``group_norm_act``, with a modulation of each frame or without."""
    vector = (shape[0], shape[1], shape[4])
    sizes = (shape, shape[4:], shape[4:], *[vector] * (2 * modulated))
    inputs = [torch.randn(size, generator=generator).to(device, DTYPES[dtype]) for size in sizes]
    ours, formula = (
        lambda x, w, b, *vectors, backend=backend: group_norm_act(
            x, w, b, groups, *vectors, **SETTINGS[kind], backend=backend
        )
        for backend in ("triton", "reference")
    )
    return against_formula(ours, formula, inputs)


def cases() -> Iterator[Case]:
    """All cases."""
    for shape, groups in SHAPES:
        for dtype in DTYPES:
            for kind in SETTINGS:
                name = f"{'x'.join(map(str, shape))}-{dtype}-{kind}"
                yield Case(f"group_norm_act[{name}]", partial(norm, shape, groups, dtype, kind, kind == "clip"))
