"""RIN's three attentions: latents read tokens, tokens read latents, latents read latents.

Peers are PyTorch's fused attention as it chooses, and on CUDA each of its backends by name. FlashAttention and cuDNN
take no fp32: their rows say so. On the CPU only the smallest pyramid runs, in about a minute on one core.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import peers, shapes
from hpdm_kernels import cross_attention, reference

CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class LatentShape(shapes.AttentionShape):
    """Self-attention of the latents."""

    reads: bool = True

    def __str__(self) -> str:
        return (
            f"{self.pyramid.name} latents, {self.queries} queries, {self.keys} keys, {self.heads} heads, B={self.batch}"
        )

    @property
    def keys(self) -> int:
        return self.queries


PYRAMIDS = (shapes.UCF_S, shapes.UCF_M, shapes.UCF_L, shapes.T2V) if CUDA else (shapes.UCF_S,)
SHAPES = (
    *(shape for shape in shapes.ATTENTION if CUDA or shape.pyramid in PYRAMIDS),
    *(LatentShape(pyramid) for pyramid in PYRAMIDS),
    # Enough samples to fill a GPU without splitting the walk over the keys.
    *((shapes.AttentionShape(shapes.UCF_M, reads, batch=16) for reads in (True, False)) if CUDA else ()),
)
FUSED = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)

# The oracle's yardstick is the plain formula in full fp32. Products with 11 bits (TF32) err up to 2^13 times as much as
# those with 24; three of them make up for all but a few bits, in our kernels and in PyTorch's memory-efficient one.
ONE_TF32, THREE_TF32 = 2.0**13, 16.0


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference.cross_attention(q, k, v, q.shape[-1] ** -0.5)


def sdpa_by(backend: SDPBackend) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return peers.sdpa(q, k, v)

    return call


def ours(backend: str, precision: str | None = None) -> Callable[..., Tensor]:
    return lambda q, k, v: cross_attention(q, k, v, backend=backend, precision=precision)


@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if CUDA else [torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_attention(compare, backends, device, generator, shape, dtype, direction):
    contenders = {"reference (plain softmax)": plain, "SDPA": peers.sdpa}
    budgets = {"SDPA": THREE_TF32} if CUDA else {}
    arithmetic = {}
    if CUDA:
        for fused in FUSED:
            name = f"SDPA {fused.name.removesuffix('_ATTENTION').lower()}"
            contenders[name], budgets[name] = sdpa_by(fused), THREE_TF32
    if CUDA and dtype is torch.float32:
        # What takes fp32 at all there is the memory-efficient backend: always three TF32 passes.
        arithmetic = dict.fromkeys((*list(contenders)[1:], "hpdm torch"), "tf32x3")
        name = "reference (plain softmax), tf32"
        contenders[name], budgets[name], arithmetic[name] = plain, ONE_TF32, "tf32"
    peer_names = list(contenders)[1:]
    for backend in backends:
        if backend == "triton" and dtype is torch.float32:
            for precision, budget in (("ieee", 2.0), ("tf32x3", THREE_TF32), ("tf32", ONE_TF32)):
                name = f"hpdm triton {precision}"
                contenders[name], budgets[name], arithmetic[name] = ours(backend, precision), budget, precision
        else:
            contenders[f"hpdm {backend}"] = ours(backend)
            budgets[f"hpdm {backend}"] = budgets.get("SDPA", 2.0) if backend == "torch" else 2.0
    compare(
        contenders,
        inputs=shape.make(generator, device, dtype),
        group=f"cross_attention {str(dtype).removeprefix('torch.')}",
        shape=str(shape),
        direction=direction,
        reference="reference (plain softmax)",
        peers=peer_names,
        budgets=budgets,
        arithmetic=arithmetic,
        bytes=shape.bytes(direction, dtype.itemsize),
        flops=shape.flops(direction),
    )
