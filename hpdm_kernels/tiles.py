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

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hpdm_kernels import reference
from hpdm_kernels._backend import resolve
from hpdm_kernels._checks import check_tensor, check_triple
from hpdm_kernels.tiles_geometry import Axis, Plan, read_origins
from hpdm_kernels.tiles_triton import launch_average, launch_extract

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The portable average works on pieces of this many elements (1 MB in fp32), which stay in the cache while the tiles
# that cover them are added up. On a GPU launches cost more than cache misses.
CPU_PIECE = 1 << 18
GPU_PIECE = 1 << 26


def _inverse_counts(axis: Axis, like: Tensor) -> Tensor:
    return 1.0 / torch.tensor([max(n, 1) for n in axis.counts()], dtype=like.dtype, device=like.device)


def _pieces(axis: Axis, longest: int) -> Iterator[tuple[int, int, range]]:
    for start, stop, cover in axis.cells():
        for at in range(start, stop, longest):
            yield at, min(at + longest, stop), cover


def _extract_torch(video: Tensor, plan: Plan, tile: Sequence[int], mean: bool, scale: float) -> Tensor:
    """One strided copy per row of tiles; the weights, if any, are applied to the video first."""
    b, c = video.shape[:2]
    out = video.new_empty(b, len(plan.origins), c, *tile)
    if mean or scale != 1.0:
        video = video.to(reference.coordinate_dtype(video.dtype)) * scale
    if plan.axes is None:
        f, h, w = tile
        for t, (i, j, k) in enumerate(plan.origins):
            out[:, t] = video[:, :, i : i + f, j : j + h, k : k + w]
        return out
    if mean:
        inverse = [_inverse_counts(axis, video) for axis in plan.axes]
        video.mul_(inverse[1][:, None] * inverse[2]).mul_(inverse[0][:, None, None])
    axis_f, axis_h, axis_w = plan.axes
    grid = out.unflatten(1, [len(axis.origins) for axis in plan.axes])
    for (i, at_f), (j, at_h) in itertools.product(enumerate(axis_f.origins), enumerate(axis_h.origins)):
        rows = video.narrow(2, at_f, axis_f.tile).narrow(3, at_h, axis_h.tile)
        for first, count, step in axis_w.runs():
            row = rows.narrow(4, axis_w.origins[first], (count - 1) * step + axis_w.tile).unfold(4, axis_w.tile, step)
            grid[:, i, j, first : first + count] = row.permute(0, 4, 1, 2, 3, 5)
    return out


def _average_torch(
    tiles: Tensor, plan: Plan, size: Sequence[int], x: Tensor | None, alpha: float, beta: float, mean: bool
) -> Tensor:
    """Adds up, for each piece of the video that one set of tiles covers in frames and height, whole rows of tiles."""
    b, _, c, f, h, w = tiles.shape
    work = reference.coordinate_dtype(tiles.dtype)
    if plan.axes is None:
        total = tiles.new_zeros(b, c, *size, dtype=work)
        for t, (i, j, k) in enumerate(plan.origins):
            total[:, :, i : i + f, j : j + h, k : k + w] += tiles[:, t]
        total *= beta
        return (total if x is None else total.add_(x, alpha=alpha)).to(tiles.dtype)
    out = tiles.new_empty(b, c, *size)
    axis_f, axis_h, axis_w = plan.axes
    grid = tiles.unflatten(1, [len(axis.origins) for axis in plan.axes])
    inverse_w = _inverse_counts(axis_w, tiles.new_empty(0, dtype=work))
    most = max(1, (CPU_PIECE if tiles.device.type == "cpu" else GPU_PIECE) // (b * c * size[2]))
    pieces_h = list(_pieces(axis_h, most))
    most = max(1, most // max(stop - start for start, stop, _ in pieces_h))
    for start_f, stop_f, cover_f in _pieces(axis_f, most):
        for start_h, stop_h, cover_h in pieces_h:
            total = out.new_zeros(b, c, stop_f - start_f, stop_h - start_h, size[2], dtype=work)
            # First what shares columns, in long contiguous runs; then the overlap of columns, on a fraction of it.
            rows = tiles.new_zeros(b, len(axis_w.origins), c, stop_f - start_f, stop_h - start_h, w, dtype=work)
            for i, j in itertools.product(cover_f, cover_h):
                row = grid[:, i, j].narrow(3, start_f - axis_f.origins[i], stop_f - start_f)
                rows += row.narrow(4, start_h - axis_h.origins[j], stop_h - start_h)
            rows = rows.permute(0, 2, 3, 4, 1, 5)
            for first, count, step in axis_w.runs():
                # A run of overlapping tiles is a few tilings without overlap, each added in one operation.
                for at in range(0, w, step):
                    width = min(step, w - at)
                    span = total.narrow(4, axis_w.origins[first] + at, (count - 1) * step + width)
                    span.unfold(4, width, step).add_(rows.narrow(4, first, count).narrow(5, at, width))
            if mean:
                total.mul_(inverse_w * (beta / max(1, len(cover_f) * len(cover_h))))
            elif beta != 1.0:
                total.mul_(beta)
            if x is not None:
                total.add_(x[:, :, start_f:stop_f, start_h:stop_h], alpha=alpha)
            out[:, :, start_f:stop_f, start_h:stop_h] = total
    return out


@torch.library.custom_op("hpdm::extract_tiles", mutates_args=())
def _extract_op(
    video: Tensor, origins: Tensor, tile_size: Sequence[int], mean: bool, scale: float, backend: str
) -> Tensor:
    plan = read_origins(origins, tile_size, video.shape[2:])
    extract = launch_extract if backend == "triton" else _extract_torch
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
    average = launch_average if backend == "triton" and plan.axes else _average_torch
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
