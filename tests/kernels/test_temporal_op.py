"""Temporal attention against loops over pairs of frames in fp64, its gradients, its limits, its contract."""

import pytest
import torch

from hpdm_kernels import reference, temporal_attention
from hpdm_kernels.temporal import api, block_sizes
from hpdm_kernels.temporal.distances import fold, sum_of_pairs
from hpdm_kernels.testing import check_op, value_and_grads

BACKENDS = ("torch", "triton")
# Batch, frames, positions, heads, width of a head, farthest distance with an embedding of its own.
SIZES = [
    (1, 4, 5, 2, 8, 3), (2, 5, 3, 2, 12, 2), (1, 1, 1, 1, 3, 0), (2, 3, 1, 1, 1, 5), (1, 7, 70, 1, 24, 1),
    (1, 9, 2, 1, 20, 8), (1, 2, 9, 2, 5, 1), (1, 1, 4, 2, 6, 2), (1, 17, 1, 1, 7, 13),
]  # fmt: skip
DTYPES = [torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def _registered_ops_for_few_positions_too(monkeypatch):
    monkeypatch.setattr(api, "LEAST", 0)


def inputs_of(generator, device, size, dtype=torch.float32):
    """``qkv``, ``rel_k`` and ``rel_v``."""
    batch, frames, positions, heads, width, farthest = size
    shapes = (batch, frames, positions, 3 * heads * width), (2 * farthest + 1, width), (2 * farthest + 1, width)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def by_pairs(qkv, rel_k, rel_v):
    """Shaw et al. 2018, eq. 3 and 4: a score for each query and key, one after the other."""
    width, frames, farthest = rel_k.shape[1], qkv.shape[1], len(rel_k) // 2
    q, k, v = (part.unflatten(-1, (-1, width)).unbind(1) for part in qkv.chunk(3, dim=-1))  # T x [B, N, h, d]
    out = []
    for t in range(frames):
        rows = [farthest + max(-farthest, min(farthest, s - t)) for s in range(frames)]
        scores = [(q[t] * (k[s] + rel_k[rows[s]])).sum(-1) * width**-0.5 for s in range(frames)]
        shares = torch.stack(scores).softmax(0)  # [S, B, N, h]
        out.append(sum(shares[s][..., None] * (v[s] + rel_v[rows[s]]) for s in range(frames)))
    return torch.stack(out, dim=1).flatten(3)


def on(backend):
    return lambda *tensors: temporal_attention(*tensors, backend=backend)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_a_loop_over_pairs(size, backend, generator, device):
    values = inputs_of(generator, device, size)
    check_op(on(backend), by_pairs, values, repeat=True, products=True, ulps=16.0, names=("qkv", "rel_k", "rel_v"))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_one_embedding_for_all_distances(backend, generator, device):
    """It adds the same to all scores of a query, so its gradient is zero in exact arithmetic."""
    values = inputs_of(generator, device, (1, 5, 9, 1, 8, 0))
    out, grads = value_and_grads(on(backend), values)
    expected, (of_qkv, _, of_values) = value_and_grads(by_pairs, [t.double() for t in values])
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads[0].double(), of_qkv, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads[2].double(), of_values, rtol=1e-4, atol=1e-4)
    assert grads[1].abs().max() < 1e-3


@pytest.mark.parametrize("frames", range(1, 18))
def test_every_distance_near_and_far(frames, generator):
    for farthest in {0, 1, 3, frames - 1, frames + 2}:
        values = inputs_of(generator, "cpu", (2, frames, 3, 2, 5, farthest), torch.float64)
        for backend in ("reference", "torch"):
            torch.testing.assert_close(temporal_attention(*values, backend=backend), by_pairs(*values))


def test_the_embedding_at_t_s_is_that_of_s_minus_t():
    """The right way round: the released code has them transposed for keys. Far distances count as the farthest."""
    frame = torch.arange(6)
    rows = reference.distance_rows(torch.empty(5, 1), 6)
    assert torch.equal(rows - 2, (frame - frame[:, None]).clamp(-2, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_other_dtypes(backend, dtype, generator, device):
    values = inputs_of(generator, device, (2, 5, 7, 2, 16, 3), dtype)
    check_op(on(backend), by_pairs, values, products=True, ulps=64.0)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_tables_may_be_wider_than_the_projection(backend, generator, device):
    """As under autocast: the projection in bf16, parameters in fp32, whose gradients have their dtype."""
    qkv, *tables = inputs_of(generator, device, (1, 4, 9, 2, 16, 3))
    qkv = qkv.bfloat16()
    value, grads = value_and_grads(on(backend), (qkv, *tables))
    _, expected = value_and_grads(by_pairs, (qkv.double(), *(t.double() for t in tables)))
    assert value.dtype is torch.bfloat16
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    for grad, true in zip(grads, expected):
        torch.testing.assert_close(grad.double(), true, rtol=3e-2, atol=3e-2 * true.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float64])
def test_gradients_by_differences(dtype, generator):
    values = [t.requires_grad_() for t in inputs_of(generator, "cpu", (1, 4, 2, 2, 3, 2), dtype)]
    assert torch.autograd.gradcheck(on("torch"), values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend, generator, device):
    """Parts of wider tensors, other orders of axes, gaps; the gradient of the output, too."""
    qkv, rel_k, rel_v = inputs_of(generator, device, (2, 4, 5, 2, 8, 3))
    wide = torch.stack((qkv, torch.full_like(qkv, torch.nan)), dim=-2).flatten(-2)[..., :48]
    swapped = qkv.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    tables = [t.t().contiguous().t() for t in (rel_k, rel_v)]
    grad = torch.randn(16, 5, 4, 2, generator=generator).to(device).permute(3, 2, 1, 0)
    for view in (wide, swapped):
        check_op(on(backend), by_pairs, (view, *tables), grad, products=True, ulps=16.0)
    check_op(on(backend), by_pairs, (qkv, rel_k, rel_v), torch.ones((), device=device).expand(2, 4, 5, 16), ulps=16.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_positions_are_summed_in_parts(backend, generator, device, monkeypatch):
    """Several blocks of positions per program, and several programs; the last ones partial."""
    monkeypatch.setattr(block_sizes, "ENOUGH_PROGRAMS", 2)
    values = inputs_of(generator, device, (1, 3, 200, 1, 4, 1))
    check_op(on(backend), by_pairs, values, products=True, ulps=16.0, repeat=True)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_equal_frames_are_averaged(backend, generator):
    """Frames that are alike, without embeddings: every share is 1 / T, and the result is the value."""
    frame = torch.randn(1, 1, 3, 3 * 8, generator=generator)
    out = temporal_attention(frame.expand(1, 4, 3, 24), torch.zeros(7, 4), torch.zeros(7, 4), backend=backend)
    torch.testing.assert_close(out, frame[..., 16:].expand(1, 4, 3, 8))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_large_scores_do_not_overflow(backend):
    """A key whose score is far above the others takes all of the weight; in fp32 exp(1000) would be infinite."""
    qkv = torch.ones(1, 3, 1, 3)
    qkv[..., 1] = torch.tensor([0.0, 1000.0, -1000.0])[None, :, None]
    qkv[..., 2] = torch.tensor([1.0, 2.0, 3.0])[None, :, None]
    zeros = torch.zeros(5, 1)
    assert torch.equal(temporal_attention(qkv, zeros, zeros, backend=backend), torch.full((1, 3, 1, 1), 2.0))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_bad_number_stays_in_its_position_and_head(backend, part, value, generator):
    qkv, rel_k, rel_v = inputs_of(generator, "cpu", (2, 4, 5, 2, 8, 3))
    qkv[1, 2, 3, part * 16 + 8 + 1] = value
    finite = temporal_attention(qkv, rel_k, rel_v, backend=backend).isfinite()
    # An infinite key takes all of the weight, or none of it.
    if part != 1 or value != torch.inf:
        assert not finite[1, 2, 3, 8:].all()
    finite[1, :, 3, 8:] = True
    assert finite.all()


def test_pairs_to_distances(generator):
    pairs = torch.randn(5, 5, 3, generator=generator, dtype=torch.float64)
    sums = sum_of_pairs(pairs)
    expected = torch.stack([torch.diagonal(pairs, s).sum(1) for s in range(-4, 5)])
    torch.testing.assert_close(sums, expected)
    assert torch.equal(fold(sums, 9), sums)
    assert torch.equal(fold(sums, 13)[2:-2], sums)
    torch.testing.assert_close(fold(sums, 3), torch.stack([sums[:4].sum(0), sums[4], sums[5:].sum(0)]))
    torch.testing.assert_close(fold(sums, 1), sums.sum(0, keepdim=True))


def registered_calls(generator, backend):
    values = inputs_of(generator, "cpu", (2, 3, 5, 2, 4, 1))
    grad = torch.randn(2, 3, 5, 8, generator=generator)
    leaves = [t.clone().requires_grad_() for t in values]
    _, weights = torch.ops.hpdm.temporal_attention_fwd(*values, backend)
    return {
        "temporal_attention_fwd": (*leaves, backend),
        "temporal_attention_bwd": (grad, *values, weights, backend),
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, generator):
    for name, arguments in registered_calls(generator, backend).items():
        torch.library.opcheck(getattr(torch.ops.hpdm, name).default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend, generator):
    def run(qkv, rel_k, rel_v):
        return temporal_attention(qkv * 2, rel_k, rel_v, backend=backend).sin()

    values = inputs_of(generator, "cpu", (1, 3, 5, 2, 4, 1))
    eager, compiled = value_and_grads(run, values), value_and_grads(torch.compile(run, fullgraph=True), values)
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_mixed_precision_stops_at_the_op(backend, generator):
    values = inputs_of(generator, "cpu", (1, 3, 5, 2, 4, 1))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = temporal_attention(*values, backend=backend)
    assert torch.equal(mixed, temporal_attention(*values, backend=backend))


def test_what_no_program_can_hold(generator, monkeypatch):
    """Long sequences of wide heads: asked for by name the kernels say why not, and "auto" does without them."""
    assert block_sizes.obstacle(64, 64) is block_sizes.obstacle(16, 256) is None
    values = inputs_of(generator, "cpu", (1, 17, 1, 1, 129, 3))
    with pytest.raises(RuntimeError, match=r"^temporal_attention: backend='triton' cannot run: 17 frames of 129 chan"):
        temporal_attention(*values, backend="triton")
    assert torch.equal(temporal_attention(*values), temporal_attention(*values, backend="torch"))


@pytest.mark.parametrize("backward", [False, True])
def test_tiles_fit_registers(backward, monkeypatch):
    monkeypatch.setattr(block_sizes, "INTERPRETED", False)
    for frames in range(1, 129):
        for width in range(1, 1025, 3):
            if block_sizes.obstacle(frames, width) is None:
                tile = block_sizes.tile(frames, width, backward)
                assert tile.frames >= frames
                assert tile.channels >= width
                assert tile.frames * tile.positions * tile.channels <= 32 * (8 if backward else 32) * tile.num_warps
                assert tile.num_warps <= 16


QKV, TABLE = torch.zeros(1, 4, 5, 48), torch.zeros(7, 8)
BAD = {
    "qkv: got list": (TypeError, {"qkv": [1]}),
    "qkv: got dtype torch.int64": (TypeError, {"qkv": QKV.long()}),
    r"qkv: got shape \(4, 5, 48\)": (ValueError, {"qkv": QKV[0]}),
    r"qkv: got shape \(1, 4, 5, 40\), expected a multiple of 3 \* 8": (ValueError, {"qkv": QKV[..., :40]}),
    "rel_k: got NoneType": (TypeError, {"rel_k": None}),
    r"rel_k: got shape \(6, 8\), expected an odd number": (ValueError, {"rel_k": TABLE[:6], "rel_v": TABLE[:6]}),
    "rel_k: got device meta": (ValueError, {"rel_k": TABLE.to("meta")}),
    r"rel_v: got shape \(5, 8\)": (ValueError, {"rel_v": TABLE[:5]}),
    "rel_v: got dtype": (TypeError, {"rel_v": TABLE.int()}),
    "backend: got 'cuda'": (ValueError, {"backend": "cuda"}),
}


@pytest.mark.parametrize("message", BAD)
def test_it_rejects(message):
    error, change = BAD[message]
    with pytest.raises(error, match=f"^{message}"):
        temporal_attention(**({"qkv": QKV, "rel_k": TABLE, "rel_v": TABLE, "backend": "torch"} | change))


def test_few_positions_take_the_formula_on_the_cpu(generator, monkeypatch):
    """The bits of the formula below the limit, and those of the op from there on."""
    inputs = inputs_of(generator, "cpu", (1, 5, 6, 2, 8, 2))
    op = temporal_attention(*inputs, backend="torch")
    monkeypatch.setattr(api, "LEAST", 5 * 6 * 8 + 1)
    assert torch.equal(temporal_attention(*inputs, backend="torch"), reference.temporal_attention(*inputs))
    monkeypatch.setattr(api, "LEAST", 5 * 6 * 8)
    assert torch.equal(temporal_attention(*inputs, backend="torch"), op)
