"""The network: shapes, flow of information between levels, conditioning, ablation switches."""

import gc

import pytest
import torch

from hpdm import HPDM
from hpdm.patch import rin
from hpdm.patch.boxes import sample_boxes
from hpdm_kernels.testing import assert_within_budget
from tests.small import random_model, small_config


def inputs(config, generator, batch=2):
    x = torch.randn(batch, config.levels, config.channels, *config.patch, generator=generator)
    t = torch.rand(batch, config.levels, generator=generator)
    labels = torch.randint(config.classes, (batch,), generator=generator)
    return x, sample_boxes(config, batch, generator), t, labels


def test_shapes_of_one_patch_per_level(generator):
    config = small_config()
    x, boxes, t, labels = inputs(config, generator)
    assert HPDM(config)(x, boxes, t, labels).shape == x.shape


def test_information_flows_from_coarse_to_fine_alone(generator):
    config = small_config()
    model = random_model(config)
    x, boxes, t, labels = inputs(config, generator)
    before = model(x, boxes, t, labels)
    for level in range(3):
        changed = x.clone()
        changed[:, level] += 1
        after = model(changed, boxes, t, labels)
        for other in range(3):
            same = torch.allclose(after[:, other], before[:, other], atol=1e-6)
            assert same == (other < level)


@pytest.mark.parametrize("detach", [False, True])
def test_gradients_flow_to_the_levels_below_unless_detached(detach, generator):
    config = small_config(detach_context=detach)
    model = random_model(config)
    x, boxes, t, labels = inputs(config, generator)
    x.requires_grad_(True)
    model(x, boxes, t, labels)[:, 2].square().sum().backward()
    assert bool(x.grad[:, 2].abs().sum() > 0)
    assert bool(x.grad[:, 0].abs().sum() > 0) == (not detach)


def test_adaptive_computation_skips_early_blocks(generator):
    config = small_config(fusion="shallow")  # no context, through which level 0 would carry early blocks to the others
    model = random_model(config)
    assert [block.levels for block in model.blocks] == [1, 1, 2, 2, 3, 3]
    x, boxes, t, labels = inputs(config, generator)
    before = model(x, boxes, t, labels)
    for b, reached in ((0, [0]), (2, [0, 1]), (4, [0, 1, 2])):
        changed = random_model(config)
        with torch.no_grad():
            for p in changed.blocks[b].parameters():
                p.add_(0.5)
        after = changed(x, boxes, t, labels)
        assert [n for n in range(3) if not torch.equal(after[:, n], before[:, n])] == reached
    full = HPDM(small_config().without_adaptive_computation())
    assert all(block.fusion is not None and block.levels == 3 for block in full.blocks)


def test_shallow_fusion_sees_the_previous_level_alone(generator):
    config = small_config(fusion="shallow")
    model = random_model(config)
    assert all(block.fusion is None for block in model.blocks)
    x, boxes, t, labels = inputs(config, generator)
    before = model(x, boxes, t, labels)
    changed = x.clone()
    changed[:, 0] += 1
    after = model(changed, boxes, t, labels)
    assert not torch.allclose(after[:, 1], before[:, 1], atol=1e-4)
    assert torch.allclose(after[:, 2], before[:, 2], atol=1e-6)


def test_without_coordinates_the_position_of_all_patches_does_not_matter(generator):
    x, boxes, t, labels = inputs(small_config(), generator)
    # Levels 1 and 2 moved together: their boxes relative to each other stay, relative to level 0 they change.
    boxes = torch.tensor([[[0, 0, 0, 1, 1, 1], [0, 0, 0, 0.5, 0.5, 0.5], [0.25, 0, 0, 0.25, 0.25, 0.25]]]).repeat(
        2, 1, 1
    )
    moved = boxes.clone()
    moved[:, 1:, 2] += 0.5
    x = x.clone()
    x[:, 0] = x[:, 0].mean(dim=-1, keepdim=True)  # level 0 looks the same everywhere along w ...
    for coordinates in (True, False):
        model = random_model(small_config(coordinates=coordinates))
        with torch.no_grad():
            model.position_w.zero_()  # ... and so do its tokens
        same = torch.allclose(model(x, boxes, t, labels)[:, 2], model(x, moved, t, labels)[:, 2], atol=1e-5)
        assert same == (not coordinates)


def test_class_noise_and_level_reach_the_output(generator):
    config = small_config()
    model = random_model(config)
    x, boxes, t, labels = inputs(config, generator)
    before = model(x, boxes, t, labels)
    assert not torch.allclose(model(x, boxes, t, (labels + 1) % config.classes), before, atol=1e-4)
    assert not torch.allclose(model(x, boxes, 1 - t, labels), before, atol=1e-4)
    none = torch.full_like(labels, config.classes)
    torch.testing.assert_close(model(x, boxes, t, none), model(x, boxes, t, None))


def text_inputs(config, generator, lengths):
    """As :func:`inputs`, with random texts of ``lengths``: ``x, boxes, t, text, mask``."""
    x, boxes, t, _ = inputs(config, generator, len(lengths))
    text = torch.randn(len(lengths), max(lengths), config.text_width, generator=generator)
    return x, boxes, t, text, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("recompute", ["none", "selective", "block"])
@pytest.mark.parametrize("kernels", ["reference", "torch"])
def test_text_reaches_every_level_and_its_padding_none(kernels, recompute, generator):
    config = small_config(conditioning="text", text_width=8)
    model = random_model(config, kernels, recompute=recompute).double()
    x, boxes, t, text, mask = text_inputs(config, generator, (5, 2, 0))
    x, t, text = x.double(), t.double(), text.double()
    before = model(x, boxes, t, text=text, text_mask=mask)
    padded = torch.cat((text, torch.full((3, 11, 8), 1e3)), dim=1)
    padded[1, 2:] = -1e3  # behind the mask
    longer = torch.cat((mask, torch.zeros(3, 11, dtype=torch.bool)), dim=1)
    torch.testing.assert_close(model(x, boxes, t, text=padded, text_mask=longer), before)
    # Alone, without padding and without a mask, a text gives what it gives among longer ones.
    alone = model(x[1:2], boxes[1:2], t[1:2], text=text[1:2, :2])
    torch.testing.assert_close(alone, before[1:2])
    changed = text.clone()
    changed[:2, 1] += 1
    after = model(x, boxes, t, text=changed, text_mask=mask)
    assert ((after - before)[:2].flatten(2).abs().amax(dim=2) > 1e-4).all()
    torch.testing.assert_close(after[2], before[2])


def test_absent_text_is_one_learned_token(generator):
    config = small_config(conditioning="text", text_width=8)
    model = random_model(config).double()
    x, boxes, t, text, _ = text_inputs(config, generator, (4, 4))
    x, t, text = x.double(), t.double(), text.double()
    without = model(x, boxes, t)
    masked = model(x, boxes, t, text=text, text_mask=torch.zeros(2, 4, dtype=torch.bool))
    torch.testing.assert_close(masked, without)
    with torch.no_grad():
        model.conditioner.no_text += 1
    assert not torch.allclose(model(x, boxes, t), without, atol=1e-3)
    all_levels = model(x, boxes, t)
    level = model.forward_level(x[:, 0], 0, boxes[:, 0], t[:, 0], None)
    torch.testing.assert_close(level, all_levels[:, 0])


def test_gradients_of_text_stop_at_the_mask(generator):
    config = small_config(conditioning="text", text_width=8)
    model = random_model(config)
    x, boxes, t, text, mask = text_inputs(config, generator, (4, 2))
    text.requires_grad_(True)
    model(x, boxes, t, text=text, text_mask=mask).square().sum().backward()
    assert (text.grad.abs().amax(dim=2) > 0).equal(mask)


def test_image_mode(generator):
    config = small_config().with_pyramid((1, 8, 8), (1, 32, 32))
    x, boxes, t, labels = inputs(config, generator)
    assert HPDM(config)(x, boxes, t, labels).shape == (2, 3, 3, 1, 8, 8)


def test_the_flag_changes_no_parameter():
    config = small_config()
    states = [HPDM(config, kernels).state_dict() for kernels in ("auto", "reference", "torch", "triton")]
    shapes = [{name: tuple(p.shape) for name, p in state.items()} for state in states]
    assert all(s == shapes[0] for s in shapes)


def test_blocks_are_sharded_after_their_fusions():
    """A fusion is wrapped before its block and keeps its weights between the levels; the last block keeps its own."""
    model = HPDM(small_config())
    modules = model.sharded_modules()
    assert model.compiled_modules() == list(model.blocks)
    assert [module for module, reshard in modules if reshard] == list(model.blocks)[:-1]
    kept = [module for module, reshard in modules if not reshard]
    assert kept == [*(block.fusion for block in model.blocks if block.fusion is not None), model.blocks[-1]]
    order = {id(module): i for i, (module, _) in enumerate(modules)}
    assert all(order[id(b.fusion)] == order[id(b)] - 1 for b in model.blocks if b.fusion is not None)


def test_a_fresh_model_predicts_zero_velocity(generator):
    config = small_config()
    x, boxes, t, labels = inputs(config, generator)
    assert (HPDM(config)(x, boxes, t, labels) == 0).all()


def test_bad_inputs_are_named(generator):
    config = small_config()
    model = HPDM(config)
    x, boxes, t, labels = inputs(config, generator)
    with pytest.raises(ValueError, match=r"x: got shape"):
        model(x[:, :, :2], boxes, t, labels)
    with pytest.raises(ValueError, match=r"boxes: got shape"):
        model(x, boxes[:, :, :5], t, labels)
    with pytest.raises(ValueError, match=r"t: got shape"):
        model(x, boxes, t[:1], labels)
    with pytest.raises(ValueError, match=r"labels: got shape"):
        model(x, boxes, t, labels[:1])
    with pytest.raises(ValueError, match=r"text: got a tensor"):
        model(x, boxes, t, labels, text=torch.zeros(2, 3, 1024))
    with pytest.raises(ValueError, match=r"labels: got a tensor, expected None"):
        HPDM(small_config(conditioning="none"))(x, boxes, t, labels)
    words = HPDM(small_config(conditioning="text"))
    with pytest.raises(ValueError, match=r"labels: got a tensor, expected None for conditioning='text'"):
        words(x, boxes, t, labels)
    with pytest.raises(ValueError, match=r"text: got shape \(2, 3, 7\), expected \(2, 3, 1024\)"):
        words(x, boxes, t, text=torch.zeros(2, 3, 7))
    with pytest.raises(ValueError, match=r"text: got shape \(2, 0, 1024\), expected \(2, 1, 1024\)"):
        words(x, boxes, t, text=torch.zeros(2, 0, 1024))
    with pytest.raises(ValueError, match=r"text_mask: got shape \(2, 4\), expected \(2, 3\)"):
        words(x, boxes, t, text=torch.zeros(2, 3, 1024), text_mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"text_mask: got dtype torch.float32, expected torch.bool"):
        words(x, boxes, t, text=torch.zeros(2, 3, 1024), text_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"text_mask: got a tensor, expected None where text is None"):
        words(x, boxes, t, text_mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"t: got shape \(1,\), expected \(2,\)"):
        model.forward_level(x[:, 0], 0, boxes[:, 0], t[:1, 0], None, labels)
    with pytest.raises(ValueError, match=r"context: got NoneType on level 1"):
        model.forward_level(x[:, 1], 1, boxes[:, 1], t[:, 1], None, labels)
    with pytest.raises(ValueError, match=r"backend: got 'cuda'"):
        HPDM(config, kernels="cuda")


def value_and_gradients(model, arguments):
    out = model(*arguments)
    out.square().mean().backward()
    return out.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "changes", [{}, {"fusion": "shallow"}, {"detach_context": True}], ids=["deep", "shallow", "detached"]
)
@pytest.mark.parametrize("kernels", ["reference", "torch"])
@pytest.mark.parametrize("recompute", ["selective", "block"])
def test_recomputing_changes_no_value(recompute, kernels, changes, generator):
    """Nor a gradient of the formulas; with kernels on the read sums its gradients in another order."""
    config = small_config(**changes)
    arguments = inputs(config, generator)
    kept, recomputed = (
        value_and_gradients(random_model(config, kernels, recompute=r), arguments) for r in ("none", recompute)
    )
    assert torch.equal(kept[0], recomputed[0])
    if kernels == "reference":
        assert torch.equal(kept[1], recomputed[1])
    wide = [g.double() if i in (0, 2) else g for i, g in enumerate(arguments)]
    oracle = value_and_gradients(random_model(config).double(), wide)
    assert_within_budget("gradients", recomputed[1], kept[1], oracle[1])


@pytest.mark.parametrize("recompute", ["selective", "block"])
def test_recomputing_in_pieces_changes_only_rounding(recompute, monkeypatch, generator):
    monkeypatch.setattr(rin, "CHUNK_ROWS", 10)
    monkeypatch.setattr(rin, "CHUNKS", 3)
    config = small_config(conditioning="text", text_width=8)
    x, boxes, t, _ = inputs(config, generator)
    arguments = (x, boxes, t, None, torch.randn(2, 5, 8, generator=generator))
    wide = [g if g is None else g.double() for g in arguments]
    wide[1] = boxes
    oracle = value_and_gradients(random_model(config).double(), wide)
    kept, recomputed = (value_and_gradients(random_model(config, recompute=r), arguments) for r in ("none", recompute))
    for name, got, near, true in zip(("output", "gradients"), recomputed, kept, oracle):
        assert_within_budget(name, got, near, true)


def test_recomputing_keeps_less(generator):
    """Bytes that the forward pass leaves for the backward pass, each storage once."""
    config = small_config()
    arguments = inputs(config, generator)

    def storages():
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor]
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

    kept = {}
    for recompute in ("none", "selective", "block"):
        model = random_model(config, recompute=recompute)
        before = storages()
        # With hooks Python sees what is saved; what a policy keeps is in a dictionary.
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            out = model(*arguments)
        kept[recompute] = sum(size for pointer, size in storages().items() if pointer not in before)
        out.sum().backward()
    assert kept["block"] < 0.7 * kept["selective"] < 0.4 * kept["none"], kept


@pytest.mark.parametrize("recompute", ["selective", "block"])
def test_recomputing_compiles_as_one_graph(recompute, generator):
    config = small_config(levels_per_block=(1, 3))  # compiling takes time for every block
    arguments = inputs(config, generator)
    eager = value_and_gradients(random_model(config, recompute=recompute), arguments)
    model = random_model(config, recompute=recompute)
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(*arguments)
    out.square().mean().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(out.detach(), eager[0])
    torch.testing.assert_close(gradients, eager[1])


def test_unknown_recompute_setting_is_named():
    with pytest.raises(ValueError, match=r"^recompute: got 'all', expected one of 'none', 'selective', 'block'$"):
        HPDM(small_config(), recompute="all")
