"""How visible the borders of tiles are in a video."""

from __future__ import annotations

from torch import Tensor

from hpdm.patch.tiling import Tiling
from hpdm.sampling import AXES


def seam_energy(video: Tensor, cover: Tiling) -> dict[str, float]:
    """Gradient energy across the borders of tiles, divided by that elsewhere, for each axis with borders.

    Per axis it is the mean of ``(x[i] - x[i-1])^2`` over the positions ``i`` where a tile starts or ends, divided by
    its mean over all other positions. It is about 1 where borders do not show, and above 1 where they do.

    Args:
        video: ``[C, F, H, W]`` floating point.
        cover: the tiles that the video was sampled with.

    Raises:
        ValueError: the video's size is not the cover's.
    """
    if tuple(video.shape[1:]) != tuple(cover.size):
        raise ValueError(f"video: got {tuple(video.shape[1:])}, expected the size of the cover, {tuple(cover.size)}")
    energies = {}
    for axis, name in enumerate(AXES):
        size, patch, stride = cover.size[axis], cover.patch[axis], cover.stride[axis]
        starts = range(0, size - patch + 1, stride)
        borders = sorted({edge for start in starts for edge in (start, start + patch)} - {0, size})
        elsewhere = sorted(set(range(1, size)) - set(borders))
        if not borders or not elsewhere:
            continue
        energy = video.diff(dim=1 + axis).square().movedim(1 + axis, 0).flatten(1).mean(1)  # [size - 1], of i = 1 ...
        at_borders, at_others = (energy[[i - 1 for i in positions]].mean() for positions in (borders, elsewhere))
        energies[name] = float(at_borders / at_others.clamp(min=1e-12))
    return energies
