"""The ops on rows at the sizes of HPDM-M: tokens ``[1, 4096, 1024]``, latents ``[3, 768, 512]``, hidden layers.

The peers are PyTorch's own layers one after the other, and the same under ``torch.compile``, which fuses them into
loops of its own. Liger's kernels and Apex have layer norms with one affine map for all samples, which cannot take a
modulation per sample, and no gated residual.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hpdm_kernels import bias_gelu, gated_residual, modulated_norm

TOKENS, LATENTS = (1, 4096, 1024), (3, 768, 512)
DIRECTIONS = ["fwd", "fwd+bwd"]
# On a CPU the compiled peer adds the rows of a gradient one after the other, in fp32, where PyTorch adds them in pairs:
# over 4096 rows its error was up to fourteen times as large.
BUDGETS = {"torch.compile": 32.0}


def name(shape):
    return "x".join(map(str, shape))


def eager_norm(x: Tensor, shift: Tensor, scale: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Both results in one tensor's place: their sum, of which each gets the gradient."""
    y = torch.addcmul(x, gate[:, None], branch)
    return y + torch.addcmul(shift[:, None], F.layer_norm(y, y.shape[2:]), 1 + scale[:, None])


def eager_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return torch.addcmul(x, gate[:, None], branch)


def eager_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate="tanh")


def contenders(eager, ours, backends):
    return {
        "PyTorch": eager,
        "torch.compile": torch.compile(eager),
        **{f"hpdm {backend}": ours(backend) for backend in backends},
    }


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", [TOKENS, LATENTS], ids=name)
def test_modulated_norm(compare, backends, device, generator, shape, direction):
    vector = (shape[0], shape[2])
    inputs = [torch.randn(size, generator=generator).to(device) for size in (shape, vector, vector, shape, vector)]

    def ours(backend):
        return lambda *tensors: torch.add(*modulated_norm(*tensors, backend=backend))

    # Forward x and the branch are read, y and the norm written, and both read for the sum that is written; backward
    # the gradient, y and the branch are read, and two gradients written.
    passes = 7 + (6 if direction == "fwd+bwd" else 0)
    compare(
        contenders(eager_norm, ours, backends), inputs=inputs, group="modulated_norm after a gated residual",
        shape=name(shape), direction=direction, reference="PyTorch", peers=["torch.compile"],
        budgets=BUDGETS,
        bytes=passes * inputs[0].nbytes,
    )  # fmt: skip


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", [TOKENS, LATENTS], ids=name)
def test_gated_residual(compare, backends, device, generator, shape, direction):
    inputs = [torch.randn(size, generator=generator).to(device) for size in (shape, shape, (shape[0], shape[2]))]
    compare(
        contenders(eager_residual, lambda b: lambda *t: gated_residual(*t, backend=b), backends), inputs=inputs,
        group="gated_residual", shape=name(shape), direction=direction, reference="PyTorch", peers=["torch.compile"],
        budgets=BUDGETS,
        bytes=(3 + (3 if direction == "fwd+bwd" else 0)) * inputs[0].nbytes,
    )  # fmt: skip


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", [(1, 4096, 2048), (3, 768, 2048)], ids=name)
def test_bias_gelu(compare, backends, device, generator, shape, direction):
    inputs = [torch.randn(size, generator=generator).to(device) for size in (shape, shape[2:])]
    compare(
        contenders(eager_gelu, lambda b: lambda *t: bias_gelu(*t, backend=b), backends), inputs=inputs,
        group="bias_gelu", shape=name(shape), direction=direction, reference="PyTorch", peers=["torch.compile"],
        budgets=BUDGETS,
        bytes=(2 + (3 if direction == "fwd+bwd" else 0)) * inputs[0].nbytes,
    )  # fmt: skip
