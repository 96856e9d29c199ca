"""RIN's three attentions: latents read tokens, tokens read latents, latents read latents. Also the read with hidden
tokens, and the read including its projection.

Peers are PyTorch's fused attention with its own choice of backend, and on CUDA each of its backends by name.
FlashAttention and cuDNN do not support fp32: their rows say so. On the CPU only the smallest pyramid runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from benchmarks import peers, shapes
from hpdm_kernels import cross_attention, read_tokens, reference

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
    # Enough samples to fill a GPU without splitting the loop over the keys.
    *((shapes.AttentionShape(shapes.UCF_M, reads, batch=16) for reads in (True, False)) if CUDA else ()),
)
FUSED = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)

# Budgets are multiples of the error of the plain formula in full fp32. Products with 11 bits (TF32) err up to 2^13
# times as much as products with 24 bits. Three TF32 passes recover all but a few bits, in our kernels and in PyTorch's
# memory-efficient one.
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
        # For fp32 on CUDA, PyTorch has only the memory-efficient backend, which always takes three TF32 passes.
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


READS = tuple(shapes.AttentionShape(pyramid, True, batch=2) for pyramid in PYRAMIDS)


@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("shape", READS, ids=str)
def test_key_mask(compare, backends, device, generator, shape, direction):
    """A quarter of the keys are hidden, as for texts of different lengths."""
    q, k, v = shape.make(generator, device)
    mask = (torch.rand(shape.batch, shape.keys, generator=generator) < 0.75).to(device)
    compare(
        {
            "reference (plain softmax)": lambda q, k, v: reference.cross_attention(q, k, v, q.shape[-1] ** -0.5, mask),
            "SDPA": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask[:, None, None]),
            **{
                f"hpdm {backend}": lambda q, k, v, backend=backend: cross_attention(
                    q, k, v, key_mask=mask, backend=backend, precision="ieee"
                )
                for backend in backends
            },
        },
        inputs=(q, k, v),
        group="cross_attention with a mask",
        shape=str(shape),
        direction=direction,
        reference="reference (plain softmax)",
        peers=["SDPA"],
        budgets={"SDPA": THREE_TF32, "hpdm torch": THREE_TF32} if CUDA else {},
        arithmetic=dict.fromkeys(("SDPA", "hpdm torch"), "tf32x3") if CUDA else {},
        bytes=shape.bytes(direction),
        flops=shape.flops(direction),
    )


@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("shape", READS, ids=str)
def test_read_tokens(compare, backends, device, generator, shape, direction):
    """The peers save keys and values, or recompute them together with the attention."""
    width, both = shape.pyramid.width, 2 * shape.heads * shape.head_dim
    q, _, _ = shape.make(generator, device)
    tokens = torch.randn(shape.batch, shape.keys, width, generator=generator).to(device)
    weight = (torch.randn(both, width, generator=generator) / width**0.5).to(device)

    def projected(q: Tensor, tokens: Tensor, weight: Tensor) -> Tensor:
        k, v = F.linear(tokens, weight).unflatten(-1, (2, shape.heads, -1)).permute(2, 0, 3, 1, 4)
        return peers.sdpa(q, k, v)

    def recomputed(q: Tensor, tokens: Tensor, weight: Tensor) -> Tensor:
        return checkpoint(projected, q, tokens, weight, use_reentrant=False, preserve_rng_state=False)

    def ours(backend: str, recompute: bool | None = None) -> Callable[..., Tensor]:
        return lambda q, tokens, weight: read_tokens(
            q, tokens, weight, recompute=recompute, backend=backend, precision="ieee"
        )

    fused = ("projection, SDPA", "projection, SDPA, checkpoint", "hpdm torch", "hpdm torch, recompute")
    product = 2 * tokens[..., 0].numel() * width * both
    ends = 2 * q.numel() + tokens.numel() + weight.numel()
    compare(
        {
            "reference (projection, plain softmax)": ours("reference"),
            fused[0]: projected,
            fused[1]: recomputed,
            **{f"hpdm {backend}": ours(backend) for backend in backends},
            **{f"hpdm {backend}, recompute": ours(backend, recompute=True) for backend in backends},
        },
        inputs=(q, tokens, weight),
        group="read_tokens",
        shape=str(shape),
        direction=direction,
        reference="reference (projection, plain softmax)",
        peers=list(fused[:2]),
        budgets=dict.fromkeys(fused, THREE_TF32) if CUDA else {},
        arithmetic=dict.fromkeys(fused[:2], "tf32x3") if CUDA else {},
        bytes=ends * tokens.itemsize * (3 if direction == "fwd+bwd" else 1),
        flops=shape.flops(direction) + product * (3 if direction == "fwd+bwd" else 1),
    )
