"""Seam energy: 1 where tiles do not show."""

import pytest
import torch

from hpdm import presets
from hpdm.patch.boxes import tiling
from hpdm.patch.seams import seam_energy

CONFIG = presets.tiny()


def tiles_of(letters, level=2):
    return tiling(CONFIG, level, [a in letters for a in "fhw"])


def test_noise_has_no_seams(generator):
    cover = tiles_of("hw")
    video = torch.randn(3, *cover.size, generator=generator)
    found = seam_energy(video, cover)
    assert list(found) == ["f", "h", "w"]
    assert all(0.8 < energy < 1.25 for energy in found.values())


def test_tiles_of_their_own_brightness_have(generator):
    cover = tiles_of("")
    video = torch.randn(3, *cover.size, generator=generator) * 0.1
    for i, origin in enumerate(cover.origins.tolist()):
        f, h, w = (slice(o, o + p) for o, p in zip(origin, cover.patch))
        video[:, f, h, w] += i % 2
    assert seam_energy(video, cover)["w"] > 10
    # Half a tile further there is none to see.
    shifted = seam_energy(video.roll(cover.patch[2] // 2, dims=3), cover)
    assert shifted["w"] < 1


def test_axes_without_borders_are_left_out(generator):
    cover = tiling(CONFIG, 0, (True, True, True))
    assert seam_energy(torch.randn(3, *cover.size, generator=generator), cover) == {}


def test_another_size_is_refused():
    with pytest.raises(ValueError, match="video: got"):
        seam_energy(torch.zeros(3, 2, 2, 2), tiles_of("hw"))
