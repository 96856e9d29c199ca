"""Kernels of ``tiles.py``: every element of the result is gathered by one program, so there are no atomics.

Voxels of one channel are indexed by int32, everything above by int64. Which tiles cover a coordinate is looked up in
small tables, made once per set of origins and device.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hpdm_kernels._triton import INTERPRETED, KernelSpec, jit, tl, triton
from hpdm_kernels.tiles_geometry import Plan

# Voxels per program. The interpreter pays per program and operation, not per voxel.
BLOCK = 1 << 16 if INTERPRETED else 1024


@jit
def _extract_tiles_kernel(  # type: ignore[no-untyped-def]
    video_ptr, out_ptr, origins_ptr, cover_ptr, scale,
    stride_video_b, stride_video_c, stride_video_f, stride_video_h, stride_video_w,
    T, C, F, H, tile_f, tile_h, tile_w, n_blocks,
    MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of voxels of one channel of one tile per program. ``cover``: first tile and number, per coordinate."""
    pid = tl.program_id(0)
    plane = pid // n_blocks
    voxels = tile_f * tile_h * tile_w
    v = (pid % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = v < voxels
    t = (plane // C) % T
    b = (plane // C) // T
    i = tl.load(origins_ptr + 3 * t) + v // (tile_h * tile_w)
    j = tl.load(origins_ptr + 3 * t + 1) + v // tile_w % tile_h
    k = tl.load(origins_ptr + 3 * t + 2) + v % tile_w
    base = video_ptr + b.to(tl.int64) * stride_video_b + (plane % C).to(tl.int64) * stride_video_c
    offset = i.to(tl.int64) * stride_video_f + j.to(tl.int64) * stride_video_h + k.to(tl.int64) * stride_video_w
    value = tl.load(base + offset, mask=mask, other=0.0).to(tl.float32) * scale
    if MEAN:
        count = tl.load(cover_ptr + 2 * i + 1, mask=mask, other=1)
        count *= tl.load(cover_ptr + 2 * (F + j) + 1, mask=mask, other=1)
        count *= tl.load(cover_ptr + 2 * (F + H + k) + 1, mask=mask, other=1)
        value /= count.to(tl.float32)
    tl.store(out_ptr + plane.to(tl.int64) * voxels + v, value.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _average_tiles_kernel(  # type: ignore[no-untyped-def]
    tiles_ptr, x_ptr, out_ptr, starts_ptr, cover_ptr, alpha, beta,
    stride_tiles_b, stride_tiles_t, stride_tiles_c, stride_tiles_f, stride_tiles_h, stride_tiles_w,
    stride_x_b, stride_x_c, stride_x_f, stride_x_h, stride_x_w,
    C, F, H, W, n_tiles_f, n_tiles_h, n_tiles_w, most_f, most_h, most_w, n_blocks,
    MEAN: tl.constexpr, HAS_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of voxels of one channel per program. ``starts``: the origins per axis; ``most``: covering tiles."""
    pid = tl.program_id(0)
    plane = pid // n_blocks
    v = (pid % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = v < F * H * W
    b = (plane // C).to(tl.int64)
    c = (plane % C).to(tl.int64)
    i = v // (H * W)
    j = v // W % H
    k = v % W
    first_f = tl.load(cover_ptr + 2 * i, mask=mask, other=0)
    count_f = tl.load(cover_ptr + 2 * i + 1, mask=mask, other=0)
    first_h = tl.load(cover_ptr + 2 * (F + j), mask=mask, other=0)
    count_h = tl.load(cover_ptr + 2 * (F + j) + 1, mask=mask, other=0)
    first_w = tl.load(cover_ptr + 2 * (F + H + k), mask=mask, other=0)
    count_w = tl.load(cover_ptr + 2 * (F + H + k) + 1, mask=mask, other=0)
    base = tiles_ptr + b * stride_tiles_b + c * stride_tiles_c
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for near_f in range(most_f):
        t_f = first_f + near_f
        mask_f = near_f < count_f
        tile_i = i - tl.load(starts_ptr + t_f, mask=mask_f, other=0)
        for near_h in range(most_h):
            t_h = first_h + near_h
            mask_h = mask_f & (near_h < count_h)
            tile_j = j - tl.load(starts_ptr + n_tiles_f + t_h, mask=mask_h, other=0)
            row = tile_i.to(tl.int64) * stride_tiles_f + tile_j.to(tl.int64) * stride_tiles_h
            for near_w in range(most_w):
                t_w = first_w + near_w
                mask_w = mask_h & (near_w < count_w)
                tile_k = k - tl.load(starts_ptr + n_tiles_f + n_tiles_h + t_w, mask=mask_w, other=0)
                t = ((t_f * n_tiles_h + t_h) * n_tiles_w + t_w).to(tl.int64)
                offset = t * stride_tiles_t + row + tile_k.to(tl.int64) * stride_tiles_w
                total += tl.load(base + offset, mask=mask_w, other=0.0).to(tl.float32)
    if MEAN:
        total /= tl.where(mask, count_f * count_h * count_w, 1).to(tl.float32)
    total *= beta
    if HAS_X:
        row = i.to(tl.int64) * stride_x_f + j.to(tl.int64) * stride_x_h + k.to(tl.int64) * stride_x_w
        x = tl.load(x_ptr + b * stride_x_b + c * stride_x_c + row, mask=mask, other=0.0)
        total += alpha * x.to(tl.float32)
    tl.store(out_ptr + plane.to(tl.int64) * (F * H * W) + v, total.to(out_ptr.dtype.element_ty), mask=mask)


@functools.lru_cache(maxsize=64)
def _tables(plan: Plan, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For the kernels, int32 on ``device``: origins, (first tile, number) per coordinate, origins per axis."""
    cover = [(n.start, len(n)) for axis in plan.axes or () for a, b, n in axis.cells() for _ in range(a, b)]
    starts = [origin for axis in plan.axes or () for origin in axis.origins]
    return tuple(torch.tensor(rows, dtype=torch.int32, device=device) for rows in (plan.origins, cover, starts))  # type: ignore[return-value]


def _blocks(shape: Sequence[int]) -> tuple[int, int]:
    """Block length, and blocks in one channel."""
    voxels = math.prod(shape)
    if voxels > 2**31 - BLOCK:
        raise ValueError(
            f"size: got {tuple(shape)}, expected fewer than 2**31 voxels (kernels index a channel by int32)"
        )
    block = min(BLOCK, triton.next_power_of_2(voxels))
    return block, triton.cdiv(voxels, block)


def launch_extract(video: Tensor, plan: Plan, tile: Sequence[int], mean: bool, scale: float) -> Tensor:
    b, c, f, h, _ = video.shape
    t = len(plan.origins)
    out = video.new_empty(b, t, c, *tile)
    block, n_blocks = _blocks(tile)
    origins, cover, _ = _tables(plan, video.device)
    with torch.cuda.device_of(video):
        _extract_tiles_kernel[(b * t * c * n_blocks,)](
            video, out, origins, cover, scale, *video.stride(), t, c, f, h, *tile, n_blocks, MEAN=mean, BLOCK=block
        )  # fmt: skip
    return out


def launch_average(
    tiles: Tensor, plan: Plan, size: Sequence[int], x: Tensor | None, alpha: float, beta: float, mean: bool
) -> Tensor:
    """For plans with ``axes``."""
    assert plan.axes is not None
    b, _, c = tiles.shape[:3]
    out = tiles.new_empty(b, c, *size)
    block, n_blocks = _blocks(size)
    _, cover, starts = _tables(plan, tiles.device)
    grid = [len(axis.origins) for axis in plan.axes]
    most = [max(axis.counts()) for axis in plan.axes]
    with torch.cuda.device_of(tiles):
        _average_tiles_kernel[(b * c * n_blocks,)](
            tiles, tiles if x is None else x, out, starts, cover, alpha, beta,
            *tiles.stride(), *(tiles.stride()[:5] if x is None else x.stride()), c, *size, *grid, *most, n_blocks,
            MEAN=mean, HAS_X=x is not None, BLOCK=block,
        )  # fmt: skip
    return out


def aot_specs() -> list[KernelSpec]:
    """Every kernel in every configuration, for compilation without a GPU."""
    names = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16"}
    specs = []
    for (name, pointer), mean in itertools.product(names.items(), (False, True)):
        strides = {f"stride_video_{a}": "i64" for a in "bcfhw"}
        sizes = dict.fromkeys(("T", "C", "F", "H", "tile_f", "tile_h", "tile_w", "n_blocks"), "i32")
        specs.append(
            KernelSpec(
                f"extract_tiles[{name},{'mean' if mean else 'plain'}]",
                _extract_tiles_kernel,
                {"video_ptr": pointer, "out_ptr": pointer, "origins_ptr": "*i32", "cover_ptr": "*i32", "scale": "fp32"}
                | strides | sizes | dict.fromkeys(("MEAN", "BLOCK"), "constexpr"),
                {"MEAN": mean, "BLOCK": 1024},
                aligned=("video_ptr", "out_ptr", "origins_ptr", "cover_ptr"),
            )
        )  # fmt: skip
    for (name, pointer), mean, has_x in itertools.product(names.items(), (False, True), (False, True)):
        strides = {f"stride_tiles_{a}": "i64" for a in "btcfhw"} | {f"stride_x_{a}": "i64" for a in "bcfhw"}
        counts = [f"{kind}_{a}" for kind in ("n_tiles", "most") for a in "fhw"]
        specs.append(
            KernelSpec(
                f"average_tiles[{name},{'mean' if mean else 'sum'}{',x' if has_x else ''}]",
                _average_tiles_kernel,
                {"tiles_ptr": pointer, "x_ptr": pointer, "out_ptr": pointer, "starts_ptr": "*i32", "cover_ptr": "*i32"}
                | {"alpha": "fp32", "beta": "fp32"} | strides | dict.fromkeys(("C", "F", "H", "W"), "i32")
                | dict.fromkeys(counts, "i32") | {"n_blocks": "i32"}
                | dict.fromkeys(("MEAN", "HAS_X", "BLOCK"), "constexpr"),
                {"MEAN": mean, "HAS_X": has_x, "BLOCK": 1024},
                aligned=("tiles_ptr", "x_ptr", "out_ptr", "starts_ptr", "cover_ptr"),
            )
        )  # fmt: skip
    return specs
