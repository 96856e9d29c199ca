"""Latent self-conditioning: a second pass that starts from the latents of the first."""

import itertools

import pytest
import torch

from hpdm import HPDM
from hpdm.patch.boxes import extract_patches, sample_boxes
from hpdm.patch.draws import draw
from hpdm.patch.objective import denoising_error
from hpdm.patch.sampler import Sampler
from hpdm.process import add_noise, network_input
from hpdm.sampling import SamplerOptions
from tests.small import random_model, small_config

CONFIG = small_config(self_conditioning=1.0)


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
    on = random_model(CONFIG)
    torch.nn.init.zeros_(on.self_conditioning.norm.weight)
    torch.nn.init.zeros_(on.self_conditioning.norm.bias)
    off = HPDM(CONFIG.replace(self_conditioning=0.0), "torch")
    off.load_state_dict({k: v for k, v in on.state_dict().items() if not k.startswith("self_conditioning.")})
    arguments = inputs(generator)
    _, final = on(*arguments, return_latents=True)
    assert torch.equal(on(*arguments, latents=final), off(*arguments))
    new = HPDM(CONFIG).self_conditioning.norm
    assert not new.weight.any()
    assert not new.bias.any()


def test_latents_matter_without_a_gradient_and_zeros_are_none(generator):
    model, arguments = random_model(CONFIG), inputs(generator)
    plain, final = model(*arguments, return_latents=True)
    assert final.shape == (2, 3, 4, 16)
    final = final.detach().requires_grad_()
    again = model(*arguments, latents=final)
    assert (again - plain).abs().amax(dim=(2, 3, 4, 5)).min() > 1e-3
    grads = torch.autograd.grad(again.square().sum(), [final, *model.self_conditioning.parameters()], allow_unused=True)
    assert grads[0] is None
    assert all(g.abs().sum() > 0 for g in grads[1:])
    first_only = model(*arguments, latents=final * torch.tensor([1.0, 0.0])[:, None, None, None])
    torch.testing.assert_close(first_only[0], again[0])
    torch.testing.assert_close(first_only[1], plain[1])
    with pytest.raises(ValueError, match="latents: got shape"):
        model(*arguments, latents=final[:, :, :1])


def test_one_level_alone_takes_and_gives_the_same(generator):
    model = random_model(CONFIG)
    x, boxes, t, labels = inputs(generator)
    first = torch.randn(2, 3, 4, 16, generator=generator)
    v, final = model(x, boxes, t, labels, latents=first, return_latents=True)
    inputs_of_level_0 = (x[:, 0], 0, boxes[:, 0], t[:, 0], None, labels)
    alone, latents = model.forward_level_with_latents(*inputs_of_level_0, latents=first[:, 0])
    torch.testing.assert_close(alone, v[:, 0])
    torch.testing.assert_close(latents, final[:, 0])
    # Without latents of an earlier pass, both methods predict the same.
    plain, _ = model.forward_level_with_latents(*inputs_of_level_0)
    assert torch.equal(model.forward_level(*inputs_of_level_0), plain)


@pytest.mark.parametrize("rate", [1.0, 1e-9])
def test_training_takes_two_passes_for_the_samples_drawn(rate, generator):
    model = random_model(CONFIG.replace(self_conditioning=rate))
    video = torch.randint(0, 256, (2, 3, *CONFIG.resolution), dtype=torch.uint8, generator=generator)
    labels = torch.tensor([1, 4])
    error = denoising_error(model, video, labels, draw(model.config, 2, torch.Generator().manual_seed(3)))
    # The same draws.
    again = torch.Generator().manual_seed(3)
    boxes = sample_boxes(CONFIG, 2, again)
    x, t = extract_patches(video, boxes, CONFIG), torch.rand(2, 3, generator=again)
    signal = torch.tensor(CONFIG.signal_scales)
    noised, target = add_noise(x, torch.randn(x.shape, generator=again), t, signal)
    arguments = (network_input(noised, t, signal), boxes, t, labels)
    latents = model(*arguments, return_latents=True)[1] if rate == 1.0 else None
    expected = (model(*arguments, latents=latents) - target).square().mean(dim=(2, 3, 4, 5))
    torch.testing.assert_close(error, expected)
    error.mean().backward()
    assert all(p.grad is not None for p in model.self_conditioning.parameters())


def test_sampling_carries_latents_on_level_0():
    model, seen = random_model(CONFIG), []
    with_latents, without = model.forward_level_with_latents, model.forward_level

    def spy(x, level, *rest, latents):
        v, final = with_latents(x, level, *rest, latents=latents)
        seen.append((level, latents, final))
        return v, final

    def spy_without(x, level, *rest):
        seen.append((level, None, None))
        return without(x, level, *rest)

    model.forward_level_with_latents, model.forward_level = spy, spy_without

    def run(cache, finished=()):
        options = SamplerOptions(steps=3, overlap="hw", tile_batch=8, guidance=1.5, cache=cache)
        return Sampler(model, options)([1, 2], torch.tensor([0, 1]), finished=finished)

    videos = run("gpu")
    predictions = [(initial, final) for level, initial, final in seen if final is not None]
    assert [level for level, _, final in seen if final is not None] == [0] * 5  # second order, three steps
    assert predictions[0][0] is None
    assert all(initial is final for (_, final), (initial, _) in itertools.pairwise(predictions))
    assert all(level > 0 for level, _, final in seen if final is None)
    # Clean passes carry nothing, so neither the cache nor an interruption makes a difference.
    for other in (run("cpu"), run("gpu", finished=videos[:1])):
        assert all(torch.equal(a, b) for a, b in zip(videos, other, strict=True))
    torch.testing.assert_close(run("off")[2], videos[2], rtol=0, atol=2e-5)
