"""Joint training on images: which clips become stills, from which frame, and that nothing else changes."""

import pytest
import torch

from hpdm import HPDM
from hpdm.patch.draws import draw
from hpdm.patch.objective import denoising_error
from hpdm.training.stills import draw_stills, show_frames
from tests.small import small_config


def clips(batch=8, frames=5):
    """Clips whose every frame is told apart by its value."""
    values = torch.arange(batch * frames).reshape(batch, 1, frames, 1, 1)
    return values.expand(batch, 3, frames, 2, 2).to(torch.uint8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def still_images(video, share, generator):
    shown = draw_stills(len(video), video.shape[2], share, generator)
    return video if shown is None else show_frames(video, shown)


def test_a_share_of_the_clips_stands_still_and_the_rest_is_untouched():
    video = clips()
    made = still_images(video, 0.5, seeded())
    still = (made == made[:, :, :1]).flatten(1).all(dim=1)
    assert still.sum() == 4
    assert torch.equal(made[~still], video[~still])
    for row in still.nonzero()[:, 0]:
        assert any(torch.equal(made[row, :, 0], video[row, :, f]) for f in range(5))  # a frame of that clip itself
    assert torch.equal(video, clips())  # the input is nobody's to change


def test_clips_and_frames_are_drawn_from_the_generator():
    video = clips()
    assert torch.equal(still_images(video, 0.5, seeded(1)), still_images(video, 0.5, seeded(1)))
    drawn = torch.stack([still_images(video, 0.5, seeded(n))[:, 0, 0, 0, 0] for n in range(100)])
    assert all(len(set(column.tolist())) == 5 for column in drawn.T)  # every clip, from every frame


def test_no_images_draw_nothing():
    video, generator = clips(), seeded()
    assert still_images(video, 0.0, generator) is video
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=seeded()))


@pytest.mark.parametrize("share", [0.1, 0.25, 1.0])
def test_the_share_is_right_on_average_even_for_one_clip(share):
    stills = [still_images(clips(1, 2), share, seeded(n)) for n in range(400)]
    found = sum(torch.equal(s[:, :, 0], s[:, :, 1]) for s in stills) / len(stills)
    assert abs(found - share) < 4 * (share * (1 - share) / len(stills)) ** 0.5 + 1e-9


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_out_of_range_is_named(share):
    with pytest.raises(ValueError, match=rf"^images: got {share}, expected a share from 0 to 1$"):
        still_images(clips(), share, seeded())


def test_the_objective_trains_on_stills():
    """A model that sees stills alone has the error of the same clips stood still beforehand."""
    torch.manual_seed(0)
    config = small_config(conditioning="none")
    video = torch.randint(256, (2, 3, *config.resolution), dtype=torch.uint8)
    model = HPDM(config)
    generator = seeded(5)
    stills = still_images(video, 1.0, generator)
    expected = denoising_error(model, stills, None, draw(config, 2, generator))
    assert torch.equal(denoising_error(model, video, None, draw(config, 2, seeded(5), images=1.0)), expected)
    assert not torch.equal(denoising_error(model, video, None, draw(config, 2, seeded(5))), expected)
