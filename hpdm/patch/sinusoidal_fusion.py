"""Context fusion that sees its coordinates as sinusoids (paper appendix D.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpdm_kernels.boxes import coordinate_dtype, token_coordinates
from hpdm_kernels.modules import ContextFusion

FREQUENCIES = 7
"""Octaves of each coordinate: the shortest wave is 1/32 of the video, two tokens of the finest level of HPDM-S."""


class SinusoidalFusion(ContextFusion):
    """Deep context fusion of ``concat[a_l, ctx_l, s(c_l)]``: eq. 9 with sinusoids in place of the raw coordinates.

    ``s(c)`` holds, for each of the three absolute coordinates c in [0, 1], ``sin(pi 2^k c)`` and ``cos(pi 2^k c)``,
    ``k = 0 .. FREQUENCIES - 1``. The paper tried sinusoidal embeddings, which diverged, and does not say which ones.
    **Reading:** these, which are common for coordinates in space.

    The part of the map that multiplies the sinusoids, ``coordinate_weight [D, 6 FREQUENCIES]``, is a parameter of its
    own, and its product is added to that of the fused op without coordinates; the map is linear, so this is the same.

    Args:
        width: token width ``D``.
        backend: see :func:`hpdm_kernels.fuse_context`.
    """

    def __init__(self, width: int, *, backend: str = "auto") -> None:
        super().__init__(width, coordinates=False, backend=backend)
        self.coordinate_weight = nn.Parameter(torch.empty(width, 6 * FREQUENCIES))
        bound = 1 / math.sqrt(self.weight.shape[1] + self.coordinate_weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.coordinate_weight, -bound, bound)

    def forward(
        self,
        x: Tensor,
        sources: Sequence[Tensor],
        source_boxes: Sequence[Tensor],
        box: Tensor,
        source_grids: Sequence[Sequence[int]],
        grid: Sequence[int],
        *rest: Any,
        **options: Any,
    ) -> Tensor:
        """``x [B, N, D]`` -> ``[B, N, D]``; the arguments are those of :class:`~hpdm_kernels.modules.ContextFusion`."""
        fused = super().forward(x, sources, source_boxes, box, source_grids, grid, *rest, **options)  # [B, N, D]
        return fused + coordinate_sinusoids(box, grid).to(x.dtype) @ self.coordinate_weight.T


def coordinate_sinusoids(box: Tensor, grid: Sequence[int]) -> Tensor:
    """The sinusoids of the coordinates of a patch's tokens.

    Args:
        box: ``[B, 6]``.
        grid: tokens of the patch per axis, (F, H, W).

    Returns:
        ``[B, F * H * W, 6 FREQUENCIES]``, fp32 or wider: the sines of all coordinates, then the cosines.
    """
    c = token_coordinates(box, grid, coordinate_dtype(box.dtype))  # [B, N, 3]
    octaves = math.pi * 2.0 ** torch.arange(FREQUENCIES, device=c.device, dtype=c.dtype)
    angles = (c[..., None] * octaves).flatten(2)  # [B, N, 3 FREQUENCIES]
    return torch.cat((angles.sin(), angles.cos()), dim=2)
