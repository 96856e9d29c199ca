"""Kernels of ``tiles.py``: every element of the result is gathered by one program, so there are no atomics.

Offsets are int64, since the tiles of a long video exceed 2**31 elements. A program works on rows and columns of one
frame: what depends on the frame is scalar, what depends on a row or a column is a short vector. Which tiles cover a
coordinate is looked up in small tables, made once per set of origins and device.

Columns come in groups of ``VECTOR`` neighbours that are covered by the same tiles and lie side by side in each of
them, so one lookup serves a group, and a group is one load of 16 bytes. That takes origins, widths and strides in
multiples of 16 bytes; otherwise groups are of one column.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hpdm_kernels._triton import INTERPRETED, KernelSpec, jit, tl, triton
from hpdm_kernels.tiles.geometry import Plan
from hpdm_kernels.tiles.huge_pages import new_empty

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows and columns of one frame per program. The interpreter pays per program and operation, not per pixel.
BLOCK_H, BLOCK_W = (1 << 8, 1 << 8) if INTERPRETED else (4, 128)


@jit
def _aligned(at, VECTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """The offsets of groups ``[H, W]`` as those of their columns ``[H, W, VECTOR]``, which are known to be aligned."""
    at = at[:, :, None] + tl.arange(0, VECTOR)[None, None, :]
    return tl.max_contiguous(tl.multiple_of(at, (1, 1, VECTOR)), (1, 1, VECTOR))


@jit
def _extract_tiles_kernel(  # type: ignore[no-untyped-def]
    video_ptr, out_ptr, origins_ptr, cover_ptr, scale,
    stride_video_b, stride_video_c, stride_video_f, stride_video_h, stride_video_w,
    T, C, F, H, tile_f, tile_h, tile_w, n_blocks_h, n_blocks_w,
    MEAN: tl.constexpr, VECTOR: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Part of one frame of one channel of one tile per program. ``cover``: first tile and number, per coordinate."""
    pid = tl.program_id(0)
    frame = pid // (n_blocks_h * n_blocks_w)
    tile_i = frame % tile_f
    c = frame // tile_f % C
    t = frame // tile_f // C % T
    b = frame // tile_f // C // T
    tile_j = pid // n_blocks_w % n_blocks_h * BLOCK_H + tl.arange(0, BLOCK_H)
    tile_k = (pid % n_blocks_w * BLOCK_W + tl.arange(0, BLOCK_W)) * VECTOR
    i = tl.load(origins_ptr + 3 * t) + tile_i
    j = tl.load(origins_ptr + 3 * t + 1) + tile_j
    k = tl.load(origins_ptr + 3 * t + 2) + tile_k
    mask = ((tile_j < tile_h)[:, None] & (tile_k < tile_w)[None, :])[:, :, None]
    base = b.to(tl.int64) * stride_video_b + c.to(tl.int64) * stride_video_c + i.to(tl.int64) * stride_video_f
    rows = base + j.to(tl.int64) * stride_video_h
    cols = k.to(tl.int64) * stride_video_w
    at = _aligned(rows[:, None] + cols[None, :], VECTOR)
    value = tl.load(video_ptr + at, mask=mask, other=0.0).to(tl.float32) * scale
    if MEAN:
        count_f = tl.load(cover_ptr + 2 * i + 1)
        count_h = tl.load(cover_ptr + 2 * (F + j) + 1, mask=tile_j < tile_h, other=1)
        count_w = tl.load(cover_ptr + 2 * (F + H + k) + 1, mask=tile_k < tile_w, other=1)
        value /= (count_f * count_h[:, None] * count_w[None, :]).to(tl.float32)[:, :, None]
    rows = (frame.to(tl.int64) * tile_h + tile_j) * tile_w
    tl.store(out_ptr + _aligned(rows[:, None] + tile_k[None, :], VECTOR), value.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _average_tiles_kernel(  # type: ignore[no-untyped-def]
    tiles_ptr, sums_ptr, x_ptr, out_ptr, starts_ptr, cover_ptr, alpha, beta,
    stride_tiles_b, stride_tiles_t, stride_tiles_c, stride_tiles_f, stride_tiles_h, stride_tiles_w,
    stride_x_b, stride_x_c, stride_x_f, stride_x_h, stride_x_w,
    C, F, H, W, n_tiles_f, n_tiles_h, n_tiles_w, most_f, most_h, most_w, first, stop,
    box_f, box_h, box_w, frames, stop_h, stop_w, n_blocks_h, n_blocks_w,
    ADD: tl.constexpr, SUMS: tl.constexpr, FINISH: tl.constexpr, MEAN: tl.constexpr, HAS_X: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Part of one frame of one channel of a box per program: adds tiles ``first`` to ``stop - 1``, in their order.

    ``ADD``: there are any. ``SUMS``: they are a chunk, and ``sums`` has the tiles before. ``FINISH``: they are the last
    ones, and ``out`` takes the linear step, else ``out`` takes the sums. ``starts``: origins per axis; ``most``:
    covering tiles at most. One loop with the same bounds in all threads: nested ones spilled registers.
    """
    pid = tl.program_id(0)
    frame = pid // (n_blocks_h * n_blocks_w)
    i = box_f + frame % frames
    c = (frame // frames % C).to(tl.int64)
    b = (frame // frames // C).to(tl.int64)
    j = box_h + pid // n_blocks_w % n_blocks_h * BLOCK_H + tl.arange(0, BLOCK_H)
    k = box_w + (pid % n_blocks_w * BLOCK_W + tl.arange(0, BLOCK_W)) * VECTOR
    first_f = tl.load(cover_ptr + 2 * i)
    count_f = tl.load(cover_ptr + 2 * i + 1)
    first_h = tl.load(cover_ptr + 2 * (F + j), mask=j < stop_h, other=0)
    count_h = tl.load(cover_ptr + 2 * (F + j) + 1, mask=j < stop_h, other=0)
    first_w = tl.load(cover_ptr + 2 * (F + H + k), mask=k < stop_w, other=0)
    count_w = tl.load(cover_ptr + 2 * (F + H + k) + 1, mask=k < stop_w, other=0)
    rows = (((b * C + c) * F + i) * H + j) * W
    at = _aligned(rows[:, None] + k[None, :], VECTOR)
    mask = (j < stop_h)[:, None] & (k < stop_w)[None, :]
    total = tl.zeros((BLOCK_H, BLOCK_W, VECTOR), dtype=tl.float32)
    if SUMS:
        # A voxel's first tile starts its sum: the buffer is never cleared.
        started = (first_f * n_tiles_h + first_h[:, None]) * n_tiles_w + first_w[None, :] < first
        total += tl.load(sums_ptr + at, mask=(mask & started)[:, :, None], other=0.0)
    if ADD:
        base = b * stride_tiles_b + c * stride_tiles_c
        for near in range(most_f * most_h * most_w):
            near_f, near_h, near_w = near // most_w // most_h, near // most_w % most_h, near % most_w
            t_f, t_h, t_w = first_f + near_f, first_h + near_h, first_w + near_w
            mask_h = near_h < tl.where(near_f < count_f, count_h, 0)
            mask_w = near_w < count_w
            tile_i = i - tl.load(starts_ptr + tl.minimum(t_f, n_tiles_f - 1))
            tile_j = j - tl.load(starts_ptr + n_tiles_f + t_h, mask=mask_h, other=0)
            tile_k = k - tl.load(starts_ptr + n_tiles_f + n_tiles_h + t_w, mask=mask_w, other=0)
            t = (t_f * n_tiles_h + t_h) * n_tiles_w - first
            rows = base + t.to(tl.int64) * stride_tiles_t
            rows += tile_i.to(tl.int64) * stride_tiles_f + tile_j.to(tl.int64) * stride_tiles_h
            cols = t_w.to(tl.int64) * stride_tiles_t + tile_k.to(tl.int64) * stride_tiles_w
            here = mask_h[:, None] & mask_w[None, :]
            if SUMS:
                number = t[:, None] + t_w[None, :]
                here = here & (number >= 0) & (number < stop - first)
            tile = tiles_ptr + _aligned(rows[:, None] + cols[None, :], VECTOR)
            total += tl.load(tile, mask=here[:, :, None], other=0.0).to(tl.float32)
    if FINISH:
        if MEAN:
            count = count_f * count_h[:, None] * count_w[None, :]
            total /= tl.where(mask, count, 1).to(tl.float32)[:, :, None]
        total *= beta
        if HAS_X:
            rows = b * stride_x_b + c * stride_x_c + i.to(tl.int64) * stride_x_f + j.to(tl.int64) * stride_x_h
            cols = k.to(tl.int64) * stride_x_w
            x = x_ptr + _aligned(rows[:, None] + cols[None, :], VECTOR)
            total += alpha * tl.load(x, mask=mask[:, :, None], other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask[:, :, None])


@functools.lru_cache(maxsize=64)
def _tables(plan: Plan, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For the kernels, int32 on ``device``: origins, (first tile, number) per coordinate, origins per axis."""
    cover = [(n.start, len(n)) for axis in plan.axes or () for a, b, n in axis.cells() for _ in range(a, b)]
    starts = [origin for axis in plan.axes or () for origin in axis.origins]
    return tuple(torch.tensor(rows, dtype=torch.int32, device=device) for rows in (plan.origins, cover, starts))  # type: ignore[return-value]


@functools.lru_cache(maxsize=64)
def _common_width(plan: Plan) -> int:
    """The greatest common divisor of all first columns."""
    return math.gcd(*(k for *_, k in plan.origins))


def _vector(plan: Plan, tile_w: int, *tensors: Tensor) -> int:
    """Columns per group: 16 bytes of the tensor with the smallest elements, or 1 where something is not aligned."""
    vector = 16 // min(t.element_size() for t in tensors)
    aligned = _common_width(plan) % vector == 0 and tile_w % vector == 0
    for t in tensors:
        outer = [stride for n, stride in zip(t.shape[:-1], t.stride()) if n > 1]
        aligned = aligned and t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(n % vector == 0 for n in outer)
    return vector if aligned else 1


def _rows(vector: int) -> int:
    """Rows of a block. With more ptxas spilled: single columns on sm_90, groups of eight on sm_90 and sm_100."""
    return BLOCK_H if vector > 1 else BLOCK_H // 2


def _blocks(height: int, width: int, vector: int) -> dict[str, int]:
    """How a frame is cut into blocks: never much larger than itself."""
    block_h = min(_rows(vector), triton.next_power_of_2(height))
    block_w = min(BLOCK_W, triton.next_power_of_2(width)) // vector
    return {
        "n_blocks_h": triton.cdiv(height, block_h),
        "n_blocks_w": triton.cdiv(width, block_w * vector),
        "VECTOR": vector,
        "BLOCK_H": block_h,
        "BLOCK_W": block_w,
    }


def launch_extract(video: Tensor, plan: Plan, tile: Sequence[int], mean: bool, scale: float) -> Tensor:
    b, c, f, h, _ = video.shape
    t = len(plan.origins)
    out = new_empty(video, b, t, c, *tile)
    blocks = _blocks(tile[1], tile[2], _vector(plan, tile[2], video, out))
    programs = b * t * c * tile[0] * blocks["n_blocks_h"] * blocks["n_blocks_w"]
    origins, cover, _ = _tables(plan, video.device)
    with torch.cuda.device_of(video):
        _extract_tiles_kernel[(programs,)](
            video, out, origins, cover, scale, *video.stride(), t, c, f, h, *tile, MEAN=mean, **blocks
        )
    return out


def _launch(
    tiles: Tensor | None,
    sums: Tensor | None,
    x: Tensor | None,
    out: Tensor,
    plan: Plan,
    alpha: float,
    beta: float,
    chunk: tuple[int, int],
    box: Sequence[tuple[int, int]],
    *,
    finish: bool,
    mean: bool,
) -> None:
    if plan.axes is None:
        raise ValueError("plan: got origins that are no product grid, expected one with axes")
    b, c = out.shape[:2]
    start, stop = zip(*box)
    vector = _vector(plan, plan.axes[2].tile, *(t for t in (tiles, sums, x, out) if t is not None))
    blocks = _blocks(stop[1] - start[1], stop[2] - start[2], vector)
    frames = stop[0] - start[0]
    _, cover, starts = _tables(plan, out.device)
    grid = [len(axis.origins) for axis in plan.axes]
    most = [max(axis.counts()) for axis in plan.axes]
    with torch.cuda.device_of(out):
        _average_tiles_kernel[(b * c * frames * blocks["n_blocks_h"] * blocks["n_blocks_w"],)](
            *(out if t is None else t for t in (tiles, sums, x)), out, starts, cover, alpha, beta,
            *((0,) * 6 if tiles is None else tiles.stride()), *((0,) * 5 if x is None else x.stride()),
            c, *out.shape[2:], *grid, *most, *chunk, *start, frames, *stop[1:],
            ADD=tiles is not None, SUMS=sums is not None, FINISH=finish, MEAN=mean, HAS_X=x is not None, **blocks,
        )  # fmt: skip


def launch_average(
    tiles: Tensor, plan: Plan, size: Sequence[int], x: Tensor | None, alpha: float, beta: float, mean: bool
) -> Tensor:
    """For plans with ``axes``."""
    out = new_empty(tiles, tiles.shape[0], tiles.shape[2], *size)
    whole = [(0, n) for n in size]
    _launch(tiles, None, x, out, plan, alpha, beta, (0, len(plan.origins)), whole, finish=True, mean=mean)
    return out


def launch_add(sums: Tensor, tiles: Tensor, plan: Plan, first: int) -> None:
    """Adds the tiles from number ``first`` on; ``sums [B, C, F, H, W]`` fp32 need not be cleared before."""
    chunk = (first, first + tiles.shape[1])
    _launch(tiles, sums, None, sums, plan, 0.0, 1.0, chunk, plan.box(*chunk), finish=False, mean=False)


def launch_step(sums: Tensor, plan: Plan, dtype: torch.dtype, x: Tensor | None, alpha: float, beta: float) -> Tensor:
    """``alpha * x + beta * sums / counts``, after the last tile."""
    out = new_empty(sums, *sums.shape, dtype=dtype)
    none_left, whole = (len(plan.origins),) * 2, [(0, n) for n in sums.shape[2:]]
    _launch(None, sums, x, out, plan, alpha, beta, none_left, whole, finish=True, mean=True)
    return out


_SIZES = {
    _extract_tiles_kernel: "T C F H tile_f tile_h tile_w n_blocks_h n_blocks_w",
    _average_tiles_kernel: "C F H W n_tiles_f n_tiles_h n_tiles_w most_f most_h most_w first stop "
    "box_f box_h box_w frames stop_h stop_w n_blocks_h n_blocks_w",
}


def aot_specs() -> list[KernelSpec]:
    """Every kernel in every configuration, for compilation without a GPU."""
    elements = {"fp32": 4, "bf16": 2, "fp16": 2}
    sizes = {kernel: dict.fromkeys(names.split(), "i32") for kernel, names in _SIZES.items()}
    specs = []
    for (name, size), mean, aligned in itertools.product(elements.items(), (False, True), (True, False)):
        pointers = {"video_ptr": f"*{name}", "out_ptr": f"*{name}", "origins_ptr": "*i32", "cover_ptr": "*i32"}
        strides = dict.fromkeys((f"stride_video_{a}" for a in "bcfhw"), "i64")
        blocks = _aot_blocks(16 // size if aligned else 1)
        specs.append(
            KernelSpec(
                f"extract_tiles[{name},{'mean' if mean else 'plain'}{'' if aligned else ',unaligned'}]",
                _extract_tiles_kernel,
                pointers | {"scale": "fp32"} | strides | sizes[_extract_tiles_kernel]
                | dict.fromkeys(("MEAN", *blocks), "constexpr"),
                {"MEAN": mean} | blocks,
                aligned=tuple(pointers),
            )
        )  # fmt: skip
    strides = dict.fromkeys([f"stride_tiles_{a}" for a in "btcfhw"] + [f"stride_x_{a}" for a in "bcfhw"], "i64")
    # What is asked for, then ADD, SUMS, FINISH, MEAN.
    uses = {
        "average_tiles": {"sum": (True, False, True, False), "mean": (True, False, True, True)},
        "add_tiles": {"": (True, True, False, False)},
        "step_tiles": {"": (False, True, True, True)},
    }
    kinds = [(op, kind, flags) for op, flavours in uses.items() for kind, flags in flavours.items()]
    for (op, kind, flags), (name, size), has_x, aligned in itertools.product(
        kinds, elements.items(), (False, True), (True, False)
    ):
        if op == "add_tiles" and has_x:
            continue
        out = "*fp32" if op == "add_tiles" else f"*{name}"
        pointers = {"tiles_ptr": f"*{name}", "sums_ptr": "*fp32", "x_ptr": f"*{name}", "out_ptr": out}
        pointers |= {"starts_ptr": "*i32", "cover_ptr": "*i32"}
        constexprs: dict[str, int] = dict(zip(("ADD", "SUMS", "FINISH", "MEAN", "HAS_X"), (*flags, has_x)))
        constexprs |= _aot_blocks(16 // size if aligned else 1)
        options = [name, kind, "x" if has_x else "", "" if aligned else "unaligned"]
        specs.append(
            KernelSpec(
                f"{op}[{','.join(filter(None, options))}]",
                _average_tiles_kernel,
                pointers | {"alpha": "fp32", "beta": "fp32"} | strides | sizes[_average_tiles_kernel]
                | dict.fromkeys(constexprs, "constexpr"),
                constexprs,
                aligned=tuple(pointers),
            )
        )  # fmt: skip
    return specs


def _aot_blocks(vector: int) -> dict[str, int]:
    """The blocks of a large frame on a GPU."""
    return {"VECTOR": vector, "BLOCK_H": _rows(vector), "BLOCK_W": BLOCK_W // vector}
