"""Hierarchical tiled sampling: with a perfect denoiser it must return the video, whatever the tiles."""

import pathlib
import subprocess
import sys

import pytest
import torch

from hpdm import HPDM
from hpdm.patch.context import Context
from hpdm.patch.sampler import Sampler
from hpdm.patch.seams import seam_energy
from hpdm.planning.training_cost import Ledger
from hpdm.process import DATA_STD, gamma
from hpdm.sampling import SamplerOptions
from hpdm_kernels import sample_patches
from tests.small import random_model, small_config


class Oracle(HPDM):
    """Knows the videos: returns the v that leads to them, and checks what the sampler hands it."""

    def __init__(self, config, videos):
        super().__init__(config, "torch")
        self.videos = videos  # per level [B, C, F, H, W]
        self.calls = []

    def level_features(self, x, level, *_):
        nothing = torch.zeros(x.shape[0], self.config.tokens, self.config.width)
        return dict.fromkeys(self.fusing_blocks(level + 1), nothing)

    def forward_level(self, x, level, boxes, t, context, labels=None, text=None, text_mask=None):
        self.calls.append((level, x.shape[0]))
        videos = self.videos[level]
        per_video = x.shape[0] // videos.shape[0]
        whole = videos.repeat_interleave(per_video, dim=0)
        signal = self.config.signal_scale(level)
        y = sample_patches(whole, boxes, self.config.patch) * signal
        g = gamma(t).reshape(-1, 1, 1, 1, 1)
        noised = x * (g * (signal * DATA_STD) ** 2 + 1 - g).sqrt()
        return (g.sqrt() * noised - y) / (1 - g).sqrt().clamp(min=1e-4)


@pytest.mark.parametrize("overlap", ["none", "w", "fh", "fhw"])
@pytest.mark.parametrize(("solver", "later"), [("2m", "heun"), ("heun", "ddim"), ("ddim", "2m"), ("edm", "edm")])
def test_a_perfect_denoiser_gives_the_video(overlap, solver, later, generator):
    config = small_config()
    videos = [
        torch.rand(2, 3, *config.level_resolution(n), generator=generator) * 1.8 - 0.9 for n in range(config.levels)
    ]
    options = SamplerOptions(steps=8, overlap=overlap, solver=solver, later_solver=later, tile_batch=7)
    levels = Sampler(Oracle(config, videos), options)([3, 4])
    for sampled, expected in zip(levels, videos):
        torch.testing.assert_close(sampled, expected, rtol=0, atol=2e-4)


def test_a_video_depends_on_its_seed_and_class_alone():
    model = random_model(small_config())
    options = SamplerOptions(steps=3, overlap="hw", tile_batch=64)
    together = Sampler(model, options)([5, 6, 7], torch.tensor([0, 1, 2]))[-1]
    alone = Sampler(model, options)([6], torch.tensor([1]))[-1]
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=2e-5)
    assert (together[0] - together[1]).abs().max() > 0.05
    chunked = Sampler(model, SamplerOptions(steps=3, overlap="hw", tile_batch=5))([6], torch.tensor([1]))[-1]
    torch.testing.assert_close(chunked, alone, rtol=0, atol=2e-5)
    assert torch.equal(alone, Sampler(model, options)([6], torch.tensor([1]))[-1])


def test_the_context_of_finished_levels_matters():
    """Level 1 sampled above two different level-0 videos differs, though its noise is the same."""
    config = small_config()
    model = random_model(config)
    sampler = Sampler(model, SamplerOptions(steps=2, overlap="none"))
    first, second = sampler([1], torch.tensor([0])), sampler([1], torch.tensor([0]))
    assert torch.equal(first[1], second[1])
    with torch.no_grad():
        model.latents[:1] += 10  # changes level 0 and its features
    assert not torch.allclose(sampler([1], torch.tensor([0]))[1], first[1])


def test_cached_context_is_what_joint_denoising_sees():
    """A tile with cached ancestors gets the v that forward() gives it among its clean ancestors."""
    config = small_config()
    model = random_model(config)
    torch.manual_seed(1)
    boxes = torch.tensor([[[0, 0, 0, 1, 1, 1], [0.5, 0, 0.25, 0.5, 0.5, 0.5], [0.5, 0.25, 0.5, 0.25, 0.25, 0.25]]])
    x = torch.randn(1, 3, 3, *config.patch)
    t = torch.tensor([[0.0, 0.0, 0.6]])
    labels = torch.tensor([2])
    with torch.no_grad():
        joint = model(x, boxes, t, labels)
        features = {b: [] for b in range(6)}
        context = None
        for level in range(3):
            arguments = x[:, level], level, boxes[:, level], t[:, level], context, labels
            v, kept = model.forward_level(*arguments), model.level_features(*arguments)
            torch.testing.assert_close(v, joint[:, level], rtol=1e-4, atol=1e-5)
            for b, f in kept.items():
                features[b].append(f)
            context = Context(
                {b: tuple(features[b]) for b in model.fusing_blocks(level + 1)},
                None,
                tuple(boxes[:, k] for k in range(level + 1)),
                torch.zeros(1, level + 1, dtype=torch.long),
            )


@pytest.mark.parametrize(
    "changes",
    [{"fusion": "shallow"}, {"coordinates": False}, {"levels_per_block": (3, 3)}, {"share_blocks": True}],
)
def test_ablations_sample(changes):
    model = random_model(small_config(**changes))
    videos = Sampler(model, SamplerOptions(steps=2, overlap="hw"))([0], torch.tensor([1]))
    assert [tuple(v.shape[2:]) for v in videos] == [model.config.level_resolution(n) for n in range(3)]
    assert all(torch.isfinite(v).all() and v.abs().max() <= 1 for v in videos)


def test_image_mode_samples():
    config = small_config().with_pyramid((1, 8, 8), (1, 32, 32))
    videos = Sampler(random_model(config), SamplerOptions(steps=2))([0], torch.tensor([1]))
    assert tuple(videos[-1].shape) == (1, 3, 1, 32, 32)


def test_text_conditioned_models_sample_with_guidance(generator):
    config = small_config(conditioning="text", text_width=12)
    text = torch.randn(2, 5, 12, generator=generator)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    sampler = Sampler(random_model(config), SamplerOptions(steps=2, overlap="none", guidance=2.0))
    videos = sampler([0, 1], text=text, text_mask=mask)[-1]
    text = text.clone()
    text[1, 2:] = 7.0  # behind the mask
    torch.testing.assert_close(sampler([0, 1], text=text, text_mask=mask)[-1], videos)
    with pytest.raises(ValueError, match=r"^text: got shape \(2, 5, 12\), expected 1 texts, one for each seed$"):
        sampler([0], text=text, text_mask=mask)


def test_guidance_of_texts_is_that_of_absent_text(generator):
    config = small_config(conditioning="text", text_width=12)
    model, text = random_model(config), torch.randn(1, 5, 12, generator=generator)

    def run(guidance, text):
        options = SamplerOptions(steps=2, overlap="none", guidance=guidance, clip=False, solver="heun", spacing="time")
        return Sampler(model, options)([3], text=text)[-1]

    torch.testing.assert_close(run(0.0, text), run(1.0, None), rtol=0, atol=5e-5)
    assert not torch.allclose(run(3.0, text), run(1.0, text), atol=1e-4)


def test_guidance_of_one_is_none_and_zero_is_unconditional():
    model = random_model(small_config())

    def run(guidance, label):
        options = SamplerOptions(
            steps=2, overlap="none", guidance=guidance, clip=False, solver="heun", spacing="time"
        )  # with spacing "edm" Heun's method takes two such large steps that only rounding is left
        return Sampler(model, options)([3], torch.tensor([label]))[0]

    null = model.config.classes
    # One call of the network has twice the rows of the other, so its sums are rounded in another order.
    torch.testing.assert_close(run(0.0, 1), run(1.0, null), rtol=0, atol=5e-5)
    assert not torch.allclose(run(3.0, 1), run(1.0, 1), atol=1e-4)


@pytest.mark.parametrize("cache", ["gpu", "cpu", "off"])
def test_progress_ends_complete(cache):
    seen = []
    model = random_model(small_config())
    Sampler(model, SamplerOptions(steps=4, overlap="hw", tile_batch=4, cache=cache))(
        [0], torch.tensor([0]), progress=lambda *call: seen.append(call)
    )
    for level in range(3):
        calls = [(done, total) for n, done, total in seen if n == level]
        assert [done for done, _ in calls] == list(range(1, calls[0][1] + 1))


FOUR_LEVELS = {"patch": (2, 4, 4), "ratio": (1, 2, 2), "levels": 4, "levels_per_block": (1, 2, 3, 4, 4)}


@pytest.mark.parametrize("changes", [{}, {"fusion": "shallow"}, {"coordinates": False}, FOUR_LEVELS])
def test_cache_modes_agree(changes):
    """Features in device and in host memory give the same bits; recomputed, the same up to rounding."""
    model = random_model(small_config(**{"ratio": (1, 2, 2)} | changes))
    overlap = "none" if model.config.levels == 4 else "hw"  # 225 tiles on the last of four levels would take long

    def run(cache):
        options = SamplerOptions(steps=3, overlap=overlap, tile_batch=6, guidance=1.5, cache=cache)
        return Sampler(model, options)([1, 2], torch.tensor([0, 1]))

    on_device, on_host, computed = run("gpu"), run("cpu"), run("off")
    for level in range(model.config.levels):
        assert torch.equal(on_device[level], on_host[level])
        torch.testing.assert_close(computed[level], on_device[level], rtol=0, atol=2e-5)


def test_finer_strides_change_the_seams_alone():
    model = random_model(small_config())
    half, quarter = (
        Sampler(model, SamplerOptions(steps=2, overlap="hw", tiles_per_patch=n))([1], torch.tensor([0])) for n in (2, 4)
    )
    assert torch.equal(half[0], quarter[0])
    assert not torch.equal(half[1], quarter[1])
    assert [t.counts for t in Sampler(model, SamplerOptions(overlap="w", tiles_per_patch=4)).tilings] == [
        (1, 1, 1), (2, 2, 5), (4, 4, 13),
    ]  # fmt: skip


def test_an_interrupted_run_goes_on_with_the_next_level():
    model = random_model(small_config())
    sampler = Sampler(model, SamplerOptions(steps=3, overlap="hw", tile_batch=8))
    seen = []
    whole = sampler([4, 5], torch.tensor([0, 1]), on_level=lambda level, video: seen.append((level, video.clone())))
    assert [level for level, _ in seen] == [0, 1, 2]
    for done in (1, 2, 3):
        again = sampler([4, 5], torch.tensor([0, 1]), finished=[video for _, video in seen[:done]])
        assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))
    with pytest.raises(ValueError, match="finished: got videos of"):
        sampler([4], torch.tensor([0]), finished=[seen[0][1]])


def test_parts_are_the_levels_as_they_are_finished():
    sampler = Sampler(random_model(small_config()), SamplerOptions(steps=2, overlap="w"))
    whole, last_level = sampler([4], torch.tensor([0])), []
    parts = sampler.parts([4], torch.tensor([0]), progress=lambda level, *_: last_level.append(level))
    for level, expected in enumerate(whole):
        assert torch.equal(next(parts), expected)
        assert last_level[-1] == level
    assert list(parts) == []
    (continued,) = sampler.parts([4], torch.tensor([0]), finished=whole[:2])
    assert torch.equal(continued, whole[-1])


def test_seams_are_those_of_the_last_level():
    sampler = Sampler(random_model(small_config()), SamplerOptions(steps=1, overlap="none"))
    video = sampler([4], torch.tensor([0]))[-1][0]
    assert sampler.seams(video) == seam_energy(video, sampler.tilings[-1])
    assert list(sampler.seams(video)) == ["f", "h", "w"]


def test_memory_does_not_grow_with_the_tiles():
    """At the same video and batch of tiles, nine times as many tiles take no more memory while a level is sampled."""
    model = random_model(small_config().with_pyramid((2, 16, 16), (4, 32, 32)))

    def peak(tiles_per_patch):
        options = SamplerOptions(steps=1, overlap="hw", tiles_per_patch=tiles_per_patch, tile_batch=4, cache="off")
        sampler = Sampler(model, options)
        with Ledger() as ledger:
            sampler([0], torch.tensor([0]))
        return sampler.tilings[-1].tiles, sum(ledger.at_peak().values())

    (few, memory), (many, more) = peak(2), peak(8)
    assert many >= 9 * few
    # Boxes and origins are a few numbers per tile, here and in the levels below, where they are looked up.
    assert more < memory + 100 * (many - few)


CHILD = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from tests.small import random_model, small_config
from hpdm.patch.sampler import Sampler
from hpdm.sampling import SamplerOptions
torch.set_num_threads(1)
if int(sys.argv[3]) > 1:
    world, rank = map(int, sys.argv[3:5])
    dist.init_process_group("gloo", init_method="file://" + sys.argv[5], rank=rank, world_size=world)
for cache in ("gpu", "cpu", "off"):
    options = SamplerOptions(
        steps=3, overlap="hw", tile_batch=6, cache=cache, guidance=1.5, guidance_interval=(0.01, 20.0),
        context_noise=0.1,
    )
    model = random_model(small_config(ratio=(1, 2, 2), self_conditioning=0.9 if cache == "gpu" else 0.0))
    videos = Sampler(model, options)([1, 2], torch.tensor([0, 1]))
    torch.save(videos, f"{sys.argv[2]}/{cache}_{sys.argv[3]}_{sys.argv[4]}.pt")
"""


def test_processes_share_the_tiles_and_make_the_same_video(tmp_path):
    root = str(pathlib.Path(__file__).parents[2])

    def start(count, rank):
        arguments = [root, str(tmp_path), str(count), str(rank), str(tmp_path / f"meeting{count}")]
        return subprocess.Popen([sys.executable, "-c", CHILD, *arguments], cwd=root)

    children = [start(1, 0), *(start(2, rank) for rank in range(2)), *(start(3, rank) for rank in range(3))]
    assert [child.wait(timeout=300) for child in children] == [0] * 6
    for cache in ("gpu", "cpu", "off"):
        alone = torch.load(tmp_path / f"{cache}_1_0.pt")
        for count in (2, 3):
            for rank in range(count):
                together = torch.load(tmp_path / f"{cache}_{count}_{rank}.pt")
                assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"steps": 0}, "steps"),
        ({"steps_decay": 0.0}, "steps_decay"),
        ({"overlap": "q"}, "overlap"),
        ({"churn": -1.0}, "churn"),
        ({"tile_batch": 0}, "tile_batch"),
        ({"tiles_per_patch": 1}, "tiles_per_patch"),
        ({"solver": "euler"}, "solver"),
        ({"later_solver": "rk4"}, "later_solver"),
        ({"cache": "disk"}, "cache"),
    ],
)
def test_bad_options_are_named(options, field):
    with pytest.raises(ValueError, match=f"{field}: got"):
        SamplerOptions(**options)


def test_bad_calls_are_named():
    model = random_model(small_config())
    with pytest.raises(ValueError, match="seeds: got none"):
        Sampler(model)([])
    with pytest.raises(ValueError, match=r"labels: got \[9\]"):
        Sampler(model)([0], torch.tensor([9]))
    with pytest.raises(ValueError, match=r"guidance: got 2.0 without labels"):
        Sampler(model, SamplerOptions(guidance=2.0))([0])


def test_steps_too_few_for_heuns_method_are_named(caplog):
    model = random_model(small_config())
    for options in ({"steps": 16}, {"solver": "2m", "steps": 4}, {"steps": 4, "spacing": "time"}):
        Sampler(model, SamplerOptions(**options))
    assert not caplog.records
    Sampler(model, SamplerOptions(steps=15))
    Sampler(model, SamplerOptions(steps=24, later_solver="heun"))
    assert [record.getMessage() for record in caplog.records] == [
        f"steps: got {steps} on level {level}, expected at least 16 for {name}: fewer exaggerate detail; '2m' does not"
        for steps, level, name in [(15, 0, "solver 'edm'"), (12, 1, "later_solver 'heun'")]
    ]
