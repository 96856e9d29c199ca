"""The U-Net: its size, how it starts, what it is told, and what depends on what."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hpdm.latent.unet import FactorizedUNet
from hpdm.latent.unet_config import UNetConfig
from hpdm.latent.unet_presets import PUBLISHED_PARAMETERS, UNETS
from tests.latent.unets import trained_unet, unet_config, with_known


def inputs(config, generator, batch=2, frames=4):
    x = torch.randn(batch, config.channels, frames, *config.latent[1:], generator=generator)
    return x, torch.rand(batch, generator=generator)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("lvdm_ucf", 418.12), ("lvdm_released", 548.90), ("lvdm_predict", 549.16), ("lvdm_interpolate", 549.18),
        ("lvdm_tiny", 0.8887),
    ],
)  # fmt: skip
def test_presets_have_the_published_sizes(name, millions):
    """Within 0.1 %: the released code has two rows per table of positions that no distance reaches."""
    with torch.device("meta"):
        model = FactorizedUNet(UNETS[name]())
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(millions * 1e6, rel=1e-3)
    assert name not in PUBLISHED_PARAMETERS or count == pytest.approx(PUBLISHED_PARAMETERS[name], rel=1e-3)


@pytest.mark.parametrize(("name", "billions"), [("lvdm_ucf", 317.3), ("lvdm_released", 362.0)])
def test_a_forward_pass_takes_the_work_that_is_known(name, billions):
    """Products and convolutions for one clip of 4x32x32 latents, in GFLOP."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        FactorizedUNet(UNETS[name]())(torch.empty(1, 4, 4, 32, 32), torch.empty(1))
    assert counter.get_total_flops() / 1e9 == pytest.approx(billions, rel=1e-3)


def test_bf16_is_near(generator):
    """Under automatic mixed precision."""
    config = unet_config(conditioning="class", known="times")
    model = trained_unet(config)
    x, t = inputs(config, generator)
    frame_t = torch.where(torch.tensor([True, False, False, False]), 0.1, t[:, None])
    wanted = model(x, t, torch.tensor([1, 2]), frame_t=frame_t)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x, t, torch.tensor([1, 2]), frame_t=frame_t)
    assert (found - wanted).norm() < 0.03 * wanted.norm()


def test_shards_are_the_blocks_in_order():
    model = FactorizedUNet(unet_config())
    names = {module: name for name, module in model.named_modules()}
    found = [(names[module], flag) for module, flag in model.sharded_modules()]
    assert [name.split(".")[0] for name, _ in found] == ["down"] * 2 + ["middle"] * 2 + ["up"] * 4
    assert [flag for _, flag in found] == [True] * 7 + [False]


def test_a_new_network_predicts_nothing_and_learns_everywhere(generator):
    config = unet_config(conditioning="class", known="times")
    model = FactorizedUNet(config)
    x, t = inputs(config, generator)
    assert not model(x, t).any()
    model = trained_unet(config)
    frame_t = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.7, 0.7, 0.7, 0.2]])
    out = model(x, torch.tensor([0.5, 0.7]), torch.tensor([0, 5]), frame_t=frame_t)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("norm", ["clip", "frame"])
def test_clips_do_not_depend_on_their_batch(norm, generator):
    config = unet_config(norm=norm)
    model = trained_unet(config).double()
    x, t = (value.double() for value in inputs(config, generator, batch=3))
    both = model(x, t)
    torch.testing.assert_close(torch.cat([model(x[n : n + 1], t[n : n + 1]) for n in range(3)]), both)
    # Every frame depends on every other one.
    changed = x.clone()
    changed[:, :, 3] += 1
    assert ((model(changed, t) - both).flatten(3).abs().amax(dim=(1, 3)) > 1e-6).all()


def test_other_sizes_than_in_training(generator):
    model = trained_unet(unet_config())
    for frames, height, width in ((1, 4, 4), (9, 4, 4), (2, 8, 6)):
        x = torch.randn(1, 3, frames, height, width, generator=generator)
        assert model(x, torch.rand(1, generator=generator)).shape == x.shape


@pytest.mark.parametrize("recompute", ["selective", "block"])
def test_what_is_computed_again_is_the_same(recompute, generator):
    config = unet_config(conditioning="text")
    text, mask = torch.randn(2, 5, 6, generator=generator), torch.rand(2, 5, generator=generator) < 0.6
    x, t = inputs(config, generator)
    results = []
    for kind in ("none", recompute):
        model = trained_unet(config, kind)
        out = model(x, t, text=text, text_mask=mask)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in model.parameters())])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_the_backend_changes_the_results_by_rounding_alone(kernels, generator):
    config = unet_config(attention=(2,))
    model = trained_unet(config)
    other = FactorizedUNet(config, kernels).eval()
    other.load_state_dict(model.state_dict())
    x, t = inputs(config, generator)
    with torch.no_grad():
        torch.testing.assert_close(other(x, t), model(x, t), rtol=1e-4, atol=1e-4)


# ---- conditions ----


def test_classes_and_none(generator):
    config = unet_config(conditioning="class")
    model = trained_unet(config)
    x, t = inputs(config, generator)
    assert torch.equal(model(x, t), model(x, t, torch.tensor([5, 5])))
    assert not torch.allclose(model(x, t, torch.tensor([0, 1])), model(x, t, torch.tensor([0, 2])))


def test_texts_and_none(generator):
    config = unet_config(conditioning="text")
    model = trained_unet(config)
    x, t = inputs(config, generator)
    text = torch.randn(2, 3, 6, generator=generator)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    found = model(x, t, text=text, text_mask=mask)
    torch.testing.assert_close(found[1], model(x, t)[1])
    longer = torch.cat((text, torch.randn(2, 4, 6, generator=generator)), dim=1)
    more = torch.cat((mask, torch.zeros(2, 4, dtype=torch.bool)), dim=1)
    torch.testing.assert_close(model(x, t, text=longer, text_mask=more), found)
    torch.testing.assert_close(
        model(x[:1], t[:1], text=text[:1, :2], text_mask=torch.ones(1, 2, dtype=torch.bool)), found[:1]
    )
    assert torch.equal(model(x, t, text=text), model(x, t, text=text, text_mask=torch.ones(2, 3, dtype=torch.bool)))


# ---- known frames ----


@pytest.mark.parametrize("known", ["mask", "times"])
def test_a_network_that_gets_known_frames_is_the_old_one(known, generator):
    """With nothing known, the same bits, however long it has been trained since."""
    old = trained_unet(unet_config(conditioning="class"))
    new = with_known(old, known)
    x, t = inputs(old.config, generator)
    wanted = old(x, t, torch.tensor([1, 2]))
    nothing = t[:, None].expand(-1, 4)
    for _ in range(2):
        assert torch.equal(new(x, t, torch.tensor([1, 2])), wanted)
        assert torch.equal(new(x, t, torch.tensor([1, 2]), frame_t=nothing), wanted)
        with torch.no_grad():
            for module in (new.known_mask, new.known_times):
                for parameter in [] if module is None else module.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("known", ["mask", "times"])
def test_clips_that_know_nothing_are_told_nothing(known, generator):
    """Beside a clip with known frames, and whatever the noise of its known frames is."""
    config = unet_config(known=known)
    model = trained_unet(config)
    x, t = inputs(config, generator)
    nothing = t[:, None].expand(-1, 4)
    wanted = model(x, t, frame_t=nothing)
    for s in (0.0, 0.2):
        frame_t = nothing.clone()
        frame_t[0, :2] = s
        found = model(x, t, frame_t=frame_t)
        assert torch.equal(found[1], wanted[1])
        assert not torch.allclose(found[0], wanted[0])


def test_the_mask_starts_as_nothing(generator):
    """One more input channel whose weights are zero: even clips with known frames come out as before."""
    old = trained_unet(unet_config())
    new = with_known(old, "mask")
    x, t = inputs(old.config, generator)
    frame_t = torch.where(torch.tensor([True, False, False, True]), 0.1, t[:, None])
    assert torch.equal(new(x, t, frame_t=frame_t), old(x, t))


def test_the_mask_is_an_input_channel_and_its_noise_level_goes_to_all_frames(generator):
    config = unet_config(known="mask")
    model = trained_unet(config)
    features = torch.randn(1, 4, 4, 4, 16, generator=generator)
    t, frame_t = torch.tensor([0.6]), torch.tensor([[0.1, 0.6, 0.6, 0.1]])
    told, vector = model.known_mask(features, t, frame_t)
    added = torch.nn.functional.conv2d(torch.ones(1, 1, 4, 4), model.known_mask.mask.weight, padding=1)
    wanted = features.clone()
    wanted[0, [0, 3]] += added[0].permute(1, 2, 0)
    torch.testing.assert_close(told, wanted)
    assert vector.shape == (1, 64)
    assert vector.any()


def test_frames_have_times_of_their_own(generator):
    """Without attention and with normalization per frame, each frame of a rolling clip is that of a clip of its
    time, since what is told of the differing times starts as zero.
    """
    config = unet_config(known="times", attention=(), norm="frame")
    old = trained_unet(config.replace(known="none"))
    for block in old.middle:
        if block.temporal is not None:
            torch.nn.init.zeros_(block.temporal.out.weight)
            torch.nn.init.zeros_(block.temporal.out.bias)
    model = with_known(old, "times").double()
    x = torch.randn(1, 3, 4, 4, 4, generator=generator, dtype=torch.float64)
    frame_t = torch.tensor([[0.1, 0.4, 0.7, 0.9]], dtype=torch.float64)
    found = model(x, frame_t[:, -1], frame_t=frame_t)
    for n in range(4):
        torch.testing.assert_close(found[:, :, n], model(x, frame_t[:, n])[:, :, n])


# ---- bad input ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent": (4, 30, 32)}, r"latent: got \(4, 30, 32\), expected a height and width that are multiples of 8"),
        ({"latent": (4, 32)}, r"latent: got \(4, 32\), expected three ints"),
        ({"latent": (0, 32, 32)}, r"latent: got \(0, 32, 32\), expected ints >= 1"),
        ({"latent": (2**20, 2**10, 2**10)}, "latent: .* expected clips of at most 4294967296 numbers"),
        ({"multipliers": ()}, "multipliers: got 0 levels of 2 blocks, expected 1 to 16 levels"),
        ({"multipliers": (1, 2.0)}, r"multipliers: got \(1, 2.0\), expected ints >= 1"),
        ({"blocks": 1000}, "multipliers: got 4 levels of 1000 blocks"),
        ({"blocks": 0}, "blocks: got 0, expected at least 1"),
        ({"attention": (1, 16)}, r"attention: got \(1, 16\), expected some of \(1, 2, 4, 8\)"),
        ({"width": 48}, "width: got a level of 48 channels, expected a multiple of groups = 32 and of heads = 4"),
        ({"norm": "video"}, r"norm: got 'video', expected one of \('frame', 'clip'\)"),
        ({"conditioning": "image"}, "conditioning: got 'image'"),
        ({"known": "all"}, r"known: got 'all', expected one of \('none', 'mask', 'times'\)"),
        ({"known": "mask", "latent": (1, 32, 32)}, "known: got 'mask' for clips of 1 latent frame"),
        ({"schedule": "sigmoid"}, "schedule: got 'sigmoid', expected one of"),
        ({"prediction": "x0"}, r"prediction: got 'x0', expected one of \('v', 'eps'\)"),
        ({"conditioning_dropout": 2.0}, "conditioning_dropout: got 2.0, expected a probability"),
    ],
)
def test_bad_configs_are_named(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        UNetConfig(**changes)


@pytest.mark.parametrize("name", UNETS)
def test_configs_go_through_json(name):
    config = UNETS[name]()
    values = config.to_dict()
    assert UNetConfig.from_dict(values | {"multipliers": list(config.multipliers)}) == config
    with pytest.raises(ValueError, match=r"^config: got unknown fields \['depth'\]"):
        UNetConfig.from_dict(values | {"depth": 3})
    with pytest.raises(ValueError, match=r"^config: width: got '32', expected an integer"):
        UNetConfig.from_dict(values | {"width": "32"})


def test_bad_inputs_are_named(generator):
    config = unet_config(conditioning="class")
    model = FactorizedUNet(config)
    x, t = inputs(config, generator)
    text = torch.zeros(2, 3, 6)
    for arguments, named, message in (
        ((x[:, :2], t), {}, r"x: got shape \(2, 2, 4, 4, 4\), expected \(B, 3, T, H, W\) with H and W multiples of 2"),
        ((x[..., :3], t), {}, r"x: got shape \(2, 3, 4, 4, 3\)"),
        ((x[0], t), {}, r"x: got shape \(3, 4, 4, 4\)"),
        ((x, t[:1]), {}, r"t: got shape \(1,\), expected \(2,\)"),
        ((x, t, torch.zeros(3)), {}, r"labels: got shape \(3,\), expected \(2,\)"),
        ((x, t), {"text": text}, "text: got a tensor, expected None for conditioning='class'"),
        ((x, t), {"frame_t": t[:, None].expand(2, 4)}, "frame_t: got a tensor, expected None for a network without"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            model(*arguments, **named)
    known = FactorizedUNet(config.replace(known="times", conditioning="text"))
    with pytest.raises(ValueError, match=r"^frame_t: got shape \(2,\), expected \(2, 4\)"):
        known(x, t, frame_t=t)
    with pytest.raises(ValueError, match=r"^text: got shape \(2, 3, 5\), expected \(2, 3, 6\)"):
        known(x, t, text=text[..., :5])
    with pytest.raises(TypeError, match=r"^text_mask: got dtype torch.float32, expected torch.bool"):
        known(x, t, text=text, text_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"^text_mask: got a tensor, expected None where text is None"):
        known(x, t, text_mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"^recompute: got 'all', expected one of"):
        FactorizedUNet(config, recompute="all")
    with pytest.raises(ValueError, match=r"^backend: got 'cuda', expected one of"):
        FactorizedUNet(config, "cuda")
