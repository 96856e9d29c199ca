"""The network of the autoencoder: its sizes, its layers against plain formulas, what it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hpdm import presets
from hpdm.latent.autoencoder import VideoAutoencoder
from hpdm.latent.config import AutoencoderConfig
from hpdm.latent.layers import (
    RepeatConv,
    RepeatTransposedConv,
    ResidualBlock,
    VideoNorm,
    repeats,
    to_channels,
    to_positions,
)
from tests.latent.small_autoencoder import random_autoencoder, small_config


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("preset", "encoder", "decoder", "whole"),
    [("lvdm_ae", 7.459e6, 11.988e6, 19.447e6), ("lvdm_ae_tiny", 0.120e6, 0.185e6, 0.305e6)],
)
def test_parameters_of_the_presets(preset, encoder, decoder, whole):
    with torch.device("meta"):
        model = VideoAutoencoder(presets.get(preset))
    assert count(model.encoder) == pytest.approx(encoder, rel=1e-3)
    assert count(model.decoder) == pytest.approx(decoder, rel=1e-3)
    assert count(model) == pytest.approx(whole, rel=1e-3)


def test_the_full_preset_has_the_published_sizes():
    config = presets.get("lvdm_ae")
    assert config.strides == ((2, 2, 2), (2, 2, 2), (1, 2, 2))
    assert math.prod(config.latent_grid) * config.latent_channels == 16_384  # LVDM Table 2
    with torch.device("meta"):
        model = VideoAutoencoder(config)
        z, _ = model.moments(torch.zeros(1, 3, *config.resolution))
        assert z.shape == (1, 4, 4, 32, 32)
        assert model.decode(z).shape == (1, 3, *config.resolution)
    widths = [stage[0].weight.shape[1] for stage in model.decoder.stages]
    assert widths == [256, 128, 64]
    assert model.encoder.norm.num_groups == 32
    assert model.encoder.norm.eps == 1e-6


# ---- padding ----


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_convolutions_divide_the_size_by_the_stride(kernel, stride):
    front, back = repeats(kernel, stride)
    assert front + back == max(kernel - stride, 0)
    assert front - back in (0, 1)
    conv = RepeatConv(1, 2, kernel, (stride, 1, stride))
    for n in (1, 2, 4):
        assert conv(torch.zeros(1, 1, n * stride, 5, 3 * stride)).shape == (1, 2, n, 5, 3)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (4, 2)])
def test_transposed_convolutions_multiply_it(kernel, stride):
    conv = RepeatTransposedConv(1, 2, kernel, (stride, 1, stride))
    for n in (1, 2, 4):
        assert conv(torch.zeros(1, 1, n, 5, 3)).shape == (1, 2, n * stride, 5, 3 * stride)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (5, 2), (4, 3)])
def test_transposed_convolutions_of_another_size_are_refused(kernel, stride):
    with pytest.raises(ValueError, match=f"stride: got .* with kernel {kernel}, expected 1, or 2 with kernel 4"):
        RepeatTransposedConv(1, 1, kernel, (1, stride, 1))


def by_hand(x, kernel, stride):
    """``x [F]`` with repeated ends, written out."""
    total = kernel - stride
    front = (total + 1) // 2
    return torch.stack([x[min(max(i - front, 0), len(x) - 1)] for i in range(len(x) + total)])


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (4, 1), (4, 2)])
def test_convolution_along_time_is_the_plain_sum(kernel, stride, generator):
    x = torch.randn(8, generator=generator, dtype=torch.float64)
    conv = RepeatConv(1, 1, kernel, (stride, 1, 1)).double()
    with torch.no_grad():
        conv.weight.zero_()
        weight = torch.randn(kernel, generator=generator, dtype=torch.float64)
        middle = repeats(kernel, 1)[0]  # the position itself, along height and width
        conv.weight[0, 0, :, middle, middle] = weight
        padded = by_hand(x, kernel, stride)
        expected = [weight @ padded[i : i + kernel] + conv.bias[0] for i in range(0, len(padded) - kernel + 1, stride)]
        actual = conv(x[None, None, :, None, None])[0, 0, :, 0, 0]
    torch.testing.assert_close(actual, torch.stack(expected))


@pytest.mark.parametrize(("kernel", "stride"), [(4, 1), (4, 2)])
def test_transposed_convolution_along_time_is_the_plain_sum(kernel, stride, generator):
    x = torch.randn(6, generator=generator, dtype=torch.float64)
    conv = RepeatTransposedConv(1, 1, kernel, (stride, 1, 1)).double()
    with torch.no_grad():
        conv.weight.zero_()
        weight = torch.randn(kernel, generator=generator, dtype=torch.float64)
        # Along height and width, where the stride is 1: result o is the padded input o + kernel - 1 - k.
        place = kernel - 1 - repeats(kernel, 1)[0]
        conv.weight[0, 0, :, place, place] = weight
        padded = by_hand(x, kernel, stride)
        spread = torch.zeros((len(padded) - 1) * stride + kernel, dtype=torch.float64)
        for i, value in enumerate(padded):
            spread[i * stride : i * stride + kernel] += value * weight
        expected = spread[kernel - 1 : len(spread) - kernel + 1] + conv.bias[0]
        actual = conv(x[None, None, :, None, None])[0, 0, :, 0, 0]
    assert len(expected) == len(x) * stride
    torch.testing.assert_close(actual, expected)


# ---- gradients against independent formulas ----


def gradients(fn, x, parameters, weight):
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad((fn(x) * weight).sum(), [x, *parameters])


@pytest.mark.parametrize(("kernel", "stride"), [(3, (1, 1, 1)), (4, (2, 2, 2)), (4, (1, 2, 2))])
def test_gradients_of_the_convolution(kernel, stride, generator):
    x = torch.randn(2, 3, 4, 6, 8, generator=generator, dtype=torch.float64)
    conv = RepeatConv(3, 5, kernel, stride).double()
    pads = [side for s in reversed(stride) for side in ((kernel - s + 1) // 2, (kernel - s) // 2)]

    def plain(x):
        return F.conv3d(F.pad(x, pads, mode="replicate"), conv.weight, conv.bias, stride)

    weight = torch.randn(plain(x).shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(conv(x), plain(x))
    for ours, theirs in zip(
        gradients(conv, x, conv.parameters(), weight), gradients(plain, x, conv.parameters(), weight)
    ):
        torch.testing.assert_close(ours, theirs)


def plain_norm(x, groups, axes):
    """Group normalization without scale and shift, written out; statistics over a group's channels and ``axes``."""
    b, c, f, h, w = x.shape
    split = x.reshape(b, groups, c // groups, f, h, w)
    mean = split.mean((2, *(a + 1 for a in axes)), keepdim=True)
    variance = (split - mean).square().mean((2, *(a + 1 for a in axes)), keepdim=True)
    return ((split - mean) / (variance + 1e-6).sqrt()).reshape(x.shape)


@pytest.mark.parametrize(("per_frame", "axes"), [(True, (3, 4)), (False, (2, 3, 4))])
@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
def test_a_residual_block_is_the_plain_formula_with_its_gradients(per_frame, axes, recompute, generator):
    block = ResidualBlock(8, per_frame, recompute).double()
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3)
    x = torch.randn(2, 8, 3, 4, 5, generator=generator, dtype=torch.float64)

    def plain(x):
        out = x
        for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
            scaled = plain_norm(out, 4, axes) * norm.weight.view(-1, 1, 1, 1) + norm.bias.view(-1, 1, 1, 1)
            activated = scaled / (1 + torch.exp(-scaled))
            out = F.conv3d(F.pad(activated, (1,) * 6, mode="replicate"), conv.weight, conv.bias)
        return x + out

    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(block(x), plain(x))
    parameters = list(block.parameters())
    for ours, theirs in zip(gradients(block, x, parameters, weight), gradients(plain, x, parameters, weight)):
        torch.testing.assert_close(ours, theirs)


def test_statistics_are_those_of_each_frame_or_of_the_clip(generator):
    x = torch.randn(2, 8, 3, 4, 4, generator=generator)
    changed = x.clone()
    changed[:, :, 2] *= 5
    per_frame, per_clip = VideoNorm(8, per_frame=True), VideoNorm(8, per_frame=False)
    torch.testing.assert_close(per_frame(x)[:, :, :2], per_frame(changed)[:, :, :2])
    assert (per_clip(x)[:, :, :2] - per_clip(changed)[:, :, :2]).abs().max() > 0.1
    assert isinstance(per_frame, nn.GroupNorm)


def test_blocks_become_channels_and_return(generator):
    x = torch.randn(2, 3, 4, 6, 8, generator=generator)
    folded = to_channels(x, (2, 3, 4))
    assert folded.shape == (2, 72, 2, 2, 2)
    assert torch.equal(folded[1, :24, 0, 1, 1], x[1, 0, :2, 3:6, 4:8].reshape(-1))
    assert torch.equal(to_positions(folded, (2, 3, 4)), x)


# ---- the whole model ----


@pytest.mark.parametrize("stem", [(1, 1, 1), (1, 2, 2)])
@pytest.mark.parametrize("factors", [(4, 8, 8), (2, 4, 4), (4, 4, 4)])
def test_the_latent_grid_is_the_clip_over_the_factors(factors, stem):
    config = small_config(factors=factors, stem=stem, resolution=(8, 16, 24))
    model = random_autoencoder(config)
    x = torch.zeros(2, 3, 8, 16, 24)
    assert model.encode(x).shape == (2, 4, *(n // f for n, f in zip(config.resolution, factors)))
    assert config.latent_grid == tuple(model.encode(x).shape[2:])
    assert model(x).shape == x.shape


def test_normalized_latents_are_an_affine_map_that_decoding_undoes(generator):
    model = random_autoencoder(small_config())
    x = torch.randn(1, 3, 8, 32, 32, generator=generator)
    raw, out = model.moments(x)[0], model(x)
    torch.testing.assert_close(model.encode(x), raw)
    assert not model.is_measured
    model.latent_mean.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    model.latent_std.copy_(torch.tensor([0.1, 2.0, 0.7, 1.0]))
    assert model.is_measured
    torch.testing.assert_close(model.encode(x)[:, 1], (raw[:, 1] + 2) / 2)
    torch.testing.assert_close(model.decode(model.encode(x)), out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(x), out)  # training sees no normalization


@pytest.mark.parametrize("recompute", ["selective", "block"])
def test_recomputation_changes_no_gradient(recompute, generator):
    x = torch.randn(1, 3, 8, 16, 16, generator=generator)
    found = []
    for how in ("none", recompute):
        model = random_autoencoder(small_config(), recompute=how).train()
        (model(x) - x).square().mean().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))


def test_every_weight_is_trained(generator):
    model = random_autoencoder(small_config()).train()
    x = torch.randn(1, 3, 8, 16, 16, generator=generator)
    (model(x) - x).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert not model.to_moments.weight.grad[4:].any()  # but the log variance, whose KL weight is published as 0


def test_the_config_survives_json():
    config = small_config(crop=(4, 16, 16), norm="clip", pixel_loss="l1")
    assert AutoencoderConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"config.*depth"):
        AutoencoderConfig.from_dict(config.to_dict() | {"depth": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": (8, 30, 32)}, r"resolution: got \(8, 30, 32\), expected multiples of factors = \(4, 8, 8\)"),
        ({"resolution": (8, 32)}, r"resolution: got \(8, 32\), expected three ints"),
        ({"factors": (3, 8, 8)}, r"factors: got \(3, 8, 8\), expected stem = \(1, 2, 2\) times powers of two"),
        ({"factors": (1, 2, 2)}, r"factors: got \(1, 2, 2\) with stem = \(1, 2, 2\), expected 1 to 16 halvings"),
        ({"crop": (8, 32, 40)}, r"crop: got \(8, 32, 40\), expected at most resolution"),
        ({"crop": (8, 32, 31)}, r"crop: got \(8, 32, 31\), expected multiples"),
        ({"norm": "batch"}, "norm: got 'batch', expected one of"),
        ({"pixel_loss": "l3"}, "pixel_loss: got 'l3', expected one of"),
        ({"width": 0}, "width: got 0, expected at least 1"),
        ({"edge_weight": -1.0}, r"edge_weight: got -1.0, expected at least 0"),
        ({"perceptual_file": "lpips.pt"}, "perceptual_sha256: got '' with perceptual_file='lpips.pt', expected both"),
        ({"resolution": (2**20, 2**10, 2**10)}, "resolution: got .*, expected clips of at most"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


def test_inputs_of_other_shapes_are_refused():
    model = random_autoencoder(small_config())
    with pytest.raises(ValueError, match=r"x: got shape \(1, 4, 8, 32, 32\), expected \[B, 3, F, H, W\]"):
        model(torch.zeros(1, 4, 8, 32, 32))
    with pytest.raises(ValueError, match=r"x: got frames, height, width \(8, 30, 32\), expected multiples of"):
        model.encode(torch.zeros(1, 3, 8, 30, 32))
    with pytest.raises(ValueError, match=r"z: got shape \(1, 3, 2, 4, 4\), expected \[B, 4, f, h, w\]"):
        model.decode(torch.zeros(1, 3, 2, 4, 4))
    with pytest.raises(ValueError, match="recompute: got 'all', expected one of"):
        VideoAutoencoder(small_config(), recompute="all")
    with pytest.raises(ValueError, match="output_size: got"):
        RepeatTransposedConv(1, 1, 4, (2, 2, 2))(torch.zeros(1, 1, 2, 2, 2), output_size=[4, 4, 4])
