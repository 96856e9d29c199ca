"""Tiles of a video, and the average of overlapping tiles (MultiDiffusion), both in gather form.

    extract:  tiles[b, t] = video[b, :, o_t : o_t + tile]
    average:  out[b, :, v] = alpha * x[b, :, v] + beta * mean over tiles t that cover v of tiles[b, t, :, v - o_t]

with ``video``, ``x``, ``out`` ``[B, C, F, H, W]``, ``tiles`` ``[B, T, C, f, h, w]`` and ``origins`` ``o`` ``[T, 3]``.
The mean may have weights: one per frame, row and column of a tile (:mod:`hpdm_kernels.tiles.weights`).

The tiles of an average form a product grid: on each axis, the tiles that cover a voxel are a range of indices, and
their number is the product of three small numbers. There is no count map and no scatter, and no result is read back.
The average reads every tile once, reads ``x`` once if given, and writes every voxel once. Each op is the other's
backward, so both give the same bits in every run and are twice differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpdm_kernels import _transforms, reference
from hpdm_kernels._backend import resolve
from hpdm_kernels._checks import check_tensor, check_triple
from hpdm_kernels.tiles import ops
from hpdm_kernels.tiles.checks import check_factors, check_weights
from hpdm_kernels.tiles.geometry import read_origins
from hpdm_kernels.tiles.weights import shares


def _check_fits(tile: Sequence[int], size: Sequence[int], name: str) -> None:
    if any(n > m for n, m in zip(tile, size)):
        raise ValueError(f"{name}: got tiles of {tuple(tile)} in a video of {tuple(size)}, expected tiles that fit")


def extract_tiles(video: Tensor, origins: Tensor, tile_size: Sequence[int], *, backend: str = "auto") -> Tensor:
    """Cuts tiles out of a video: ``tiles[b, t] = video[b, :, origins[t] : origins[t] + tile_size]``.

    Args:
        video: ``[B, C, F, H, W]``, fp16, bf16, fp32 or fp64. Gets a gradient: the sum over the tiles, in fp32 (fp64 for
            fp64), in a fixed order.
        origins: ``[T, 3]`` int32 or int64, the first pixel of each tile (frame, row, column), any order, overlaps
            allowed. The host reads the values, so keep them on the CPU whatever the device of ``video``: a CUDA
            tensor also works, but then each call synchronizes with the GPU. Gets no gradient.
        tile_size: (frames, height, width) in pixels.
        backend: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``[B, T, C, f, h, w]`` of ``video``'s dtype and device.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, an unknown backend, or a tile that is not inside of the video.
        RuntimeError: ``backend="triton"`` cannot run here.
        NotImplementedError: ``torch.func`` or forward mode differentiates the op on another backend than ``reference``.

    Source: paper section 4.4 (tiled inference).
    """
    video = check_tensor("video", video, ("B", "C", "F", "H", "W"))
    tile = check_triple("tile_size", tile_size)
    origins = check_tensor("origins", origins, ("T", 3), dtypes=(torch.int32, torch.int64))
    _check_fits(tile, video.shape[2:], "tile_size")
    chosen = resolve(backend, "extract_tiles", video)
    if chosen == "reference":
        read_origins(origins, tile, video.shape[2:])
        return reference.extract_tiles(video, origins, tile)
    _transforms.refuse("extract_tiles", chosen, (video,))
    return ops.extract_tiles(video, origins, tile, False, 1.0, None, chosen)


def average_tiles(
    tiles: Tensor,
    origins: Tensor,
    size: Sequence[int],
    *,
    x: Tensor | None = None,
    alpha: float = 0.0,
    beta: float = 1.0,
    weights: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Averages tiles where they overlap: ``alpha * x + beta * mean``, the mean over the tiles that cover each voxel.

    With ``x`` the current sample and ``alpha``, ``beta`` the coefficients of a linear sampler step, one call averages
    the denoised tiles and steps the whole video.

    Args:
        tiles: ``[B, T, C, f, h, w]``, fp16, bf16, fp32 or fp64; summed in fp32 (fp64 for fp64). Gets a gradient.
        origins: ``[T, 3]`` int32 or int64, the first pixel of each tile (frame, row, column). They form a product grid
            in row-major order (frames slowest); the spacing may be irregular, but every voxel must be covered. The host
            reads the values, so keep them on the CPU whatever the device of ``tiles``: a CUDA tensor also works, but
            then each call synchronizes with the GPU. Gets no gradient.
        size: (frames, height, width) of the video in pixels.
        x: ``[B, C, F, H, W]`` like ``tiles``, or ``None``. Gets a gradient.
        alpha: factor of ``x``, a finite number; must be 0 without ``x``. Numbers get no gradient.
        beta: factor of the mean, a finite number.
        weights: ``None`` for a plain mean, or three 1-D fp32 tensors of positive finite numbers: one per frame, row and
            column of a tile. The weight of an element is the product of its three; the mean is ``sum(weight * tile) /
            sum(weight)``. Linear ramps hide where tiles end. The host reads the values, as those of ``origins``, and
            what it computes from them is kept as long as ``origins``. They get no gradient.
        backend: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``[B, C, F, H, W]`` of ``tiles``'s dtype and device. A NaN or infinity reaches its own voxel alone.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, an unknown backend, tiles that are not inside of the video, are no product grid or
            leave a voxel uncovered, ``alpha`` without ``x``, ``alpha`` or ``beta`` not finite or a tensor with a
            gradient, weights that are not positive and finite or that require a gradient.
        RuntimeError: ``backend="triton"`` cannot run here.
        NotImplementedError: ``torch.func`` or forward mode differentiates the op on another backend than ``reference``.

    Source: MultiDiffusion (Bar-Tal et al., 2023), as used in paper section 4.4 (tiled inference).
    """
    tiles = check_tensor("tiles", tiles, ("B", "T", "C", "f", "h", "w"))
    size = check_triple("size", size)
    origins = check_tensor("origins", origins, (tiles.shape[1], 3), dtypes=(torch.int32, torch.int64))
    _check_fits(tiles.shape[3:], size, "size")
    if x is not None:
        check_tensor("x", x, (tiles.shape[0], tiles.shape[2], *size), like=("tiles", tiles))
    alpha, beta = check_factors(alpha, beta, x)
    per_axis = check_weights(weights, tiles.shape[3:])
    chosen = resolve(backend, "average_tiles", tiles)
    if chosen == "reference":
        plan = read_origins(origins, tiles.shape[3:], size, cover=True)
        if per_axis is not None:
            shares(plan, per_axis, torch.float64, per_axis.device)  # which checks them
        return reference.average_tiles(tiles, origins, size, x, alpha, beta, weights)
    _transforms.refuse("average_tiles", chosen, (tiles, x))
    return ops.average_tiles(tiles, origins, size, x, alpha, beta, True, per_axis, chosen)
