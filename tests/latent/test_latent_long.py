"""Videos of any length from latent diffusion: in Python and by the command, given frames, interruptions, ranks."""

import itertools

import pytest
import torch

from hpdm import cli, runs, systems
from hpdm.commands import unfinished
from hpdm.commands.sample import sample
from hpdm.frames import NOT_TRAINED
from hpdm.latent import coding
from hpdm.latent.denoiser import Conditions
from hpdm.latent.latent_model import LVDM
from hpdm.latent.long_cost import long_plan
from hpdm.latent.long_sampler import LatentLongSampler
from hpdm.latent.long_windows import hierarchy_of
from hpdm.latent.objective import Draws, clip_of, draw
from hpdm.latent.storylines import Autoregressive, Hierarchical, Videos
from hpdm.long_video import LongOptions
from hpdm.noise import level_noise
from hpdm.objective import Objective
from hpdm.planning.ledger import Ledger
from hpdm.process import SCHEDULES
from hpdm.runs import RunConfig
from hpdm.sampling import SamplerOptions
from hpdm.training.checkpoint import save_checkpoint
from hpdm.training.ema import EMA, ConstantDecay
from hpdm.training.optim import make_optimizer
from hpdm.video import write_video
from tests.latent.latent_runs import long_latent_config as config
from tests.latent.latent_runs import random_latent_model
from tests.sampling.long_commands import contents, frames_of, options, psnr

QUICK = SamplerOptions(steps=2, solver="ddim", overlap="none", known_noise=0.1, frame_guidance=0.1)
UNAWARE = {"known": "none", "spacing": 1}
SCHEMES = ("autoregressive", "hierarchical")


def sampler_of(scheme="autoregressive", options=QUICK, known=None, **unet):
    return LatentLongSampler(random_latent_model(config(**unet)), options, LongOptions(scheme, known=known))


def frames_of_segments(segments):
    return torch.cat([segment.frames for segment in segments], dim=2)


@pytest.fixture(scope="module", params=SCHEMES)
def sampler(request):
    return sampler_of(request.param)


@pytest.fixture(scope="module")
def whole(sampler):
    """Two videos of 38 frames: their segments."""
    return list(sampler.segments([3, 8], 38, torch.tensor([1, 4])))


def test_the_first_frames_do_not_depend_on_how_many_are_asked_for(sampler, whole):
    expected = frames_of_segments(whole)
    assert expected.shape == (2, 3, 38, 32, 32)
    assert expected.abs().max() <= 1
    for frames in (17, 3):
        video = frames_of_segments(sampler.segments([3, 8], frames, torch.tensor([1, 4])))
        # Windows that are sampled at once are fewer in a shorter video, which changes rounding.
        torch.testing.assert_close(video, expected[:, :, :frames], atol=1e-4, rtol=0)
        assert sampler.long.scheme == "hierarchical" or torch.equal(video, expected[:, :, :frames])
    numbers = [segment.number for segment in whole]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == sampler.windows.count(38) - 1


def test_a_video_depends_on_its_own_seed_and_class_alone(sampler, whole):
    one_by_one = LatentLongSampler(sampler.model, SamplerOptions(**{**vars(QUICK), "tile_batch": 1}), sampler.long)
    alone = frames_of_segments(one_by_one.segments([8], 38, torch.tensor([4])))
    torch.testing.assert_close(alone[0], frames_of_segments(whole)[1], atol=1e-3, rtol=0)


def test_it_goes_on_after_any_segment_with_the_same_bits(sampler, whole):
    for before, after in itertools.pairwise(whole):
        again = LatentLongSampler(sampler.model, QUICK, sampler.long)
        more = again.segments([3, 8], 38, torch.tensor([1, 4]), state=before.state, done=before.number + 1)
        found = next(more)
        assert found.number == after.number
        assert torch.equal(found.frames, after.frames)
        assert found.state.keys() == after.state.keys()
        assert all(torch.equal(found.state[name], t) for name, t in after.state.items())


@pytest.mark.parametrize(
    ("scheme", "known", "lengths"), [("autoregressive", 2, (36, 28)), ("hierarchical", 1, (84, 60))]
)
def test_work_and_memory_are_as_predicted_and_memory_does_not_grow(scheme, known, lengths):
    quicker = SamplerOptions(**{**vars(QUICK), "steps": 1})
    sampler, rows, peaks, sizes = sampler_of(scheme, quicker, known), [], [], []
    sampler.model.unet.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    for frames in lengths:
        rows.clear()
        with Ledger() as ledger:
            ledger.label([*sampler.model.parameters(), *sampler.model.buffers()], "weights")
            for segment in sampler.segments([0], frames, torch.tensor([1])):
                sizes.append({name: t.shape for name, t in segment.state.items()})
        peaks.append(sum(ledger.at_peak().values()))
    assert peaks[0] == peaks[1]
    assert sizes[1] == sizes[2]
    plan = long_plan(sampler.config, quicker, sampler.long, lengths[-1])
    assert plan.memory_bytes == pytest.approx(peaks[0], rel=0.12)
    assert plan.patches == sum(rows)
    assert plan.windows == sampler.windows.count(lengths[-1])
    assert set(plan.as_json()) == {
        "frames", "windows", "known", "first", "next", "memory_bytes", "patches", "flops"
    }  # fmt: skip
    parts = sum(row["flops"] for row in plan.first) + (plan.windows - 1) * sum(row["flops"] for row in plan.next)
    assert parts == pytest.approx(plan.flops, rel=1e-3)


class Best:
    """The best denoiser of a Gaussian process, in place of a model: neighboring latents have the correlation 0.8."""

    def __init__(self, model):
        self.autoencoder = model.autoencoder

    def __call__(self, x, t, labels, text, text_mask, *, frame_t, sparse=None):
        place = torch.arange(x.shape[2], dtype=torch.float64) * (1 if sparse is None else 3)
        covariance = 0.8 ** (place[:, None] - place).abs()
        g = torch.cos(frame_t[0].double() * torch.pi / 2).square()  # that of each frame
        seen = g.sqrt()[:, None] * covariance * g.sqrt() + torch.diag(1 - g)
        weights = covariance * g.sqrt() @ torch.linalg.inv(seen)  # of the noised frames
        y = torch.einsum("st,bcthw->bcshw", weights, x.double())
        own = torch.cos(t[0].double() * torch.pi / 2).square()
        return ((own.sqrt() * x - y) / (1 - own).sqrt()).to(x.dtype)  # v


@pytest.mark.parametrize(("scheme", "known"), [("autoregressive", 2), ("hierarchical", 1)])
def test_with_the_best_network_latents_go_on_as_the_data_do(scheme, known):
    """No border can be told from the inside of a window, and what is far apart has nothing to do with each other."""
    sampler = sampler_of(scheme, SamplerOptions(steps=16, solver="2m", overlap="none", known_noise=0.0), known)
    sampler.sampler.model = Best(sampler.model)
    seeds = range(48)
    videos = Videos(sampler.sampler, seeds, Conditions(), None)
    if scheme == "hierarchical":
        story = Hierarchical(videos, hierarchy_of(sampler.config, sampler.long), 25)
    else:
        story = Autoregressive(videos, sampler.windows.until(84))
    latents = torch.cat([part.latents for part in story.parts(0)], dim=2)
    numbers = latents.movedim(2, 0).flatten(1)[:25]  # [T, 48 * 64]
    correlation = torch.corrcoef(numbers)
    torch.testing.assert_close(correlation.diagonal(1), torch.full((24,), 0.8), atol=0.04, rtol=0)
    torch.testing.assert_close(correlation.diagonal(3), torch.full((22,), 0.8**3), atol=0.06, rtol=0)
    torch.testing.assert_close(numbers.std(dim=1), torch.ones(25), atol=0.06, rtol=0)


# ---- given frames ----


def calls_of(model):
    """Records the arguments of every call of the network."""
    calls = []
    model.unet.register_forward_pre_hook(lambda _, args, named: calls.append((*args, named)), with_kwargs=True)
    return calls


def test_given_frames_come_out_as_they_are_and_are_known_as_the_options_say(generator):
    sampler = sampler_of(schedule="linear")
    clip = torch.rand(1, 3, 8, 32, 32, generator=generator) * 2 - 1
    calls = calls_of(sampler.model)
    video = frames_of_segments(sampler.segments([5], 30, torch.tensor([1]), first=[clip]))
    assert torch.equal(video[:, :, :8], clip)
    x, t, _, _, _, named = calls[0]
    latents = coding.encode(sampler.model.autoencoder, clip, chunk=None)
    assert latents.shape[2] == 2
    # As much noise as at the time 0.1 of the cosine schedule, at the time that the network has for it.
    g = torch.cos(torch.tensor(0.1 * torch.pi / 2)).square()
    noise = level_noise([5], 0, (4, 4, 4, 4), "known")
    torch.testing.assert_close(x[:1, :, :2], g.sqrt() * latents + (1 - g).sqrt() * noise[:, :, :2])
    s = named["frame_t"][0, 0]
    torch.testing.assert_close(SCHEDULES["linear"].gamma(s), g)
    assert named["frame_t"][0].tolist() == [s, s, t[0], t[0]]
    # Guidance by frames: its rows know nothing, whatever is known.
    assert torch.equal(x[1, :, 2:], x[0, :, 2:])
    assert named["frame_t"][1].tolist() == [t[0]] * 4
    calls.clear()
    other = frames_of_segments(sampler.segments([5], 30, torch.tensor([1]), first=[-clip]))
    assert torch.equal(calls[0][0][1], x[1])
    assert not torch.equal(other[:, :, 8:], video[:, :, 8:])


def test_images_at_the_ends(generator):
    first, last = torch.rand(2, 1, 3, 1, 32, 32, generator=generator) * 2 - 1
    sampler = sampler_of()
    for frames in (16, 20):
        segments = list(sampler.segments([5], frames, torch.tensor([1]), first=[first], last=[last]))
        video = frames_of_segments(segments)
        assert video.shape[2] == frames
        assert torch.equal(video[:, :, :1], first)
        assert torch.equal(video[:, :, -1:], last)
        still = coding.encode(sampler.model.autoencoder, last.expand(-1, -1, 4, -1, -1))
        assert torch.equal(segments[-1].state["latents"][:, :, -1:], still)


@pytest.mark.parametrize(
    ("made", "arguments", "message"),
    [
        ({}, {"frames": 0}, "frames: got 0, expected at least 1"),
        (UNAWARE, {"frames": 17}, f"frames: got 17, expected at most 16, .*: {NOT_TRAINED}"),
        (UNAWARE, {"frames": 9, "first": 4}, f"first: got 4 frames, expected none: {NOT_TRAINED}"),
        ({}, {"frames": 20, "first": 5}, "first: got 5 frames, expected 1 or a multiple of 4, those of a latent"),
        ({}, {"frames": 20, "first": 16}, "first: got 16 frames, expected fewer than the 16 of a window"),
        ({}, {"frames": 8, "first": 8}, "frames: got 8, expected more than the 8 that are given"),
        ({}, {"frames": 18, "last": 1}, "frames: got 18, expected at least 16, and a multiple of 4"),
        ({"scheme": "hierarchical"}, {"frames": 20, "first": 4}, "scheme: got 'hierarchical' with first frames"),
        ({"scheme": "hierarchical"}, {"frames": 20, "last": 4}, "scheme: got 'hierarchical' with last frames"),
    ],
)  # fmt: skip
def test_what_cannot_be_sampled_is_named(made, arguments, message):
    unet = {name: value for name, value in made.items() if name != "scheme"}
    model = LVDM(config(**unet)).eval()
    sampler = LatentLongSampler(model, SamplerOptions(steps=2), LongOptions(made.get("scheme", "autoregressive")))
    given = {name: [torch.zeros(1, 3, arguments[name], 4, 4)] for name in ("first", "last") if name in arguments}
    with pytest.raises(ValueError, match=f"^{message}"):
        next(sampler.segments([0], arguments["frames"], **given))


def test_schemes_and_sizes_that_a_model_does_not_have_are_named():
    model = LVDM(config()).eval()
    for scheme in ("joint", "rolling"):
        with pytest.raises(ValueError, match=f"^scheme: got '{scheme}', expected 'autoregressive' or 'hierarchical'"):
            LatentLongSampler(model, None, LongOptions(scheme))
    with pytest.raises(ValueError, match=r"^scheme: got 'hierarchical' for a model that was trained without --spacing"):
        LatentLongSampler(LVDM(config(spacing=1)).eval(), None, LongOptions("hierarchical"))
    for scheme in SCHEMES:
        with pytest.raises(ValueError, match=r"^known: got 4, expected 1 to 3"):
            LatentLongSampler(model, None, LongOptions(scheme, known=4))
    with pytest.raises(ValueError, match=r"^spacing: got 2, expected 1 or a divisor of 3$"):
        config(spacing=2)
    with pytest.raises(ValueError, match=r"^known: got 'none' with spacing=3, expected 'mask' or 'times'$"):
        config(known="none")
    by_clip = config(spacing=1)
    by_clip = by_clip.replace(autoencoder=by_clip.autoencoder.replace(norm="clip"))
    sampler = LatentLongSampler(LVDM(by_clip).eval(), QUICK)
    assert frames_of_segments(sampler.segments([0], 9)).shape[2] == 9
    with pytest.raises(ValueError, match=r"^frames: got 17, expected at most 16, .*norm='clip'"):
        sampler.check(17)
    with pytest.raises(ValueError, match=r"^spacing: got 3 with an autoencoder of norm='clip'"):
        by_clip.replace_unet(spacing=3)


# ---- training ----


def test_training_shows_sparse_clips_and_tells_them(generator):
    cfg, system = config(), systems.get("latent")
    assert system.clip_frames(cfg) == 40
    video = torch.randint(256, (6, 3, 40, 32, 32), dtype=torch.uint8, generator=generator)
    model = random_latent_model(cfg)
    drawn = system.draw(cfg, 6, generator, objective=Objective(sparse=0.5))
    drawn = drawn._replace(sparse=torch.arange(6) % 2 == 0)
    latents = coding.encode(model.autoencoder, video, chunk=None)
    shown = clip_of(cfg.unet, latents, drawn)
    for n in range(6):
        start = int(drawn.start[n])
        assert torch.equal(shown[n], latents[n, :, ::3] if n % 2 == 0 else latents[n, :, start : start + 4])
    batch = {"video": video, "labels": torch.zeros(6, dtype=torch.long)}
    system.losses(model, batch, drawn)["latent"].sum().backward()
    assert model.unet.sparse.grad.abs().max() > 0
    # Evaluation has clips of the model's own length, all of them consecutive.
    errors, _ = system.errors(model, batch | {"video": video[:, :, :16]}, generator)
    assert errors["latent"].isfinite().all()


def test_the_draws_are_as_often_as_said_and_stills_are_not_sparse():
    cfg, law = config().unet, Objective(sparse=0.3)
    drawn: Draws = draw(cfg, 4000, torch.Generator().manual_seed(0), frames=40, objective=law, images=0.5)
    moves = (drawn.stills != drawn.stills[:, :1]).any(dim=1)
    assert not (drawn.sparse & ~moves).any()
    assert 0.25 < float(drawn.sparse[moves].float().mean()) < 0.35
    assert drawn.start.unique().tolist() == list(range(7))
    before = draw(cfg.replace(spacing=1), 5, torch.Generator().manual_seed(0), frames=40, objective=law)
    assert before.start is before.sparse is None
    # A network that is not trained yet does not know what is sparse.
    torch.manual_seed(0)
    model = LVDM(config()).eval()
    x, t = torch.randn(2, 4, 4, 4, 4), torch.rand(2)
    assert torch.equal(model(x, t), model(x, t, sparse=torch.tensor([True, False])))
    told = random_latent_model(config())
    a, b = told(x, t, sparse=torch.tensor([True, False])), told(x, t)
    assert not torch.allclose(a[0], b[0])
    torch.testing.assert_close(a[1], b[1])
    with pytest.raises(ValueError, match=r"^sparse: got a tensor, expected None for a network without a spacing$"):
        LVDM(config(spacing=1))(x, t, sparse=torch.ones(2, dtype=torch.bool))


# ---- the command ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latent_long") / "run"
    model = random_latent_model(config(conditioning="none"))
    about = RunConfig(systems.get("latent"), model.config, [], {"stride": 1, "short": "skip"})
    runs.save_run_config(folder, about)
    save_checkpoint(folder, 1, model, EMA(model, ConstantDecay(0.9)), make_optimizer(model, "adamw", 1e-3, 0.0))
    return folder


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_command_goes_on_after_an_interruption_to_the_same_files(run, scheme, tmp_path, monkeypatch):
    (whole,) = sample(options(run, tmp_path / "whole", frames=18, scheme=scheme))
    assert frames_of(whole).shape == (18, 32, 32, 3)
    real = unfinished.write_state

    def write_state(path, state):
        real(path, state)
        raise KeyboardInterrupt

    interrupted = 0
    while interrupted < 9:
        with monkeypatch.context() as patched:
            patched.setattr(unfinished, "write_state", write_state)
            try:
                sample(options(run, tmp_path / "out", frames=18, scheme=scheme))
                break
            except KeyboardInterrupt:
                interrupted += 1
    assert interrupted == {"autoregressive": 3, "hierarchical": 1}[scheme]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_command_line_goes_on_from_a_clip(run, tmp_path, capsys):
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    clip = torch.stack([(4 * (x + n) + 2 * y).clamp(0, 255) for n in range(20)]).to(torch.uint8)
    write_video(tmp_path / "clip.mp4", clip[None].expand(3, -1, -1, -1), 16)
    words = ["sample", "--run", run, "--out", tmp_path / "out", "--count", 1, "--frames", 20, "--known", 2]
    words += ["--steps", 1, "--solver", "ddim", "--continue", tmp_path / "clip.mp4"]
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "the last 8 frames of these are the first of every video" in out
    assert "1 video(s) of 20 frames in 4 window(s), autoregressive, 2 known latent(s), 1 steps of ddim" in out
    video = frames_of(tmp_path / "out" / "video_seed0.mp4")
    assert video.shape == (20, 32, 32, 3)
    assert psnr(video[:8], clip[-8:, ..., None].expand(-1, -1, -1, 3).numpy()) > 33
