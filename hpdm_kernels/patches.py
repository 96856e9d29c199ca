"""Patch extraction: crop a box out of a video and shrink it with an area filter (paper eq. 6).

    out[b, c, i, j, k] = sum over pixels (p, q, r) of Wf[b, i, p] * Wh[b, j, q] * Ww[b, k, r] * video[b, c, p, q, r]

with ``video`` ``[B, C, F, H, W]``, ``box`` ``[B, 6]`` and ``out`` ``[B, C, f, h, w]``. A row of ``W`` is the share of
each pixel in a window of ``max(scale / n, 1 / resolution)`` around the output's centre (``reference.area_weights``), so
it is zero but for a few neighbours. Only the pixels under the box are read: ``footprint * itemsize(video)`` bytes (a
uint8 video is converted after the crop), and ``out`` is written. Backward gathers too: a pixel adds up the outputs
whose windows touch it, a range in closed form, without atomics and so repeatable bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpdm_kernels import reference
from hpdm_kernels._backend import resolve, unmixed
from hpdm_kernels._checks import FLOATS, check_boxes, check_tensor, check_triple
from hpdm_kernels.patches_triton import launch_backward, launch_forward

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
        return self.step == 1 and len(self.weight) == 1 and bool((self.weight == 1).all())

    def rows(self, start: int, stop: int) -> _Filter:
        """The same filter for outputs ``start`` to ``stop - 1``."""
        if self.step:
            first, length = self.step * start, self.step * (stop - 1 - start) + len(self.weight)
            return _Filter(self.first + first, length, self.step, self.weight[:, start:stop], self.shrink)
        used = self.weight[start:stop].ne(0).any(dim=0).nonzero()
        first, last = int(used[0]), int(used[-1])
        weight = self.weight[start:stop, first : last + 1]
        return _Filter(self.first + first, last + 1 - first, 0, weight, self.shrink)

    def _tap(self, x: Tensor, axis: int, k: int) -> tuple[Tensor, Tensor]:
        """The pixels that tap ``k`` reads for each output, and its weights."""
        n = self.weight.shape[1]
        index = [slice(None)] * 4
        index[1 + axis] = slice(k, k + self.step * (n - 1) + 1, self.step)
        return x[tuple(index)], self.weight[k].view([n if a == axis else 1 for a in range(3)])

    def apply(self, x: Tensor, axis: int) -> Tensor:
        """Filters ``[C, F, H, W]`` along ``axis`` (0, 1, 2) of its pixels."""
        if self.step:
            out = torch.mul(*self._tap(x, axis, 0))
            for k in range(1, len(self.weight)):
                out.addcmul_(*self._tap(x, axis, k))
            return out
        return _multiply(self.weight, x, axis)

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
    """``reference.area_weights`` on the footprint alone, per sample and axis.

    In numpy, whose small operations cost a quarter of PyTorch's: these would be half of a copy's time otherwise.
    """
    filters: list[list[_Filter]] = []
    for row in box.detach().to(work).numpy():
        filters.append([_axis_filter(*axis) for axis in zip(row[:3], row[3:], size, video)])
    return filters


def _axis_filter(offset: np.floating, scale: np.floating, n: int, resolution: int) -> _Filter:
    real = offset.dtype.type
    centre = (offset + scale * ((np.arange(n, dtype=real) + real(0.5)) / real(n))) * real(resolution)
    half = max(scale * real(resolution) / real(n), real(1)) / real(2)
    low, high = _snap(centre - half), _snap(centre + half)
    first = min(max(int(np.floor(low[0])), 0), resolution - 1)
    last = min(max(int(np.ceil(high[-1])), first + 1), resolution)
    left = np.arange(first, last, dtype=real)
    right = left + real(1)
    if first == 0:
        left[0] = -np.inf
    if last == resolution:
        right[-1] = np.inf
    overlap = np.minimum(high[:, None], right) - np.maximum(low[:, None], left)
    matrix = np.maximum(overlap, 0) / (high - low)[:, None]
    length = last - first
    step = max(1, round(float(scale) * resolution / n))
    taps = length - step * (n - 1)
    if 1 <= taps <= MOST_TAPS:
        i = np.arange(n)
        weight = matrix[i, step * i + np.arange(taps)[:, None]]
        if np.count_nonzero(weight) == np.count_nonzero(matrix):
            return _Filter(first, length, step, torch.from_numpy(weight), n / length)
    return _Filter(first, length, 0, torch.from_numpy(matrix), n / length)


def _snap(edge: np.ndarray) -> np.ndarray:
    whole = np.round(edge)
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
            for axis in order:
                x = some[axis].apply(x, axis)
            out[b, :, start:stop] = x
    return out


def _backward_torch(grad: Tensor, box: Tensor, size: Sequence[int]) -> Tensor:
    work = reference.coordinate_dtype(grad.dtype)
    dvideo = grad.new_zeros(*grad.shape[:2], *size)
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
        video: ``[B, C, F, H, W]``, fp16, bf16, fp32 or fp64; gets a gradient. Or uint8, which does not and gives fp32
            patches of the same range (0 to 255).
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
