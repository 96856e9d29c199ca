"""The ops on rows against PyTorch's own layers in fp64, their gradients, their exact cases, their contract."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from hpdm_kernels import bias_gelu, gated_residual, modulated_norm
from hpdm_kernels.rows import api, torch_backend
from hpdm_kernels.rows.ops import bias_gelu_fwd
from hpdm_kernels.testing import check_op, max_error, value_and_grads

BACKENDS = ("torch", "triton")


@pytest.fixture(autouse=True)
def _registered_ops_for_few_rows_too(monkeypatch):
    monkeypatch.setattr(api, "LEAST", 0)


SHAPES = [(2, 5, 24), (3, 1, 7), (1, 70, 33), (2, 3, 1), (1, 1, 1), (2, 19, 130), (1, 2, 1030)]
DTYPES = [torch.bfloat16, torch.float16, torch.float64]


def rows(generator, device, shape, dtype=torch.float32):
    """Rows and branch ``[B, N, D]``, then shift, scale and gate ``[B, D]``."""
    b, _, d = shape
    sizes = (shape, shape, (b, d), (b, d), (b, d))
    return [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]


def plain_norm(x, shift, scale, branch=None, gate=None):
    """The norm by statistics of its own, written out."""
    y = x
    if branch is not None:
        y = x + (branch if gate is None else gate.unsqueeze(1) * branch)
    centered = y - y.mean(dim=2, keepdim=True)
    normal = centered * (centered.square().mean(dim=2, keepdim=True) + 1e-5).rsqrt()
    out = normal * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    return out if branch is None else torch.stack((y, out))


def norm(backend):
    def run(x, shift, scale, *branch_and_gate):
        result = modulated_norm(x, shift, scale, *branch_and_gate, backend=backend)
        return result if isinstance(result, torch.Tensor) else torch.stack(result)

    return run


def inputs_of_norm(kind, values):
    x, branch, shift, scale, gate = values
    return [x, shift, scale, *{"alone": (), "branch": (branch,), "gate": (branch, gate)}[kind]]


KINDS = ("alone", "branch", "gate")


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(("kind", "shape"), list(itertools.product(KINDS, [s for s in SHAPES if s[2] > 1])))
def test_norm_matches_formula(kind, shape, backend, generator, device):
    values = inputs_of_norm(kind, rows(generator, device, shape))
    check_op(norm(backend), plain_norm, values, ulps=16.0, repeat=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 3, 1), (1, 1, 1)])
def test_norm_of_one_channel_is_its_shift(shape, backend, generator, device):
    """In exact arithmetic the gradient of the rows is zero; two numbers cancel that are 316 times the gradient."""
    x, _, shift, scale, _ = rows(generator, device, shape)
    out, grads = value_and_grads(norm(backend), (x, shift, scale))
    assert torch.equal(out, shift[:, None].expand(shape))
    assert grads[0].abs().max() < 1e-4
    assert torch.equal(grads[1], torch.full_like(shift, shape[1]))
    assert grads[2].abs().max() < 1e-4


@pytest.mark.parametrize(("kind", "dtype"), list(itertools.product(KINDS, DTYPES)))
def test_norm_of_other_dtypes(kind, dtype, generator, device):
    check_op(norm("torch"), plain_norm, inputs_of_norm(kind, rows(generator, device, (2, 9, 40), dtype)), ulps=64.0)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_rows_may_be_wider_than_what_products_give(backend, generator, device):
    """As under autocast: fp32 rows; vectors and the branch in bf16, whose gradients have their dtype."""
    x, branch, shift, scale, gate = rows(generator, device, (2, 9, 40))
    narrow = [t.bfloat16() for t in (shift, scale, branch, gate)]
    value, grads = value_and_grads(norm(backend), (x, *narrow))
    _, expected = value_and_grads(plain_norm, (x.double(), *(t.double() for t in narrow)))
    assert value.dtype is torch.float32
    assert [g.dtype for g in grads] == [torch.float32, *[torch.bfloat16] * 4]
    for grad, true in zip(grads, expected):
        torch.testing.assert_close(grad.double(), true, rtol=2e-2, atol=2e-2 * true.abs().max().item())


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_matches_formula(shape, backend, generator, device):
    x, branch, _, _, gate = rows(generator, device, shape)
    check_op(
        lambda x, b, g: gated_residual(x, b, g, backend=backend), lambda x, b, g: x + g.unsqueeze(1) * b,
        (x, branch, gate), repeat=True,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_of_other_dtypes(dtype, generator, device):
    x, branch, _, _, gate = rows(generator, device, (2, 9, 40), dtype)
    check_op(
        lambda x, b, g: gated_residual(x, b, g, backend="torch"), lambda x, b, g: x + g.unsqueeze(1) * b,
        (x, branch, gate),
    )  # fmt: skip


def plain_gelu(x, bias):
    """The tanh formula written out."""
    x = x + bias
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("shape", [(2, 5, 24), (1, 1, 1), (1, 70, 33), (3, 1, 300)])
def test_gelu_matches_formula(shape, backend, generator, device):
    x = 2 * torch.randn(shape, generator=generator).to(device)
    bias = torch.randn(shape[-1], generator=generator).to(device)
    check_op(lambda x, b: bias_gelu(x, b, backend=backend), plain_gelu, (x, bias), ulps=16.0, repeat=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_of_other_dtypes(dtype, generator, device):
    x, bias = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((2, 9, 40), (40,)))
    check_op(lambda x, b: bias_gelu(x, b, backend="torch"), plain_gelu, (x, bias), ulps=64.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gelu_far_from_zero(backend):
    """Where the exponential overflows or vanishes, GELU is the identity or zero, and so is its gradient."""
    x = torch.tensor([[[-1e6, -100.0, -30.0, 30.0, 100.0, 1e6]]])
    out, (grad, _) = value_and_grads(lambda x, b: bias_gelu(x, b, backend=backend), (x, torch.zeros(6)))
    assert torch.equal(out, x.clamp(min=0))
    assert torch.equal(grad, (x > 0).float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_rows_are_summed_in_parts(backend, generator, device):
    """More rows than a program or a piece takes, and a partial one at the end."""
    x, branch, shift, scale, gate = rows(generator, device, (1, 261, 8))
    check_op(norm(backend), plain_norm, (x, shift, scale, branch, gate), ulps=16.0)
    check_op(
        lambda x, b, g: gated_residual(x, b, g, backend=backend), lambda x, b, g: x + g.unsqueeze(1) * b,
        (x, branch, gate),
    )  # fmt: skip
    check_op(lambda x, b: bias_gelu(x, b, backend=backend), plain_gelu, (x, gate[0]), ulps=16.0)


def test_few_rows_on_the_cpu_take_the_layers_of_pytorch(monkeypatch, generator):
    values = rows(generator, "cpu", (2, 5, 24))
    inputs = inputs_of_norm("gate", values)
    monkeypatch.setattr(api, "LEAST", values[0].numel() + 1)
    assert torch.equal(norm("torch")(*inputs), norm("reference")(*inputs))
    monkeypatch.setattr(api, "LEAST", values[0].numel())
    with monkeypatch.context() as patch:
        patch.setattr(api, "residual_norm_fwd", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            norm("torch")(*inputs)


def test_pieces_of_gelu(generator, monkeypatch):
    monkeypatch.setattr(torch_backend, "PIECE", 50)
    x, bias = torch.randn(1, 23, 8, generator=generator), torch.randn(8, generator=generator)
    check_op(lambda x, b: bias_gelu(x, b, backend="torch"), plain_gelu, (x, bias), ulps=16.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_mean_does_not_cancel(backend, generator):
    """The variance is that of the centered row, not a difference of squares."""
    x = torch.randn(1, 4, 64, generator=generator) + 1000
    zeros = torch.zeros(1, 64)
    ours = modulated_norm(x, zeros, zeros, backend=backend)
    assert max_error(ours, F.layer_norm(x.double(), (64,))) < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend, generator, device):
    def strided(shape):
        return (
            torch.randn(*reversed(shape), 2, generator=generator)
            .to(device)[..., 0]
            .permute(*reversed(range(len(shape))))
        )

    x, branch, gate, grad = strided((2, 9, 12)), strided((2, 9, 12)), strided((2, 12)), strided((2, 9, 12))
    whole = torch.randn(2, 36, generator=generator).to(device)
    shift, scale = whole[:, :12], whole[:, 12:24]
    assert not x.is_contiguous()
    check_op(norm(backend), plain_norm, (x, shift, scale), grad, ulps=16.0)
    check_op(norm(backend), plain_norm, (x, shift, scale, branch, gate), torch.stack((grad, grad)), ulps=16.0)
    check_op(norm(backend), plain_norm, (x, shift, scale), torch.ones((), device=device).expand(2, 9, 12), ulps=16.0)
    check_op(
        lambda x, b, g: gated_residual(x, b, g, backend=backend), lambda x, b, g: x + g.unsqueeze(1) * b,
        (x, branch, gate), grad,
    )  # fmt: skip
    check_op(lambda x, b: bias_gelu(x, b, backend=backend), plain_gelu, (x, gate[0]), grad, ulps=16.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_either_result_alone_has_gradients(backend, generator):
    """Of the two results of a norm with a branch the loss may use one only."""
    values = [t.requires_grad_() for t in rows(generator, "cpu", (2, 5, 8))]
    x, branch, shift, scale, gate = values
    for i in range(2):
        outputs = modulated_norm(x, shift, scale, branch, gate, backend=backend)
        ours = torch.autograd.grad(outputs[i].sin().sum(), values, allow_unused=True, materialize_grads=True)
        plain = plain_norm(x, shift, scale, branch, gate)[i]
        expected = torch.autograd.grad(plain.sin().sum(), values, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_number_stays_in_its_row(backend, generator):
    x, branch, shift, scale, gate = rows(generator, "cpu", (2, 5, 8))
    x[1, 3, 2] = torch.nan
    for out in modulated_norm(x, shift, scale, branch, gate, backend=backend):
        finite = out.isfinite()
        assert finite[0].all()
        assert finite[1, [0, 1, 2, 4]].all()
    assert not finite[1, 3].any()


def registered_calls(generator, backend):
    x, branch, shift, scale, gate = rows(generator, "cpu", (2, 3, 8))
    ops = torch.ops.hpdm
    y, out, mean, rstd = ops.residual_norm_fwd(x, branch, gate, shift, scale, 1e-5, backend)
    xg, branchg, gateg, shiftg, scaleg = (t.clone().requires_grad_() for t in (x, branch, gate, shift, scale))
    return {
        "norm": (ops.residual_norm_fwd, (xg, branchg, gateg, shiftg, scaleg, 1e-5, backend)),
        "norm without a gate": (ops.residual_norm_fwd, (xg, branchg, None, shiftg, scaleg, 1e-5, backend)),
        "norm alone": (ops.modulated_norm_fwd, (xg, shiftg, scaleg, 1e-5, backend)),
        "norm, backward": (ops.modulated_norm_bwd, (y, out, y, mean, rstd, shift, scale, branch, gate, backend)),
        "norm alone, backward": (ops.modulated_norm_bwd, (None, out, y, mean, rstd, shift, scale, None, None, backend)),
        "residual": (ops.gated_residual_fwd, (xg, branchg, gateg, backend)),
        "residual, backward": (ops.gated_residual_bwd, (x, branch, gate, backend)),
        "gelu": (ops.bias_gelu_fwd, (x[0].clone().requires_grad_(), gate[0].clone().requires_grad_(), backend)),
        "gelu, backward": (ops.bias_gelu_bwd, (x[0], y[0], gate[0], backend)),
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, generator):
    for op, arguments in registered_calls(generator, backend).values():
        torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend, generator):
    def run(x, branch, shift, scale, gate, bias):
        y, out = modulated_norm(x + 1, shift, scale, branch, gate, backend=backend)
        return modulated_norm(
            gated_residual(y, bias_gelu(out, bias, backend=backend), gate, backend=backend), shift, scale,
            backend=backend,
        )  # fmt: skip

    inputs = [*rows(generator, "cpu", (2, 3, 8)), torch.randn(8, generator=generator)]
    eager, compiled = value_and_grads(run, inputs), value_and_grads(torch.compile(run, fullgraph=True), inputs)
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_precision_stops_at_the_ops(backend, generator):
    x, branch, shift, scale, gate = rows(generator, "cpu", (2, 3, 8))
    calls = (
        lambda: modulated_norm(x, shift, scale, backend=backend),
        lambda: gated_residual(x, branch, gate, backend=backend),
        lambda: bias_gelu(x, gate[0], backend=backend),
    )
    for call in calls:
        with torch.autocast("cpu", torch.bfloat16):
            mixed = call()
        assert torch.equal(mixed, call())


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_layers_may_be_wider_than_what_is_normed(backend, generator):
    """A hidden layer is a multiple of its latents, which may have the widest rows."""
    x, branch, _, _, gate = rows(generator, "cpu", (1, 2, 3 * api.WIDEST + 5))
    check_op(lambda x, b: bias_gelu(x, b, backend=backend), plain_gelu, (x, gate[0]), ulps=16.0)
    check_op(
        lambda x, b, g: gated_residual(x, b, g, backend=backend), lambda x, b, g: x + g.unsqueeze(1) * b,
        (x, branch, gate),
    )  # fmt: skip


X, V = torch.zeros(2, 3, 4), torch.zeros(2, 4)
BAD_NORM = {
    "x: got list": (TypeError, {"x": [1]}),
    "x: got dtype torch.int64": (TypeError, {"x": X.long()}),
    "x: got shape": (ValueError, {"x": X[0]}),
    "x: got shape .* at most 4096": (ValueError, {"x": torch.zeros(1, 1, 4097)}),
    "shift: got shape": (ValueError, {"shift": V[:1]}),
    "scale: got NoneType": (TypeError, {"scale": None}),
    "branch: got shape": (ValueError, {"branch": X[:, :2]}),
    "gate: got a tensor, expected None": (ValueError, {"gate": V}),
    "gate: got shape": (ValueError, {"branch": X, "gate": V[:, :3]}),
    "eps: got 0": (ValueError, {"eps": 0}),
    "eps: got '1'": (TypeError, {"eps": "1"}),
    "backend: got 'cuda'": (ValueError, {"backend": "cuda"}),
}


@pytest.mark.parametrize("message", BAD_NORM)
def test_norm_rejects(message):
    error, change = BAD_NORM[message]
    with pytest.raises(error, match=message):
        modulated_norm(**({"x": X, "shift": V, "scale": V, "backend": "torch"} | change))


def test_the_others_reject():
    for message, call in {
        "branch: got shape": lambda: gated_residual(X, X[:1], V),
        "gate: got dtype": lambda: gated_residual(X, X, V.int()),
        "x: got shape": lambda: bias_gelu(X[:0], V[0]),
        "bias: got shape": lambda: bias_gelu(X, V),
    }.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_triton_refuses_what_it_cannot_run():
    with pytest.raises(RuntimeError, match="modulated_norm: backend='triton' cannot run"):
        modulated_norm(X.double(), V.double(), V.double(), backend="triton")


def test_second_derivatives_are_refused(generator):
    """First order only: a second derivative is an error, not silently zero."""
    x = torch.randn(2, 3, generator=generator, requires_grad=True)
    bias = torch.zeros(3, requires_grad=True)
    (grad,) = torch.autograd.grad(bias_gelu_fwd(x, bias, "torch").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), x)
