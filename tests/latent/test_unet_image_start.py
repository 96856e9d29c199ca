"""A video network that starts from the weights of a network for images, which is built here of PyTorch's layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hpdm.latent.image_start import start_from_image
from hpdm.latent.unet import FactorizedUNet
from hpdm.sinusoids import noise_frequencies
from tests.latent.unets import unet_config

GROUPS, HEADS, VECTOR = 4, 2, 64


class ImageResidual(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(VECTOR, 2 * outputs))
        self.out_norm = nn.GroupNorm(GROUPS, outputs)
        self.out_layers = nn.Sequential(nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x, vector):
        scale, shift = self.emb_layers(vector)[..., None, None].chunk(2, dim=1)
        h = self.out_norm(self.in_layers(x)) * (1 + scale) + shift
        return self.skip(x) + self.out_layers(h)


class ImageAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x, vector):
        tokens = x.flatten(2)
        q, k, v = self.qkv(self.norm(tokens)).unflatten(1, (3, HEADS, -1)).unbind(1)  # [B, heads, d, N]
        shares = (q.transpose(2, 3) @ k / q.shape[2] ** 0.5).softmax(dim=-1)
        out = (v @ shares.transpose(2, 3)).flatten(1, 2)
        return x + self.proj_out(out).reshape(x.shape)


class ImageUNet(nn.Module):
    """The spatial part of :func:`unet_config`'s network: two levels, one block, attention everywhere."""

    def __init__(self):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(256, VECTOR), nn.SiLU(), nn.Linear(VECTOR, VECTOR))
        self.enter = nn.Conv2d(3, 16, 3, padding=1)
        self.a, self.a_attention = ImageResidual(16, 16), ImageAttention(16)
        self.shrink = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.b, self.b_attention = ImageResidual(16, 32), ImageAttention(32)
        self.middle, self.middle_attention, self.middle_2 = (
            ImageResidual(32, 32),
            ImageAttention(32),
            ImageResidual(32, 32),
        )
        self.c, self.c_attention = ImageResidual(64, 32), ImageAttention(32)
        self.d, self.d_attention = ImageResidual(48, 32), ImageAttention(32)
        self.grow = nn.Conv2d(32, 32, 3, padding=1)
        self.e, self.e_attention = ImageResidual(48, 16), ImageAttention(16)
        self.f, self.f_attention = ImageResidual(32, 16), ImageAttention(16)
        self.leave = nn.Sequential(nn.GroupNorm(GROUPS, 16), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1))

    def forward(self, x, t):
        vector = self.time(noise_frequencies(t))

        def block(name, *parts):
            x = getattr(self, name)(torch.cat(parts, dim=1), vector)
            return getattr(self, f"{name}_attention")(x, vector)

        entered = self.enter(x)
        a = block("a", entered)
        small = self.shrink(a)
        b = block("b", small)
        x = self.middle_2(block("middle", b), vector)
        x = block("d", block("c", x, b), small)
        x = self.grow(F.interpolate(x, scale_factor=2, mode="nearest"))
        return self.leave(block("f", block("e", x, a), entered))


BLOCKS = {
    "down.0.blocks.0": "a", "down.1.blocks.0": "b", "middle.0": "middle", "middle.1": "middle_2", "up.0.blocks.0": "c",
    "up.0.blocks.1": "d", "up.1.blocks.0": "e", "up.1.blocks.1": "f",
}  # fmt: skip
OTHERS = {
    "conditioner.time": "time", "first": "enter", "down.0.resample": "shrink", "up.0.resample": "grow",
    "out_norm": "leave.0", "out_conv": "leave.2",
}  # fmt: skip
RESIDUAL = {
    "in_norm": "in_layers.0", "in_conv": "in_layers.2", "modulation": "emb_layers.1", "out_norm": "out_norm",
    "out_conv": "out_layers.1", "skip": "skip",
}  # fmt: skip
ATTENTION = {"norm": "norm", "qkv": "qkv", "out": "proj_out"}


def names_of(model):
    """Names in the image network of the video network's parameters."""
    prefixes = dict(OTHERS)
    for ours, theirs in BLOCKS.items():
        prefixes |= {f"{ours}.residual.{a}": f"{theirs}.{b}" for a, b in RESIDUAL.items()}
        prefixes |= {f"{ours}.spatial.{a}": f"{theirs}_attention.{b}" for a, b in ATTENTION.items()}
    return {
        name: theirs + name[len(ours) :]
        for name, _ in model.named_parameters()
        for ours, theirs in prefixes.items()
        if name.startswith(ours + ".")
    }


def random_image_network(generator):
    network = ImageUNet().double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return network


@pytest.mark.parametrize("known", ["none", "mask", "times"])
@pytest.mark.parametrize("norm", ["frame", "clip"])
def test_every_frame_is_that_of_the_image_network(norm, known, generator):
    """With normalization per frame for any clip; with that of a clip, for stills."""
    images = random_image_network(generator)
    model = FactorizedUNet(unet_config(norm=norm, known=known)).double()
    with torch.no_grad():  # as after some training
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    start_from_image(model, images.state_dict(), names_of(model))
    x = torch.randn(2, 3, 5 if norm == "frame" else 1, 4, 4, generator=generator, dtype=torch.float64)
    x = x if norm == "frame" else x.expand(-1, -1, 4, -1, -1)
    t = torch.rand(2, generator=generator, dtype=torch.float64)
    found = model(x, t)
    assert found.std() > 0.1
    for n in range(x.shape[2]):
        torch.testing.assert_close(found[:, :, n], images(x[:, :, n], t))
    # And it can learn in time from there.
    model(x, t).square().sum().backward()
    learns = [name for name, p in model.named_parameters() if ".temporal.out." in name and p.grad.any()]
    assert len(learns) == 2 * 7


def test_what_does_not_fit_is_named(generator):
    images = random_image_network(generator)
    model = FactorizedUNet(unet_config())
    names, weights = names_of(model), images.state_dict()
    with pytest.raises(ValueError, match=r"^weights: got none named 'conditioner.time.0.weight', expected one for"):
        start_from_image(model, weights)
    with pytest.raises(ValueError, match=r"^weights: got 'more', expected only those that the network has"):
        start_from_image(model, weights | {"more": torch.zeros(1)}, names)
    wrong = weights | {"enter.weight": torch.zeros(16, 4, 3, 3)}
    with pytest.raises(ValueError, match=r"^weights: got shape \(16, 4, 3, 3\) for 'enter.weight', expected \(16, 3"):
        start_from_image(model, wrong, names)
