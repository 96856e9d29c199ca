"""The patch hierarchy (paper section 4.1): random nested boxes, and the patches of a video inside them.

A box is a float32 row ``(offset_f, offset_h, offset_w, scale_f, scale_h, scale_w)`` in fractions of the whole video.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpdm.checks import check_choice
from hpdm.objective import BoxLaw
from hpdm.patch.config import HPDMConfig
from hpdm_kernels import sample_patches


def sample_boxes(
    config: HPDMConfig,
    batch: int,
    generator: torch.Generator | None = None,
    law: BoxLaw = "uniform",
    borders: float = 0.0,
) -> Tensor:
    """Random nested boxes, one per level: ``[B, L, 6]`` float32 on the CPU.

    Level 0 is the whole video, and level ``l`` lies inside level ``l-1``.

    ``"uniform"`` draws from fine to coarse: the offset of the last level is uniform among the whole pixels of the
    target resolution (section 4.5, "Integer patch coordinates"), and each parent is uniform among the boxes on whole
    pixels of its own level that contain its child. So every position of the last level is equally likely, borders
    included, and a child is seen with each of its possible parents equally often.

    ``"nested"`` draws from coarse to fine: each level is uniform inside the level below, the last one on whole pixels.
    Boxes then pile up in the middle of the video; with three levels or more the last one never touches a border.

    Args:
        config: gives the pyramid.
        batch: number of rows, B.
        generator: CPU generator; ``None`` for PyTorch's global one.
        law: ``"uniform"`` or ``"nested"``.
        borders: for the uniform law, probability that the last level's box is at the first or the last position of an
            axis on purpose, for each axis on its own.

    Raises:
        ValueError: unknown law, ``borders`` outside of 0..1, or ``borders`` with the nested law.
    """
    check_choice("law", law, BoxLaw)
    if not 0 <= borders <= 1 or (borders and law == "nested"):
        raise ValueError(f"borders: got {borders}, expected 0 to 1, and 0 with law='nested'")
    if law == "uniform":
        offsets = _uniform_offsets(config, batch, generator, borders)
    else:
        offsets = _nested_offsets(config, batch, generator)
    scales = torch.tensor([config.level_scale(level) for level in range(config.levels)], dtype=torch.float32)  # [L, 3]
    return torch.cat((offsets.float(), scales.expand(batch, -1, -1)), dim=2)


def _uniform_offsets(config: HPDMConfig, batch: int, generator: torch.Generator | None, borders: float) -> Tensor:
    """Offsets by the uniform law, ``[B, L, 3]`` float64 in fractions of the video."""
    patch, ratio = torch.tensor(config.patch), torch.tensor(config.ratio)  # [3] both
    sizes = [torch.tensor(config.level_resolution(level)) for level in range(config.levels)]  # L x [3]
    offset = _uniform_integers(torch.zeros(batch, 3, dtype=torch.int64), sizes[-1] - patch, generator)  # [B, 3], pixels
    if borders:
        moved = torch.rand(batch, 3, generator=generator) < borders
        border = torch.randint(2, (batch, 3), generator=generator) * (sizes[-1] - patch)
        offset = torch.where(moved, border, offset)
    offsets = [offset / sizes[-1].double()]
    for size in reversed(sizes[:-1]):
        # The parent at pixel p of its level covers [ratio * p, ratio * (p + patch)) of the child's pixels.
        last = torch.minimum(offset // ratio, size - patch)
        first = torch.clamp(-((patch * (ratio - 1) - offset) // ratio), min=0)  # rounded up
        offset = _uniform_integers(first, last, generator)
        offsets.append(offset / size.double())
    return torch.stack(offsets[::-1], dim=1)


def _uniform_integers(first: Tensor, last: Tensor, generator: torch.Generator | None) -> Tensor:
    """Integers in ``first .. last``, both included, ``[B, 3]``."""
    u = torch.rand(first.shape, generator=generator, dtype=torch.float64)
    return first + torch.minimum((u * (last - first + 1)).long(), last - first)


def _nested_offsets(config: HPDMConfig, batch: int, generator: torch.Generator | None) -> Tensor:
    """Offsets by the nested law, ``[B, L, 3]`` float64 in fractions of the video."""
    offset = torch.zeros(batch, 3, dtype=torch.float64)
    offsets = [offset]
    for level in range(1, config.levels):
        before, scale = (torch.tensor(config.level_scale(n), dtype=torch.float64) for n in (level - 1, level))
        u = torch.rand(batch, 3, generator=generator, dtype=torch.float64)
        low, room = offset.float().double(), before - scale  # the lowest offset [B, 3], and how far it may move [3]
        if level == config.levels - 1:
            pixels = torch.tensor(config.resolution, dtype=torch.float64)
            first, last = torch.ceil(low * pixels - 1e-6), torch.floor((low + room) * pixels + 1e-6)
            offset = torch.minimum(first + torch.floor(u * (last - first + 1)), last) / pixels
        else:
            offset = low + u * room
        offsets.append(offset)
    return torch.stack(offsets, dim=1)


def at_border(boxes: Tensor, config: HPDMConfig) -> Tensor:
    """Which boxes touch a border of the video: ``[B, L, 6] -> [B, L]`` bool.

    Only axes count on which the boxes of a level can move. So none does on level 0, which is the whole video.
    """
    size = torch.tensor([config.level_resolution(level) for level in range(boxes.shape[1])], device=boxes.device)
    room = size - torch.tensor(config.patch, device=boxes.device)  # [L, 3]: the last offset, in pixels
    offset = (boxes[..., :3] * size).round()
    return ((room > 0) & ((offset == 0) | (offset == room))).any(dim=2)


def extract_patches(video: Tensor, boxes: Tensor, config: HPDMConfig, backend: str = "auto") -> Tensor:
    """The patches of every level (paper eq. 6) in [-1, 1]: ``[B, C, F, H, W] -> [B, L, C, f, h, w]`` float32.

    Args:
        video: uint8 in [0, 255], at ``config.resolution``.
        boxes: ``[B, L, 6]`` from :func:`sample_boxes`, or those of the lowest levels, on the same device.
        config: gives the patch size.
        backend: see :func:`hpdm_kernels.sample_patches`.

    Raises:
        TypeError: the video is not uint8.
        ValueError: the video is not at the target resolution of the pyramid.
    """
    if video.dtype is not torch.uint8:
        raise TypeError(f"video: got dtype {video.dtype}, expected torch.uint8")
    if tuple(video.shape[2:]) != config.resolution:
        raise ValueError(f"video: got size {tuple(video.shape[2:])}, expected config.resolution = {config.resolution}")
    levels = [
        sample_patches(video, boxes[:, level].contiguous(), config.patch, backend=backend)
        for level in range(boxes.shape[1])
    ]
    return torch.stack(levels, dim=1).div_(127.5).sub_(1.0)
