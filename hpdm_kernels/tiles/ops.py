"""The registered ops behind tile extraction and averaging: schemas, shapes for tracing, gradients.

Extraction and averaging are each other's backward. The ops of :class:`hpdm_kernels.TileAccumulator` have no gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hpdm_kernels._backend import custom_op
from hpdm_kernels.boxes import coordinate_dtype
from hpdm_kernels.tiles import torch_backend, triton_backend
from hpdm_kernels.tiles.geometry import TilePlan, read_origins
from hpdm_kernels.tiles.huge_pages import new_empty
from hpdm_kernels.tiles.weights import Shares, shares


@custom_op("extract_tiles")
def extract_tiles(
    video: Tensor,
    origins: Tensor,
    tile_size: Sequence[int],
    mean: bool,
    scale: float,
    weights: Tensor | None,
    backend: str,
) -> Tensor:
    """``scale`` times the tiles ``[B, T, C, *tile_size]`` of ``video [B, C, F, H, W]``, at ``origins [T, 3]``.

    ``mean``: each voxel is also divided by the number of tiles that cover it, or with ``weights`` multiplied by the
    share that the tile has of it.
    """
    plan = read_origins(origins, tile_size, video.shape[2:], cover=weights is not None)
    extract = triton_backend.extract if backend == "triton" else torch_backend.extract
    return extract(video, plan, tile_size, mean, scale, _shares(plan, weights, video))


# There are many parameters because an op's schema cannot group them.
@custom_op("average_tiles")
def average_tiles(
    tiles: Tensor,
    origins: Tensor,
    size: Sequence[int],
    x: Tensor | None,
    alpha: float,
    beta: float,
    mean: bool,
    weights: Tensor | None,
    backend: str,
) -> Tensor:
    """``alpha * x + beta * sum`` ``[B, C, *size]``, the sum over ``tiles [B, T, C, f, h, w]`` at ``origins [T, 3]``.

    ``mean``: the sum is divided by the number of tiles that cover each voxel; with ``weights [f + h + w]``, which need
    ``mean``, each tile is multiplied by its share instead.
    """
    plan = read_origins(origins, tiles.shape[3:], size, cover=mean)
    # In the backward of extraction the tiles need not form a product grid. Then the tiles that cover a voxel are not a
    # range, and both backends add the tiles one by one in PyTorch.
    average = triton_backend.average if backend == "triton" and plan.axes else torch_backend.average
    return average(tiles, plan, size, x, alpha, beta, mean, _shares(plan, weights, tiles))


def _shares(plan: TilePlan, weights: Tensor | None, like: Tensor) -> Shares | None:
    """The shares for sums of tensors like ``like``; ``None`` without weights."""
    return None if weights is None else shares(plan, weights, coordinate_dtype(like.dtype), like.device)


@torch.library.custom_op("hpdm::new_tile_sums", mutates_args=())
def new_sums(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialized buffer for :func:`add_tiles`, on the device of ``like``.

    An op of its own because ``torch.compile`` cannot trace how it asks the system for huge pages. The buffer is made
    outside of inference mode, since one of that mode could not be written in a later step outside of it.
    """
    with torch.inference_mode(False):
        return new_empty(like, *shape, dtype=dtype)


@new_sums.register_fake
def _(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


@custom_op("add_tiles", mutates_args=("sums",))
def add_tiles(sums: Tensor, tiles: Tensor, origins: Tensor, first: int, weights: Tensor | None, backend: str) -> None:
    """Adds ``tiles [B, n, C, f, h, w]``, from index ``first`` on, to ``sums [B, C, F, H, W]``, in place.

    ``sums`` need not be zeroed before the first tile. With ``weights`` tiles are multiplied by their shares.
    """
    plan = read_origins(origins, tiles.shape[3:], sums.shape[2:], cover=True)
    parts = _shares(plan, weights, sums)
    if backend == "reference":
        if first == 0:
            sums.zero_()
        f, h, w = tiles.shape[3:]
        for t, tile, (i, j, k) in zip(itertools.count(first), tiles.unbind(1), plan.origins[first:]):
            if parts is not None:
                n_f, n_h, n_w = plan.place(t)
                tile = tile * (parts.of_rows(n_f, n_h)[:, :, None] * parts.w[n_w])
            sums[:, :, i : i + f, j : j + h, k : k + w] += tile
    else:
        add = triton_backend.add if backend == "triton" else torch_backend.add
        add(sums, tiles, plan, first, parts)


@custom_op("step_tiles", mutates_args=("sums",))
def step_tiles(
    sums: Tensor,
    origins: Tensor,
    tile_size: Sequence[int],
    dtype: torch.dtype,
    x: Tensor | None,
    alpha: float,
    beta: float,
    mean: bool,
    backend: str,
) -> Tensor:
    """``alpha * x + beta * sums`` ``[B, C, F, H, W]`` of ``dtype``; may overwrite ``sums``.

    ``mean``: the sums are divided by the numbers of tiles.
    """
    plan = read_origins(origins, tile_size, sums.shape[2:], cover=True)
    step = triton_backend.step if backend == "triton" else torch_backend.step
    return step(sums, plan, dtype, x, alpha, beta, mean)


@extract_tiles.register_fake
def _(video: Tensor, origins: Tensor, tile_size: Sequence[int], *_: Any) -> Tensor:
    return video.new_empty(video.shape[0], origins.shape[0], video.shape[1], *tile_size)


@average_tiles.register_fake
def _(tiles: Tensor, origins: Tensor, size: Sequence[int], *_: Any) -> Tensor:
    return tiles.new_empty(tiles.shape[0], tiles.shape[2], *size)


@add_tiles.register_fake
def _(*_: Any) -> None:
    return None


@step_tiles.register_fake
def _(sums: Tensor, origins: Tensor, tile_size: Sequence[int], dtype: torch.dtype, *_: Any) -> Tensor:
    return sums.new_empty(sums.shape, dtype=dtype)


def _setup_extract_tiles(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    video, origins, _, ctx.mean, ctx.scale, weights, ctx.backend = inputs
    ctx.size = video.shape[2:]
    ctx.save_for_backward(origins, weights)


def _backward_extract_tiles(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    origins, weights = ctx.saved_tensors
    dvideo = average_tiles(grad, origins, ctx.size, None, 0.0, ctx.scale, ctx.mean, weights, ctx.backend)
    return dvideo, None, None, None, None, None, None


def _setup_average_tiles(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tiles, origins, _, x, ctx.alpha, ctx.beta, ctx.mean, weights, ctx.backend = inputs
    ctx.tile_size, ctx.has_x = tiles.shape[3:], x is not None
    ctx.save_for_backward(origins, weights)


def _backward_average_tiles(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    origins, weights = ctx.saved_tensors
    dtiles = dx = None
    if ctx.needs_input_grad[0]:
        dtiles = extract_tiles(grad, origins, ctx.tile_size, ctx.mean, ctx.beta, weights, ctx.backend)
    if ctx.has_x and ctx.needs_input_grad[3]:
        dx = grad * ctx.alpha
    return dtiles, None, None, dx, None, None, None, None, None


extract_tiles.register_autograd(_backward_extract_tiles, setup_context=_setup_extract_tiles)
average_tiles.register_autograd(_backward_average_tiles, setup_context=_setup_average_tiles)
