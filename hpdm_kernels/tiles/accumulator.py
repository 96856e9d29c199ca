"""Averages overlapping tiles that arrive in chunks; needs memory for the video and one chunk only.

A sampler computes tiles in batches, and with 50 % overlap on three axes all tiles together are as large as eight
videos. Here each chunk is added to running sums when it arrives. ``step`` divides by the counts, each a product of
three small numbers, and takes the sampler's linear step. With weights, tiles are multiplied by their shares of a voxel
when they are added, and there is nothing to divide by. Every voxel adds its tiles one by one in the order of the
tiles, so the chunks do not change the result, bit for bit. On a GPU there is one launch per chunk and one per step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpdm_kernels._backend import check_backend, resolve
from hpdm_kernels._checks import check_tensor, check_triple
from hpdm_kernels._transforms import differentiates
from hpdm_kernels.boxes import coordinate_dtype
from hpdm_kernels.tiles import ops
from hpdm_kernels.tiles.checks import check_factors, check_weights
from hpdm_kernels.tiles.geometry import read_origins
from hpdm_kernels.tiles.weights import shares


class TileAccumulator:
    """Averages tiles where they overlap, like :func:`hpdm_kernels.average_tiles`, chunk by chunk.

    ::

        sums = TileAccumulator(origins, tile_size, size)
        for step in steps:
            for batch in range(0, len(origins), n):
                sums.add(denoise(x, origins[batch : batch + n]))
            x = sums.step(x, alpha, beta)

    The sums are fp32 (fp64 for fp64 tiles), in one buffer ``[B, C, F, H, W]`` that is reused for the next step. There
    is no gradient.

    Args:
        origins: ``[T, 3]`` int32 or int64, as for :func:`hpdm_kernels.average_tiles`: a product grid in row-major order
            (frames slowest) that covers the whole video.
        tile_size: (frames, height, width) of a tile in pixels.
        size: (frames, height, width) of the video in pixels.
        weights: as of :func:`hpdm_kernels.average_tiles`; the accumulator keeps a copy.
        backend: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, an unknown backend, tiles that are not inside of the video, are no product grid or
            leave a voxel uncovered, weights that are not positive and finite or that require a gradient.

    Source: MultiDiffusion (Bar-Tal et al., 2023), as used in paper section 4.4 (tiled inference).
    """

    def __init__(
        self,
        origins: Tensor,
        tile_size: Sequence[int],
        size: Sequence[int],
        *,
        weights: Sequence[Tensor] | None = None,
        backend: str = "auto",
    ) -> None:
        self.tile_size, self.size = check_triple("tile_size", tile_size), check_triple("size", size)
        self.origins = check_tensor("origins", origins, ("T", 3), dtypes=(torch.int32, torch.int64))
        self.origins = self.origins.to("cpu", copy=True)  # the caller may change its own
        plan = read_origins(self.origins, self.tile_size, self.size, cover=True)
        self._weights = check_weights(weights, self.tile_size)
        if self._weights is not None:
            shares(plan, self._weights, torch.float64, self._weights.device)  # which checks them
        self.backend = check_backend(backend)
        self._chosen = backend
        self._sums: Tensor | None = None
        self._like: Tensor | None = None  # [B, C, 0] of the dtype and device of this step's tiles
        self.added = 0
        """Number of tiles added in this step."""

    @property
    def tiles(self) -> int:
        """Number of tiles per step."""
        return self.origins.shape[0]

    def reset(self) -> None:
        """Discards the tiles added since the last step."""
        self._like, self.added = None, 0

    def add(self, tiles: Tensor, first: int | None = None) -> None:
        """Adds the next chunk of tiles.

        Args:
            tiles: ``[B, n, C, f, h, w]``, fp16, bf16, fp32 or fp64, any strides: the tiles of the next ``n`` rows of
                ``origins``. ``B``, ``C``, dtype and device are the same for all chunks of a step.
            first: the row of ``origins`` of the chunk's first tile, to check the order; ``None``: not checked.

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
        _refuse_gradient("tiles", tiles)
        if self._like is None:
            self._start(tiles)
        ops.add_tiles(self._sums, tiles, self.origins, self.added, self._weights, self._chosen)
        self.added += tiles.shape[1]

    def _start(self, tiles: Tensor) -> None:
        """Chooses the backend for a new step and allocates its sums, unless the last step's buffer fits."""
        self._chosen = resolve(self.backend, "TileAccumulator", tiles)
        shape, dtype = (tiles.shape[0], tiles.shape[2], *self.size), coordinate_dtype(tiles.dtype)
        old = self._sums
        # Compiled code in inference mode leaves a buffer that cannot be written outside of the mode, and cannot ask.
        reuse = not torch.compiler.is_compiling() and old is not None and not old.is_inference()
        if not reuse or old is None or (old.shape, old.dtype, old.device) != (shape, dtype, tiles.device):
            self._sums = old = None  # freed before the new buffer is allocated
            self._sums = ops.new_sums(tiles, shape, dtype)
        self._like = tiles.new_empty(tiles.shape[0], tiles.shape[2], 0)

    def step(self, x: Tensor | None = None, alpha: float = 0.0, beta: float = 1.0) -> Tensor:
        """``alpha * x + beta * mean``, the mean over the tiles that cover each voxel. Ends the step.

        Args:
            x: ``[B, C, F, H, W]`` like the tiles, or ``None``.
            alpha: factor of ``x``, a finite number; must be 0 without ``x``.
            beta: factor of the mean, a finite number.

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
            _refuse_gradient("x", x)
        alpha, beta = check_factors(alpha, beta, x)
        mean, dtype = self._weights is None, self._like.dtype
        out = ops.step_tiles(self._sums, self.origins, self.tile_size, dtype, x, alpha, beta, mean, self._chosen)
        self.reset()
        return out


def _refuse_gradient(name: str, tensor: Tensor) -> None:
    if (torch.is_grad_enabled() and tensor.requires_grad) or differentiates((tensor,)):
        raise ValueError(f"{name}: got a tensor that requires a gradient, expected none (average_tiles has one)")
