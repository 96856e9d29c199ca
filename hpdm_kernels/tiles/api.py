"""Tiles of a video, and the average of overlapping tiles (MultiDiffusion), both in gather form.

    extract:  tiles[b, t] = video[b, :, o_t : o_t + tile]
    average:  out[b, :, v] = alpha * x[b, :, v] + beta * mean over tiles t that cover v of tiles[b, t, :, v - o_t]

with ``video``, ``x``, ``out`` ``[B, C, F, H, W]``, ``tiles`` ``[B, T, C, f, h, w]`` and ``origins`` ``o`` ``[T, 3]``.

The tiles of an average form a product grid, so the tiles covering a voxel are a range of indices per axis, and how many
there are is a product of three small numbers: there is no count map, no scatter, and no write is ever read back. The
average reads every tile once and writes every voxel once (plus one read of ``x``): ``4 * (tiles + out [+ x])`` bytes in
fp32. Each op is the other's backward, so both are repeatable bit for bit and twice differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpdm_kernels import reference
from hpdm_kernels._backend import resolve
from hpdm_kernels._checks import check_tensor, check_triple
from hpdm_kernels.tiles import torch_backend as tiles_torch
from hpdm_kernels.tiles.geometry import read_origins
from hpdm_kernels.tiles.triton_backend import TRITON_DTYPES, launch_average, launch_extract


@torch.library.custom_op("hpdm::extract_tiles", mutates_args=())
def _extract_op(
    video: Tensor, origins: Tensor, tile_size: Sequence[int], mean: bool, scale: float, backend: str
) -> Tensor:
    plan = read_origins(origins, tile_size, video.shape[2:])
    extract = launch_extract if backend == "triton" else tiles_torch.extract
    return extract(video, plan, tile_size, mean, scale)


@_extract_op.register_fake
def _(video: Tensor, origins: Tensor, tile_size: Sequence[int], mean: bool, scale: float, backend: str) -> Tensor:
    return video.new_empty(video.shape[0], origins.shape[0], video.shape[1], *tile_size)


@torch.library.custom_op("hpdm::average_tiles", mutates_args=())
def _average_op(
    tiles: Tensor,
    origins: Tensor,
    size: Sequence[int],
    x: Tensor | None,
    alpha: float,
    beta: float,
    mean: bool,
    backend: str,
) -> Tensor:
    plan = read_origins(origins, tiles.shape[3:], size, cover=mean)
    # Where tiles are no grid (gradients of extraction alone), a voxel's tiles are in no range: both backends then add
    # them up one by one.
    average = launch_average if backend == "triton" and plan.axes else tiles_torch.average
    return average(tiles, plan, size, x, alpha, beta, mean)


@_average_op.register_fake
def _(
    tiles: Tensor,
    origins: Tensor,
    size: Sequence[int],
    x: Tensor | None,
    alpha: float,
    beta: float,
    mean: bool,
    backend: str,
) -> Tensor:
    return tiles.new_empty(tiles.shape[0], tiles.shape[2], *size)


def _extract_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    video, origins, _, ctx.mean, ctx.scale, ctx.backend = inputs
    ctx.size = video.shape[2:]
    ctx.save_for_backward(origins)


def _extract_backward(ctx, grad):  # type: ignore[no-untyped-def]
    (origins,) = ctx.saved_tensors
    dvideo = _average_op(grad, origins, ctx.size, None, 0.0, ctx.scale, ctx.mean, ctx.backend)
    return dvideo, None, None, None, None, None


def _average_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    tiles, origins, _, x, ctx.alpha, ctx.beta, ctx.mean, ctx.backend = inputs
    ctx.tile_size, ctx.has_x = tiles.shape[3:], x is not None
    ctx.save_for_backward(origins)


def _average_backward(ctx, grad):  # type: ignore[no-untyped-def]
    (origins,) = ctx.saved_tensors
    dtiles = dx = None
    if ctx.needs_input_grad[0]:
        dtiles = _extract_op(grad, origins, ctx.tile_size, ctx.mean, ctx.beta, ctx.backend)
    if ctx.has_x and ctx.needs_input_grad[3]:
        dx = grad * ctx.alpha
    return dtiles, None, None, dx, None, None, None, None


_extract_op.register_autograd(_extract_backward, setup_context=_extract_setup)
_average_op.register_autograd(_average_backward, setup_context=_average_setup)


def _check_fits(tile: Sequence[int], size: Sequence[int], name: str) -> None:
    if any(n > m for n, m in zip(tile, size)):
        raise ValueError(f"{name}: got tiles of {tuple(tile)} in a video of {tuple(size)}, expected tiles that fit")


def extract_tiles(video: Tensor, origins: Tensor, tile_size: Sequence[int], *, backend: str = "auto") -> Tensor:
    """Cuts tiles out of a video: ``tiles[b, t] = video[b, :, origins[t] : origins[t] + tile_size]``.

    Args:
        video: ``[B, C, F, H, W]``, fp16, bf16, fp32 or fp64. Gets a gradient: the sum over the tiles, taken in fp32 or
            better in a fixed order.
        origins: ``[T, 3]`` int32 or int64, the first pixel of each tile (frame, row, column), any order, overlaps
            allowed. Values are read by the host, so keep them on the CPU whatever the device of ``video``: a CUDA
            tensor is taken too, but each call then waits for the GPU. Gets no gradient.
        tile_size: (frames, height, width) in pixels.
        backend: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``[B, T, C, f, h, w]`` of ``video``'s dtype and device.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, an unknown backend, or a tile that is not inside of the video.
        RuntimeError: ``backend="triton"`` cannot run here.

    Source: paper section 4.4 (tiled inference).
    """
    video = check_tensor("video", video, ("B", "C", "F", "H", "W"))
    tile = check_triple("tile_size", tile_size)
    origins = check_tensor("origins", origins, ("T", 3), dtypes=(torch.int32, torch.int64))
    _check_fits(tile, video.shape[2:], "tile_size")
    chosen = resolve(backend, "extract_tiles", video, TRITON_DTYPES)
    if chosen == "reference":
        read_origins(origins, tile, video.shape[2:])
        return reference.extract_tiles(video, origins, tile)
    return _extract_op(video, origins, tile, False, 1.0, chosen)


def average_tiles(
    tiles: Tensor,
    origins: Tensor,
    size: Sequence[int],
    *,
    x: Tensor | None = None,
    alpha: float = 0.0,
    beta: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Averages tiles where they overlap: ``alpha * x + beta * mean``, the mean over the tiles that cover each voxel.

    With ``x`` the current sample and ``alpha``, ``beta`` the coefficients of a linear sampler step, one call averages
    the denoised tiles and steps the whole video.

    Args:
        tiles: ``[B, T, C, f, h, w]``, fp16, bf16, fp32 or fp64; sums are taken in fp32 or better. Gets a gradient.
        origins: ``[T, 3]`` int32 or int64, the first pixel of each tile (frame, row, column). They form a product grid
            in row-major order (frames slowest); the spacing may be irregular, but every voxel must be covered. Values
            are read by the host, so keep them on the CPU whatever the device of ``tiles``: a CUDA tensor is taken too,
            but each call then waits for the GPU. Gets no gradient.
        size: (frames, height, width) of the video in pixels.
        x: ``[B, C, F, H, W]`` like ``tiles``, or ``None``. Gets a gradient.
        alpha: factor of ``x``; must be 0 without ``x``.
        beta: factor of the mean.
        backend: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``[B, C, F, H, W]`` of ``tiles``'s dtype and device.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, an unknown backend, tiles that are not inside of the video, are no product grid or
            leave a voxel uncovered, ``alpha`` without ``x``.
        RuntimeError: ``backend="triton"`` cannot run here.

    Source: MultiDiffusion (Bar-Tal et al., 2023), as used in paper section 4.4 (tiled inference).
    """
    tiles = check_tensor("tiles", tiles, ("B", "T", "C", "f", "h", "w"))
    size = check_triple("size", size)
    origins = check_tensor("origins", origins, (tiles.shape[1], 3), dtypes=(torch.int32, torch.int64))
    _check_fits(tiles.shape[3:], size, "size")
    if x is not None:
        check_tensor("x", x, (tiles.shape[0], tiles.shape[2], *size), like=("tiles", tiles))
    elif alpha != 0.0:
        raise ValueError(f"alpha: got {alpha} without x, expected 0.0 or a tensor x to multiply")
    chosen = resolve(backend, "average_tiles", tiles, TRITON_DTYPES)
    if chosen == "reference":
        read_origins(origins, tiles.shape[3:], size, cover=True)
        return reference.average_tiles(tiles, origins, size, x, alpha, beta)
    return _average_op(tiles, origins, size, x, float(alpha), float(beta), True, chosen)
