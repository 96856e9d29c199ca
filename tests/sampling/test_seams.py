"""Seam energy: 1 where tiles do not show."""

import pytest
import torch

from hpdm import presets
from hpdm.patch.seams import seam_energy
from hpdm.patch.tiling import level_tiling
from hpdm.sampling import SamplerOptions

CONFIG = presets.tiny()


def tiles_of(overlap, level=2):
    return level_tiling(CONFIG, SamplerOptions(overlap=overlap), level)


def test_noise_has_no_seams(generator):
    cover = tiles_of("hw")
    video = torch.randn(3, *cover.size, generator=generator)
    energies = seam_energy(video, cover)
    assert list(energies) == ["f", "h", "w"]
    assert all(0.8 < energy < 1.25 for energy in energies.values())


def test_tiles_of_different_brightness_have_seams(generator):
    cover = tiles_of("none")
    video = torch.randn(3, *cover.size, generator=generator) * 0.1
    for i, origin in enumerate(cover.origins.tolist()):
        f, h, w = (slice(o, o + p) for o, p in zip(origin, cover.patch))
        video[:, f, h, w] += i % 2
    assert seam_energy(video, cover)["w"] > 10
    # Shifted by half a tile, the borders lie inside the tiles.
    shifted = seam_energy(video.roll(cover.patch[2] // 2, dims=3), cover)
    assert shifted["w"] < 1


def test_axes_without_borders_are_left_out(generator):
    cover = tiles_of("fhw", level=0)
    assert seam_energy(torch.randn(3, *cover.size, generator=generator), cover) == {}


def test_another_size_is_refused():
    with pytest.raises(ValueError, match="video: got"):
        seam_energy(torch.zeros(3, 2, 2, 2), tiles_of("hw"))
