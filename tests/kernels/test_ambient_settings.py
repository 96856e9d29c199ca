"""What a program sets for PyTorch as a whole, autocast and the default dtype, changes neither dtypes nor values."""

import contextlib

import pytest
import torch

import hpdm_kernels as ops
from hpdm_kernels.attention.triton_backend import _bias_of
from hpdm_kernels.testing import poisoned_allocations, random_boxes
from tests.kernels.every_op import BACKENDS, CALLS


def results(call, backend, inputs, setting=None):
    """Output and gradients; the forward pass runs in ``setting``."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    with setting or contextlib.nullcontext():
        out = call.run(backend, *leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


@pytest.fixture
def double_by_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_autocast_changes_nothing(name, backend, dtype, generator, device):
    if backend == "triton" and device.type == "cpu" and dtype != torch.float32:
        pytest.skip("the interpreter is right for fp32 only")
    call = CALLS[name]
    inputs = [t.to(device) for t in call.inputs(generator, dtype)]
    expected = results(call, backend, inputs)
    actual = results(call, backend, inputs, torch.autocast(device.type, torch.bfloat16))
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype == dtype
        assert torch.equal(a, e)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_reference_compiles_under_autocast(backend, generator):
    q, k, v = CALLS["cross_attention"].inputs(generator)

    def attend(q):
        with torch.autocast("cpu", torch.bfloat16):
            return ops.cross_attention(q, k, v, backend=backend)

    torch._dynamo.reset()
    assert torch.equal(torch.compile(attend, fullgraph=True, backend="eager")(q), attend(q))


def test_reference_takes_meta_tensors_where_there_is_no_autocast():
    assert CALLS["cross_attention"].run("reference", *torch.zeros(3, 1, 1, 2, 4, device="meta")).device.type == "meta"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("double_by_default")
def test_default_dtype_changes_nothing(name, backend, generator, device):
    call = CALLS[name]
    torch.set_default_dtype(torch.float32)
    inputs = [t.to(device) for t in call.inputs(generator)]
    expected = results(call, backend, inputs)
    torch.set_default_dtype(torch.float64)
    actual = results(call, backend, inputs)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, e)


@pytest.mark.usefixtures("double_by_default")
def test_kernels_get_masks_in_fp32():
    """The interpreter would compute with a mask of any dtype; the compiler refuses fp64."""
    with poisoned_allocations():
        bias = _bias_of(torch.tensor([[True, False, True]]))
    assert bias.dtype == torch.float32
    assert bias[0, :4].tolist() == [0.0, -torch.inf, 0.0, -torch.inf]


@pytest.mark.usefixtures("double_by_default")
def test_random_boxes_are_fp32():
    assert random_boxes(2, (0.5, 0.5, 0.5), torch.Generator()).dtype == torch.float32
