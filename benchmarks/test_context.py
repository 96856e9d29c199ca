"""Context sampling (paper eq. 7) and fusion (eq. 9): the last level of a pyramid reads all levels before it.

Peers: the paper's formula with ``F.grid_sample``, one small matrix per axis, a weighted gather of 8 corners, and the
matrices through ``torch.compile``. Fusion adds concatenation and projection to each. ``hpdm`` appears twice: with
footprints read from the boxes (on the CPU; whole sources on CUDA), and with the footprints that the pyramid implies.
Products in TF32 are rows of their own: on CUDA also those of the formula, the strongest peer and the torch backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from benchmarks import peers, shapes
from hpdm_kernels import fuse_context, reference, sample_context

REFERENCE = "reference (grid_sample)"
CUDA = torch.cuda.is_available()
# With one TF32 pass a product errs up to 2^13 times as much as the plain one in full fp32, with three a few times.
PRECISIONS = {"ieee": 2.0, "tf32x3": 16.0, "tf32": 2.0**13}


def of_pyramid(shape: shapes.ContextShape, backend: str) -> dict[str, Sequence[Sequence[int]] | None]:
    """Contenders' names and footprints: from the pyramid always, read from the boxes where that is possible."""
    hinted = {f"hpdm {backend}, footprints given": shape.footprints}
    return hinted if CUDA else {f"hpdm {backend}": None, **hinted}


@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("shape", shapes.CONTEXT, ids=str)
def test_sample_context(compare, backends, device, generator, shape, direction):
    sources, source_boxes, box = shape.make(generator, device)
    rest = (source_boxes, box, shape.source_grids, shape.grid)

    def by(fn: Callable[..., Tensor], **options) -> Callable[..., Tensor]:
        return lambda *s: fn(s, *rest, **options)

    contenders = {
        REFERENCE: by(reference.sample_context),
        "separable matmul": by(peers.separable_context),
        "embedding_bag": by(peers.embedding_bag_context),
        "separable matmul, compiled": by(peers.compiled(peers.separable_context)),
    }
    peer_names = list(contenders)[1:]
    for backend in backends:
        for name, footprints in of_pyramid(shape, backend).items():
            contenders[name] = by(sample_context, footprints=footprints, backend=backend)
    compare(
        contenders,
        inputs=sources,
        group="sample_context",
        shape=str(shape),
        direction=direction,
        reference=REFERENCE,
        peers=peer_names,
        bytes=shape.bytes(direction),
    )


@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("shape", shapes.CONTEXT, ids=str)
def test_fuse_context(compare, backends, device, generator, shape, direction):
    d = shape.width
    sources, source_boxes, box = shape.make(generator, device)
    x = torch.randn(shape.batch, shape.tokens, d, generator=generator).to(device)
    weight = (torch.randn(d, 2 * d + 3, generator=generator) / math.sqrt(2 * d)).to(device)
    bias = torch.randn(d, generator=generator).to(device)

    def by(fn: Callable[..., Tensor], **options) -> Callable[..., Tensor]:
        return lambda x, w, b, *s: fn(x, s, source_boxes, box, w, b, shape.source_grids, shape.grid, **options)

    contenders = {
        REFERENCE: by(reference.fuse_context),
        "separable matmul": by(peers.separable_fuse),
        "embedding_bag": by(peers.embedding_bag_fuse),
        "separable matmul, compiled": by(peers.compiled(peers.separable_fuse)),
    }
    if CUDA:
        contenders |= {f"{REFERENCE}, tf32": contenders[REFERENCE]}
        contenders |= {"separable matmul, tf32": contenders["separable matmul"]}
    peer_names = list(contenders)[1:]
    # The compiler sums the bias gradient over tokens one after the other, PyTorch in a tree.
    budgets = {"separable matmul, compiled": 16.0}
    for backend in backends:
        for name, footprints in of_pyramid(shape, backend).items():
            for precision, budget in PRECISIONS.items() if backend == "triton" else [(None, 2.0)]:
                full = f"{name}, {precision}" if precision else name
                contenders[full] = by(fuse_context, footprints=footprints, precision=precision, backend=backend)
                budgets[full] = budget
    if CUDA:
        name = "hpdm torch, footprints given"
        contenders |= {f"{name}, tf32": contenders[name]}
    arithmetic = {name: kind for name in contenders for kind in ("tf32x3", "tf32") if name.endswith(f", {kind}")}
    budgets |= {name: PRECISIONS[kind] for name, kind in arithmetic.items()}
    # What the formula costs: the whole concatenated product, three times with its gradients.
    product = 2 * shape.batch * shape.tokens * (2 * d + 3) * d
    passes = 3 if direction == "fwd+bwd" else 1
    compare(
        contenders,
        inputs=(x, weight, bias, *sources),
        group="fuse_context",
        shape=str(shape),
        direction=direction,
        reference=REFERENCE,
        peers=peer_names,
        budgets=budgets,
        arithmetic=arithmetic,
        bytes=shape.bytes(direction) + passes * 4 * (x.numel() + weight.numel()),
        flops=passes * product,
    )
