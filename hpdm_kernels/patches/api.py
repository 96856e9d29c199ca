"""Patch extraction: crop a box out of a video and shrink it with an area filter (paper eq. 6).

    out[b, c, i, j, k] = sum over pixels (p, q, r) of Wf[b, i, p] * Wh[b, j, q] * Ww[b, k, r] * video[b, c, p, q, r]

with ``video`` ``[B, C, F, H, W]``, ``box`` ``[B, 6]`` and ``out`` ``[B, C, f, h, w]``. A row of ``W`` is the share of
each pixel in a window of ``max(scale / n, 1 / resolution)`` around the center of the output
(``reference.area_weights``), so only a few neighboring pixels have non-zero weights. The *footprint* of a box is the
part of the video that its windows touch. Only the footprint is read, in the video's dtype (a uint8 video is converted
after the crop), and only ``out`` is written. Backward also gathers: each pixel sums the outputs whose windows touch it,
a range in closed form. There are no atomics, so every run gives the same bits.

The window formula is implemented three times: in PyTorch (``reference``), numpy and Triton. A kernel cannot call the
other two, and PyTorch's overhead per operation is too large for cropping a single patch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpdm_kernels import _transforms, reference
from hpdm_kernels._backend import TRITON_DTYPES, autocast_off, resolve
from hpdm_kernels._checks import FLOATS, check_tensor, check_triple
from hpdm_kernels.boxes import check_boxes
from hpdm_kernels.patches.ops import sample_patches_fwd


def sample_patches(video: Tensor, box: Tensor, size: Sequence[int], *, backend: str = "auto") -> Tensor:
    """Crops a box out of each video and resizes it: ``downsample(crop(video; box); size)`` with an area filter.

    Downsampling is antialiased, upsampling interpolates linearly, and a box of scale ``size / resolution`` on whole
    pixels is copied exactly. The part of a window outside of the video counts as its border pixels.

    Args:
        video: ``[B, C, F, H, W]``, fp16, bf16, fp32 or fp64, which gets a dense gradient; or uint8, which gets no
            gradient and gives fp32 patches of the same range (0 to 255). On the CPU ``"torch"`` allocates the gradient
            outside of PyTorch, so its storage cannot be resized.
        box: ``[B, 6]`` fp32, ``(offset_f, offset_h, offset_w, scale_f, scale_h, scale_w)`` in fractions of the whole
            video, on ``video``'s device. Gets no gradient.
        size: (frames, height, width) of the patch in pixels.
        backend: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``. None of them synchronizes with the GPU;
            ``"torch"`` therefore cannot crop there and filters whole axes.

    Returns:
        ``[B, C, f, h, w]`` of ``video``'s dtype (fp32 for uint8). A NaN or infinity makes every pixel not finite whose
        window contains it, and may reach others of the same patch and channel, but no other.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, an unknown backend, or (on the CPU, where values can be read without
            waiting) a box that is not inside of the video.
        RuntimeError: ``backend="triton"`` cannot run here.
        NotImplementedError: ``torch.func`` or forward mode differentiates the op on another backend than ``reference``.

    Source: paper eq. 6.
    """
    video = check_tensor("video", video, ("B", "C", "F", "H", "W"), dtypes=(*FLOATS, torch.uint8))
    box = check_boxes("box", box, video.shape[0], ("video", video))
    size = check_triple("size", size)
    chosen = resolve(backend, "sample_patches", video, (*TRITON_DTYPES, torch.uint8))
    if chosen == "reference":
        with autocast_off(video):
            return reference.sample_patches(video, box, size)
    _transforms.refuse("sample_patches", chosen, (video, box))
    return sample_patches_fwd(video, box, size, chosen)
