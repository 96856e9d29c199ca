"""All levels from a base of one level: level 0 is the base, the others start from it."""

import pytest
import torch

from hpdm import HPDM, presets, runs
from hpdm.patch.base_model import start_from_base
from hpdm.patch.boxes import sample_boxes
from hpdm.patch.draws import draw
from hpdm.patch.objective import denoising_error
from tests.small import random_model, save_as_run

FULL = presets.tiny().replace(
    patch=(4, 12, 16), tokenizer=(1, 3, 4), levels=4, levels_per_block=(1, 2, 2, 3, 3, 4), width=16, latents=4,
    latent_width=16, head_width=16, conditioning_width=16, conditioning="text", text_width=8,
)  # fmt: skip
BASE = FULL.with_pyramid(FULL.patch, FULL.patch)


def load_base(model, run):
    """As ``hpdm train --base`` does."""
    start_from_base(model, runs.load(run).model, run)


@pytest.fixture(scope="module")
def base_run(tmp_path_factory):
    return save_as_run(random_model(BASE, seed=0), tmp_path_factory.mktemp("base"))


def inputs(config, generator, batch=2):
    x = torch.randn(batch, config.levels, 3, *config.patch, generator=generator)
    t = torch.rand(batch, config.levels, generator=generator)
    text = torch.randn(batch, 5, config.text_width, generator=generator)
    return x, sample_boxes(config, batch, generator), t, text


def test_level_0_is_the_base_bit_for_bit_on_its_own_and_up_to_rounding_among_the_others(base_run, generator):
    assert (BASE.levels, BASE.levels_per_block) == (1, (1,) * 6)
    base, model = random_model(BASE, seed=0), random_model(FULL, seed=1)
    load_base(model, base_run)
    x, boxes, t, text = inputs(FULL, generator)
    expected = base(x[:, :1], boxes[:, :1], t[:, :1], text=text)[:, 0]
    assert torch.equal(model.forward_level(x[:, 0], 0, boxes[:, 0], t[:, 0], None, text=text), expected)
    # Products of all levels at once may sum in another order.
    torch.testing.assert_close(model(x, boxes, t, text=text)[:, 0], expected)


def test_new_levels_start_as_the_base_without_the_blocks_that_do_not_serve_them(base_run, generator):
    """A fusion hands tokens on, a new level takes itself for level 0: where all blocks serve it, it is the base."""
    config = FULL.without_adaptive_computation()
    base, model = random_model(BASE, seed=0), random_model(config, seed=1)
    load_base(model, base_run)
    x, boxes, t, text = inputs(config, generator)
    found = model(x, boxes, t, text=text)
    for level in range(4):
        alone = base(x[:, level : level + 1], boxes[:, :1], t[:, level : level + 1], text=text)[:, 0]
        torch.testing.assert_close(found[:, level], alone)


def test_the_first_step_trains_the_context(base_run, generator):
    model = HPDM(FULL)
    load_base(model, base_run)
    video = torch.randint(256, (2, 3, *FULL.resolution), generator=generator, dtype=torch.uint8)
    text = torch.randn(2, 5, 8, generator=generator)
    denoising_error(model, video, None, draw(FULL, 2, generator), text=text).mean().backward()
    for block in model.blocks[1:]:
        parts = block.fusion.weight.grad.split([16, 16, 3], dim=1)
        assert all(part.abs().max() > 0 for part in parts)


def test_a_base_of_two_levels_keeps_its_fusion(tmp_path, generator):
    half = FULL.with_pyramid(FULL.patch, FULL.level_resolution(1)).replace(levels_per_block=(1, 2, 2, 2, 2, 2))
    base, model = random_model(half), random_model(FULL.replace(levels_per_block=(1, 2, 2, 3, 3, 4)), seed=1)
    load_base(model, save_as_run(base, tmp_path))
    x, boxes, t, text = inputs(FULL, generator)
    both = base(x[:, :2], boxes[:, :2], t[:, :2], text=text)
    torch.testing.assert_close(model(x, boxes, t, text=text)[:, :2], both)
    levels = model.conditioner.level.weight
    assert torch.equal(levels[:2], base.conditioner.level.weight)
    assert torch.equal(levels[2:], levels[:1].expand(2, -1))


def test_positions_of_larger_patches_are_interpolated(base_run):
    config = FULL.replace(patch=(8, 24, 32), ratio=(1, 2, 2), levels_per_block=(4,) * 6)
    base, model = random_model(BASE, seed=0), random_model(config, seed=1)
    load_base(model, base_run)
    small, large = base.position_w[0, 0], model.position_w[0, 0]
    assert (len(small), len(large)) == (4, 8)
    torch.testing.assert_close(large[1:-1:2], 0.75 * small[:-1] + 0.25 * small[1:])
    assert torch.equal(large[0], small[0])
    assert torch.equal(model.tokenizer.weight, base.tokenizer.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 32}, r"width: 16, not 32"),
        ({"text_width": 9, "head_width": 8}, r"head_width: 16, not 8; text_width: 8, not 9"),
        ({"levels_per_block": (2, 4)}, r"blocks: 6, not 2"),
        ({"conditioning": "class"}, r"conditioning: text, not class"),
        ({"input_scale": 0.5}, r"input_scale: 1.0, not 0.5"),
    ],
)
def test_a_base_of_another_network_is_named(base_run, changes, message):
    model = HPDM(FULL.replace(**changes))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=rf"^base: .* is of another network \({message}\)$"):
        load_base(model, base_run)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_a_base_must_not_have_more_levels_and_must_exist(base_run, tmp_path):
    run = save_as_run(HPDM(FULL.replace(ratio=(1, 1, 1))), tmp_path / "full")
    with pytest.raises(ValueError, match=r"\(levels: 4, more than 1\)$"):
        load_base(HPDM(BASE), run)
    with pytest.raises(FileNotFoundError, match=r"run: .*gone has no config.json"):
        load_base(HPDM(FULL), tmp_path / "gone")
