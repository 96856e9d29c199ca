"""Known frames in training: what is drawn, what the network is told, what is trained; and off, nothing of it."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from hpdm import HPDM, runs
from hpdm.commands.train import prepare, train
from hpdm.frames import EXACTLY_CLEAN, FrameCopies, FrameTimes, draw_frames, mean_over_predicted, of_pixels
from hpdm.objective import Objective
from hpdm.patch.boxes import extract_patches, sample_boxes
from hpdm.patch.draws import draw
from hpdm.patch.objective import denoising_error
from hpdm.process import DATA_STD, add_noise, gamma, network_input
from hpdm.training.trainer import Trainer
from tests.processes import run_ranks
from tests.small import random_model, small_config
from tests.small import train_options as options

CONFIG = small_config(patch=(4, 8, 8), tokenizer=(1, 2, 2), known_frames=True)
BEFORE = CONFIG.replace(known_frames=False)
FRAMES = {"patch": (4, 8, 8), "resolution": (16, 32, 32), "known_frames": True, "short": "loop"}


def with_zero_started(model):
    """The same model with known frames, whose map is zero."""
    more = HPDM(model.config.replace(known_frames=True), "torch").eval()
    more.load_state_dict(model.state_dict(), strict=False)
    return more


def inputs(generator, batch=2):
    x = torch.randn(batch, 3, 3, *CONFIG.patch, generator=generator)
    t = torch.rand(batch, 3, generator=generator)
    return x, sample_boxes(CONFIG, batch, generator), t, torch.randint(6, (batch,), generator=generator)


def test_a_model_with_a_new_map_is_the_old_one(generator):
    old = random_model(BEFORE)
    new = with_zero_started(old)
    assert {n for n, _ in new.named_parameters()} - {n for n, _ in old.named_parameters()} == {
        "frame_times.linear.weight", "frame_times.linear.bias", "frame_times.nearest.weight",
        "frame_copies.share.weight", "frame_copies.share.bias",
    }  # fmt: skip
    x, boxes, t, labels = inputs(generator)
    v = old(x, boxes, t, labels)
    assert torch.equal(new(x, boxes, t, labels), v)
    nothing = t[..., None].expand(-1, -1, 4)
    assert torch.equal(new(x, boxes, t, labels, frame_t=nothing), v)
    assert torch.equal(new(x, boxes, t, labels, frame_t=torch.rand(2, 3, 4, generator=generator)), v)
    assert [n for n, p in HPDM(CONFIG).named_parameters() if n.startswith("frame_") and p.any()] == []


def test_without_known_frames_the_draws_are_those_of_before():
    before, now = (draw(config, 8, torch.Generator().manual_seed(3)) for config in (BEFORE, CONFIG))
    assert before.frame_t is None
    assert before.predicted is None
    for name in ("boxes", "noise", "dropped"):
        assert torch.equal(getattr(before, name), getattr(now, name)), name
    rolling = rises(now)[:, 0]  # its clips alone have a time of their own then
    assert torch.equal(before.t[~rolling], now.t[~rolling])
    assert torch.equal(before.t[:, 1:], now.t[:, 1:])


def test_one_level_alone_is_told_the_same(generator):
    model = random_model(CONFIG)
    x, boxes, t, labels = inputs(generator)
    frame_t = torch.where(torch.arange(4) < 2, 0.1, t[..., None])
    v = model(x, boxes, t, labels, frame_t=frame_t)
    arguments = (x[:, 0], 0, boxes[:, 0], t[:, 0], None, labels, None, None)
    torch.testing.assert_close(model.forward_level(*arguments, frame_t=frame_t[:, 0]), v[:, 0])
    torch.testing.assert_close(model.forward_level_with_latents(*arguments, frame_t[:, 0])[0], v[:, 0])
    assert (model.forward_level(*arguments) - v[:, 0]).abs().max() > 1e-3


def test_only_frames_whose_time_differs_are_told(generator):
    told = FrameTimes(16, 12)
    pixels = torch.randn(2, 4, 6, 12, generator=generator)
    with torch.no_grad():
        told.linear.weight.normal_(generator=generator)
        told.linear.bias.fill_(1.0)
    tokens = torch.randn(2, 4 * 6, 16, generator=generator)
    t = torch.tensor([0.5, 0.2])
    frame_t = torch.tensor([[0.0, 0.5, 0.5, 0.5], [0.2, 0.2, 0.1, 0.3]])
    change = (told(tokens, t, frame_t, pixels) - tokens).unflatten(1, (4, 6))
    differs = frame_t != t[:, None]
    assert not change[~differs].any()
    assert (change[differs].abs().amax(-1) > 0).all()
    # By the formula of the embedding, in float64.
    wave = torch.exp(torch.arange(128, dtype=torch.float64) * (-math.log(1e4) / 128))
    angle = 1000 * 0.3 * wave
    expected = told.linear.weight.double() @ torch.cat((angle.cos(), angle.sin())) + 1
    torch.testing.assert_close(change[1, 3, 0], expected.float(), rtol=1e-3, atol=1e-3)


def test_frames_see_the_nearest_known_one(generator):
    told = FrameTimes(16, 12)
    with torch.no_grad():
        told.nearest.weight.normal_(generator=generator)
    pixels, tokens = torch.randn(5, 4, 6, 12, generator=generator), torch.zeros(5, 24, 16)
    t = torch.full((5,), 0.5)
    frame_t = torch.tensor(
        [
            [0.1, 0.1, 0.5, 0.5],  # the first are known
            [0.1, 0.5, 0.5, 0.1],  # both ends
            [0.5, 0.5, 0.5, 0.5],  # nothing
            [0.6, 0.5, 0.5, 0.5],  # known, with more noise than the others
            [0.0, 0.2, 0.35, 0.5],  # rolling: the cleanest one
        ]
    )
    change = told(tokens, t, frame_t, pixels).unflatten(1, (4, 6))
    sees = [[None, None, 1, 1], [None, 0, 3, None], [None] * 4, [None, 0, 0, 0], [None, 0, 0, 0]]
    for b, f in itertools.product(range(5), range(4)):
        frame = sees[b][f]
        expected = torch.zeros(6, 16) if frame is None else pixels[b, frame] @ told.nearest.weight.T
        torch.testing.assert_close(change[b, f], expected)


def test_what_is_copied_is_the_nearest_known_frame(generator):
    """By the definition, in clean pixels: whatever v says, a whole share at full noise is the known frame itself."""
    copies, signal = FrameCopies(16, 12).double(), 0.7
    clean, noise, v = (torch.randn(3, 4, 6, 12, generator=generator, dtype=torch.float64) / 5 for _ in range(3))
    tokens = torch.randn(3, 4, 6, 16, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.7, 0.4, 0.999999], dtype=torch.float64)
    frame_t = torch.stack([torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.2, 1.0, 1.0, 0.2]), torch.zeros(4)])
    frame_t[2, 1:] = 1.0
    frame_t = torch.where(frame_t == 1.0, t[:, None], frame_t.double())
    g = gamma(frame_t)[..., None, None]
    noised = g.sqrt() * signal * clean + (1 - g).sqrt() * noise
    std = (g * (signal * DATA_STD) ** 2 + 1 - g).sqrt()
    assert torch.equal(copies(v, tokens, noised / std, t, frame_t, signal), v)
    with torch.no_grad():
        copies.share.weight.normal_(std=0.2, generator=generator)
        copies.share.bias.fill_(1.0)
    got = copies(v, tokens, noised / std, t, frame_t, signal)
    sees = [[None, None, 1, 1], [None, 0, 3, None], [None, 0, 0, 0]]
    for b, f in itertools.product(range(3), range(4)):
        frame = sees[b][f]
        if frame is None:
            assert torch.equal(got[b, f], v[b, f])
            continue
        before, after = (g[b, f].sqrt() * noised[b, f] - (1 - g[b, f]).sqrt() * part[b, f] for part in (v, got))
        known = signal * clean[b, frame]
        if b == 1:  # with noise: the mean of the posterior of a normal pixel
            variance, kept = (signal * DATA_STD) ** 2, g[b, frame]
            known = noised[b, frame] * kept.sqrt() * variance / (kept * variance + 1 - kept)
        distance = ((known - before) / signal).square().mean(dim=-1).sqrt()  # [6]
        similar = torch.stack([torch.exp(-((distance * n) ** 2)) for n in (32, 16, 8, 4)], dim=-1)
        share = torch.cat((tokens[b, f], similar), dim=-1) @ copies.share.weight.T + 1
        expected = before + share * (1 - g[b, f]).sqrt() * (known - before)
        torch.testing.assert_close(after, expected)
    with torch.no_grad():
        copies.share.weight.zero_()
    copied = copies(v, tokens, noised / std, t, frame_t, signal)[2, 3]
    shown = g[2, 3].sqrt() * noised[2, 3] - (1 - g[2, 3]).sqrt() * copied
    torch.testing.assert_close(shown, signal * clean[2, 0], atol=1e-4, rtol=0)


def runs_of(known):
    """Known frames at the start and at the end of every row, and whether there are others."""
    start = known.long().cumprod(dim=-1).sum(dim=-1)
    end = known.flip(-1).long().cumprod(dim=-1).sum(dim=-1)
    return start, end, known.sum(dim=-1) != torch.where(known.all(dim=-1), start, start + end)


def rises(drawn):
    """Clips of which the times of the frames that are predicted differ."""
    low = torch.where(drawn.predicted, drawn.frame_t, 2.0).amin(dim=-1)
    return torch.where(drawn.predicted, drawn.frame_t, -1.0).amax(dim=-1) > low


@pytest.mark.parametrize("frames", [2, 4, 7])
def test_what_is_drawn_has_the_asked_shares(generator, frames):
    law = Objective(known_first=0.4, known_ends=0.25, rolling=0.15, known_t_max=0.3)
    n = 20_000
    t = torch.rand(n, 2, generator=generator)
    finished = torch.rand(n, 2, generator=generator) < 0.25
    drawn = draw_frames(t, frames, law, generator, finished)
    known = ~drawn.predicted
    start, end, scattered = runs_of(known)
    assert not scattered.any()
    assert drawn.predicted.any(dim=-1).all()
    assert not known[finished].any()

    def close(share, expected):
        assert share.float().mean().item() == pytest.approx(expected, abs=5 * (0.25 / len(share)) ** 0.5)

    free = ~finished
    rolling = rises(drawn)
    assert (drawn.predicted.sum(dim=-1)[rolling] >= 2).all()
    shown_first = start[rolling]
    for count in range(frames - 1):
        close(shown_first == count, 1 / (frames - 1))
    for level, rolls in enumerate((0.15, 0.0)):
        own = free[:, level]
        close(rolling[own, level], rolls)
        close((end[own, level] > 0), 0.25)
        close(((start > 0) & (end == 0) & ~rolling)[own, level], 0.4 + (0.15 - rolls))
    first_only = start[(end == 0) & (start > 0) & ~rolling]
    for count in range(1, frames):
        close(first_only == count, 1 / (frames - 1))
    last = end[end > 0]
    for count in range(1, frames):
        close(last == count, 1 / (frames - 1))
    # Known frames of a clip share a time up to the largest, a quarter of these times is 0.
    times = torch.where(known, drawn.frame_t, torch.nan)
    shown = known.any(dim=-1)
    of_clip = times.nan_to_num(-1.0).amax(dim=-1)[shown]
    assert torch.equal(of_clip, times.nan_to_num(2.0).amin(dim=-1)[shown])
    close(of_clip == 0, EXACTLY_CLEAN)
    assert 0.29 < of_clip.max() <= 0.3
    # All other frames have the clip's time, which changes for rolling clips alone.
    others = drawn.predicted & ~rolling[..., None]
    assert torch.equal(drawn.frame_t[others], drawn.t[..., None].expand_as(others)[others])
    assert torch.equal(drawn.t[~rolling], t[~rolling])


def test_rolling_times_fill_the_unit_interval_evenly(generator):
    law = Objective(known_first=0, known_ends=0, rolling=1.0)
    drawn = draw_frames(torch.rand(4000, 1, generator=generator), 4, law, generator, torch.zeros(4000, 1).bool())
    assert torch.equal(drawn.t[:, 0], drawn.frame_t[:, 0, -1])
    for known in range(3):
        rows = (~drawn.predicted[:, 0]).sum(dim=1) == known
        rising = drawn.frame_t[rows, 0, known:]
        torch.testing.assert_close(rising.diff(dim=1), torch.full((len(rising), 3 - known), 1 / (4 - known)))
        quantiles = rising.flatten().sort().values
        assert (quantiles - torch.linspace(0, 1, len(quantiles))).abs().max() < 0.05


def test_the_loss_is_the_mean_over_frames_that_are_predicted(generator):
    model = random_model(CONFIG)
    video = torch.randint(256, (3, 3, *CONFIG.resolution), dtype=torch.uint8, generator=generator)
    labels = torch.randint(6, (3,), generator=generator)
    law = Objective(known_first=0.5, known_ends=0.3, rolling=0.2)
    draws = draw(CONFIG, 3, torch.Generator().manual_seed(4), objective=law)
    assert (~draws.predicted).any()
    error = denoising_error(model, video, labels, draws)
    # The noise of a known frame reaches the loss only through what the others see: at s = 0 it does not at all.
    clean = draws._replace(frame_t=torch.where(draws.predicted, draws.frame_t, 0.0))
    plain = denoising_error(model, video, labels, clean)
    shifted = clean.noise + 5 * of_pixels(~draws.predicted, 1)[..., None, None]
    torch.testing.assert_close(denoising_error(model, video, labels, clean._replace(noise=shifted)), plain)
    # By hand: every frame noised and scaled by its own time.
    x = extract_patches(video, draws.boxes, CONFIG, backend="torch")
    signal = torch.tensor(CONFIG.signal_scales)
    frames = [
        (*add_noise(x[:, :, :, f], draws.noise[:, :, :, f], draws.frame_t[..., f], signal), draws.frame_t[..., f])
        for f in range(4)
    ]
    scaled = torch.stack([network_input(noised, t, signal) for noised, _, t in frames], dim=3)
    target = torch.stack([v for _, v, _ in frames], dim=3)
    labels = labels.masked_fill(draws.dropped, CONFIG.classes)
    v = model(scaled, draws.boxes, draws.t, labels, frame_t=draws.frame_t)
    by_hand = torch.stack(
        [((v - target)[b, k][:, draws.predicted[b, k]] ** 2).mean() for b, k in itertools.product(range(3), range(3))]
    )
    torch.testing.assert_close(error.flatten(), by_hand)


def test_a_known_frame_has_the_size_of_its_own_noise(generator):
    """Scaled by the clip's time instead, a known frame would come up to three times too small."""
    x = torch.rand(64, 1, 3, 4, 8, 8, generator=generator).sub(0.5).mul(12**0.5 / 2)  # standard deviation 0.5
    t, s = torch.tensor(0.9), torch.tensor(0.1)
    times = torch.where(torch.arange(4) < 2, s, t).expand(64, 1, 4)
    signal = torch.tensor([0.7])[:, None, None]
    noised, _ = add_noise(x, torch.randn(x.shape, generator=generator), of_pixels(times, 1), signal)
    size = network_input(noised, of_pixels(times, 1), signal).std(dim=(0, 1, 2, 4, 5))
    torch.testing.assert_close(size, torch.ones(4), atol=0.03, rtol=0)
    assert gamma(t) < gamma(s)


def test_means_and_values_of_frames():
    error, predicted = torch.tensor([[1.0, 2.0, 6.0]]), torch.tensor([[False, True, True]])
    assert mean_over_predicted(error, predicted).tolist() == [4.0]
    assert of_pixels(torch.tensor([[0.5, 1.0]]), 2).tolist() == [[[0.5, 0.5, 1.0, 1.0]]]


def test_training_moves_the_map(clips, tmp_path):
    train(options(clips, tmp_path / "old", **(FRAMES | {"known_frames": False}), steps=2))
    train(options(clips, tmp_path / "new", init=tmp_path / "old", **FRAMES, steps=1, batch=6, ema_decay=0.5))
    old, new = (runs.load(tmp_path / name, weights="model").model for name in ("old", "new"))
    assert new.config.known_frames
    assert new.frame_times.linear.weight.any()
    assert new.frame_copies.share.weight.any()
    assert not any("frame_" in name for name, _ in old.named_parameters())
    # And a run with known frames resumes as itself alone.
    train(options(clips, tmp_path / "new", init=tmp_path / "old", **FRAMES, steps=2, batch=6, ema_decay=0.5))
    with pytest.raises(ValueError, match="known_frames: True -> False"):
        prepare(options(clips, tmp_path / "new", **(FRAMES | {"known_frames": False}), steps=2, batch=6, ema_decay=0.5))
    with pytest.raises(ValueError, match="of another config"):
        train(options(clips, tmp_path / "third", init=tmp_path / "new", **(FRAMES | {"known_frames": False})))


@pytest.mark.parametrize("exported", [False, True])
def test_the_first_step_from_an_old_run_is_that_of_the_old_model(clips, tmp_path, exported):
    train(options(clips, tmp_path / "old", **(FRAMES | {"known_frames": False}), steps=1))
    source = tmp_path / "old"
    if exported:
        source = tmp_path / "old.safetensors"
        runs.export(tmp_path / "old", source, weights="model")
    nothing = {"known_first": 0.0, "known_ends": 0.0, "rolling": 0.0}

    def start(name, **changes):
        job = prepare(options(clips, tmp_path / name, init=source, **(FRAMES | nothing | changes)))
        return Trainer(job, torch.device("cpu")).model

    old, new = start("a", known_frames=False), start("b")
    weights = dict(old.named_parameters())
    assert all(torch.equal(p, weights[n]) for n, p in new.named_parameters() if n in weights)
    assert not any(p.any() for n, p in new.named_parameters() if n not in weights)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"known_first": -0.1}, "known_first, known_ends, rolling: got"),
        ({"known_first": 0.6, "known_ends": 0.3, "rolling": 0.2}, "add up to at most 1"),
        ({"known_t_max": 1.5}, "known_t_max: got 1.5, expected a time"),
    ],
)
def test_wrong_shares_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        Objective(**wrong)


def test_patches_of_one_frame_know_none():
    with pytest.raises(ValueError, match="known_frames: got true for patches of 1 frame of tokens"):
        small_config(known_frames=True)
    plain = random_model(BEFORE)
    with pytest.raises(ValueError, match="frame_t: got a tensor, expected None for a model without known frames"):
        plain(*inputs(torch.Generator().manual_seed(0)), frame_t=torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="frame_t: got shape"):
        random_model(CONFIG)(*inputs(torch.Generator().manual_seed(0)), frame_t=torch.zeros(2, 3, 5))


def long_config(**changes):
    return CONFIG.replace(**({"spacing": 3, "memory": True} | changes))


def numbered_frames(frames, videos=2):
    """Every pixel of frame f of video b is 4 f + b: uint8."""
    values = 4 * torch.arange(frames)[None, :] + torch.arange(videos)[:, None]
    return values[:, None, :, None, None].expand(-1, 3, -1, 32, 32).to(torch.uint8).contiguous()


def test_longer_clips_show_the_window_the_sparse_frames_and_the_past(monkeypatch):
    """Seen at the network's input: which frames each part shows, as means over the frames that it covers."""
    config = long_config()
    assert (config.frame_scale, config.past_frames, config.clip_frames) == (4, 8, 40)
    assert (long_config(memory=False).clip_frames, long_config(spacing=1).clip_frames) == (40, 24)
    seen = []

    def record(x, boxes, t, labels, text, mask, **named):
        seen.append((x, t, named))
        latents = torch.full((len(x), x.shape[1], config.latents, config.latent_width), 3.0)
        return (x, latents) if named.get("return_latents") else x

    model = random_model(config)
    generator = torch.Generator().manual_seed(5)
    draws = draw(config, 2, generator, objective=Objective(known_first=0, known_ends=0, rolling=0))
    clean = {"t": torch.zeros(2, 3), "frame_t": torch.zeros(2, 3, 4), "noise": torch.zeros_like(draws.noise)}
    start, sparse, remembers = torch.tensor([9, 20]), torch.tensor([False, True]), torch.tensor([True, False])
    draws = draws._replace(**clean, start=start, sparse=sparse, remembers=remembers)
    denoising_error(model, numbered_frames(40), torch.tensor([0, 1]), draws, network=record)
    (past, past_t, _), (x, _, named) = seen

    def frames_of(patch):
        """Numbers of the frames that a patch shows, from its input ``[C, f, h, w]``."""
        return ((patch[0, :, 0, 0] * DATA_STD + 1) * 127.5 / 4).tolist()

    # Level 0 shows means over four frames; the second clip is sparse: frames 0-3, 12-15, 24-27, 36-39.
    assert frames_of(x[0, 0]) == pytest.approx([9 + 1.5 + 4 * i for i in range(4)], abs=0.01)
    assert frames_of(x[1, 0]) == pytest.approx([0.25 + 1.5 + 12 * i for i in range(4)], abs=0.01)
    first = round(float(draws.boxes[0, 2, 0]) * 16)
    assert frames_of(x[0, 2]) == pytest.approx([9 + first + i for i in range(4)], abs=0.01)
    assert past.shape[1] == 1
    assert not past_t.any()
    assert frames_of(past[0, 0]) == pytest.approx([1 + 1.5 + 4 * i for i in range(4)], abs=0.01)
    assert torch.equal(named["sparse"], sparse)
    assert named["memory"][0].eq(3.0).all()
    assert not named["memory"][1].any()


def test_sparse_clips_train_level_0_alone_and_the_expectation_stays(generator):
    law = Objective(known_first=0, known_ends=0, rolling=0, sparse=0.3, remembered=0.4)
    draws = draw(long_config(), 20_000, generator, objective=law)
    assert draws.weight[:, 0].eq(1).all()
    assert not draws.weight[draws.sparse, 1:].any()
    assert draws.weight.mean(dim=0).tolist() == pytest.approx([1.0] * 3, abs=0.03)
    assert draws.sparse.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert draws.remembers.float().mean().item() == pytest.approx(0.4 * 0.7, abs=0.02)
    assert not (draws.remembers & draws.sparse).any()
    assert sorted(draws.start.unique().tolist()) == list(range(8, 25))
    stills = draw(long_config(), 400, generator, objective=law, images=0.5)
    moves = (stills.stills != stills.stills[:, :1]).any(dim=1)
    assert not (stills.sparse | stills.remembers)[~moves].any()
    assert (stills.sparse | stills.remembers)[moves].any()


def test_new_memory_and_sparse_storylines_change_nothing(generator):
    old = random_model(CONFIG)
    torch.manual_seed(1)
    new = HPDM(long_config(), "torch").eval()
    new.load_state_dict(old.state_dict(), strict=False)
    x, boxes, t, labels = inputs(generator)
    v = old(x, boxes, t, labels)
    more = {"sparse": torch.tensor([True, False]), "memory": torch.randn(2, 4, 16, generator=generator)}
    assert torch.equal(new(x, boxes, t, labels), v)
    assert torch.equal(new(x, boxes, t, labels, **more), v)
    for p in new.parameters():
        p.grad = None
    (new(x, boxes, t, labels, **more) ** 2).sum().backward()
    learns = {n for n, p in new.named_parameters() if n.startswith(("memory", "sparse")) and p.grad.any()}
    assert learns == {"sparse", "memory.norm.weight", "memory.norm.bias"}
    trained = random_model(long_config())
    plain, told = trained(x, boxes, t, labels), trained(x, boxes, t, labels, **more)
    assert (plain - told)[:, 0].abs().max() > 1e-3
    zeros = {"sparse": torch.zeros(2, dtype=torch.bool), "memory": torch.zeros(2, 4, 16)}
    torch.testing.assert_close(trained(x, boxes, t, labels, **zeros), plain)
    arguments = (x[:, 0], 0, boxes[:, 0], t[:, 0], None, labels)
    torch.testing.assert_close(trained.forward_level(*arguments, **more), told[:, 0])


def test_training_with_everything(clips, tmp_path):
    everything = FRAMES | {"spacing": 3, "memory": True}
    train(options(clips, tmp_path / "old", **(FRAMES | {"known_frames": False}), steps=1))
    train(options(clips, tmp_path / "new", init=tmp_path / "old", **everything, steps=3, batch=6, ema_decay=0.5))
    model = runs.load(tmp_path / "new", weights="model").model
    assert model.memory.norm.weight.any()
    with pytest.raises(ValueError, match="known_frames: got false with spacing=3 and memory=False, expected true"):
        CONFIG.replace(known_frames=False, spacing=3)
    with pytest.raises(ValueError, match="spacing: got 2, expected 1 or a divisor of 3"):
        CONFIG.replace(spacing=2)


def test_rows_are_the_same_whichever_are_drawn_together():
    law = Objective(clean_context=0.5, flip=True)

    def drawn(rows):
        generator = torch.Generator().manual_seed(3)
        return draw(long_config(), 8, generator, objective=law, images=0.5, rows=rows)

    whole, parts = drawn(range(8)), [drawn(range(first, first + 2)) for first in range(0, 8, 2)]
    for name in ("t", "frame_t", "predicted", "start", "sparse", "remembers", "weight"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name


def train_as_a_rank(clips, out, parallel):
    everything = FRAMES | {"spacing": 3, "memory": True, "self_conditioning": 0.5, "remembered": 0.9}
    train(options(Path(clips), Path(out), **everything, batch=4, steps=3, device="cpu", parallel=parallel))


def test_a_run_does_not_depend_on_the_processes(clips, tmp_path):
    def losses(name):
        return [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]

    train_as_a_rank(clips, tmp_path / "one", "ddp")
    for parallel in ("ddp", "fsdp"):
        run_ranks(train_as_a_rank, 2, clips, tmp_path / parallel, parallel)
        assert losses(parallel) == pytest.approx(losses("one"), rel=1e-4)
