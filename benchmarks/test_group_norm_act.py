"""Group normalization with what follows it: in the U-Net a modulation and SiLU, in the autoencoder SiLU and padding.

The U-Net's shape is that of LVDM's first level, 4 latent frames of 32x32 with 256 channels; the autoencoder's is a
clip of 16 frames with the 64 channels of the decoder's last stage, at a quarter of its height and width. The peers are
PyTorch's own layers one after the other on channels-last tensors, as the models called them before, and the same under
``torch.compile``. Liger's and Apex's group norms take neither a modulation per frame nor a padded result.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hpdm_kernels import group_norm_act

UNET, DECODER, GROUPS = (1, 4, 32, 32, 256), (1, 16, 64, 64, 64), 32
PAD = ((1, 1), (1, 1), (1, 1))
DIRECTIONS = ["fwd", "fwd+bwd"]
# On a CPU PyTorch's variance of channels-last tensors is a difference of squares, and its gradients of vectors are
# sums one after the other; ours are compared with its error.
BUDGETS = {"torch.compile": 32.0}


def name(shape):
    return "x".join(map(str, shape))


def eager(x: Tensor, weight: Tensor, bias: Tensor, *modulation: Tensor) -> Tensor:
    images = x.flatten(0, 1).permute(0, 3, 1, 2)
    out = F.group_norm(images, GROUPS, weight, bias).permute(0, 2, 3, 1).reshape(x.shape)
    if modulation:
        scale, shift = (t[:, :, None, None] for t in modulation)
        return F.silu(torch.addcmul(shift, out, 1 + scale))
    padded = F.pad(F.silu(out).movedim(-1, 1), (1, 1, 1, 1, 1, 1), mode="replicate")
    return padded.movedim(1, -1)


def contenders(backends):
    def ours(backend):
        return lambda *tensors: group_norm_act(
            *tensors[:3], GROUPS, *tensors[3:], pad=None if len(tensors) == 5 else PAD, backend=backend
        )

    return {
        "PyTorch": eager,
        "torch.compile": torch.compile(eager),
        **{f"hpdm {backend}": ours(backend) for backend in backends},
    }


def run(compare, backends, generator, device, shape, direction, group, vectors):
    sizes = (shape, shape[-1:], shape[-1:], *vectors)
    inputs = [torch.randn(size, generator=generator).to(device) for size in sizes]
    with torch.no_grad():
        result = eager(*inputs).nbytes
    # Forward x is read twice and the result written; backward the gradient and x are read twice, and one written.
    moved = 2 * inputs[0].nbytes + result
    if direction == "fwd+bwd":
        moved += 3 * inputs[0].nbytes + 2 * result
    compare(
        contenders(backends), inputs=inputs, group=group, shape=name(shape), direction=direction, reference="PyTorch",
        peers=["torch.compile"], budgets=BUDGETS, bytes=moved,
    )  # fmt: skip


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_modulated(compare, backends, device, generator, direction):
    vectors = [(UNET[0], UNET[1], UNET[4])] * 2
    run(compare, backends, generator, device, UNET, direction, "group_norm_act, modulated", vectors)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_padded(compare, backends, device, generator, direction):
    run(compare, backends, generator, device, DECODER, direction, "group_norm_act with repeated edges", ())
