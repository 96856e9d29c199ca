"""Latent self-conditioning: a second pass that starts from the latents of the first."""

import itertools

import pytest
import torch

from hpdm import HPDM, presets
from hpdm.patch.boxes import extract_patches, sample_boxes
from hpdm.patch.objective import denoising_error
from hpdm.patch.sampler import Sampler, SamplerOptions
from hpdm.process import add_noise, network_input, signal_scales

CONFIG = presets.tiny().replace(
    patch=(2, 8, 8), width=16, latents=4, latent_width=16, head_width=16, conditioning_width=16, self_conditioning=1.0
)


def awake(config=CONFIG):
    """A model whose zero-initialised parts are not zero."""
    torch.manual_seed(0)
    model = HPDM(config, "torch").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def inputs(generator, batch=2):
    x = torch.randn(batch, 3, 3, *CONFIG.patch, generator=generator)
    t = torch.rand(batch, 3, generator=generator)
    return x, sample_boxes(CONFIG, batch, generator), t, torch.randint(6, (batch,), generator=generator)


def test_off_there_is_nothing_of_it(generator):
    off, on = HPDM(CONFIG.replace(self_conditioning=0.0)), HPDM(CONFIG)
    more = {name for name in on.state_dict() if name.startswith("self_conditioning.")}
    assert more
    assert on.state_dict().keys() - more == off.state_dict().keys()
    with pytest.raises(ValueError, match="latents: got a tensor, expected None for a model without self-conditioning"):
        off(*inputs(generator), latents=torch.zeros(2, 3, 4, 16))
    for rate in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"self_conditioning: got {rate}, expected a probability"):
            CONFIG.replace(self_conditioning=rate)


def test_a_new_model_starts_as_if_there_were_none(generator):
    on = awake(CONFIG)
    torch.nn.init.zeros_(on.self_conditioning.norm.weight)
    torch.nn.init.zeros_(on.self_conditioning.norm.bias)
    off = HPDM(CONFIG.replace(self_conditioning=0.0), "torch")
    off.load_state_dict({k: v for k, v in on.state_dict().items() if not k.startswith("self_conditioning.")})
    given = inputs(generator)
    _, found = on(*given, return_latents=True)
    assert torch.equal(on(*given, latents=found), off(*given))
    new = HPDM(CONFIG).self_conditioning.norm
    assert not new.weight.any()
    assert not new.bias.any()


def test_latents_matter_without_a_gradient_and_zeros_are_none(generator):
    model, given = awake(), inputs(generator)
    plain, found = model(*given, return_latents=True)
    assert found.shape == (2, 3, 4, 16)
    found = found.detach().requires_grad_()
    again = model(*given, latents=found)
    assert (again - plain).abs().amax(dim=(2, 3, 4, 5)).min() > 1e-3
    grads = torch.autograd.grad(again.square().sum(), [found, *model.self_conditioning.parameters()], allow_unused=True)
    assert grads[0] is None
    assert all(g.abs().sum() > 0 for g in grads[1:])
    some = model(*given, latents=found * torch.tensor([1.0, 0.0])[:, None, None, None])
    torch.testing.assert_close(some[0], again[0])
    torch.testing.assert_close(some[1], plain[1])
    with pytest.raises(ValueError, match="latents: got shape"):
        model(*given, latents=found[:, :, :1])


def test_one_level_alone_takes_and_gives_the_same(generator):
    model = awake()
    x, boxes, t, labels = inputs(generator)
    first = torch.randn(2, 3, 4, 16, generator=generator)
    v, found = model(x, boxes, t, labels, latents=first, return_latents=True)
    alone, latents = model.forward_level(
        x[:, 0], 0, boxes[:, 0], t[:, 0], None, labels, latents=first[:, 0], return_latents=True
    )
    torch.testing.assert_close(alone, v[:, 0])
    torch.testing.assert_close(latents, found[:, 0])


@pytest.mark.parametrize("rate", [1.0, 1e-9])
def test_training_takes_two_passes_for_the_samples_drawn(rate, generator):
    model = awake(CONFIG.replace(self_conditioning=rate))
    video = torch.randint(0, 256, (2, 3, *CONFIG.resolution), dtype=torch.uint8, generator=generator)
    labels = torch.tensor([1, 4])
    error = denoising_error(model, video, labels, torch.Generator().manual_seed(3))
    # The draws of denoising_error, again.
    again = torch.Generator().manual_seed(3)
    boxes = sample_boxes(CONFIG, 2, again)
    x, t = extract_patches(video, boxes, CONFIG), torch.rand(2, 3, generator=again)
    signal = signal_scales(CONFIG, x.device)
    noised, target = add_noise(x, torch.randn(x.shape, generator=again), t, signal)
    given = (network_input(noised, t, signal), boxes, t, labels)
    latents = model(*given, return_latents=True)[1] if rate == 1.0 else None
    expected = (model(*given, latents=latents) - target).square().mean(dim=(2, 3, 4, 5))
    torch.testing.assert_close(error, expected)
    error.mean().backward()
    assert all(p.grad is not None for p in model.self_conditioning.parameters())


def test_sampling_carries_latents_on_level_0():
    model, seen = awake(), []
    real = model.forward_level

    def spy(x, level, *rest, **latents):
        out = real(x, level, *rest, **latents)
        seen.append((level, latents.get("latents"), out[1] if isinstance(out, tuple) else None))
        return out

    model.forward_level = spy

    def run(cache, finished=()):
        options = SamplerOptions(steps=3, overlap="hw", tile_batch=8, guidance=1.5, cache=cache)
        return Sampler(model, options)([1, 2], torch.tensor([0, 1]), finished=finished)

    videos = run("gpu")
    predictions = [(given, found) for level, given, found in seen if found is not None]
    assert [level for level, _, found in seen if found is not None] == [0] * 5  # second order, three steps
    assert predictions[0][0] is None
    assert all(given is found for (_, found), (given, _) in itertools.pairwise(predictions))
    assert all(given is None for _, given, found in seen if found is None)
    # Clean passes carry nothing, so neither the cache nor an interruption makes a difference.
    for other in (run("cpu"), run("gpu", finished=videos[:1])):
        assert all(torch.equal(a, b) for a, b in zip(videos, other, strict=True))
    torch.testing.assert_close(run("off")[2], videos[2], rtol=0, atol=2e-5)
