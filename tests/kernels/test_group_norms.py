"""Group normalization against a formula of its own in fp64: its settings, its exact cases, its contract."""

import pytest
import torch
import torch.nn.functional as F

from hpdm_kernels import group_norm_act
from hpdm_kernels.groupnorm import api, torch_backend
from hpdm_kernels.groupnorm.form import Form
from hpdm_kernels.groupnorm.ops import group_norm_act_fwd
from hpdm_kernels.testing import formulas, max_error, poisoned_allocations, random_groups, value_and_grads
from hpdm_kernels.testing.case import Case
from hpdm_kernels.testing.draw import Draw
from hpdm_kernels.testing.fuzz import check

BACKENDS = ("torch", "triton")
PAD = ((1, 1), (1, 1), (1, 1))


@pytest.fixture(autouse=True)
def _registered_ops_for_small_clips_too(monkeypatch):
    monkeypatch.setattr(api, "LEAST", 0)


def tensors(generator, shape, per_frame=True, dtype=torch.float32):
    """``x``, weight, bias, scale and shift."""
    b, t, _, _, c = shape
    vector = (b, t, c) if per_frame else (b, c)
    return [torch.randn(size, generator=generator).to(dtype) for size in (shape, (c,), (c,), vector, vector)]


# Name: shape, groups, whether there is a modulation, and settings.
CONFIGURATIONS = {
    "one group": ((2, 2, 3, 5, 7), 1, False, {}),
    "one group of a clip": ((2, 2, 3, 5, 7), 1, True, {"over": "clip", "pad": ((0, 3), (2, 0), (1, 2))}),
    "one channel per group": ((1, 3, 4, 4, 5), 5, True, {"pad": PAD}),
    "frames of one pixel": ((2, 3, 1, 1, 12), 3, True, {"pad": ((1, 1), (0, 2), (1, 0))}),
    "a clip of one pixel": ((1, 1, 1, 1, 6), 2, False, {"over": "clip"}),
    "one number per group": ((2, 1, 1, 1, 4), 4, True, {"act": "none"}),
    "more channels than a tile": ((1, 2, 3, 3, 260), 4, True, {"over": "clip"}),
    "more rows than a chunk": ((1, 1, 37, 9, 2), 2, False, {"pad": PAD}),
}


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_it_is_the_formula(name, backend, generator):
    shape, groups, modulated, settings = CONFIGURATIONS[name]
    x, weight, bias, *modulation = tensors(generator, shape)
    scale, shift = modulation if modulated else (None, None)
    arguments = {"x": x, "weight": weight, "bias": bias, "groups": groups, "scale": scale, "shift": shift}
    defaults = {"over": "frame", "act": "silu", "pad": None, "eps": 1e-5}
    names = ("x", "weight", "bias", "scale", "shift")
    case = Case(
        group_norm_act, formulas.group_norm_act, arguments | defaults | settings, names, 16.0, 16.0,
        random_groups.sizes,
    )  # fmt: skip
    assert check(case, backend, Draw(generator.initial_seed())) is None


@pytest.mark.parametrize("piece", [1, 50, 300])
@pytest.mark.parametrize("over", ["frame", "clip"])
def test_pieces_change_only_rounding(over, piece, generator, monkeypatch):
    """Rows, frames and samples in pieces of their own, edges in every one of them."""
    inputs = [t.double() for t in tensors(generator, (3, 4, 3, 5, 6))]

    def run(x, weight, bias, scale, shift):
        return group_norm_act(x, weight, bias, 3, scale, shift, over=over, pad=PAD, backend="torch")

    whole = value_and_grads(run, inputs)
    monkeypatch.setattr(torch_backend, "PIECE", piece)
    torch.testing.assert_close(value_and_grads(run, inputs), whole)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_large_mean_does_not_cancel(backend, generator):
    """Mean 1,000 and deviation 1, where a difference of squares would leave no digit of the variance."""
    x = torch.randn(1, 2, 6, 6, 16, generator=generator) + 1000
    weight, bias = torch.ones(16), torch.zeros(16)
    true = formulas.group_norm_act(x.double(), weight.double(), bias.double(), 4)
    ours = lambda x, w, b: group_norm_act(x, w, b, 4, backend=backend)
    # The mean itself is rounded to fp32: half a unit in the last place of 1,000 is 3e-5 deviations.
    out, grads = value_and_grads(ours, (x, weight, bias), grad := torch.randn(x.shape, generator=generator))
    assert max_error(out, true) < 1e-3
    wide = lambda x, w, b: formulas.group_norm_act(x, w, b, 4)
    _, expected = value_and_grads(wide, (x.double(), weight.double(), bias.double()), grad)
    for mine, theirs in zip(grads, expected):
        assert max_error(mine, theirs) < 1e-3 * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend, generator):
    inputs = tensors(generator, (1, 2, 5, 5, 12))
    run = lambda *t: group_norm_act(*t[:3], 4, *t[3:], over="clip", pad=PAD, backend=backend)
    grad = torch.randn(1, 4, 7, 7, 12, generator=generator)
    with poisoned_allocations():
        (first, grads), (second, again) = (value_and_grads(run, inputs, grad) for _ in range(2))
    assert all(map(torch.equal, (first, *grads), (second, *again)))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_edges_are_repeated_to_the_bit(backend, generator):
    x, weight, bias, *_ = tensors(generator, (2, 3, 4, 5, 6))
    padded = group_norm_act(x, weight, bias, 2, pad=((1, 2), (0, 3), (2, 1)), backend=backend)
    inner = padded[:, 1:4, :4, 2:7]
    torch.testing.assert_close(inner, group_norm_act(x, weight, bias, 2, backend=backend))
    assert torch.equal(padded, F.pad(inner.movedim(4, 1), (2, 1, 0, 3, 1, 2), mode="replicate").movedim(1, 4))
    assert padded.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_vector_of_the_clip_is_that_of_every_frame(backend, generator):
    x, weight, bias, scale, shift = tensors(generator, (2, 3, 2, 3, 4), per_frame=False)
    of_frames = [t[:, None].expand(2, 3, 4) for t in (scale, shift)]
    run = lambda *modulation: group_norm_act(x, weight, bias, 2, *modulation, backend=backend)
    out, grads = value_and_grads(run, (scale, shift))
    same, each = value_and_grads(run, of_frames)
    single, alike = value_and_grads(run, (scale[:, None], shift[:, None]))
    assert torch.equal(out, same)
    assert torch.equal(out, single)
    torch.testing.assert_close(grads, [g.sum(1) for g in each])
    torch.testing.assert_close(grads, [g[:, 0] for g in alike])


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_vectors_may_be_narrower_or_wider(backend, generator):
    """As under autocast: what convolutions and products give has 16 bits, weights have 32."""
    inputs = tensors(generator, (2, 2, 3, 4, 8))
    mixed = [t.bfloat16() if i in (0, 3, 4) else t for i, t in enumerate(inputs)]
    value, grads = value_and_grads(lambda *t: group_norm_act(*t[:3], 4, *t[3:], pad=PAD, backend=backend), mixed)
    assert [t.dtype for t in (value, *grads)] == [t.dtype for t in (mixed[0], *mixed)]
    wide = [t.double() for t in mixed]
    true, expected = value_and_grads(lambda *t: formulas.group_norm_act(*t[:3], 4, *t[3:], pad=PAD), wide)
    for mine, theirs in zip((value, *grads), (true, *expected)):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-2, atol=2e-2 * theirs.abs().max().item())


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_silu_far_from_zero(backend):
    """Where the exponential overflows or vanishes, SiLU is the identity or zero, and so is its gradient."""
    bias = torch.tensor([-1e6, -200.0, 200.0, 1e6])
    x, weight = torch.randn(1, 1, 2, 2, 4), torch.zeros(4)
    out, grads = value_and_grads(lambda x, w, b: group_norm_act(x, w, b, 2, backend=backend), (x, weight, bias))
    assert torch.equal(out, bias.clamp(min=0).expand(out.shape))
    assert torch.equal(grads[2], 4.0 * (bias > 0))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("over", ["frame", "clip"])
def test_a_bad_number_stays_in_its_group(over, backend, generator):
    x, weight, bias, scale, shift = tensors(generator, (2, 2, 3, 3, 6))
    x[1, 0, 2, 1, 3] = torch.nan
    shift[0, 1, 5] = torch.inf
    finite = group_norm_act(x, weight, bias, 3, scale, shift, over=over, backend=backend).isfinite()
    expected = torch.ones_like(finite)
    expected[1, slice(None) if over == "clip" else 0, :, :, 2:4] = False
    expected[0, 1, :, :, 5] = False
    assert torch.equal(finite, expected)


def test_small_clips_on_the_cpu_take_the_layers_of_pytorch(monkeypatch, generator):
    x, weight, bias, *_ = tensors(generator, (2, 2, 3, 4, 6))
    monkeypatch.setattr(api, "LEAST", x.numel() + 1)
    small = group_norm_act(x, weight, bias, 2, backend="torch")
    assert torch.equal(small, group_norm_act(x, weight, bias, 2, backend="reference"))
    monkeypatch.setattr(api, "LEAST", x.numel())
    monkeypatch.setattr(api, "group_norm_act_fwd", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        group_norm_act(x, weight, bias, 2, backend="torch")


@pytest.mark.parametrize(("backend", "modulated"), [("torch", True), ("torch", False), ("triton", True)])
def test_opcheck(backend, modulated, generator):
    x, weight, bias, *modulation = tensors(generator, (1, 2, 1, 2, 4))
    vectors = modulation if modulated else [None, None]
    settings = (2, modulated, modulated, [1, 0, 0, 0, 0, 1] if modulated else [0] * 6)
    leaves = [t if t is None else t.clone().requires_grad_() for t in (x, weight, bias, *vectors)]
    torch.library.opcheck(torch.ops.hpdm.group_norm_act_fwd.default, (*leaves, *settings, 1e-5, backend))
    out, mean, rstd = group_norm_act_fwd(x, weight, bias, *vectors, *settings, 1e-5, backend)
    assert out.shape == Form(*settings).padded(x.shape)
    arguments = (torch.randn_like(out), x, mean, rstd, weight, bias, *vectors, *settings, backend)
    torch.library.opcheck(torch.ops.hpdm.group_norm_act_bwd.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend, generator):
    def run(x, weight, bias, scale, shift):
        return group_norm_act(x + 1, weight, bias, 2, scale, shift, pad=PAD, backend=backend) * 2

    inputs = tensors(generator, (2, 2, 2, 3, 4))
    eager, compiled = value_and_grads(run, inputs), value_and_grads(torch.compile(run, fullgraph=True), inputs)
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_mixed_precision_stops_at_the_op(backend, generator):
    x, weight, bias, *_ = tensors(generator, (1, 2, 2, 3, 4))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = group_norm_act(x, weight, bias, 2, backend=backend)
    assert torch.equal(mixed, group_norm_act(x, weight, bias, 2, backend=backend))


X, V = torch.zeros(2, 3, 2, 2, 4), torch.zeros(4)
BAD = {
    "x: got list": (TypeError, {"x": [1]}),
    "x: got dtype torch.int64": (TypeError, {"x": X.long()}),
    "x: got shape": (ValueError, {"x": X[0]}),
    "weight: got shape": (ValueError, {"weight": V[:3]}),
    "bias: got NoneType": (TypeError, {"bias": None}),
    "groups: got 3, expected a divisor of the 4 channels": (ValueError, {"groups": 3}),
    "groups: got 0": (ValueError, {"groups": 0}),
    "groups: got 2.0": (TypeError, {"groups": 2.0}),
    "shift: got None, expected scale and shift, or neither": (ValueError, {"scale": torch.zeros(2, 4)}),
    "scale: got None": (ValueError, {"shift": torch.zeros(2, 4)}),
    r"scale: got shape \(2, 2, 4\), expected \[2, 3, 4\]": (
        ValueError, {"scale": torch.zeros(2, 2, 4), "shift": torch.zeros(2, 2, 4)},
    ),
    r"shift: got shape \(2, 4\), expected \[2, 3, 4\]": (
        ValueError, {"scale": torch.zeros(2, 3, 4), "shift": torch.zeros(2, 4)},
    ),
    "over: got 'video', expected one of 'frame', 'clip'": (ValueError, {"over": "video"}),
    "act: got None": (ValueError, {"act": None}),
    "pad: got 1, expected three pairs": (TypeError, {"pad": 1}),
    "pad: got .* expected numbers >= 0": (ValueError, {"pad": ((0, 0), (0, -1), (0, 0))}),
    "eps: got 0": (ValueError, {"eps": 0}),
    "backend: got 'cuda'": (ValueError, {"backend": "cuda"}),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_what_is_wrong_is_named(message):
    error, change = BAD[message]
    with pytest.raises(error, match=message):
        group_norm_act(**({"x": X, "weight": V, "bias": V, "groups": 2, "backend": "torch"} | change))


def test_triton_refuses_what_it_cannot_run():
    with pytest.raises(RuntimeError, match="group_norm_act: backend='triton' cannot run"):
        group_norm_act(X.double(), V.double(), V.double(), 2, backend="triton")


def test_second_derivatives_are_refused(generator):
    x, weight, bias, *_ = tensors(generator, (1, 1, 2, 2, 4))
    x.requires_grad_()
    out = group_norm_act(x, weight, bias, 2, backend="torch")
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), x)
