"""Patch extraction: crop a box out of a video and shrink it with an area filter (paper eq. 6).

    out[b, c, i, j, k] = sum over pixels (p, q, r) of Wf[b, i, p] * Wh[b, j, q] * Ww[b, k, r] * video[b, c, p, q, r]

with ``video`` ``[B, C, F, H, W]``, ``box`` ``[B, 6]`` and ``out`` ``[B, C, f, h, w]``. A row of ``W`` is the share of
each pixel in a window of ``max(scale / n, 1 / resolution)`` around the output's centre (``reference.area_weights``), so
it is zero but for a few neighbours. Only the pixels under the box are read: ``footprint * itemsize(video)`` bytes (a
uint8 video is converted after the crop), and ``out`` is written. Backward gathers too: a pixel adds up the outputs
whose windows touch it, a range in closed form, without atomics and so repeatable bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from hpdm_kernels import reference
from hpdm_kernels._backend import resolve, unmixed
from hpdm_kernels._checks import FLOATS, check_boxes, check_tensor, check_triple
from hpdm_kernels.patches.triton_backend import launch_backward, launch_forward

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


# Output frames are made in groups whose footprint has about this many elements, so that the converted crop of a uint8
# video stays small and in the cache.
CPU_PIECE = 1 << 20

# Evenly spaced windows of at most this many pixels are added up tap by tap: 2 to 4 times faster than a product.
MOST_TAPS = 16


@dataclass(frozen=True)
class _Filter:
    """The filter of one axis of one sample on the pixels it touches: ``first`` to ``first + length - 1``.

    With a ``step``, output ``i`` is ``sum_k weight[k, i] * pixel[first + step * i + k]`` with ``weight`` ``[K, n]``,
    else ``weight @ pixels`` with ``weight`` ``[n, length]``.
    """

    first: int
    length: int
    step: int
    weight: Tensor
    shrink: float

    def is_copy(self) -> bool:
        """A window of one pixel that one tap covers is that pixel: its weight is 1."""
        return self.step == 1 and len(self.weight) == 1

    def rows(self, start: int, stop: int) -> _Filter:
        """The same filter for outputs ``start`` to ``stop - 1``."""
        if self.step:
            first, length = self.step * start, self.step * (stop - 1 - start) + len(self.weight)
            return replace(self, first=self.first + first, length=length, weight=self.weight[:, start:stop])
        used = self.weight[start:stop].ne(0).any(dim=0).nonzero()
        first, last = int(used[0]), int(used[-1])
        weight = self.weight[start:stop, first : last + 1]
        return replace(self, first=self.first + first, length=last + 1 - first, weight=weight)

    def _tap(self, x: Tensor, axis: int, k: int) -> tuple[Tensor, Tensor]:
        """The pixels that tap ``k`` reads for each output, and its weights."""
        n = self.weight.shape[1]
        index = [slice(None)] * 4
        index[1 + axis] = slice(k, k + self.step * (n - 1) + 1, self.step)
        return x[tuple(index)], self.weight[k].view([n if a == axis else 1 for a in range(3)])

    def apply(self, x: Tensor, axis: int, out: Tensor | None = None) -> Tensor:
        """Filters ``[C, F, H, W]`` along ``axis`` (0, 1, 2) of its pixels, into ``out`` if that is given."""
        if not self.step:
            product = _multiply(self.weight, x, axis)
            return product if out is None else out.copy_(product)
        if len(self.weight) == 2:
            # The two weights add up to 1: one pass over the data instead of two.
            return torch.lerp(self._tap(x, axis, 0)[0], *self._tap(x, axis, 1), out=out)
        out = torch.mul(*self._tap(x, axis, 0), out=out)
        for k in range(1, len(self.weight)):
            out.addcmul_(*self._tap(x, axis, k))
        return out

    def apply_transposed(self, grad: Tensor, axis: int) -> Tensor:
        if self.step:
            out = grad.new_zeros([self.length if a == axis + 1 else n for a, n in enumerate(grad.shape)])
            for k in range(len(self.weight)):
                pixels, weight = self._tap(out, axis, k)
                pixels.addcmul_(grad, weight)
            return out
        return _multiply(self.weight.mT, grad, axis)


def _multiply(matrix: Tensor, x: Tensor, axis: int) -> Tensor:
    if axis == 2:
        return x @ matrix.mT
    if axis == 1:
        return matrix @ x
    return (matrix @ x.flatten(2)).unflatten(2, x.shape[2:])


def _filters(box: Tensor, size: Sequence[int], video: Sequence[int], work: torch.dtype) -> list[list[_Filter]]:
    """``reference.area_weights`` on the footprint alone, per sample and axis."""
    even = [[_even_filter(*axis, work) for axis in zip(row[:3], row[3:], size, video)] for row in box.detach().tolist()]
    if all(one is not None for row in even for one in row):
        return cast(list[list[_Filter]], even)
    return [
        [first or second for first, second in zip(*rows)] for rows in zip(even, _any_filters(box, size, video, work))
    ]


def _even_filter(offset: float, scale: float, n: int, pixels: int, work: torch.dtype) -> _Filter | None:
    """Windows of a whole number of pixels, as all levels of a pyramid have, lie alike: one set of weights for all.

    No array operations: with cold caches those take 0.3 ms, longer than filtering a patch of 3x16x64x64 (0.2 ms).
    """
    width = scale * pixels / n
    if not width.is_integer() or not 1 <= width < MOST_TAPS:
        return None
    step, low = int(width), offset * pixels
    if abs(low - round(low)) < reference.EDGE_SNAP:
        low = round(low)
    first = math.floor(low)
    part = low - first
    weight = [(1 - part) / step, *[1 / step] * (step - 1)] + ([part / step] if part else [])
    length = step * (n - 1) + len(weight)
    if first < 0 or first + length > pixels:
        return None
    return _Filter(first, length, step, torch.tensor(weight, dtype=work)[:, None].expand(-1, n), n / length)


def _any_filters(box: Tensor, size: Sequence[int], video: Sequence[int], work: torch.dtype) -> list[list[_Filter]]:
    """Filters of any windows.

    All samples and axes at once and in numpy: the cost is the number of small operations, and PyTorch's cost four
    times as much each. One sample takes about 90 us, four take 120 us.
    """
    rows = box.detach().to(work).numpy().reshape(-1, 2, 3, 1)
    real = rows.dtype
    offset, scale = rows[:, 0], rows[:, 1]
    outputs, pixels = np.array(size, real)[:, None], np.array(video, real)[:, None]
    # [B, 3, longest axis]: the others repeat their last output.
    i = np.minimum(np.arange(max(size), dtype=real), outputs - 1)
    width = scale * pixels / outputs
    centre = (offset + scale * ((i + 0.5) / outputs)) * pixels
    half = np.maximum(width, 1) / 2
    low, high = _snap(np.stack((centre - half, centre + half)))
    first = np.minimum(np.maximum(np.floor(low[..., :1]), 0), pixels - 1)
    last = np.minimum(np.maximum(np.ceil(high[..., -1:]), first + 1), pixels)
    # A step and a number of taps serve an axis if all windows (what of them is inside of the video) fit.
    step = np.maximum(np.rint(width), 1)
    taps = last - first - step * (outputs - 1)
    start = first + step * i
    fit = (np.maximum(low, 0) >= start) & (np.minimum(high, pixels) <= start + taps) & (taps <= MOST_TAPS)
    taps *= fit.all(axis=-1, keepdims=True)
    k = np.arange(max(0, taps.max()), dtype=real)[:, None]
    weights = _overlap(low[:, :, None], high[:, :, None], start[:, :, None] + k, pixels[:, None])
    filters: list[list[_Filter]] = []
    for b, sample in enumerate(np.concatenate((first, last, step, taps), axis=-1).astype(int).tolist()):
        filters.append([])
        for a, (begin, end, stride, count) in enumerate(sample):
            n = size[a]
            if count > 0:
                weight = weights[b, a, :count, :n]
            else:
                stride = 0
                weight = _overlap(
                    low[b, a, :n, None], high[b, a, :n, None], np.arange(begin, end, dtype=real), pixels[a]
                )
            filters[b].append(_Filter(begin, end - begin, stride, torch.from_numpy(weight), n / (end - begin)))
    return filters


def _overlap(low: np.ndarray, high: np.ndarray, pixel: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """The share of ``pixel`` in the window from ``low`` to ``high``; border pixels reach beyond the video."""
    left = np.where(pixel == 0, -np.inf, pixel)
    right = np.where(pixel == pixels - 1, np.inf, pixel + 1)
    return np.maximum(np.minimum(high, right) - np.maximum(low, left), 0) / (high - low)


def _snap(edge: np.ndarray) -> np.ndarray:
    whole = np.rint(edge)
    return np.where(np.abs(edge - whole) < reference.EDGE_SNAP, whole, edge)


def _whole_filters(box: Tensor, size: Sequence[int], video: Sequence[int], work: torch.dtype) -> list[list[_Filter]]:
    """Not cropped: on a GPU the footprint is not known without waiting for it."""
    box = box.to(work)
    matrices = [reference.area_weights(box[:, a], box[:, 3 + a], size[a], video[a]) for a in range(3)]
    return [
        [_Filter(0, video[a], 0, matrices[a][b], size[a] / video[a]) for a in range(3)] for b in range(box.shape[0])
    ]


def _shrink_first(filters: Sequence[_Filter]) -> list[int]:
    """Axes in the order of their filters: the one that shrinks most first (the slowest axis first on a tie)."""
    return sorted((a for a in range(3) if not filters[a].is_copy()), key=lambda a: filters[a].shrink)


def _crop(video: Tensor, filters: Sequence[_Filter]) -> Tensor:
    for axis, one in enumerate(filters):
        video = video.narrow(1 + axis, one.first, one.length)
    return video


def _forward_torch(video: Tensor, box: Tensor, size: Sequence[int]) -> Tensor:
    dtype = torch.float32 if video.dtype is torch.uint8 else video.dtype
    work = reference.coordinate_dtype(dtype)
    out = video.new_empty(*video.shape[:2], *size, dtype=dtype)
    on_cpu = video.device.type == "cpu"
    for b, filters in enumerate((_filters if on_cpu else _whole_filters)(box, size, video.shape[2:], work)):
        footprint = video.shape[1] * filters[0].length * filters[1].length * filters[2].length
        groups = min(size[0], -(-footprint // CPU_PIECE)) if on_cpu else 1
        order = _shrink_first(filters)
        for g in range(groups):
            start, stop = size[0] * g // groups, size[0] * (g + 1) // groups
            some = [filters[0].rows(start, stop), *filters[1:]] if groups > 1 else filters
            x = _crop(video[b], some)
            if order:
                x = x.to(work)
            patch = out[b, :, start:stop]
            for axis in order:
                in_place = axis == order[-1] and out.dtype is work
                x = some[axis].apply(x, axis, patch if in_place else None)
            if x is not patch:
                patch.copy_(x)
    return out


def _zeros(size: Sequence[int], like: Tensor) -> Tensor:
    """Zeros from ``calloc`` (through numpy), which relies on fresh memory being zero already where it is large.

    ``torch.zeros`` writes every byte: 12 ms for a video of 50 MB, of which the gradient of a patch fills 2 %. Here
    pages get memory when they are first written, and until then read as zeros; so who writes all over the gradient
    pays for its pages then. PyTorch's profiler does not see this memory, and the storage cannot be resized.
    """
    if like.device.type != "cpu":
        return like.new_zeros(size)
    return torch.from_numpy(np.zeros(math.prod(size) * like.itemsize, np.uint8)).view(like.dtype).view(size)


def _backward_torch(grad: Tensor, box: Tensor, size: Sequence[int]) -> Tensor:
    work = reference.coordinate_dtype(grad.dtype)
    dvideo = _zeros([*grad.shape[:2], *size], grad)
    on_cpu = grad.device.type == "cpu"
    for b, filters in enumerate((_filters if on_cpu else _whole_filters)(box, grad.shape[2:], size, work)):
        x = grad[b].to(work)
        for axis in _shrink_first(filters)[::-1]:
            x = filters[axis].apply_transposed(x, axis)
        _crop(dvideo[b], filters).copy_(x)
    return dvideo


@torch.library.custom_op("hpdm::sample_patches_fwd", mutates_args=())
def _forward_op(video: Tensor, box: Tensor, size: Sequence[int], backend: str) -> Tensor:
    with unmixed(video):
        return (launch_forward if backend == "triton" else _forward_torch)(video, box, size)


@_forward_op.register_fake
def _(video: Tensor, box: Tensor, size: Sequence[int], backend: str) -> Tensor:
    dtype = torch.float32 if video.dtype is torch.uint8 else video.dtype
    return video.new_empty(*video.shape[:2], *size, dtype=dtype)


@torch.library.custom_op("hpdm::sample_patches_bwd", mutates_args=())
def _backward_op(grad: Tensor, box: Tensor, size: Sequence[int], backend: str) -> Tensor:
    with unmixed(grad):
        return (launch_backward if backend == "triton" else _backward_torch)(grad, box, size)


@_backward_op.register_fake
def _(grad: Tensor, box: Tensor, size: Sequence[int], backend: str) -> Tensor:
    return grad.new_empty(*grad.shape[:2], *size)


def _forward_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    video, box, _, ctx.backend = inputs
    ctx.size = video.shape[2:]
    ctx.save_for_backward(box)


def _forward_backward(ctx, grad):  # type: ignore[no-untyped-def]
    if not ctx.needs_input_grad[0]:
        return None, None, None, None
    (box,) = ctx.saved_tensors
    return _backward_op(grad, box, ctx.size, ctx.backend), None, None, None


def _backward_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    grad, box, _, ctx.backend = inputs
    ctx.size = grad.shape[2:]
    ctx.save_for_backward(box)


def _backward_backward(ctx, dgrad):  # type: ignore[no-untyped-def]
    (box,) = ctx.saved_tensors
    return _forward_op(dgrad, box, ctx.size, ctx.backend), None, None, None


_forward_op.register_autograd(_forward_backward, setup_context=_forward_setup)
# The op is linear in the video, so the backward of its backward is the op itself.
_backward_op.register_autograd(_backward_backward, setup_context=_backward_setup)


def sample_patches(video: Tensor, box: Tensor, size: Sequence[int], *, backend: str = "auto") -> Tensor:
    """Crops a box out of each video and resizes it: ``downsample(crop(video; box); size)`` with an area filter.

    Downsampling is antialiased, upsampling interpolates linearly, and a box of scale ``size / resolution`` on whole
    pixels is copied exactly. What of a window lies outside of the video falls on its border pixels.

    Args:
        video: ``[B, C, F, H, W]``, fp16, bf16, fp32 or fp64; gets a gradient (dense; on the CPU, ``"torch"`` leaves
            its zeros to the kernel, so its storage cannot be resized). Or uint8, which does not and gives fp32 patches
            of the same range (0 to 255).
        box: ``[B, 6]`` fp32, ``(offset_f, offset_h, offset_w, scale_f, scale_h, scale_w)`` in fractions of the whole
            video, on ``video``'s device. Gets no gradient.
        size: (frames, height, width) of the patch in pixels.
        backend: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``. ``"triton"`` and ``"reference"`` never wait
            for the GPU; neither does ``"torch"``, which on a GPU multiplies by whole rather than cropped matrices.

    Returns:
        ``[B, C, f, h, w]`` of ``video``'s dtype (fp32 for uint8).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, an unknown backend, or (on the CPU, where looking is free) a box that is
            not inside of the video.
        RuntimeError: ``backend="triton"`` cannot run here.

    Source: paper eq. 6.
    """
    video = check_tensor("video", video, ("B", "C", "F", "H", "W"), dtypes=(*FLOATS, torch.uint8))
    box = check_boxes("box", box, video.shape[0], ("video", video))
    size = check_triple("size", size)
    chosen = resolve(backend, "sample_patches", video, TRITON_DTYPES)
    if chosen == "reference":
        return reference.sample_patches(video, box, size)
    return _forward_op(video, box, size, chosen)
