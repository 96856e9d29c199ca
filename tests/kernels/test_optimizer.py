"""Steps of AdamW and LAMB over many tensors: against fp64, PyTorch's own AdamW, and what may be odd about a list."""

import math

import pytest
import torch
from torch import nn

import hpdm_kernels
from hpdm_kernels import _triton
from hpdm_kernels.optimizer import torch_backend, triton_backend
from hpdm_kernels.optimizer.lists import is_dense, pieces
from hpdm_kernels.testing import steps

BACKENDS = ("reference", "torch", "triton")
OPS = tuple(steps.OPS)


def same(a, b):
    """Whether two dictionaries of results have the same bits, those of zeros and NaN too."""
    bits = lambda t: t.contiguous().view(-1).view(torch.uint8)
    return a.keys() == b.keys() and all(torch.equal(bits(a[name]), bits(b[name])) for name in a)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("averages", [0, 1, 3])
@pytest.mark.parametrize("op", OPS)
def test_a_step_is_within_the_budget(op, averages, backend, generator):
    """Odd, empty and single tensors, each after another number of steps; two runs have the same bits."""
    arguments = steps.draw(generator, averages=averages, op=op)
    assert same(steps.check_step(op, arguments, backend), steps.after(op, arguments, backend))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("op", OPS)
def test_a_step_in_fp64(op, backend, generator):
    steps.check_step(op, steps.draw(generator, averages=2, dtype=torch.float64, op=op), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_gradients_may_be_of_16_bits(op, backend, dtype, generator):
    if backend == "triton" and _triton.INTERPRETED:
        pytest.skip("the interpreter is wrong in 16 bits")
    steps.check_step(op, steps.draw(generator, grad_dtype=dtype, op=op), backend)


@pytest.mark.parametrize("op", OPS)
def test_long_tensors_are_worked_on_in_parts(op, generator, monkeypatch):
    """Full chunks and the last one, of tensors at multiples of 16 bytes and elsewhere."""
    monkeypatch.setattr(torch_backend, "PIECE", 100)
    monkeypatch.setattr(triton_backend, "INTERPRETED_BLOCK", 128)
    arguments = steps.draw(generator, ((3, 311), (128,), (5,), (4, 64)), averages=2, op=op)
    for backend in ("torch", "triton"):
        steps.check_step(op, arguments, backend)
    moved = steps.copied(arguments, lambda t: steps.shifted(t) if t.ndim == 2 else t)
    assert any(p.data_ptr() % 16 for p in moved["params"])
    steps.check_step(op, moved, "triton")


def test_adamw_is_that_of_pytorch(generator):
    """In fp64, over steps, for every backend that has it; and in fp32 on the CPU bit for bit."""
    shapes = ((6, 5), (7,), ())
    for dtype in (torch.float64, torch.float32):
        start = [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
        grads = [[torch.randn(s, generator=generator, dtype=dtype) for s in shapes] for _ in range(4)]
        theirs = [nn.Parameter(p.clone()) for p in start]
        optimizer = torch.optim.AdamW(theirs, lr=0.02, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
        for step in grads:
            for p, g in zip(theirs, step):
                p.grad = g.clone()
            optimizer.step()
        for backend in ("reference", "torch") if dtype is torch.float64 else ("torch",):
            own = [p.clone() for p in start]
            moments = [[torch.zeros_like(p) for p in start] for _ in range(2)]
            counts = torch.zeros(3)
            for step in grads:
                hpdm_kernels.adamw_step(
                    own, step, *moments, steps=counts, lr=0.02, betas=(0.9, 0.99), weight_decay=0.1, backend=backend
                )
            for ours, p in zip(own, theirs):
                if dtype is torch.float64:
                    torch.testing.assert_close(ours, p.detach(), rtol=1e-12, atol=1e-14)
                else:
                    assert torch.equal(ours, p.detach())
            assert counts.tolist() == [4.0] * 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_a_step_that_is_not_applied_changes_not_one_bit(op, backend, generator):
    """Whatever the gradients hold; a negative zero stays one."""
    arguments = steps.draw(generator, averages=2, op=op)
    for name in ("params", "exp_avgs"):
        arguments[name][0].view(-1)[0] = -0.0
    for g, bad in zip(arguments["grads"], (math.nan, math.inf, -math.inf)):
        g.fill_(bad)
    arguments["grad_scale"] = torch.tensor(math.nan)
    arguments["steps"].zero_()
    own = steps.copied(arguments)
    norms = steps.OPS[op](**own, apply=torch.tensor(False), backend=backend)
    assert same(steps.results(own), steps.results(arguments))
    assert same({str(i): g for i, g in enumerate(own["grads"])}, {str(i): g for i, g in enumerate(arguments["grads"])})
    if norms is not None:
        assert [t.tolist() for t in norms] == [[x] * len(own["params"]) for x in (0.0, 0.0, 1.0)]
    applied = steps.copied(arguments | {"grads": arguments["params"], "grad_scale": torch.tensor(1.0)})
    steps.OPS[op](**applied, apply=torch.tensor(True), backend=backend)
    assert not same(steps.results(applied), steps.results(arguments))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rate_of_one_copies_the_weights(backend, generator):
    arguments = steps.draw(generator, averages=2)
    arguments["rates"] = torch.tensor([1.0, 0.0])
    got = steps.after("adamw_step", arguments, backend)
    for i, average in enumerate(arguments["averages"][1]):
        assert torch.equal(got[f"averages[0][{i}]"], got[f"params[{i}]"])
        assert torch.equal(got[f"averages[1][{i}]"], average)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_may_be_completed_between_the_passes(backend, generator):
    """Halves of a tensor in two processes take the step of the whole."""
    whole = steps.draw(generator, ((8, 6),), op="lamb_step")
    part = lambda half: steps.copied(whole, lambda t: t[4 * half : 4 * half + 4].clone() if t.ndim == 2 else t.clone())
    squares = []
    for half in range(2):
        steps.OPS["lamb_step"](**part(half), sum_squares=lambda s: squares.append(s.clone()) or s, backend=backend)
    expected = steps.after("lamb_step", whole, backend)
    for half in range(2):
        own = part(half)
        norms = steps.OPS["lamb_step"](**own, sum_squares=lambda s: squares[0] + squares[1], backend=backend)
        torch.testing.assert_close(own["params"][0], expected["params[0]"][4 * half : 4 * half + 4])
        torch.testing.assert_close(norms.trust, expected["trust"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_any_dense_order_of_memory(op, backend, generator):
    """As of channels-last weights; a gradient may lie in another order, or have gaps."""
    shapes = ((4, 3, 5, 2), (6, 7))
    arguments = steps.draw(generator, shapes, op=op)
    turn = lambda t: (
        t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t.t().contiguous().t()
        if t.ndim == 2 else t.clone()
    )  # fmt: skip
    turned = steps.copied(arguments, turn)
    turned["grads"] = [
        torch.stack((g, g), -1)[..., 0] if i else g.clone() for i, g in enumerate(arguments["grads"])
    ]  # fmt: skip
    assert not turned["params"][0].is_contiguous()
    steps.check_step(op, turned, backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("op", ["adamw_step", "lamb_moments", "lamb_apply"])
def test_registered_ops_pass_pytorchs_checks(op, backend, generator):
    a = steps.draw(generator, ((5, 7), (3,)), averages=2, op="lamb_step")
    averages = [t for average in a["averages"] for t in average]
    applied, trust, adam = torch.tensor(True), torch.tensor([1.5, 0.5]), (0.9, 0.999, 1e-6, 0.05)
    moments = (a["exp_avgs"], a["exp_avg_sqs"])
    arguments = {
        "adamw_step": (a["params"], a["grads"], *moments, averages, a["steps"], a["rates"], a["grad_scale"], applied,
                       0.01, *adam, backend),
        "lamb_moments": (a["params"], a["grads"], *moments, a["steps"], a["grad_scale"], applied, *adam, backend),
        "lamb_apply": (a["params"], *moments, averages, a["steps"] + 1, trust, a["rates"], applied, 0.01, *adam,
                       backend),
    }  # fmt: skip
    torch.library.opcheck(getattr(torch.ops.hpdm, op).default, arguments[op])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_steps_compile_as_one_graph(op, backend, generator):
    arguments = steps.draw(generator, ((5, 7), (3,)), averages=2, op=op)
    own = steps.copied(arguments)
    lists = {name: own.pop(name) for name in (*steps.LISTS, "averages")}
    numbers = {name: own.pop(name) for name in ("lr", "betas", "eps", "weight_decay")}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(lists, tensors):
        lists["grads"] = [g * 2 for g in lists["grads"]]
        return steps.OPS[op](**lists, **tensors, **numbers, backend=backend)

    norms = compiled(dict(lists), own)
    doubled = arguments | {"grads": [g * 2 for g in arguments["grads"]]}
    expected = steps.after(op, doubled, backend)
    torch.testing.assert_close(steps.results(lists | own, norms), expected)


def test_parameters_that_require_gradients_are_stepped(generator):
    arguments = steps.draw(generator)
    expected = steps.after("adamw_step", arguments, "torch")
    arguments["params"] = [nn.Parameter(p) for p in arguments["params"]]
    hpdm_kernels.adamw_step(**arguments, backend="torch")
    assert all(torch.equal(p, expected[f"params[{i}]"]) for i, p in enumerate(arguments["params"]))


def wrong(name, value, error, message):
    return pytest.param({name: value}, error, message, id=f"{name}: {message[:24]}")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        wrong("params", torch.zeros(3), TypeError, "params: got Tensor, expected a sequence"),
        wrong("params", [], ValueError, "params: got no tensors"),
        wrong("params", [torch.zeros(2), torch.zeros(4)[::2]], ValueError, r"params\[1\]: got strides \(2,\)"),
        wrong("params", [torch.zeros(2).bfloat16()] * 2, TypeError, r"params\[0\]: got dtype torch.bfloat16"),
        wrong("params", [torch.zeros(2), torch.zeros(2).double()], TypeError, r"params\[1\]: got dtype torch.float64"),
        wrong("grads", [torch.zeros(2)], ValueError, "grads: got 1 tensors, expected 2 as for params"),
        wrong("grads", [torch.zeros(2), torch.zeros(3)], ValueError, r"grads\[1\]: got shape \(3,\)"),
        wrong("grads", [torch.zeros(2), torch.zeros(2).bfloat16()], TypeError, r"grads\[1\]: got dtype torch.bfloat16"),
        wrong("grads", [torch.zeros(2), None], TypeError, r"grads\[1\]: got NoneType"),
        wrong("exp_avgs", [torch.zeros(2), torch.zeros(4)[::2]], ValueError, r"exp_avgs\[1\]: got strides \(2,\)"),
        wrong("exp_avg_sqs", [torch.zeros(2), torch.zeros(2, device="meta")], ValueError, r"exp_avg_sqs\[1\]: got dev"),
        wrong("averages", [torch.zeros(2)] * 2, TypeError, "averages: got Tensor"),
        wrong("averages", torch.zeros(2), TypeError, "averages: got Tensor, expected a sequence of sequences"),
        wrong("steps", torch.zeros(3), ValueError, r"steps: got shape \(3,\), expected \[2\]"),
        wrong("steps", torch.zeros(2, dtype=torch.int64), TypeError, "steps: got dtype torch.int64"),
        wrong("rates", torch.zeros(2), ValueError, r"rates: got shape \(2,\)"),
        wrong("rates", None, TypeError, "rates: got NoneType"),
        wrong("grad_scale", torch.zeros(2), ValueError, r"grad_scale: got shape \(2,\)"),
        wrong("apply", torch.ones(()), TypeError, "apply: got dtype torch.float32"),
        wrong("lr", -1.0, ValueError, "lr: got -1.0, expected at least 0"),
        wrong("eps", math.nan, ValueError, "eps: got nan"),
        wrong("betas", (0.9, 1.0), ValueError, r"betas: got \(0.9, 1.0\), expected both in \[0, 1\)"),
        wrong("betas", 0.9, TypeError, "betas: got 0.9, expected two numbers"),
        wrong("backend", "cuda", ValueError, "backend: got 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(op, change, error, message, generator):
    arguments = steps.draw(generator, ((2,), (2,)), op=op)
    with pytest.raises(error, match=f"^{message}"):
        steps.OPS[op](**(arguments | {"backend": "torch"} | change))


@pytest.mark.skipif(not _triton.INTERPRETED, reason="about the interpreter")
def test_the_interpreter_does_not_take_16_bits(generator):
    with pytest.raises(RuntimeError, match="adamw_step: backend='triton' cannot run: Triton's interpreter"):
        hpdm_kernels.adamw_step(**steps.draw(generator, grad_dtype=torch.bfloat16), backend="triton")


def test_what_is_dense():
    t = torch.zeros(4, 3, 2)
    assert all(map(is_dense, (t, t.permute(2, 0, 1), t[:1], t[:0], t[:, :, :1][:1, :1], torch.zeros(()))))
    assert not any(map(is_dense, (t[:, :2], t[..., :1], torch.zeros(3, 1).expand(3, 4))))


def test_pieces_cover_every_element_once():
    sizes = (250, 0, 100, 7, 1, 99)
    columns = [[torch.zeros(size) for size in sizes] for _ in range(2)]
    most = []
    for owners, parts in pieces(columns, 100):
        most.append(sum(t.numel() for t in parts[0]))
        for tensors in parts:
            assert [t.untyped_storage().nbytes() // 4 for t in tensors] == [sizes[i] for i in owners]
            for t in tensors:
                t += 1
    assert all(bool((t == 1).all()) for column in columns for t in column)
    assert max(most) <= 100
    assert len(most) == 6  # 100, 100, 50, 100, 8, 99
