"""The weights of `tiny` that come with the package: of the preset, they paint what they are asked for, and go on."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hpdm import load, presets, published
from hpdm.commands.sampler_choice import choose_sampler, sampler_not_given
from hpdm.data.clips import VideoDataset
from hpdm.data.synthetic import CLASSES, render_synthetic
from hpdm.evaluation.synthetic_score import score_clip
from hpdm.long_video import LongOptions
from hpdm.patch.objective import evaluation_error
from hpdm.video import to_uint8

# By level, for times from 0.25 to 0.75: twice the errors on the held-out clips of docs/learning.md.
LARGEST_ERRORS = (0.02, 0.012, 0.016)


def test_the_file_is_small_and_of_the_preset():
    assert published.find("tiny").stat().st_size < 4e6
    run = load("tiny")
    assert run.config == presets.get("tiny")
    assert run.classes == list(CLASSES)
    assert run.step == presets.recipe("tiny").steps == run.training["steps"]
    assert choose_sampler(run, sampler_not_given()).consistency == 1


def test_the_long_one_is_small_and_knows_frames():
    assert published.find("tiny_long").stat().st_size < 4e6
    run = load("tiny_long")
    changes = {"known_frames": True, "spacing": 3, "memory": True}
    assert run.config == presets.get("tiny").replace(conditioning_dropout=0.3, **changes)
    assert run.classes == list(CLASSES)
    assert choose_sampler(run, sampler_not_given()).known_noise == 0


@pytest.mark.parametrize("name", ["tiny", "tiny_long"])
def test_it_denoises_clips_that_it_has_not_seen(tmp_path, name):
    render_synthetic(tmp_path, clips=4, frames=16, seed=77)
    dataset = VideoDataset(tmp_path, frames=16, size=(64, 64), train=False)
    items = [dataset[i] for i in range(len(dataset))]
    video, labels = torch.stack([i["video"] for i in items]), torch.tensor([i["label"] for i in items])
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        error, _ = evaluation_error(load(name).model, video, labels, generator, times=(0.25, 0.75))
    assert (error.mean(0) < torch.tensor(LARGEST_ERRORS)).all(), error.mean(0)


def test_it_paints_shape_and_color_of_every_class():
    run = load("tiny")
    options = replace(choose_sampler(run, sampler_not_given()), steps=16, solver="2m", churn=0.0, overlap="none")
    videos = run.system.sampler(run.model, options)(range(6), torch.arange(6))[-1]
    for name, video in zip(run.classes, to_uint8(videos), strict=True):
        score = score_clip(video.permute(1, 2, 3, 0).numpy(), name, np.arange(16))
        assert (score.shape, score.color, score.found) == (name, name, 1.0)


def test_the_long_one_goes_on_with_what_it_began():
    """Two videos of four windows, without classes: shape and color of the last clip are those of the first."""
    run = load("tiny_long")
    options = replace(
        choose_sampler(run, sampler_not_given()), steps=16, steps_decay=0.25, solver="2m", churn=0.0, overlap="none",
        guidance=1.0,
    )  # fmt: skip
    segments = run.system.long_sampler(run.model, options, LongOptions()).segments([0, 1], 40)
    videos = to_uint8(torch.cat([segment.frames for segment in segments], dim=2)).permute(0, 2, 3, 4, 1).numpy()
    assert videos.shape == (2, 40, 64, 64, 3)
    for video in videos:
        first, last = (
            [score_clip(part, name, np.arange(16)) for name in CLASSES] for part in (video[:16], video[-16:])
        )
        assert first[0].found == last[0].found == 1.0
        assert (first[0].shape, first[0].color) == (last[0].shape, last[0].color)
