"""The average of overlapping tiles, taken a chunk of tiles at a time: what is held is the video and one chunk.

A sampler makes tiles a batch at a time; at 50 % overlap on three axes all of them together are eight videos. Here every
chunk is added to running sums when it comes, and ``step`` divides by the counts, which are products of three small
numbers, and takes the sampler's linear step. Every voxel adds its tiles one by one in the order of the tiles, so the
result does not depend on the chunks, bit for bit. On a GPU that is one launch per chunk and one per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hpdm_kernels._backend import check_backend, resolve
from hpdm_kernels._checks import check_tensor, check_triple
from hpdm_kernels.reference import coordinate_dtype
from hpdm_kernels.tiles import torch_backend as tiles_torch
from hpdm_kernels.tiles.geometry import read_origins
from hpdm_kernels.tiles.huge_pages import new_empty
from hpdm_kernels.tiles.triton_backend import TRITON_DTYPES, launch_add, launch_step


@torch.library.custom_op("hpdm::add_tiles", mutates_args=("sums",))
def _add_op(sums: Tensor, tiles: Tensor, origins: Tensor, first: int, backend: str) -> None:
    """Adds tiles ``first`` and following; what ``sums`` holds before the first tile does not matter."""
    plan = read_origins(origins, tiles.shape[3:], sums.shape[2:], cover=True)
    if backend == "reference":
        if first == 0:
            sums.zero_()
        f, h, w = tiles.shape[3:]
        for tile, (i, j, k) in zip(tiles.unbind(1), plan.origins[first:]):
            sums[:, :, i : i + f, j : j + h, k : k + w] += tile
    else:
        add = launch_add if backend == "triton" else tiles_torch.add
        add(sums, tiles, plan, first)


@_add_op.register_fake
def _(*given: Any) -> None:
    return None


@torch.library.custom_op("hpdm::step_tiles", mutates_args=("sums",))
def _step_op(
    sums: Tensor,
    origins: Tensor,
    tile_size: Sequence[int],
    dtype: torch.dtype,
    x: Tensor | None,
    alpha: float,
    beta: float,
    backend: str,
) -> Tensor:
    """``alpha * x + beta * sums / counts`` in ``dtype``; ``sums`` is used up."""
    plan = read_origins(origins, tile_size, sums.shape[2:], cover=True)
    step = launch_step if backend == "triton" else tiles_torch.step
    return step(sums, plan, dtype, x, alpha, beta)


@_step_op.register_fake
def _(sums: Tensor, origins: Tensor, tile_size: Sequence[int], dtype: torch.dtype, *rest: Any) -> Tensor:
    return sums.new_empty(sums.shape, dtype=dtype)


class TileAccumulator:
    """Averages tiles where they overlap, like :func:`hpdm_kernels.average_tiles`, chunk by chunk.

    ::

        sums = TileAccumulator(origins, tile_size, size)
        for step in steps:
            for batch in range(0, len(origins), n):
                sums.add(denoise(x, origins[batch : batch + n]))
            x = sums.step(x, alpha, beta)

    The sums are kept in fp32 (fp64 for fp64) in one buffer ``[B, C, F, H, W]``, which the next step uses again. There
    is no gradient.

    Args:
        origins: ``[T, 3]`` int32 or int64, as for :func:`hpdm_kernels.average_tiles`: a product grid in row-major order
            (frames slowest) that covers the whole video.
        tile_size: (frames, height, width) of a tile in pixels.
        size: (frames, height, width) of the video in pixels.
        backend: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, an unknown backend, tiles that are not inside of the video, are no product grid or
            leave a voxel uncovered.

    Source: MultiDiffusion (Bar-Tal et al., 2023), as used in paper section 4.4 (tiled inference).
    """

    def __init__(
        self, origins: Tensor, tile_size: Sequence[int], size: Sequence[int], *, backend: str = "auto"
    ) -> None:
        self.tile_size, self.size = check_triple("tile_size", tile_size), check_triple("size", size)
        self.origins = check_tensor("origins", origins, ("T", 3), dtypes=(torch.int32, torch.int64)).cpu()
        read_origins(self.origins, self.tile_size, self.size, cover=True)
        self.backend = check_backend(backend)
        self._chosen = backend
        self._sums: Tensor | None = None
        self._like: Tensor | None = None  # no elements; batch, channels, dtype and device of this step's tiles
        self.added = 0
        """How many tiles of this step were added."""

    @property
    def tiles(self) -> int:
        """How many tiles a step takes."""
        return self.origins.shape[0]

    def reset(self) -> None:
        """Forgets the tiles added since the last step."""
        self._like, self.added = None, 0

    def add(self, tiles: Tensor, first: int | None = None) -> None:
        """Adds the next chunk of tiles.

        Args:
            tiles: ``[B, n, C, f, h, w]``, fp16, bf16, fp32 or fp64, any strides: the tiles of the next ``n`` rows of
                ``origins``. ``B``, ``C``, dtype and device are the same for all chunks of a step.
            first: the row of ``origins`` of the first of them, if that is to be checked.

        Raises:
            TypeError: a wrong type or dtype.
            ValueError: a wrong shape or device, a chunk out of order, more tiles than there are, or tiles that require
                a gradient.
            RuntimeError: ``backend="triton"`` cannot run here.
        """
        if self._like is None:
            tiles = check_tensor("tiles", tiles, ("B", "n", "C", *self.tile_size))
        else:
            b, c = self._like.shape[:2]
            tiles = check_tensor(
                "tiles", tiles, (b, "n", c, *self.tile_size), like=("the step's first tiles", self._like)
            )
        if first is not None and first != self.added:
            raise ValueError(f"first: got {first}, expected {self.added}, the next tile: chunks come once and in order")
        if tiles.shape[1] > self.tiles - self.added:
            raise ValueError(
                f"tiles: got {tiles.shape[1]} tiles, expected at most {self.tiles - self.added}: {self.added} of "
                f"{self.tiles} were added before"
            )
        if torch.is_grad_enabled() and tiles.requires_grad:
            raise ValueError("tiles: got tiles that require a gradient, expected none (average_tiles has one)")
        if self._like is None:
            self._start(tiles)
        _add_op(self._sums, tiles, self.origins, self.added, self._chosen)
        self.added += tiles.shape[1]

    def _start(self, tiles: Tensor) -> None:
        self._chosen = resolve(self.backend, "TileAccumulator", tiles, TRITON_DTYPES)
        shape, dtype = (tiles.shape[0], tiles.shape[2], *self.size), coordinate_dtype(tiles.dtype)
        old = self._sums
        if old is None or (old.shape, old.dtype, old.device) != (shape, dtype, tiles.device):
            self._sums = None  # freed before the new one is made
            self._sums = new_empty(tiles, *shape, dtype=dtype)
        self._like = tiles.new_empty(tiles.shape[0], tiles.shape[2], 0)

    def step(self, x: Tensor | None = None, alpha: float = 0.0, beta: float = 1.0) -> Tensor:
        """``alpha * x + beta * mean``, the mean over the tiles that cover each voxel; the next chunk starts a new step.

        Args:
            x: ``[B, C, F, H, W]`` like the tiles, or ``None``.
            alpha: factor of ``x``; must be 0 without ``x``.
            beta: factor of the mean.

        Returns:
            ``[B, C, F, H, W]`` of the tiles' dtype and device.

        Raises:
            TypeError: a wrong type or dtype.
            ValueError: tiles are missing, a wrong shape or device, ``alpha`` without ``x``, or ``x`` requires a
                gradient.
        """
        if self._like is None or self._sums is None or self.added < self.tiles:
            raise ValueError(f"tiles: got {self.added} of {self.tiles} tiles, expected all of them before a step")
        if x is not None:
            check_tensor("x", x, self._sums.shape, like=("tiles", self._like))
            if torch.is_grad_enabled() and x.requires_grad:
                raise ValueError("x: got a tensor that requires a gradient, expected none (average_tiles has one)")
        elif alpha != 0.0:
            raise ValueError(f"alpha: got {alpha} without x, expected 0.0 or a tensor x to multiply")
        out = _step_op(
            self._sums, self.origins, self.tile_size, self._like.dtype, x, float(alpha), float(beta), self._chosen
        )
        self.reset()
        return out
