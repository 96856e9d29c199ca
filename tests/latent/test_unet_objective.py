"""The losses of latent diffusion: what is drawn, what the network gets, and which errors count."""

import pytest
import torch

from hpdm.latent.objective import draw, example_inputs, latent_error
from hpdm.latent.unet import FactorizedUNet
from hpdm.objective import Objective, on_device
from hpdm.process import SCHEDULES
from tests.latent.unets import trained_unet, unet_config


def drawn(config, batch=4, seed=0, **options):
    return draw(config, batch, torch.Generator().manual_seed(seed), frames=16, **options)


class Recorder:
    """A network that remembers what it was called with."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, x, t, labels=None, text=None, text_mask=None, **named):
        self.x, self.t, self.labels, self.text_mask, self.named = x, t, labels, text_mask, named
        return self.answer(x)


# ---- draws ----


@pytest.mark.parametrize("known", ["none", "mask", "times"])
def test_rows_do_not_depend_on_which_they_are(known):
    config = unet_config(known=known)
    options = {"images": 0.5, "dropout": 0.5, "objective": Objective(flip=True, weighting="min-snr")}
    whole = drawn(config, 6, rows=range(6), **options)
    part = drawn(config, 6, rows=range(2, 5), **options)
    for one, all_ in zip(part, whole, strict=True):
        assert (one is None) == (all_ is None)
        assert one is None or torch.equal(one, all_[2:5])


def test_what_is_drawn():
    config = unet_config()
    found = drawn(config, 1000, dropout=0.3)
    assert found.noise.shape == (1000, 3, 4, 4, 4)
    assert found.t.shape == found.weight.shape == (1000,)
    assert found.dropped.float().mean() == pytest.approx(0.3, abs=0.06)
    assert found.stills is found.mirrored is found.frame_t is found.predicted is None
    torch.testing.assert_close(found.gamma, SCHEDULES["linear"].gamma(found.t)[:, None].expand(-1, 4))
    few = drawn(config, 8, images=1.0, times=(0.2, 0.3), objective=Objective(flip=True))
    assert few.stills.shape == (8, 16)
    assert few.mirrored.dtype is torch.bool
    assert ((few.t >= 0.2) & (few.t <= 0.3)).all()


def test_known_frames_are_those_of_the_shared_law():
    """Half of the noise levels of the released code: s uniform in [0, 250) of 1000, a quarter of them 0."""
    law = Objective(known_first=0.5, known_ends=0.2, rolling=0.0)
    found = drawn(unet_config(known="mask"), 4000, objective=law)
    known = ~found.predicted
    knows = known.any(dim=1)
    assert knows.float().mean() == pytest.approx(0.7, abs=0.03)
    assert found.predicted.any(dim=1).all()
    assert torch.equal(found.frame_t != found.t[:, None], known)
    s = torch.where(known, found.frame_t, -1).amax(dim=1)[knows]
    assert (s == 0).float().mean() == pytest.approx(0.25, abs=0.03)
    assert s.max() == pytest.approx(0.25, abs=2e-3)
    assert s[s > 0].mean() == pytest.approx(0.125, abs=5e-3)
    torch.testing.assert_close(found.gamma, SCHEDULES["linear"].gamma(found.frame_t))


def test_the_mask_knows_no_rolling_clips():
    law = Objective(known_first=0.0, known_ends=0.0, rolling=1.0)
    rolling = drawn(unet_config(known="times"), 50, objective=law)
    assert ((rolling.frame_t.diff(dim=1) > 0) | ~rolling.predicted[:, :-1]).all()
    masked = drawn(unet_config(known="mask"), 50, objective=law)
    assert (masked.predicted.sum(dim=1) < 4).all()
    assert torch.equal(torch.where(masked.predicted, masked.frame_t, 0), masked.predicted * masked.t[:, None])


# ---- errors ----


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("loss", ["l2", "l1"])
@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_the_error_is_that_of_the_prediction(prediction, loss, schedule, generator):
    config = unet_config(prediction=prediction, schedule=schedule)
    latents = torch.randn(4, 3, 4, 4, 4, generator=generator)
    draws = drawn(config, objective=Objective(weighting="min-snr"))
    network = Recorder(lambda x: 0.5 * x)
    found = latent_error(network, config, latents, draws, loss=loss)
    g = SCHEDULES[schedule].gamma(draws.t).reshape(4, 1, 1, 1, 1)
    noised = g.sqrt() * latents + (1 - g).sqrt() * draws.noise
    torch.testing.assert_close(network.x, noised)
    assert torch.equal(network.t, draws.t)
    target = draws.noise if prediction == "eps" else g.sqrt() * draws.noise - (1 - g).sqrt() * latents
    difference = 0.5 * noised - target
    wanted = (difference.square() if loss == "l2" else difference.abs()).mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(found, wanted * draws.weight)
    snr = (g / (1 - g)).flatten()
    of_v = torch.minimum(snr, torch.tensor(5.0)) / (snr + 1)
    torch.testing.assert_close(
        draws.weight, of_v if prediction == "v" else of_v * (snr + 1) / snr, rtol=1e-4, atol=1e-5
    )


def test_frames_that_are_known_are_not_trained(generator):
    """Each is noised to its own time; the error is the mean over the others."""
    config = unet_config(known="mask")
    draws = drawn(config, 40)
    latents = torch.randn(40, 3, 4, 4, 4, generator=generator)
    network = Recorder(lambda x: x)
    found = latent_error(network, config, latents, draws)
    assert torch.equal(network.named["frame_t"], draws.frame_t)
    for b in range(40):
        g = SCHEDULES["linear"].gamma(draws.frame_t[b])[:, None, None]
        noised = g.sqrt() * latents[b] + (1 - g).sqrt() * draws.noise[b]
        torch.testing.assert_close(network.x[b], noised)
        frames = (noised - draws.noise[b]).square().mean(dim=(0, 2, 3))
        torch.testing.assert_close(found[b], frames[draws.predicted[b]].mean())
    # Whatever is said of known frames makes no difference.
    other = latent_error(
        lambda x, *_, **__: torch.where(draws.predicted[:, None, :, None, None], x, 1e6), config, latents, draws
    )
    torch.testing.assert_close(other, found)


def test_labels_and_texts_are_dropped(generator):
    latents = torch.randn(4, 3, 4, 4, 4, generator=generator)
    network = Recorder(lambda x: x)
    config = unet_config(conditioning="class")
    draws = drawn(config)._replace(dropped=torch.tensor([True, False, False, True]))
    latent_error(network, config, latents, draws, torch.tensor([1, 2, 3, 4]))
    assert network.labels.tolist() == [5, 2, 3, 5]
    text = torch.randn(4, 3, 6, generator=generator)
    latent_error(network, unet_config(conditioning="text"), latents, draws, text=text)
    assert network.text_mask.all(dim=1).tolist() == [False, True, True, False]
    assert not network.text_mask[0].any()


@pytest.mark.parametrize("known", ["none", "mask", "times"])
@pytest.mark.parametrize("conditioning", ["none", "class", "text"])
def test_the_network_takes_what_the_losses_give(conditioning, known, generator):
    config = unet_config(conditioning=conditioning, known=known)
    model = trained_unet(config)
    batch = example_inputs(config, 2)
    assert model(**batch).shape == batch["x"].shape
    given = {name: batch[name] for name in ("labels", "text", "text_mask") if name in batch}
    draws = on_device(drawn(config, 2, dropout=0.5), torch.device("cpu"))
    error = latent_error(model, config, torch.randn(batch["x"].shape, generator=generator), draws, **given)
    assert error.shape == (2,)
    assert error.isfinite().all()


def test_bad_arguments_are_named():
    config = unet_config()
    model, draws = FactorizedUNet(config), drawn(config)
    with pytest.raises(ValueError, match=r"^latents: got shape \(4, 3, 4, 4, 8\), expected \(4, 3, 4, 4, 4\)"):
        latent_error(model, config, torch.zeros(4, 3, 4, 4, 8), draws)
    with pytest.raises(ValueError, match=r"^loss: got 'huber', expected one of 'l2', 'l1'"):
        latent_error(model, config, torch.zeros(4, 3, 4, 4, 4), draws, loss="huber")
    with pytest.raises(ValueError, match=r"^images: got 2.0, expected a share"):
        drawn(config, images=2.0)
