"""What is sampled and decoded of long videos of latent diffusion, for every length: all of it, once, and in time."""

import math
from itertools import islice, pairwise

import pytest
import torch

from hpdm import presets
from hpdm.latent.coding import decode
from hpdm.latent.hierarchy import Hierarchy, Step
from hpdm.latent.long_windows import LatentWindows
from hpdm.latent.reach import decoder_reach
from hpdm.latent.stream_decoder import StreamDecoder, spans
from tests.latent.small_autoencoder import random_autoencoder, small_config

FRAMES = range(1, 1101)
PUBLISHED = Hierarchy(window=4, known=1, spacing=4)
"""LVDM: predictions of four sparse latents, of which one is known, and three latents between two."""


@pytest.mark.parametrize(
    "hierarchy",
    [
        PUBLISHED, Hierarchy(4, 2, 3), Hierarchy(5, 4, 2, 2), Hierarchy(5, 2, 2, 2), Hierarchy(9, 3, 2, 4),
        Hierarchy(2, 1, 2), Hierarchy(9, 8, 2, 4),
    ],
    ids=str,
)  # fmt: skip
def test_every_pair_is_visited_and_every_latent_comes_once(hierarchy):
    stride, whole = hierarchy.stride, list(hierarchy.steps(math.ceil(FRAMES[-1] / 4)))
    windows = LatentWindows(stride + 1, 1, 4)
    for latents in range(1, math.ceil(FRAMES[-1] / 4) + 1):
        predicted, sparse, pairs, emitted = 0, 0, [], [0]
        steps = list(hierarchy.steps(latents))
        for step in steps:
            for number in step.predictions:
                assert number == predicted
                sparse += hierarchy.window - (hierarchy.known if number else 0)
                predicted += 1
            assert len(step.windows) >= 1
            for number in step.windows:
                own = [number * hierarchy.pairs + n for n in range(hierarchy.pairs + 1)]
                assert own[-1] < sparse  # all that it knows is there
                pairs += pairwise(own)
                emitted += range(number * stride + 1, (number + 1) * stride + 1)
        assert pairs == [(n, n + 1) for n in range(len(pairs))]
        assert emitted == list(range(len(emitted)))
        assert len(emitted) - stride < max(latents, 2) <= len(emitted)
        assert predicted == hierarchy.predictions(latents)
        assert steps[-1].windows.stop == hierarchy.count(latents)
        assert all(windows.count(4 * latents - n) == hierarchy.count(latents) for n in range(4))
        # Shorter videos begin as longer ones.
        assert steps[:-1] == whole[: len(steps) - 1]
        assert steps[-1].predictions == whole[len(steps) - 1].predictions
        assert steps[-1].windows.start == whole[len(steps) - 1].windows.start


def test_1024_frames_take_as_many_predictions_and_interpolations_as_published():
    """LVDM: 65 sparse latents from one clip of four and 21 predictions of three more, and 64 interpolations."""
    assert next(PUBLISHED.steps(256)) == Step(range(1), range(3))
    assert PUBLISHED.predictions(256) - 1 == 21
    assert PUBLISHED.count(256) == 64
    assert 64 * PUBLISHED.stride + 1 == 257
    windows = LatentWindows(4, 1, 4)
    assert windows.count(1024) - 1 == 84  # one after another


@pytest.mark.parametrize("known", [1, 2, 3])
def test_every_frame_comes_once_and_as_soon_as_what_it_depends_on(known):
    config = presets.get("lvdm_ae_tiny")
    reach = decoder_reach(config)
    windows, there, decoded, finished = LatentWindows(4, known, 4, reach.future), 0, 0, []
    for window in islice(windows.all(), 400):
        assert window.start + window.known == there
        there = window.start + 4
        for span in spans(config, decoded, there, ends=False):
            assert span.start == decoded
            assert (span.first, span.last) == (max(0, span.start - reach.past), span.stop + reach.future)
            decoded = span.stop
        assert decoded == max(0, there - reach.future)
        finished.append(4 * decoded)
    for frames in FRAMES:
        count = windows.count(frames)
        assert finished[count - 1] >= frames > (finished[count - 2] if count > 1 else 0)
        assert all(0 < border < frames for border in windows.borders(frames))


def test_decoding_a_stream_is_decoding_the_whole_and_goes_on_anywhere(generator):
    model = random_autoencoder(small_config())
    latents = torch.randn(2, 4, 41, 4, 4, generator=generator)
    stream = StreamDecoder(model.config, lambda z, kept: decode(model, z, chunk=None)[:, :, kept])
    there, parts, sizes, state = 0, [], [], {}
    for count in (1, 2, 4, 1, 9, 3, 3, 3, 3, 3, 3, 3, 3):
        there += count
        new, ends = latents[:, :, there - count : there], there == 41
        parts.append(stream.push(new, ends))
        if sizes:
            other = StreamDecoder(model.config, stream.decode)
            other.restore(state)
            assert torch.equal(other.push(new, ends), parts[-1])
        state = stream.state()
        sizes.append(state["latents"].numel())
    assert [part.shape[2] for part in parts[:4]] == [0, 0, 12, 4]  # four latents see it
    torch.testing.assert_close(torch.cat(parts, dim=2), decode(model, latents), rtol=0, atol=1e-4)
    assert len(set(sizes[5:-1])) == 1
