"""Sampling with known frames, window after window, against denoisers that are known exactly."""

import itertools

import pytest
import torch

from hpdm import HPDM
from hpdm.frames import Known
from hpdm.long_video import LongOptions
from hpdm.patch.long_sampler import LongSampler
from hpdm.patch.sampler import Sampler
from hpdm.patch.section import needed_features, section_of, whole
from hpdm.patch.tiling import find_ancestors, level_tiling
from hpdm.process import DATA_STD, gamma
from hpdm.sampling import SamplerOptions
from hpdm.windows import Window, Windows
from hpdm_kernels import sample_patches
from tests.small import random_model, small_config

CONFIG = small_config(patch=(4, 8, 8), tokenizer=(1, 2, 2), known_frames=True)


def per_frame(values):
    """``[R, f] -> [R, 1, f, 1, 1]``."""
    return values[:, None, :, None, None]


class Oracle(HPDM):
    """Knows the videos, and checks that known frames are shown, at their own time and size."""

    def __init__(self, config, videos, garbage):
        super().__init__(config, "torch")
        self.videos, self.garbage, self.calls, self.seen = videos, garbage, [], []

    def level_features(self, x, level, boxes, *_):
        self.calls.append((level, "features", x.shape[0]))
        nothing = torch.zeros(x.shape[0], self.config.tokens, self.config.width)
        return dict.fromkeys(self.fusing_blocks(level + 1), nothing)

    def forward_level(self, x, level, boxes, t, context, labels=None, text=None, text_mask=None, frame_t=None):
        self.calls.append((level, "tiles", x.shape[0]))
        per_video = x.shape[0] // self.videos[level].shape[0]
        signal = self.config.signal_scale(level)
        y = sample_patches(self.videos[level].repeat_interleave(per_video, dim=0), boxes, self.config.patch) * signal
        times = t[:, None].expand(-1, 4) if frame_t is None else frame_t
        known = per_frame(times != t[:, None])
        g = per_frame(gamma(times))
        noised = x * (g * (signal * DATA_STD) ** 2 + 1 - g).sqrt()
        if frame_t is not None:
            self.seen.append(((noised - g.sqrt() * y)[known.expand_as(y)], times[times != t[:, None]], level))
        g = gamma(t).reshape(-1, 1, 1, 1, 1)
        v = (g.sqrt() * noised - y) / (1 - g).sqrt().clamp(min=1e-4)
        return torch.where(known, self.garbage, v)  # a network is not trained on known frames


def truth(frames, generator, videos=2):
    """Long videos at all levels, each the mean of the next, ``[B, 3, F, H, W]``."""
    finest = torch.rand(videos, 3, frames, 32, 32, generator=generator) * 1.8 - 0.9
    levels = [finest]
    for _ in range(2):
        levels.insert(0, torch.nn.functional.avg_pool3d(levels[0], 2))
    return levels


def windows_of_truth(videos, start):
    """The window that starts at frame ``start`` of level 0, at all levels."""
    return [video[:, :, start * 2**n : (start + 4) * 2**n] for n, video in enumerate(videos)]


def telling_the_oracle(sampler, model, videos):
    """Makes a long sampler tell the oracle which window it samples."""
    starts, real = {w.number: w.start for w in itertools.islice(sampler.windows.all(), 50)}, sampler.sampler

    def call(seeds, **arguments):
        model.videos = windows_of_truth(videos, starts[arguments["window"]])
        return real(seeds, **arguments)

    sampler.sampler = call
    return sampler


@pytest.mark.parametrize("known", [1, 2, 3])
@pytest.mark.parametrize(
    ("changes", "garbage"),
    [
        ({"overlap": "fhw"}, torch.nan),
        ({"overlap": "fhw", "consistency": 1.0}, 30.0),
        ({"overlap": "none", "later_known_noise": 0.2}, torch.nan),
        ({"overlap": "hw", "solver": "edm", "later_solver": "heun", "known_noise": 0.0, "clip": False}, torch.nan),
    ],
)
def test_a_perfect_denoiser_gives_the_long_video(changes, garbage, known, generator):
    frames = 16 + 5 * (4 - known) * 4
    videos = truth(frames, generator)
    model = Oracle(CONFIG, None, garbage)
    options = SamplerOptions(**({"steps": 8, "solver": "2m", "tile_batch": 50} | changes))
    sampler = telling_the_oracle(LongSampler(model, options, LongOptions(known=known)), model, videos)
    segments = list(sampler.segments([3, 4], frames - 3))
    assert [s.number for s in segments] == list(range(6))
    long = torch.cat([s.frames for s in segments], dim=2)
    torch.testing.assert_close(long, videos[-1][:, :, : frames - 3], rtol=0, atol=5e-4)
    # Known frames are noised to their own times: what is left of them is noise of the right size.
    by_level = {level: [[], []] for level in range(3)}
    for left, times, level in model.seen:
        by_level[level][0].append(left)
        by_level[level][1].append(times)
    for level, (left, times) in by_level.items():
        if not left:
            assert level > 0
            assert changes["overlap"] in ("none", "hw")
            continue
        time = options.level_known_noise(level)
        assert set(torch.cat(times).tolist()) <= {torch.tensor(time).item()}
        size = float(1 - gamma(torch.tensor(time))) ** 0.5
        left = torch.cat(left)
        assert left.std().item() == pytest.approx(size, abs=2e-5 + 0.05 * size)


def test_finished_frames_are_never_written_again(generator):
    """Bit for bit: each window begins with the last frames of the one before, on every level."""
    sampler = LongSampler(random_model(CONFIG), SamplerOptions(steps=2, solver="ddim", overlap="fhw", consistency=1.0))
    segments = list(sampler.segments([5], 40, torch.tensor([1])))
    for before, after in itertools.pairwise(segments):
        for level in range(3):
            kept = 2 * 2**level
            old, new = (s.state[f"level_{level}"] for s in (before, after))
            assert torch.equal(old[:, :, -kept:], new[:, :, :kept])
        assert torch.equal(after.state["level_2"][:, :, 8:][:, :, : after.frames.shape[2]], after.frames)


class GaussianProcess(HPDM):
    """The best denoiser of pixels that follow a stationary Gaussian process in time, each on its own."""

    SIZE, RHO = 0.25, 0.8

    def __init__(self, config):
        super().__init__(config, "torch")
        lag = (torch.arange(config.patch[0])[:, None] - torch.arange(config.patch[0])).abs()
        self.covariance = (self.SIZE**2 * self.RHO**lag).double()

    def forward_level(
        self, x, level, boxes, t, context, labels=None, text=None, text_mask=None, frame_t=None, sparse=None
    ):
        """Every frame's v is at its own time."""
        times = (t[:, None].expand(-1, x.shape[2]) if frame_t is None else frame_t).double()
        g = per_frame(gamma(times))
        noised = x.double() * (g * DATA_STD**2 + 1 - g).sqrt()
        # E[y | x~] = C A (A C A + B^2)^-1 x~ with A = diag sqrt(g), B^2 = diag(1 - g)
        a, c = gamma(times).sqrt(), self.covariance
        if sparse is not None:
            c = self.SIZE**2 * (c / self.SIZE**2) ** self.config.spacing
        middle = a[:, :, None] * c * a[:, None] + torch.diag_embed(1 - gamma(times) + 1e-12)
        gain = torch.linalg.solve(middle, a[:, :, None] * c).transpose(1, 2)  # [R, f, f]
        y = torch.einsum("rfg,rcghw->rcfhw", gain, noised)
        return ((g.sqrt() * noised - y) / (1 - g).sqrt().clamp(min=1e-6)).float()


@pytest.mark.parametrize(
    ("known", "noise", "solver"), [(1, 0.0, "2m"), (2, 0.0, "edm"), (2, 0.3, "2m"), (3, 0.1, "heun")]
)
def test_long_videos_have_the_statistics_of_the_process(known, noise, solver, generator):
    """With the best denoiser, many windows are one sample of a process that goes on over all borders.

    A known frame with noise is known less well: by the formula the correlation of its true value falls.
    """
    config = CONFIG.replace(levels=1, levels_per_block=(1,))
    model = GaussianProcess(config)
    options = SamplerOptions(steps=24, solver=solver, known_noise=noise, churn=0.0, sigma_min=0.002)
    sampler = LongSampler(model, options, LongOptions(known=known))
    frames = 4 + 12 * (4 - known)
    long = torch.cat([s.frames for s in sampler.segments(list(range(24)), frames)], dim=2).double()
    y = long.permute(2, 0, 1, 3, 4).flatten(1) / model.SIZE  # [frames, samples]
    samples = y.shape[1]
    bound = 5 / samples**0.5
    assert (y.var(dim=1) - 1).abs().max() < bound * 2**0.5 + 0.03
    lag_1 = (y[1:] * y[:-1]).mean(dim=1) / y.var()
    inside = torch.ones(frames - 1, dtype=torch.bool)
    inside[[border - 1 for border in sampler.windows.borders(frames)]] = False
    assert (lag_1[inside] - model.RHO).abs().max() < bound + 0.03
    expected = correlation_at_border(model, known, noise)
    assert (lag_1[~inside] - expected).abs().max() < bound + 0.03
    if noise == 0.0:
        assert expected == pytest.approx(model.RHO)
        lag_6 = (y[6:] * y[:-6]).mean(dim=1)
        assert (lag_6 - model.RHO**6).abs().max() < bound + 0.03


def correlation_at_border(model, known, noise):
    """Of the last known frame with the first one that is predicted from known frames with noise, in closed form."""
    c = model.covariance / model.SIZE**2
    g = float(gamma(torch.tensor(noise, dtype=torch.float64)))
    ratio = (1 - g) / g / model.SIZE**2  # noise of a known frame, in units of the signal
    inverse = torch.linalg.inv(c[:known, :known] + ratio * torch.eye(known, dtype=torch.float64))
    mean_weights = c[known, :known] @ inverse
    return float(mean_weights @ c[:known, known - 1])


def test_guidance_by_known_frames_is_the_formula(generator):
    """(1 + w) v - w v', where v' has the known frames at the time of the others, and with guidance by class."""
    model = random_model(CONFIG)
    calls = []

    def record(x, level, boxes, t, context, labels=None, text=None, text_mask=None, frame_t=None):
        calls.append((x, t, labels, frame_t))
        return HPDM.forward_level(model, x, level, boxes, t, context, labels, text, text_mask, frame_t)

    first = torch.rand(2, 3, 2, 8, 8, generator=generator) - 0.5
    known = [Known.ends(first, None, (4, 8, 8))]

    def level_0(**changes):
        options = SamplerOptions(steps=1, solver="ddim", clip=False, **changes)
        return next(Sampler(model, options).parts([1, 2], torch.tensor([0, 3]), known=known))

    plain = level_0()
    model.forward_level = record
    guided = level_0(frame_guidance=0.5, guidance=2.0)
    x, t, labels, frame_t = calls[0]
    assert len(calls) == 1
    assert labels.tolist() == [0, 3, 0, 3, 6, 6]  # known, without known frames, without class
    aware = frame_t != t[:, None]
    assert aware.tolist() == [[True, True, False, False]] * 2 + [[False] * 4] * 2 + [[True, True, False, False]] * 2
    with torch.no_grad():
        v = HPDM.forward_level(model, x, 0, torch.tensor([[0.0, 0, 0, 1, 1, 1]] * 6), t, None, labels, frame_t=frame_t)
    both, unaware, unconditional = v.chunk(3)
    expected = both + 0.5 * (both - unaware) + (both - unconditional)
    g = gamma(t[0])
    noised = x[2:4] * (g * DATA_STD**2 + 1 - g).sqrt()  # of rows without known frames: as the solver has it
    y = (g.sqrt() * noised - (1 - g).sqrt() * expected).clamp(-1, 1)
    torch.testing.assert_close(guided[:, :, 2:], y[:, :, 2:], rtol=1e-4, atol=1e-4)
    assert torch.equal(guided[:, :, :2], first)
    assert (guided - plain)[:, :, 2:].abs().max() > 1e-3


def test_both_ends_and_whole_levels_are_kept(generator):
    model = random_model(CONFIG)
    videos = truth(16, generator, videos=1)
    ends = [Known.ends(v[:, :, : 2**n], v[:, :, -(2**n) :], v.shape[2:]) for n, v in enumerate(videos)]
    sampled = Sampler(model, SamplerOptions(steps=2, solver="2m"))([1], torch.tensor([0]), known=ends)
    for n, (video, real) in enumerate(zip(sampled, videos)):
        assert torch.equal(video[:, :, : 2**n], real[:, :, : 2**n])
        assert torch.equal(video[:, :, -(2**n) :], real[:, :, -(2**n) :])
        assert (video - real).abs().max() > 0.1
    full = [Known(videos[0], torch.ones(4, dtype=torch.bool)), None, None]
    plain = random_model(CONFIG.replace(known_frames=False))
    from_level = Sampler(plain, SamplerOptions(steps=2, solver="2m"))
    known, finished = (
        from_level([1], torch.tensor([0]), known=full),
        from_level([1], torch.tensor([0]), finished=videos[:1]),
    )
    assert torch.equal(known[-1], finished[-1])


def test_only_tiles_with_new_frames_are_computed(generator):
    model = Oracle(CONFIG, truth(16, generator, videos=1), torch.nan)
    options = SamplerOptions(steps=2, solver="2m", later_solver="2m", overlap="fhw", tile_batch=10_000)
    first = [video[:, :, : 2 * 2**n] for n, video in enumerate(model.videos)]
    known = [Known.ends(f, None, v.shape[2:]) for f, v in zip(first, model.videos)]
    Sampler(model, options)([0], known=known)
    tiles = {level: {rows for at, kind, rows in model.calls if kind == "tiles" and at == level} for level in range(3)}
    features = {rows for at, kind, rows in model.calls if kind == "features" and at == 1}
    # Level 1: frames 4..7 are new, in two of three tiles along time. Level 2: frames 8..15, in four of seven.
    assert tiles == {0: {1}, 1: {2 * 9}, 2: {4 * 49}}
    assert features == {2 * 9}


@pytest.mark.parametrize("overlap", ["fhw", "hw"])
def test_sections_hold_every_new_frame_and_little_else(overlap, generator):
    options = SamplerOptions(overlap=overlap)
    tilings = [level_tiling(CONFIG, options, level) for level in range(3)]
    ancestors = find_ancestors(tilings)
    for _ in range(20):
        sections = []
        for level, tiling in enumerate(tilings):
            frames = tiling.size[0]
            start, end = torch.randint(0, frames // 2, (2,), generator=generator).tolist()
            known = torch.zeros(frames, dtype=torch.bool)
            known[:start] = True
            known[frames - end :] = True
            multiple = 2 if level else 1
            section = section_of(tiling, known, 1, multiple)
            covered = torch.zeros(frames, dtype=torch.bool)
            covered[section.frames.start : section.frames.stop] = True
            assert covered[~known].all()
            assert section.frames.start % multiple == section.frames.stop % multiple == 0
            assert section.frames.start + 4 > start - multiple
            origins = tiling.origins[section.tiles.start : section.tiles.stop]
            assert torch.equal(section.origins + torch.tensor([section.frames.start, 0, 0]), origins)
            expected = torch.stack([known[int(f) : int(f) + 4] for f in origins[:, 0]])
            assert torch.equal(section.known_tokens, expected)
            sections.append(section)
        needed = needed_features(ancestors, sections)
        for level, section in enumerate(sections):
            for below in range(level):
                tiles = ancestors[level][below][section.tiles.start : section.tiles.stop]
                assert set(tiles.tolist()) <= set(needed[below].tolist())
    assert whole(tilings[1]).tiles == range(tilings[1].tiles)


def test_the_first_frames_do_not_depend_on_what_follows_nor_on_the_batch():
    model = random_model(CONFIG)
    options = SamplerOptions(steps=2, solver="edm", overlap="hw", tile_batch=64, consistency=0.5)

    def video(seeds, labels, frames, cache="gpu"):
        sampler = LongSampler(model, SamplerOptions(**{**options.__dict__, "cache": cache}))
        return torch.cat([s.frames for s in sampler.segments(seeds, frames, torch.tensor(labels))], dim=2)

    long = video([7], [2], 40)
    assert long.shape[2] == 40
    assert torch.equal(video([7], [2], 21), long[:, :, :21])
    assert torch.equal(video([7], [2], 5), long[:, :, :5])
    short = Sampler(model, options)([7], torch.tensor([2]))[-1]
    assert torch.equal(short, long[:, :, :16])
    together = video([6, 7], [1, 2], 40)
    torch.testing.assert_close(together[1:], long, rtol=0, atol=2e-3)  # rounding grows from window to window
    torch.testing.assert_close(video([7], [2], 24, "off"), long[:, :, :24], rtol=0, atol=2e-3)
    assert (long[:, :, 16:24] - long[:, :, 24:32]).abs().max() > 0.05


def test_an_interrupted_video_goes_on_with_the_next_segment():
    model = random_model(CONFIG)
    sampler = LongSampler(model, SamplerOptions(steps=2, solver="2m"))
    labels = torch.tensor([1])
    segments = list(sampler.segments([3], 40, labels))
    for done in (1, 3):
        again = sampler.segments([3], 40, labels, state=segments[done - 1].state, done=done)
        for expected, segment in zip(segments[done:], again, strict=True):
            assert segment.number == expected.number
            assert torch.equal(segment.frames, expected.frames)


def test_a_video_between_two_images_ends_with_the_second(generator):
    model = random_model(CONFIG)
    sampler = LongSampler(model, SamplerOptions(steps=2, solver="2m"))
    ends = [[torch.rand(1, 3, 1, 8 * 2**n, 8 * 2**n, generator=generator) for n in range(3)] for _ in range(2)]
    for frames in (16, 20, 24, 36):
        segments = sampler.segments([3], frames, torch.tensor([0]), first=ends[0], last=ends[1])
        video = torch.cat([s.frames for s in segments], dim=2)
        assert video.shape[2] == frames
        assert torch.equal(video[:, :, :1], ends[0][-1])
        assert torch.equal(video[:, :, -1:], ends[1][-1])
    for frames in (12, 18):
        with pytest.raises(ValueError, match=f"frames: got {frames}, expected at least 16, and a multiple of 4"):
            next(sampler.segments([3], frames, first=ends[0], last=ends[1]))


@pytest.mark.parametrize(("window", "known", "scale"), [(4, 2, 4), (16, 1, 4), (16, 8, 4), (8, 7, 8), (2, 1, 1)])
def test_windows_cover_every_length(window, known, scale):
    windows = Windows(window, known, scale)
    for frames in range(1, 300):
        covered = list(windows.until(frames))
        assert len(covered) == windows.count(frames)
        ends = [(w.start + window) * scale for w in covered]
        assert ends[-1] >= frames
        assert len(ends) == 1 or ends[-2] < frames
        new = [range((w.start + w.known) * scale, end) for w, end in zip(covered, ends)]
        assert list(itertools.chain(*new)) == list(range(ends[-1]))
        assert windows.borders(frames) == [part.start for part in new[1:]]
        if frames >= windows.whole and frames % scale == 0:
            exact = list(windows.up_to(frames))
            assert (exact[-1].start + window) * scale == frames
            assert all(w.known >= known for w in exact[1:])
            assert [w.start + w.known for w in exact[1:]] == [w.start + window for w in exact[:-1]]
    assert next(windows.all()) == Window(0, 0, 0)


def test_bad_calls_are_named(generator):
    model = random_model(CONFIG)
    with pytest.raises(ValueError, match=r"known: got 4, expected 1 to 3: a window has 4 frames of level 0"):
        LongSampler(model, None, LongOptions(known=4))
    sampler = LongSampler(model, SamplerOptions(steps=2, solver="2m"))
    first = [torch.zeros(1, 3, 2 * 2**n, 8 * 2**n, 8 * 2**n) for n in range(3)]
    with pytest.raises(ValueError, match="frames: got 8, expected more than the 8 that are given"):
        next(sampler.segments([0], 8, first=first))
    with pytest.raises(ValueError, match="frames: got 0, expected at least 1"):
        next(sampler.segments([0], 0))
    with pytest.raises(ValueError, match="first: got 16 frames, expected fewer than the 16 of a window"):
        next(sampler.segments([0], 30, first=truth(16, generator, videos=1)))
    plain = LongSampler(random_model(CONFIG.replace(known_frames=False)), SamplerOptions(steps=2, solver="2m"))
    with pytest.raises(ValueError, match="frames: got 17, expected at most 16, the length of a clip: the model was"):
        next(plain.segments([0], 17))
    with pytest.raises(ValueError, match="known: got some frames of level 0, expected none: the model was trained"):
        next(plain.segments([0], 16, first=first))
    assert next(plain.segments([0], 9)).frames.shape[2] == 9
    wrong = [Known.ends(torch.zeros(1, 3, 1, 4, 4), None, (4, 4, 4))]
    with pytest.raises(ValueError, match="known: got videos of"):
        next(sampler.sampler.parts([0], known=wrong))
    with pytest.raises(ValueError, match="scheme: got 'hierarchical' for a model that was trained without --spacing"):
        LongSampler(model, None, LongOptions(scheme="hierarchical"))
    sparse = random_model(CONFIG.replace(spacing=3))
    with pytest.raises(ValueError, match="known: got 2 with scheme 'hierarchical', expected 1"):
        LongSampler(sparse, None, LongOptions(scheme="hierarchical", known=2))
    with pytest.raises(ValueError, match="scheme: got 'other'"):
        LongOptions(scheme="other")


@pytest.mark.parametrize("scheme", ["joint", "rolling", "hierarchical"])
def test_other_schemes_have_the_statistics_of_the_process(scheme, generator):
    """Rolling and hierarchical windows are exact. Where windows are averaged, what one knows the other does not."""
    config = CONFIG.replace(levels=1, levels_per_block=(1,), spacing=3)
    model = GaussianProcess(config)
    options = SamplerOptions(steps=48, solver="2m", known_noise=0.0, churn=0.0, sigma_min=0.002)
    sampler = LongSampler(model, options, LongOptions(scheme=scheme, together=3))
    long = torch.cat([s.frames for s in sampler.segments(list(range(24)), 32)], dim=2).double()
    y = long.permute(2, 0, 1, 3, 4).flatten(1) / model.SIZE  # [frames, samples]
    variance = y.var(dim=1)
    lag_1 = (y[1:] * y[:-1]).mean(dim=1) / (y[1:].std(dim=1) * y[:-1].std(dim=1))
    if scheme != "joint":
        assert (variance - 1).abs().max() < 0.1
        assert (lag_1 - model.RHO).abs().max() < 0.04
        lag_6 = (y[6:] * y[:-6]).mean(dim=1)
        assert (lag_6 - model.RHO**6).abs().max() < 0.1
    else:
        assert (variance - 0.9).abs().max() < 0.2
        inside = torch.ones(31, dtype=torch.bool)
        inside[1::2] = False  # a window begins or ends at every second frame
        assert (lag_1[inside] - model.RHO).abs().max() < 0.35
        assert lag_1[:7].min() > 0.65
        assert lag_1[7].item() == pytest.approx(0.51, abs=0.06)  # the border of two groups


@pytest.mark.parametrize("scheme", ["autoregressive", "joint", "rolling", "hierarchical"])
@pytest.mark.parametrize("changes", [{}, {"self_conditioning": 0.5, "memory": True}])
def test_all_schemes_go_on_and_do_not_depend_on_the_length(scheme, changes, generator):
    model = random_model(CONFIG.replace(**changes, spacing=3))
    sampler = LongSampler(model, SamplerOptions(steps=4, solver="2m"), LongOptions(scheme=scheme, together=3))
    labels = torch.tensor([1])
    assert any(parameter.requires_grad for parameter in model.parameters())
    segments = list(sampler.segments([3], 60, labels))
    assert not any(tensor.requires_grad for segment in segments for tensor in segment.state.values())
    long = torch.cat([s.frames for s in segments], dim=2)
    assert torch.equal(torch.cat([s.frames for s in sampler.segments([3], 33, labels)], dim=2), long[:, :, :33])
    for done in (1, 2, 4):
        state = {name: tensor.clone() for name, tensor in segments[done - 1].state.items()}
        again = list(sampler.segments([3], 60, labels, state=state, done=done))
        first_frame = sum(s.frames.shape[2] for s in segments[:done])
        assert torch.equal(torch.cat([s.frames for s in again], dim=2), long[:, :, first_frame:])
    first = [torch.rand(1, 3, 2 * 2**n, 8 * 2**n, 8 * 2**n, generator=generator) for n in range(3)]
    if scheme == "hierarchical":
        with pytest.raises(ValueError, match="scheme: got 'hierarchical' with first frames, expected another one"):
            next(sampler.segments([3], 40, labels, first=first))
        return
    given = torch.cat([s.frames for s in sampler.segments([3], 40, labels, first=first)], dim=2)
    assert torch.equal(given[:, :, :8], first[-1])
    assert (given[:, :, 16:40] - long[:, :, 16:40]).abs().max() > 1e-3
    if scheme == "autoregressive":
        return
    with pytest.raises(ValueError, match=f"scheme: got '{scheme}' with a last frame, expected 'autoregressive'"):
        next(sampler.segments([3], 40, labels, last=first))


def test_windows_remember_the_one_before(generator):
    """The latents are those of the clean window before; without condition, they are computed without it, too."""
    model = random_model(CONFIG.replace(memory=True))
    options = SamplerOptions(steps=2, solver="2m", guidance=2.0, frame_guidance=0.5)
    seen = []

    def record(*arguments, memory=None, **told):
        seen.append(memory)
        return HPDM.forward_level(model, *arguments, memory=memory, **told)

    model.forward_level = record
    labels = torch.tensor([2])
    sampler = LongSampler(model, options)
    first, second = itertools.islice(sampler.segments([1], 24, labels), 2)
    memories = [m for m in seen if m is not None]
    assert len(memories) == 2  # the two predictions of level 0 in the second window
    before = first.state["level_0"]
    box, t = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]), torch.zeros(1)
    with torch.no_grad():
        x = before / DATA_STD
        expected = [model.forward_level_with_latents(x, 0, box, t, None, torch.tensor([c]))[1] for c in (2, 6)]
    for memory in memories:
        torch.testing.assert_close(memory[0], expected[0][0])
        assert not memory[1].any()  # without known frames nothing is remembered
        torch.testing.assert_close(memory[2], expected[1][0])
    forgetful = LongSampler(model, options, LongOptions(remember=False))
    a, b = itertools.islice(forgetful.segments([1], 24, labels), 2)
    assert torch.equal(a.frames, first.frames)
    assert (b.frames - second.frames).abs().max() > 1e-3
