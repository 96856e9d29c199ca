"""Gradients of only some inputs: each subset gives what asking for all gives."""

import itertools

import pytest
import torch

from tests.kernels.every_op import BACKENDS, CALLS


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_every_subset_of_gradients(name, backend, generator, device):
    call = CALLS[name]
    inputs = [t.to(device) for t in call.inputs(generator)]
    grad = torch.randn_like(call.run(backend, *inputs))
    n = len(inputs)
    found = {}
    for wanted in itertools.product((True, False), repeat=n):
        if not any(wanted) or (backend == "triton" and sum(wanted) not in (1, n)):  # the interpreter is slow
            continue
        leaves = [t.clone().requires_grad_(w) for t, w in zip(inputs, wanted)]
        call.run(backend, *leaves).backward(grad)
        assert [leaf.grad is not None for leaf in leaves] == list(wanted)
        for i, leaf in enumerate(leaves):
            if wanted[i]:
                expected = found.setdefault(i, leaf.grad)  # the first subset wants all
                torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-6)
