"""Draws the parts of a random configuration: sizes, tensors in unusual memory, boxes, grids of tiles."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")
OVERSHOOT = 8e-6
"""How far boxes may stick out: within the slack that the ops allow for rounding, 1e-5."""


class Draw:
    """Random choices that follow from one seed.

    Args:
        seed: what all choices follow from.
        longest: limit of :meth:`size`, for interpreted kernels, which take their time.
    """

    def __init__(self, seed: int, longest: int = 1000) -> None:
        self.longest = longest
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def chance(self, p: float) -> bool:
        """True with probability ``p``."""
        return self.random.random() < p

    def choose(self, options: Sequence[_T]) -> _T:
        """One of ``options``."""
        return self.random.choice(options)

    def size(self, most: int) -> int:
        """A size from 1 to ``most``, small ones more often."""
        return min(self.rows(most), self.longest)

    def rows(self, most: int) -> int:
        """As :meth:`size`, without the limit: for sizes that cost little in any case."""
        return min(self.random.randint(1, most), self.random.randint(1, most))

    def triple(self, most: int) -> tuple[int, int, int]:
        """Three sizes."""
        return self.size(most), self.size(most), self.size(most)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal numbers, as a view of some kind; bytes for uint8."""
        if dtype is torch.uint8:
            return self.view(torch.randint(0, 256, shape, generator=self.generator, dtype=dtype))
        return self.view(torch.randn(shape, generator=self.generator, dtype=torch.float32).to(dtype))

    def weights(self, n: int) -> Tensor:
        """``n`` positive fp32 numbers over some orders of magnitude, as a view of some kind."""
        return self.view(torch.randn(n, generator=self.generator).mul(2).exp())

    def view(self, t: Tensor) -> Tensor:
        """``t`` in unusual memory: permuted, with gaps, inside of a larger tensor, or expanded along an axis.

        The memory around a view is NaN, or the largest integer. Only an expanded view has other values.
        """
        kind = self.random.choice(("as it is", "permuted", "gaps", "inside", "expanded"))
        outside = torch.nan if t.is_floating_point() else (True if t.dtype is torch.bool else torch.iinfo(t.dtype).max)
        if kind == "permuted":
            axes = self.random.sample(range(t.ndim), t.ndim)
            return t.permute(axes).contiguous().permute([axes.index(a) for a in range(t.ndim)])
        if kind == "gaps":
            return torch.stack([t, torch.full_like(t, outside)], dim=-1).flatten(-2)[..., ::2]
        if kind == "inside":
            whole = torch.full([n + 2 for n in t.shape], outside, dtype=t.dtype)
            part = whole[tuple(slice(1, 1 + n) for n in t.shape)]
            return part.copy_(t)
        if kind == "expanded" and t.is_floating_point():
            axis = self.random.randrange(t.ndim)
            return t.narrow(axis, 0, 1).expand(t.shape)
        return t

    def boxes(self, rows: int, parents: Tensor | None = None, *, overshoot: bool = False) -> Tensor:
        """``[rows, 6]`` fp32 boxes inside ``parents [rows, 6]`` (default: the video): as large, at edges, or tiny.

        ``overshoot``: some also stick out a little, as far as the ops allow.
        """
        whole = [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
        result = []
        for parent in [whole] * rows if parents is None else parents.tolist():
            axes = [self._interval(parent[a], parent[3 + a], overshoot) for a in range(3)]
            result.append([offset for offset, _ in axes] + [scale for _, scale in axes])
        return torch.tensor(result, dtype=torch.float32)

    def _interval(self, offset: float, scale: float, overshoot: bool) -> tuple[float, float]:
        """Offset and extent of an interval within another one."""
        ratio = self.random.choice((1.0, 0.5, 0.25, self.random.uniform(0.05, 1), 10 ** self.random.uniform(-3.5, -2)))
        room = scale * (1 - ratio)
        place = self.random.choice((0.0, 1.0, self.random.random()))
        low = offset + place * room
        if overshoot and self.chance(0.1):
            low += self.random.choice((-OVERSHOOT, OVERSHOOT))
        return low, ratio * scale

    def product_grid(self) -> tuple[Tensor, tuple[int, int, int], tuple[int, int, int]]:
        """Origins ``[T, 3]`` of tiles that cover a video, in row-major order; sizes of a tile and of the video."""
        axes, tile, size = [], [], []
        for _ in range(3):
            n, starts = self.size(6), [0]
            for _ in range(self.random.randint(0, 2)):
                starts.append(starts[-1] + self.random.randint(1, n))
            axes.append(torch.tensor(starts))
            tile.append(n)
            size.append(starts[-1] + n)
        origins = torch.cartesian_prod(*axes).to(self.choose((torch.int32, torch.int64)))
        return origins, (tile[0], tile[1], tile[2]), (size[0], size[1], size[2])
