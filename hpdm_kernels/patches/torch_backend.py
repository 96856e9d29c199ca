"""Patch extraction in PyTorch: crops the footprint of a box and filters it one axis after the other (paper eq. 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from hpdm_kernels import reference
from hpdm_kernels.boxes import coordinate_dtype

# Output frames are computed in groups whose footprint has about this many elements, so that the converted crop of a
# uint8 video fits in the cache.
CPU_PIECE = 1 << 20

# Evenly spaced windows of at most this many pixels are summed tap by tap, which is faster than a matrix product.
MOST_TAPS = 16


@dataclass(frozen=True)
class _Filter:
    """The filter of one axis of one sample. It reads pixels ``first`` to ``first + length - 1``.

    If ``step > 0``, there are ``K`` taps, ``weight`` is ``[K, n]``, and output ``i`` is
    ``sum_k weight[k, i] * pixel[first + step * i + k]``. If ``step == 0``, ``weight`` is ``[n, length]``, and the
    outputs are ``weight @ pixels``. ``shrink`` is the number of outputs per pixel.
    """

    first: int
    length: int
    step: int
    weight: Tensor
    shrink: float

    def is_copy(self) -> bool:
        """Whether outputs are copies of neighboring pixels: the single tap of a one-pixel window has weight 1."""
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
        """The pixels that tap ``k`` reads for all outputs, a view of ``x``, and the tap's weights."""
        n = self.weight.shape[1]
        index = [slice(None)] * 4
        index[1 + axis] = slice(k, k + self.step * (n - 1) + 1, self.step)
        return x[tuple(index)], self.weight[k].view([n if a == axis else 1 for a in range(3)])

    def apply(self, x: Tensor, axis: int, out: Tensor | None = None) -> Tensor:
        """Filters ``x [C, F, H, W]`` along ``axis`` (0 frames, 1 height, 2 width), into ``out`` if given."""
        if not self.step:
            product = _multiply(self.weight, x, axis)
            return product if out is None else out.copy_(product)
        if len(self.weight) == 2:
            # Two weights that sum to 1 are a linear interpolation: one pass over the data instead of two.
            return torch.lerp(self._tap(x, axis, 0)[0], *self._tap(x, axis, 1), out=out)
        out = torch.mul(*self._tap(x, axis, 0), out=out)
        for k in range(1, len(self.weight)):
            out.addcmul_(*self._tap(x, axis, k))
        return out

    def apply_transposed(self, grad: Tensor, axis: int) -> Tensor:
        """Gradient of the pixels ``[C, F, H, W]`` from ``grad``, that of the outputs, of another size on ``axis``."""
        if self.step:
            out = grad.new_zeros([self.length if a == axis + 1 else n for a, n in enumerate(grad.shape)])
            for k in range(len(self.weight)):
                pixels, weight = self._tap(out, axis, k)
                pixels.addcmul_(grad, weight)
            return out
        return _multiply(self.weight.mT, grad, axis)


def _multiply(matrix: Tensor, x: Tensor, axis: int) -> Tensor:
    """``matrix [n, m]`` times ``x [C, F, H, W]`` along ``axis`` (0 frames, 1 height, 2 width), whose size is ``m``."""
    if axis == 2:
        return x @ matrix.mT
    if axis == 1:
        return matrix @ x
    return (matrix @ x.flatten(2)).unflatten(2, x.shape[2:])


def _filters(box: Tensor, size: Sequence[int], video: Sequence[int], work: torch.dtype) -> list[list[_Filter]]:
    """``reference.area_weights`` restricted to the footprint, per sample and axis.

    Args:
        box: ``[B, 6]``.
        size: (frames, height, width) of the patch.
        video: (frames, height, width) of the video.
        work: dtype of the weights.
    """
    even = [[_even_filter(*axis, work) for axis in zip(row[:3], row[3:], size, video)] for row in box.detach().tolist()]
    if all(filter_ is not None for row in even for filter_ in row):
        return cast(list[list[_Filter]], even)
    general = _general_filters(box, size, video, work)
    return [[fast or slow for fast, slow in zip(*rows)] for rows in zip(even, general)]


def _even_filter(offset: float, scale: float, n: int, pixels: int, work: torch.dtype) -> _Filter | None:
    """The filter of windows of a whole number of pixels, as in all levels of a pyramid; ``None`` for other windows.

    All outputs of such an axis have the same weights. No array operations are used: with cold caches they would take
    longer than filtering a patch.
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


def _general_filters(box: Tensor, size: Sequence[int], video: Sequence[int], work: torch.dtype) -> list[list[_Filter]]:
    """Filters of windows of any size; arguments and result as for :func:`_filters`.

    All samples and axes are computed together and in numpy: the number of small operations decides the cost, and each
    has less overhead in numpy than in PyTorch.
    """
    rows = box.detach().to(work).numpy().reshape(-1, 2, 3, 1)
    real = rows.dtype
    offset, scale = rows[:, 0], rows[:, 1]
    outputs, pixels = np.array(size, real)[:, None], np.array(video, real)[:, None]
    # Output indices, [3, longest axis]: shorter axes repeat their last output.
    i = np.minimum(np.arange(max(size), dtype=real), outputs - 1)
    width = scale * pixels / outputs
    center = (offset + scale * ((i + 0.5) / outputs)) * pixels
    half = np.maximum(width, 1) / 2
    low, high = _snap(np.stack((center - half, center + half)))
    first = np.minimum(np.maximum(np.floor(low[..., :1]), 0), pixels - 1)
    last = np.minimum(np.maximum(np.ceil(high[..., -1:]), first + 1), pixels)
    # Taps can be used on an axis if every window, clipped to the video, lies within its taps. Otherwise taps becomes 0.
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
    """The share of ``pixel`` in the window from ``low`` to ``high``; border pixels extend beyond the video."""
    left = np.where(pixel == 0, -np.inf, pixel)
    right = np.where(pixel == pixels - 1, np.inf, pixel + 1)
    return np.maximum(np.minimum(high, right) - np.maximum(low, left), 0) / (high - low)


def _snap(edge: np.ndarray) -> np.ndarray:
    """Moves edges that differ from a whole pixel only by rounding onto it."""
    whole = np.rint(edge)
    return np.where(np.abs(edge - whole) < reference.EDGE_SNAP, whole, edge)


def _whole_filters(box: Tensor, size: Sequence[int], video: Sequence[int], work: torch.dtype) -> list[list[_Filter]]:
    """Filters that cover whole axes: on a GPU, finding the footprint would require synchronizing to read the box."""
    box = box.to(work)
    matrices = [reference.area_weights(box[:, a], box[:, 3 + a], size[a], video[a]) for a in range(3)]
    return [
        [_Filter(0, video[a], 0, matrices[a][b], size[a] / video[a]) for a in range(3)] for b in range(box.shape[0])
    ]


def _shrink_first(filters: Sequence[_Filter]) -> list[int]:
    """Axes in the order to filter them: the one that shrinks most comes first; on a tie, the slower axis."""
    return sorted((a for a in range(3) if not filters[a].is_copy()), key=lambda a: filters[a].shrink)


def _crop(video: Tensor, filters: Sequence[_Filter]) -> Tensor:
    """The footprint of one sample: the part of ``video [C, F, H, W]`` that the filters of its axes touch."""
    for axis, filter_ in enumerate(filters):
        video = video.narrow(1 + axis, filter_.first, filter_.length)
    return video


def forward(video: Tensor, box: Tensor, size: Sequence[int]) -> Tensor:
    """Patches ``[B, C, *size]`` of ``video [B, C, F, H, W]``, one sample at a time, filtered axis by axis (eq. 6)."""
    dtype = torch.float32 if video.dtype is torch.uint8 else video.dtype
    work = coordinate_dtype(dtype)
    out = video.new_empty(*video.shape[:2], *size, dtype=dtype)
    on_cpu = video.device.type == "cpu"
    for b, filters in enumerate((_filters if on_cpu else _whole_filters)(box, size, video.shape[2:], work)):
        footprint = video.shape[1] * filters[0].length * filters[1].length * filters[2].length
        groups = min(size[0], -(-footprint // CPU_PIECE)) if on_cpu else 1
        order = _shrink_first(filters)
        for g in range(groups):
            start, stop = size[0] * g // groups, size[0] * (g + 1) // groups
            group = [filters[0].rows(start, stop), *filters[1:]] if groups > 1 else filters
            x = _crop(video[b], group)  # [C, F', H', W'], the footprint of these frames
            if order:
                x = x.to(work)
            patch = out[b, :, start:stop]  # [C, frames, h, w]
            for axis in order:
                in_place = axis == order[-1] and out.dtype is work
                x = group[axis].apply(x, axis, patch if in_place else None)
            if x is not patch:
                patch.copy_(x)
    return out


def _zeros(size: Sequence[int], like: Tensor) -> Tensor:
    """Zeros of this size, with the dtype and device of ``like``; on the CPU from ``calloc``, through numpy.

    ``torch.zeros`` writes every byte of a video, but the gradient of a patch fills only a small part of it. Large
    memory from ``calloc`` comes straight from the operating system: pages read as zeros and are allocated when they are
    first written. PyTorch's profiler does not see this memory, and the storage cannot be resized.
    """
    if like.device.type != "cpu":
        return like.new_zeros(size)
    return torch.from_numpy(np.zeros(math.prod(size) * like.itemsize, np.uint8)).view(like.dtype).view(size)


def backward(grad: Tensor, box: Tensor, size: Sequence[int]) -> Tensor:
    """Gradient ``[B, C, *size]`` of the video from that of the patches, ``[B, C, f, h, w]``."""
    work = coordinate_dtype(grad.dtype)
    dvideo = _zeros([*grad.shape[:2], *size], grad)
    on_cpu = grad.device.type == "cpu"
    for b, filters in enumerate((_filters if on_cpu else _whole_filters)(box, grad.shape[2:], size, work)):
        x = grad[b].to(work)  # [C, f, h, w]
        for axis in _shrink_first(filters)[::-1]:
            x = filters[axis].apply_transposed(x, axis)
        _crop(dvideo[b], filters).copy_(x)  # [C, F', H', W'], the footprint
    return dvideo
