"""How visible the borders of tiles are in a video."""

from __future__ import annotations

from torch import Tensor

from hpdm.patch.boxes import AXES, Tiling


def seam_energy(video: Tensor, cover: Tiling) -> dict[str, float]:
    """Gradient energy across the borders of tiles against that everywhere else, per axis that has borders.

    Per axis the mean of ``(x[i] - x[i - 1])^2`` over the ``i`` where a tile starts or ends, over its mean at all other
    ``i``. About 1 where tiles do not show (a border is then a place like any other), above it where they do.

    Args:
        video: ``[C, F, H, W]`` floating point, covered by ``cover``.
        cover: the tiles.

    Raises:
        ValueError: a video of another size.
    """
    if tuple(video.shape[1:]) != tuple(cover.size):
        raise ValueError(f"video: got {tuple(video.shape[1:])}, expected the size of the cover, {tuple(cover.size)}")
    energies = {}
    for axis, name in enumerate(AXES):
        size, patch, stride = cover.size[axis], cover.patch[axis], cover.stride[axis]
        starts = range(0, size - patch + 1, stride)
        borders = sorted({edge for start in starts for edge in (start, start + patch)} - {0, size})
        inside = sorted(set(range(1, size)) - set(borders))
        if not borders or not inside:
            continue
        energy = video.diff(dim=1 + axis).square().movedim(1 + axis, 0).flatten(1).mean(1)
        across, elsewhere = (energy[[i - 1 for i in where]].mean() for where in (borders, inside))
        energies[name] = float(across / elsewhere.clamp(min=1e-12))
    return energies
