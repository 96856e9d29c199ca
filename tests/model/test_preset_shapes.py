"""The kernels take the shapes of every preset: whole forward and backward passes on tensors without data."""

import pytest
import torch

from hpdm import systems
from hpdm.planning.ledger import fake_fp32
from hpdm_kernels.dry_run import launches_left_out

SYSTEM = systems.get("patch")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("preset", SYSTEM.presets)
def test_forward_and_backward(preset, precision):
    config = SYSTEM.presets[preset]()
    with fake_fp32(), launches_left_out():
        model = SYSTEM.build(config, "triton")
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = model(**SYSTEM.example_inputs(config, 1))
        out.sum().backward()
        assert out.shape == (1, config.levels, config.channels, *config.patch)
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
