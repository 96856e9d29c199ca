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
import torch.nn.functional as F
from torch import Tensor

from hpdm_kernels import reference
from hpdm_kernels._backend import resolve
from hpdm_kernels._checks import FLOATS, check_boxes, check_tensor, check_triple

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


# Output frames are made in groups whose footprint has about this many elements, so that the converted crop of a uint8
# video stays small and in the cache.
CPU_PIECE = 1 << 20


@dataclass(frozen=True)
class _Filter:
    """The filter of one axis of one sample, cropped to the pixels it touches: ``first`` to ``first + length - 1``."""

    first: int
    length: int
    block: int
    """Where the windows are whole neighbouring blocks of this many pixels (1: a copy), else 0."""
    matrix: Tensor
    """``[n, length]``."""

    def rows(self, start: int, stop: int) -> _Filter:
        """The same filter for outputs ``start`` to ``stop - 1``, cropped further."""
        matrix = self.matrix[start:stop]
        used = matrix.ne(0).any(dim=0).nonzero()
        first, last = int(used[0]), int(used[-1])
        return _Filter(self.first + first, last + 1 - first, self.block, matrix[:, first : last + 1])


def _filters(box: Tensor, size: Sequence[int], video: Sequence[int], work: torch.dtype) -> list[list[_Filter]]:
    """``reference.area_weights`` on the footprint alone, per sample and axis.

    In numpy, whose small operations cost a quarter of PyTorch's: these would be half of a copy's time otherwise.
    """
    rows = box.detach().to(work).numpy()
    filters: list[list[_Filter]] = []
    for row in rows:
        filters.append([])
        for n, resolution, offset, scale in zip(size, video, row[:3], row[3:]):
            steps = (np.arange(n, dtype=row.dtype) + row.dtype.type(0.5)) / row.dtype.type(n)
            centre = (offset + scale * steps) * row.dtype.type(resolution)
            half = max(scale * row.dtype.type(resolution) / row.dtype.type(n), row.dtype.type(1)) / row.dtype.type(2)
            low, high = _snap(centre - half), _snap(centre + half)
            first = min(max(int(np.floor(low[0])), 0), resolution - 1)
            last = min(max(int(np.ceil(high[-1])), first + 1), resolution)
            left = np.arange(first, last, dtype=row.dtype)
            right = left + 1
            if first == 0:
                left[0] = -np.inf
            if last == resolution:
                right[-1] = np.inf
            overlap = np.minimum(high[:, None], right) - np.maximum(low[:, None], left)
            matrix = np.maximum(overlap, 0) / (high - low)[:, None]
            block, rest = divmod(last - first, n)
            exact = rest == 0 and np.array_equal(low, first + block * np.arange(n))
            exact = exact and np.array_equal(high, low + block)
            filters[-1].append(_Filter(first, last - first, block if exact else 0, torch.from_numpy(matrix)))
    return filters


def _snap(edge: np.ndarray) -> np.ndarray:
    whole = np.round(edge)
    return np.where(np.abs(edge - whole) < reference.EDGE_SNAP, whole, edge)


def _whole_filters(box: Tensor, size: Sequence[int], video: Sequence[int], work: torch.dtype) -> list[list[_Filter]]:
    """Not cropped: on a GPU the footprint is not known without waiting for it."""
    box = box.to(work)
    matrices = [reference.area_weights(box[:, a], box[:, 3 + a], size[a], video[a]) for a in range(3)]
    return [[_Filter(0, video[a], 0, matrices[a][b]) for a in range(3)] for b in range(box.shape[0])]


def _apply(matrix: Tensor, x: Tensor, axis: int) -> Tensor:
    """``matrix @ x`` along ``axis`` (0, 1, 2) of the pixels of ``[C, F, H, W]``."""
    if axis == 2:
        return x @ matrix.mT
    if axis == 1:
        return matrix @ x
    return (matrix @ x.flatten(2)).unflatten(2, x.shape[2:])


def _shrink_first(filters: Sequence[_Filter]) -> list[int]:
    """Axes in the order of their products: the one that shrinks most first (the slowest axis first on a tie)."""
    return sorted(
        (a for a in range(3) if filters[a].block != 1), key=lambda a: len(filters[a].matrix) / filters[a].length
    )


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
        for g in range(groups):
            start, stop = size[0] * g // groups, size[0] * (g + 1) // groups
            some = filters if groups == 1 else [filters[0].rows(start, stop), *filters[1:]]
            x = _crop(video[b], some)
            order = _shrink_first(some)
            if order:
                x = x.to(work)
            if order and all(one.block for one in some):
                x = F.avg_pool3d(x, [one.block for one in some])
            else:
                for axis in order:
                    x = _apply(some[axis].matrix, x, axis)
            out[b, :, start:stop] = x
    return out


def _backward_torch(grad: Tensor, box: Tensor, size: Sequence[int]) -> Tensor:
    work = reference.coordinate_dtype(grad.dtype)
    dvideo = grad.new_zeros(*grad.shape[:2], *size)
    on_cpu = grad.device.type == "cpu"
    for b, filters in enumerate((_filters if on_cpu else _whole_filters)(box, grad.shape[2:], size, work)):
        x = grad[b]
        order = _shrink_first(filters)[::-1]
        if order:
            x = x.to(work)
        for axis in order:
            x = _apply(filters[axis].matrix.mT, x, axis)
        _crop(dvideo[b], filters).copy_(x)
    return dvideo


@torch.library.custom_op("hpdm::sample_patches_fwd", mutates_args=())
def _forward_op(video: Tensor, box: Tensor, size: Sequence[int], backend: str) -> Tensor:
    return _forward_torch(video, box, size)


@_forward_op.register_fake
def _(video: Tensor, box: Tensor, size: Sequence[int], backend: str) -> Tensor:
    dtype = torch.float32 if video.dtype is torch.uint8 else video.dtype
    return video.new_empty(*video.shape[:2], *size, dtype=dtype)


@torch.library.custom_op("hpdm::sample_patches_bwd", mutates_args=())
def _backward_op(grad: Tensor, box: Tensor, size: Sequence[int], backend: str) -> Tensor:
    return _backward_torch(grad, box, size)


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
