"""Kernels of ``tiles.py``: every element of the result is gathered by one program, so there are no atomics.

Offsets are int64, since the tiles of a long video exceed 2**31 elements. A program works on rows and columns of one
frame: what depends on the frame is scalar, what depends on a row or a column is a short vector (at most 62 registers,
where blocks of flat indices took 230). Which tiles cover a coordinate is looked up in small tables, made once per set
of origins and device.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from hpdm_kernels._triton import INTERPRETED, KernelSpec, jit, tl, triton
from hpdm_kernels.tiles_geometry import Plan

# Rows and columns of one frame per program. The interpreter pays per program and operation, not per pixel.
BLOCK_H, BLOCK_W = (1 << 8, 1 << 8) if INTERPRETED else (4, 128)


@jit
def _extract_tiles_kernel(  # type: ignore[no-untyped-def]
    video_ptr, out_ptr, origins_ptr, cover_ptr, scale,
    stride_video_b, stride_video_c, stride_video_f, stride_video_h, stride_video_w,
    T, C, F, H, tile_f, tile_h, tile_w, n_blocks_h, n_blocks_w,
    MEAN: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Part of one frame of one channel of one tile per program. ``cover``: first tile and number, per coordinate."""
    pid = tl.program_id(0)
    frame = pid // (n_blocks_h * n_blocks_w)
    tile_i = frame % tile_f
    c = frame // tile_f % C
    t = frame // tile_f // C % T
    b = frame // tile_f // C // T
    tile_j = pid // n_blocks_w % n_blocks_h * BLOCK_H + tl.arange(0, BLOCK_H)
    tile_k = pid % n_blocks_w * BLOCK_W + tl.arange(0, BLOCK_W)
    i = tl.load(origins_ptr + 3 * t) + tile_i
    j = tl.load(origins_ptr + 3 * t + 1) + tile_j
    k = tl.load(origins_ptr + 3 * t + 2) + tile_k
    mask = (tile_j < tile_h)[:, None] & (tile_k < tile_w)[None, :]
    base = video_ptr + b.to(tl.int64) * stride_video_b + c.to(tl.int64) * stride_video_c
    rows = base + i.to(tl.int64) * stride_video_f + j.to(tl.int64) * stride_video_h
    cols = k.to(tl.int64) * stride_video_w
    value = tl.load(rows[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32) * scale
    if MEAN:
        count_f = tl.load(cover_ptr + 2 * i + 1)
        count_h = tl.load(cover_ptr + 2 * (F + j) + 1, mask=tile_j < tile_h, other=1)
        count_w = tl.load(cover_ptr + 2 * (F + H + k) + 1, mask=tile_k < tile_w, other=1)
        value /= (count_f * count_h[:, None] * count_w[None, :]).to(tl.float32)
    rows = out_ptr + (frame.to(tl.int64) * tile_h + tile_j) * tile_w
    tl.store(rows[:, None] + tile_k[None, :], value.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _average_tiles_kernel(  # type: ignore[no-untyped-def]
    tiles_ptr, x_ptr, out_ptr, starts_ptr, cover_ptr, alpha, beta,
    stride_tiles_b, stride_tiles_t, stride_tiles_c, stride_tiles_f, stride_tiles_h, stride_tiles_w,
    stride_x_b, stride_x_c, stride_x_f, stride_x_h, stride_x_w,
    C, F, H, W, n_tiles_f, n_tiles_h, n_tiles_w, most_h, most_w, n_blocks_h, n_blocks_w,
    MEAN: tl.constexpr, HAS_X: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Part of one frame of one channel per program. ``starts``: origins per axis; ``most``: covering tiles at most."""
    pid = tl.program_id(0)
    frame = pid // (n_blocks_h * n_blocks_w)
    i = frame % F
    c = (frame // F % C).to(tl.int64)
    b = (frame // F // C).to(tl.int64)
    j = pid // n_blocks_w % n_blocks_h * BLOCK_H + tl.arange(0, BLOCK_H)
    k = pid % n_blocks_w * BLOCK_W + tl.arange(0, BLOCK_W)
    first_f = tl.load(cover_ptr + 2 * i)
    count_f = tl.load(cover_ptr + 2 * i + 1)
    first_h = tl.load(cover_ptr + 2 * (F + j), mask=j < H, other=0)
    count_h = tl.load(cover_ptr + 2 * (F + j) + 1, mask=j < H, other=0)
    first_w = tl.load(cover_ptr + 2 * (F + H + k), mask=k < W, other=0)
    count_w = tl.load(cover_ptr + 2 * (F + H + k) + 1, mask=k < W, other=0)
    base = tiles_ptr + b * stride_tiles_b + c * stride_tiles_c
    total = tl.zeros((BLOCK_H, BLOCK_W), dtype=tl.float32)
    for t_f in range(first_f, first_f + count_f):
        slab = base + (i - tl.load(starts_ptr + t_f)).to(tl.int64) * stride_tiles_f
        for near_h in range(most_h):
            t_h = first_h + near_h
            mask_h = near_h < count_h
            tile_j = j - tl.load(starts_ptr + n_tiles_f + t_h, mask=mask_h, other=0)
            t = (t_f * n_tiles_h + t_h) * n_tiles_w
            rows = slab + t.to(tl.int64) * stride_tiles_t + tile_j.to(tl.int64) * stride_tiles_h
            for near_w in range(most_w):
                t_w = first_w + near_w
                mask_w = near_w < count_w
                tile_k = k - tl.load(starts_ptr + n_tiles_f + n_tiles_h + t_w, mask=mask_w, other=0)
                cols = t_w.to(tl.int64) * stride_tiles_t + tile_k.to(tl.int64) * stride_tiles_w
                mask = mask_h[:, None] & mask_w[None, :]
                total += tl.load(rows[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    mask = (j < H)[:, None] & (k < W)[None, :]
    if MEAN:
        total /= tl.where(mask, count_f * count_h[:, None] * count_w[None, :], 1).to(tl.float32)
    total *= beta
    if HAS_X:
        rows = x_ptr + b * stride_x_b + c * stride_x_c + i.to(tl.int64) * stride_x_f + j.to(tl.int64) * stride_x_h
        cols = k.to(tl.int64) * stride_x_w
        total += alpha * tl.load(rows[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    rows = out_ptr + (frame.to(tl.int64) * H + j) * W
    tl.store(rows[:, None] + k[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


@functools.lru_cache(maxsize=64)
def _tables(plan: Plan, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For the kernels, int32 on ``device``: origins, (first tile, number) per coordinate, origins per axis."""
    cover = [(n.start, len(n)) for axis in plan.axes or () for a, b, n in axis.cells() for _ in range(a, b)]
    starts = [origin for axis in plan.axes or () for origin in axis.origins]
    return tuple(torch.tensor(rows, dtype=torch.int32, device=device) for rows in (plan.origins, cover, starts))  # type: ignore[return-value]


def _blocks(height: int, width: int) -> dict[str, int]:
    """How a frame is cut into blocks: never much larger than itself."""
    block_h = min(BLOCK_H, triton.next_power_of_2(height))
    block_w = min(BLOCK_W, triton.next_power_of_2(width))
    return {
        "n_blocks_h": triton.cdiv(height, block_h),
        "n_blocks_w": triton.cdiv(width, block_w),
        "BLOCK_H": block_h,
        "BLOCK_W": block_w,
    }


def launch_extract(video: Tensor, plan: Plan, tile: Sequence[int], mean: bool, scale: float) -> Tensor:
    b, c, f, h, _ = video.shape
    t = len(plan.origins)
    out = video.new_empty(b, t, c, *tile)
    blocks = _blocks(tile[1], tile[2])
    programs = b * t * c * tile[0] * blocks["n_blocks_h"] * blocks["n_blocks_w"]
    origins, cover, _ = _tables(plan, video.device)
    with torch.cuda.device_of(video):
        _extract_tiles_kernel[(programs,)](
            video, out, origins, cover, scale, *video.stride(), t, c, f, h, *tile, MEAN=mean, **blocks
        )
    return out


def launch_average(
    tiles: Tensor, plan: Plan, size: Sequence[int], x: Tensor | None, alpha: float, beta: float, mean: bool
) -> Tensor:
    """For plans with ``axes``."""
    if plan.axes is None:
        raise ValueError("plan: got origins that are no product grid, expected one with axes")
    b, _, c = tiles.shape[:3]
    out = tiles.new_empty(b, c, *size)
    blocks = _blocks(size[1], size[2])
    programs = b * c * size[0] * blocks["n_blocks_h"] * blocks["n_blocks_w"]
    _, cover, starts = _tables(plan, tiles.device)
    grid = [len(axis.origins) for axis in plan.axes]
    most = [max(axis.counts()) for axis in plan.axes[1:]]
    with torch.cuda.device_of(tiles):
        _average_tiles_kernel[(programs,)](
            tiles, tiles if x is None else x, out, starts, cover, alpha, beta,
            *tiles.stride(), *(tiles.stride()[:5] if x is None else x.stride()), c, *size, *grid, *most,
            MEAN=mean, HAS_X=x is not None, **blocks,
        )  # fmt: skip
    return out


def aot_specs() -> list[KernelSpec]:
    """Every kernel in every configuration, for compilation without a GPU."""
    names = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16"}
    specs = []
    for (name, pointer), mean in itertools.product(names.items(), (False, True)):
        strides = {f"stride_video_{a}": "i64" for a in "bcfhw"}
        sizes = dict.fromkeys(("T", "C", "F", "H", "tile_f", "tile_h", "tile_w", "n_blocks_h", "n_blocks_w"), "i32")
        specs.append(
            KernelSpec(
                f"extract_tiles[{name},{'mean' if mean else 'plain'}]",
                _extract_tiles_kernel,
                {"video_ptr": pointer, "out_ptr": pointer, "origins_ptr": "*i32", "cover_ptr": "*i32", "scale": "fp32"}
                | strides | sizes | dict.fromkeys(("MEAN", "BLOCK_H", "BLOCK_W"), "constexpr"),
                {"MEAN": mean, "BLOCK_H": 4, "BLOCK_W": 128},
                aligned=("video_ptr", "out_ptr", "origins_ptr", "cover_ptr"),
            )
        )  # fmt: skip
    for (name, pointer), mean, has_x in itertools.product(names.items(), (False, True), (False, True)):
        strides = {f"stride_tiles_{a}": "i64" for a in "btcfhw"} | {f"stride_x_{a}": "i64" for a in "bcfhw"}
        counts = ["n_tiles_f", "n_tiles_h", "n_tiles_w", "most_h", "most_w", "n_blocks_h", "n_blocks_w"]
        specs.append(
            KernelSpec(
                f"average_tiles[{name},{'mean' if mean else 'sum'}{',x' if has_x else ''}]",
                _average_tiles_kernel,
                {"tiles_ptr": pointer, "x_ptr": pointer, "out_ptr": pointer, "starts_ptr": "*i32", "cover_ptr": "*i32"}
                | {"alpha": "fp32", "beta": "fp32"} | strides | dict.fromkeys(("C", "F", "H", "W"), "i32")
                | dict.fromkeys(counts, "i32")
                | dict.fromkeys(("MEAN", "HAS_X", "BLOCK_H", "BLOCK_W"), "constexpr"),
                {"MEAN": mean, "HAS_X": has_x, "BLOCK_H": 4, "BLOCK_W": 128},
                aligned=("tiles_ptr", "x_ptr", "out_ptr", "starts_ptr", "cover_ptr"),
            )
        )  # fmt: skip
    return specs
