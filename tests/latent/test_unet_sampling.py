"""Denoising and sampling latents: guidance, known frames, and that these touch nothing that should not know them."""

import pytest
import torch

from hpdm.frames import Known
from hpdm.latent.denoiser import Conditions, KnownLatents, denoise, perturbed, sample
from hpdm.latent.objective import draw, latent_error
from hpdm.latent.unet import FactorizedUNet
from hpdm.process import SCHEDULES, clean_of
from hpdm.solvers import Solver, noise_levels
from tests.latent.unets import trained_unet, unet_config

CONFIG = unet_config(conditioning="class", known="mask")
FRAMES = torch.tensor([True, False, False, True])
LINEAR = SCHEDULES["linear"]


class Recorder:
    """A network that remembers what it was called with."""

    def __init__(self, network):
        self.network, self.calls = network, []

    def __call__(self, *arguments, **named):
        self.calls.append((*arguments, named.get("frame_t")))
        return self.network(*arguments, **named)


def known_latents(generator, config=CONFIG, batch=2, t=0.101):
    clean, noise = torch.randn(2, batch, 3, 4, 4, 4, generator=generator).unbind(0)
    return perturbed(config, Known(clean, FRAMES), t, noise)


def test_known_frames_are_perturbed_as_published(generator):
    """LVDM's s = 100: 0.910 of signal and 0.414 of noise."""
    clean, noise = torch.randn(2, 2, 3, 4, 4, 4, generator=generator).unbind(0)
    found = perturbed(CONFIG, Known(clean, FRAMES), LINEAR.time_of_step(100), noise)
    torch.testing.assert_close(found.noised, 0.9104 * clean + 0.4137 * noise, rtol=0, atol=1e-3)
    assert found.t == 0.101


@pytest.mark.parametrize("known", ["mask", "times"])
def test_what_does_not_know_frames_is_not_touched_by_them(known, generator):
    """The rows without known frames see all frames at the same time, and no perturbation; nothing changes in place."""
    config = CONFIG.replace(known=known)
    model = trained_unet(config)
    noised = torch.randn(2, 3, 4, 4, 4, generator=generator)
    before = noised.clone()
    conditions = Conditions(torch.tensor([1, 2]))
    rows = []
    for s in (0.0, 0.101):
        network = Recorder(model)
        given = known_latents(generator, config, t=s)
        found = denoise(network, config, noised, 0.6, conditions, known=given, frame_guidance=0.1)
        assert torch.equal(noised, before)
        ((x, t, labels, _, _, frame_t),) = network.calls
        assert torch.equal(x[2:], noised)
        assert torch.equal(frame_t[2:], t[2:, None].expand(-1, 4))
        assert t.tolist() == pytest.approx([0.6] * 4)
        assert labels.tolist() == [1, 2, 1, 2]
        assert torch.equal(x[:2, :, FRAMES], given.noised[:, :, FRAMES])
        assert torch.equal(x[:2, :, ~FRAMES], noised[:, :, ~FRAMES])
        assert frame_t[0].tolist() == pytest.approx([s, 0.6, 0.6, s])
        # Known frames pass through exactly.
        assert torch.equal(found[:, :, FRAMES], given.clean[:, :, FRAMES])
        rows.append(model(x, t, labels, frame_t=frame_t)[2:])
    assert torch.equal(rows[0], rows[1])
    alone = trained_unet(CONFIG.replace(known="none"))
    mine = alone.state_dict() | {k: v for k, v in model.state_dict().items() if not k.startswith("known_")}
    alone.load_state_dict(mine)
    doubled = noised.repeat(2, 1, 1, 1, 1)
    assert torch.equal(alone(doubled, t, labels)[2:], rows[0])


def test_guidance_is_its_formula(generator):
    """``g y + (1 - g) y'`` by class, and ``(1 + w) y - w y'`` by known frames, of one call."""
    model = trained_unet(CONFIG)
    network = Recorder(model)
    noised, given = torch.randn(2, 3, 4, 4, 4, generator=generator), known_latents(generator)
    labels = torch.tensor([1, 2])
    found = denoise(network, CONFIG, noised, 0.5, Conditions(labels), 3.0, given, 0.1)
    assert len(network.calls) == 1
    t, frame_t = torch.full((2,), 0.5), torch.tensor([[0.101, 0.5, 0.5, 0.101]] * 2)
    shown = torch.where(FRAMES[:, None, None], given.noised, noised)
    aware, free = model(shown, t, labels, frame_t=frame_t), model(shown, t, frame_t=frame_t)
    unaware = model(noised, t, labels)
    said = 3.0 * aware - 2.0 * free + 0.1 * (aware - unaware)
    g = float(LINEAR.gamma(torch.tensor(0.5, dtype=torch.float64)))
    y = clean_of(said, noised, g, "eps")
    torch.testing.assert_close(found[:, :, ~FRAMES], y[:, :, ~FRAMES], rtol=1e-4, atol=1e-4)
    plain = denoise(network, CONFIG, noised, 0.5, Conditions(labels))
    torch.testing.assert_close(plain, clean_of(model(noised, t, labels), noised, g, "eps"))
    assert len(network.calls[-1][0]) == 2  # one row per clip


def test_texts_are_guided(generator):
    config = unet_config(conditioning="text")
    network = Recorder(trained_unet(config))
    noised, text = torch.randn(2, 3, 4, 4, 4, generator=generator), torch.randn(2, 3, 6, generator=generator)
    denoise(network, config, noised, 0.5, Conditions(text=text), 2.0)
    assert network.calls[0][4].tolist() == [[True] * 3] * 2 + [[False] * 3] * 2


@pytest.mark.parametrize(("method", "eta"), [("euler", 0.0), ("euler", 1.0), ("heun", 0.0), ("2m", 0.0)])
def test_samples_keep_known_frames(method, eta, generator):
    model, given = trained_unet(CONFIG), known_latents(generator)
    solver = Solver(noise_levels("time", 5, 0.01, 7.0, LINEAR), method, eta=eta)

    def noise():
        return torch.randn(2, 3, 4, 4, 4, generator=generator)

    found = sample(model, CONFIG, solver, noise, Conditions(torch.tensor([0, 1])), known=given, frame_guidance=0.1)
    assert torch.equal(found[:, :, FRAMES], given.clean[:, :, FRAMES])
    assert found.isfinite().all()


@pytest.mark.parametrize("prediction", ["v", "eps"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_best_network_gives_the_data_back(schedule, prediction, generator):
    """For latents of standard deviation 0.5 everywhere; DDIM of 100 steps."""
    config = unet_config(schedule=schedule, prediction=prediction)

    def best(x, t, *_):
        g = SCHEDULES[schedule].gamma(t.double())[:, None, None, None, None]
        y = x * g.sqrt() * 0.25 / (0.25 * g + 1 - g)
        e = (x - g.sqrt() * y) / (1 - g).sqrt()
        return (e if prediction == "eps" else g.sqrt() * e - (1 - g).sqrt() * y).to(x.dtype)

    solver = Solver(noise_levels("time", 100, 0.01, 7.0, SCHEDULES[schedule]), "euler")
    start = torch.randn(8, 3, 4, 4, 4, generator=generator, dtype=torch.float64)
    found = sample(best, config, solver, lambda: start, Conditions())
    ratio = found / start
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))
    assert float(ratio.mean()) == pytest.approx(0.5, abs=0.03)  # first order: 0.475 to 0.492


def test_bad_arguments_are_named(generator):
    clean = torch.zeros(1, 3, 4, 4, 4)
    for config, frames, message in (
        (unet_config(), FRAMES, "known: got known frames, expected none: the model was trained without known frames"),
        (CONFIG, torch.ones(4, dtype=torch.bool), "known: got 4 of 4 frames, expected some, not all"),
        (CONFIG, torch.zeros(4, dtype=torch.bool), "known: got 0 of 4 frames, expected some, not all"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            perturbed(config, Known(clean, frames), 0.1, clean)
    with pytest.raises(ValueError, match=r"^guidance: got 2.0 without labels or text, expected 1"):
        denoise(FactorizedUNet(CONFIG), CONFIG, clean, 0.5, Conditions(), 2.0)


# ---- training ----


def stills(batch, generator):
    """Latents ``[B, 3, 4, 4, 4]`` that do not change in time, and are brighter in the channel that is their class."""
    labels = torch.randint(3, (batch,), generator=generator)
    latents = 0.7 * torch.randn(batch, 3, 1, 4, 4, generator=generator)
    latents[torch.arange(batch), labels] += 1
    return latents.expand(-1, -1, 4, -1, -1).contiguous(), labels


@pytest.mark.parametrize(
    ("known", "schedule", "prediction"), [("times", "cosine", "v"), ("mask", "linear", "eps")]
)  # fmt: skip
def test_training_lowers_the_loss_and_known_frames_tell(known, schedule, prediction):
    """The held-out error falls, and a known frame helps with the others."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    config = unet_config(
        conditioning="class", known=known, schedule=schedule, prediction=prediction, norm="frame", classes=3
    )
    model = FactorizedUNet(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)

    def error(batch, generator, **options):
        latents, labels = stills(batch, generator)
        return latent_error(model, config, latents, draw(config, batch, generator, frames=16, **options), labels).mean()

    def held_out():
        with torch.no_grad():
            return float(error(128, torch.Generator().manual_seed(2), times=(0.3, 0.9)))

    before = held_out()
    for _ in range(70):
        optimizer.zero_grad()
        error(16, generator, dropout=0.1).backward()
        optimizer.step()
    assert held_out() < 0.7 * before
    model.eval()
    latents, labels = stills(64, torch.Generator().manual_seed(3))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(4))
    time = 0.9 if schedule == "cosine" else 0.7
    g = float(SCHEDULES[schedule].gamma(torch.tensor(time)))
    noised = g**0.5 * latents + (1 - g) ** 0.5 * noise
    first = torch.tensor([True, False, False, False])
    knowing = KnownLatents(latents, latents, first, 0.0)

    def error_of_the_others(given):
        with torch.no_grad():
            found = denoise(model, config, noised, time, Conditions(labels), known=given)
        return float((found - latents)[:, :, 1:].square().mean())

    assert error_of_the_others(knowing) < 0.93 * error_of_the_others(None)
