"""The patch hierarchy (paper section 4.1): nested boxes for training, covers of tiles for sampling.

A box is a float32 row ``(offset_f, offset_h, offset_w, scale_f, scale_h, scale_w)`` in fractions of the whole video.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpdm.patch.config import HPDMConfig, Triple
from hpdm_kernels import sample_patches

AXES = "fhw"


def sample_boxes(config: HPDMConfig, batch: int, generator: torch.Generator | None = None) -> Tensor:
    """Random nested boxes, one per level: ``[B, L, 6]`` float32 on the CPU.

    Level 0 is the whole video, level ``l`` lies inside level ``l-1`` at a uniform offset, and the last level falls on
    whole pixels of the target resolution (section 4.5, "Integer patch coordinates").

    Args:
        config: gives the pyramid.
        batch: rows B.
        generator: CPU generator, the only source of randomness.
    """
    boxes = torch.zeros(batch, config.levels, 6)
    boxes[:, 0, 3:] = 1.0
    for level in range(1, config.levels):
        parent = boxes[:, level - 1].double()
        scale = torch.tensor(config.level_scale(level), dtype=torch.float64)
        u = torch.rand(batch, 3, generator=generator, dtype=torch.float64)
        low, room = parent[:, :3], parent[:, 3:] - scale
        if level == config.levels - 1:
            pixels = torch.tensor(config.resolution, dtype=torch.float64)
            first, last = torch.ceil(low * pixels - 1e-6), torch.floor((low + room) * pixels + 1e-6)
            offset = torch.minimum(first + torch.floor(u * (last - first + 1)), last) / pixels
        else:
            offset = low + u * room
        boxes[:, level, :3] = offset.float()
        boxes[:, level, 3:] = scale.float()
    return boxes


def extract_patches(video: Tensor, boxes: Tensor, config: HPDMConfig, backend: str = "auto") -> Tensor:
    """The patches of every level (paper eq. 6) in [-1, 1]: ``[B, C, F, H, W] -> [B, L, C, f, h, w]`` float32.

    Args:
        video: uint8 in [0, 255], at ``config.resolution``, on the device that trains.
        boxes: ``[B, L, 6]`` from :func:`sample_boxes`, on the same device.
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
        for level in range(config.levels)
    ]
    return torch.stack(levels, dim=1).div_(127.5).sub_(1.0)


@dataclass(frozen=True)
class Tiling:
    """A cover of one level's video by patches: a product of evenly spaced origins per axis."""

    patch: Triple
    size: Triple
    """Resolution of the video that is covered, R_l."""
    stride: Triple
    """Pixels between neighbouring tiles: ``patch`` without overlap, ``patch / 2`` with 50 % overlap, or finer."""

    @property
    def counts(self) -> Triple:
        """Tiles per axis, ``2R/r - 1`` at 50 % overlap."""
        f, h, w = ((n - r) // s + 1 for n, r, s in zip(self.size, self.patch, self.stride))
        return (f, h, w)

    @property
    def tiles(self) -> int:
        """Number of tiles T."""
        f, h, w = self.counts
        return f * h * w

    @property
    def origins(self) -> Tensor:
        """First voxel of every tile, ``[T, 3]`` int64 in row-major order."""
        axes = [range(0, n * s, s) for n, s in zip(self.counts, self.stride)]
        return torch.tensor(list(itertools.product(*axes)), dtype=torch.int64)

    @property
    def boxes(self) -> Tensor:
        """Boxes of the tiles, ``[T, 6]`` float32."""
        size = torch.tensor(self.size, dtype=torch.float64)
        offset = self.origins / size
        scale = (torch.tensor(self.patch, dtype=torch.float64) / size).expand_as(offset)
        return torch.cat((offset, scale), dim=1).float()

    def containing(self, boxes: Tensor) -> Tensor:
        """For each box the tile that contains it and is centred on it best, ``[T', 6] -> [T']`` int64.

        Raises:
            ValueError: no tile contains one of the boxes, as can be without overlap.
        """
        size, patch, stride, counts = (
            torch.tensor(v, dtype=torch.float64) for v in (self.size, self.patch, self.stride, self.counts)
        )
        low = boxes[:, :3].double() * size
        high = low + boxes[:, 3:].double() * size
        centred = torch.round(((low + high) / 2 - patch / 2) / stride)
        index = torch.minimum(torch.maximum(centred, torch.zeros_like(centred)), counts - 1)
        good = (index * stride <= low + 1e-3) & (index * stride + patch >= high - 1e-3)
        if not bool(good.all()):
            row = int((~good.all(dim=1)).nonzero()[0])
            raise ValueError(
                f"boxes: no tile contains row {row}, {boxes[row].tolist()}; overlap the tiles on that axis"
            )
        f, h, w = index.long().unbind(1)
        return (f * self.counts[1] + h) * self.counts[2] + w


def tiling(config: HPDMConfig, level: int, overlap: Sequence[bool], tiles_per_patch: int = 2) -> Tiling:
    """The cover of one level by tiles that overlap on some axes (paper section 4.4: by 0 % or 50 %).

    Args:
        config: gives the pyramid.
        level: pyramid level l; level 0 is a single patch.
        overlap: three flags (frames, height, width). Axes of ratio 1 have a single tile either way.
        tiles_per_patch: tiles that start within one patch on an axis that overlaps: 2 is 50 %, 4 is 75 %.

    Raises:
        ValueError: overlap on an axis whose patch size is no multiple of ``tiles_per_patch``.
    """
    stride = []
    for axis, (r, ratio, on) in enumerate(zip(config.patch, config.ratio, overlap)):
        overlaps = on and ratio > 1 and level > 0
        if overlaps and r % tiles_per_patch:
            raise ValueError(
                f"overlap: got axis {AXES[axis]!r} with patch size {r}, expected a multiple of {tiles_per_patch}, "
                "the tiles per patch"
            )
        stride.append(r // tiles_per_patch if overlaps else r)
    f, h, w = stride
    return Tiling(config.patch, config.level_resolution(level), (f, h, w))


def parse_overlap(overlap: str) -> tuple[bool, bool, bool]:
    """``"none"`` or some of the letters f, h, w (paper Table 4) as three flags.

    Raises:
        ValueError: anything else.
    """
    letters = "" if overlap == "none" else overlap
    if (not letters and overlap != "none") or set(letters) - set(AXES) or len(set(letters)) != len(letters):
        raise ValueError(f"overlap: got {overlap!r}, expected 'none' or some of the letters f, h, w, e.g. 'hw'")
    f, h, w = (axis in letters for axis in AXES)
    return (f, h, w)
