"""What one NaN or infinity does: everything that gives it a weight is not finite, and nothing beyond its sample is.

Between these bounds backends differ, because zero times NaN is NaN and they multiply by zeros in different places.
"""

import pytest
import torch

import hpdm_kernels as ops
from hpdm_kernels.testing import formulas
from tests.kernels.every_op import BACKENDS, BOX, GRID, ORIGINS, SIZE, SOURCE_GRIDS, TILE, WHOLE

BAD = [torch.nan, torch.inf, -torch.inf]


def weights(run, zeros, index):
    """The absolute derivative of every output with respect to the number at ``index``; ``run`` is linear."""
    spike = zeros.clone()
    spike[index] = 1.0
    return (run(spike) - run(zeros)).abs()


def check(run, zeros, index, value, beyond):
    """``run(t)`` with one bad number in an input of ones; ``beyond`` are outputs that must stay finite."""
    weight = weights(run, zeros, index)
    bad = torch.ones_like(zeros)
    bad[index] = value
    finite = run(bad).isfinite()
    assert not finite[weight > 1e-3].any()
    assert (weight > 1e-3).any()
    assert finite[beyond].all()
    assert not finite.all()


def outside(shape, **kept):
    """A mask of all outputs but those of ``kept``: axis number (as ``axis0``) -> index."""
    mask = torch.ones(shape, dtype=torch.bool)
    index = [slice(None)] * len(shape)
    for axis, at in kept.items():
        index[int(axis.removeprefix("axis"))] = at
    mask[tuple(index)] = False
    return mask


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sources_spread_within_their_sample_and_channel(backend, value):
    def run(source):
        return ops.sample_context((source,), WHOLE[:1], BOX, SOURCE_GRIDS[:1], GRID, backend=backend)

    out = run(torch.zeros(2, 12, 5)).shape
    touched = formulas.sample_context((torch.eye(12).expand(2, 12, 12),), WHOLE[:1], BOX, SOURCE_GRIDS[:1], GRID)
    token = touched[1].sum(dim=0).argmax().item()  # one that patches read
    check(run, torch.zeros(2, 12, 5), (1, token, 3), value, outside(out, axis0=1, axis2=3))


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_spread_within_their_sample_and_channel(backend, value):
    def run(grad):
        source = torch.zeros(2, 12, 5, requires_grad=True)
        out = ops.sample_context((source,), WHOLE[:1], BOX, SOURCE_GRIDS[:1], GRID, backend=backend)
        return torch.autograd.grad(out, source, grad)[0]

    check(run, torch.zeros(2, 12, 5), (0, 7, 2), value, outside((2, 12, 5), axis0=0, axis2=2))


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fusion_spreads_within_its_sample_and_tokens_within_their_row(backend, value):
    weight = torch.linspace(0.5, 1.5, 65).view(5, 13)

    def of_source(source):
        x = torch.zeros(2, 12, 5)
        return ops.fuse_context(x, (source,), WHOLE[:1], BOX, weight, None, SOURCE_GRIDS[:1], GRID, backend=backend)

    def of_x(x):
        source = torch.zeros(2, 12, 5)
        return ops.fuse_context(x, (source,), WHOLE[:1], BOX, weight, None, SOURCE_GRIDS[:1], GRID, backend=backend)

    touched = formulas.sample_context((torch.eye(12).expand(2, 12, 12),), WHOLE[:1], BOX, SOURCE_GRIDS[:1], GRID)
    token = touched[0].sum(dim=0).argmax().item()
    check(of_source, torch.zeros(2, 12, 5), (0, token, 1), value, outside((2, 12, 5), axis0=0))
    check(of_x, torch.zeros(2, 12, 5), (1, 4, 2), value, outside((2, 12, 5), axis0=1, axis1=4))


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_spread_within_their_patch_and_channel(backend, value):
    def run(video):
        return ops.sample_patches(video, BOX, (2, 3, 2), backend=backend)

    check(run, torch.zeros(2, 3, 3, 6, 7), (1, 2, 1, 4, 1), value, outside((2, 3, 2, 3, 2), axis0=1, axis1=2))


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tiles_do_not_spread(backend, value):
    def average(tiles):
        return ops.average_tiles(tiles, ORIGINS, SIZE, backend=backend)

    tiles = torch.zeros(2, 4, 2, *TILE)
    weight = weights(average, tiles, (1, 2, 0, 1, 1, 2))
    assert (weight > 0).sum() == 1
    check(average, tiles, (1, 2, 0, 1, 1, 2), value, weight == 0)
    cut = lambda video: ops.extract_tiles(video, ORIGINS, TILE, backend=backend)
    video = torch.zeros(2, 2, *SIZE)
    check(cut, video, (1, 0, 1, 2, 2), value, weights(cut, video, (1, 0, 1, 2, 2)) == 0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_attention_spreads_within_its_head(name, backend, value):
    inputs = dict.fromkeys("qkv", torch.ones(2, 3, 5, 8))
    inputs[name] = inputs[name].clone()
    inputs[name][1, 2, 3, 4] = value
    out = ops.cross_attention(**inputs, backend=backend)
    finite = out.isfinite()
    kept = {"axis0": 1, "axis1": 2} | ({"axis2": 3} if name == "q" else {"axis3": 4} if name == "v" else {})
    assert finite[outside(out.shape, **kept)].all()
    # With every other score far below, an infinite key takes all of the weight, and its own value is finite.
    if name != "k" or value != torch.inf:
        assert not finite[~outside(out.shape, **kept)].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_that_are_all_minus_infinity(backend):
    q, k = torch.full((1, 1, 2, 8), -torch.inf), torch.ones(1, 1, 3, 8)
    q[..., 1, :] = 1.0
    out = ops.cross_attention(q, k, k, backend=backend)
    torch.testing.assert_close(out[0, 0, 1], torch.ones(8))
    if backend == "reference":
        assert out[0, 0, 0].isnan().all()
    else:
        assert torch.equal(out[0, 0, 0], torch.zeros(8))
