"""Context sampling (paper eq. 7) and fusion (eq. 9): the last level of a pyramid reads all levels before it.

In training each patch has its own sources. In tiled sampling many tiles read the same cached levels, and the product
with the context columns can be computed once for all of them.

Peers: the paper's formula with ``F.grid_sample``, one small matrix per axis, a weighted gather of 8 corners, and the
matrices with ``torch.compile``. Fusion adds concatenation and projection to each. ``hpdm`` is measured with the
footprints that follow from the pyramid and, on the CPU, with footprints computed from the boxes. Products in TF32 have
separate rows, on CUDA also for the formula, the strongest peer and the torch backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from benchmarks import harness, peers, shapes
from hpdm_kernels import fuse_context, fuse_projected, project_sources, reference, sample_context
from hpdm_kernels.boxes import token_coordinates

REFERENCE = "reference (grid_sample)"
CUDA = torch.cuda.is_available()
# Allowed error as a multiple of the plain implementation's: one TF32 pass loses 13 bits, three passes almost none.
PRECISIONS = {"ieee": 2.0, "tf32x3": 16.0, "tf32": 2.0**13}


def footprint_options(shape: shapes.ContextShape, backend: str) -> dict[str, Sequence[Sequence[int]] | None]:
    """Footprints of our contenders by name: the pyramid's, and on the CPU also ``None``, computed from the boxes."""
    from_pyramid = {f"hpdm {backend}, footprints given": shape.footprints}
    return from_pyramid if CUDA else {f"hpdm {backend}": None, **from_pyramid}


@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("shape", shapes.CONTEXT, ids=str)
def test_sample_context(compare, backends, device, generator, shape, direction):
    sources, source_boxes, box = shape.make(generator, device)
    geometry = (source_boxes, box, shape.source_grids, shape.grid)

    def by(fn: Callable[..., Tensor], **options) -> Callable[..., Tensor]:
        return lambda *s: fn(s, *geometry, **options)

    contenders = {
        REFERENCE: by(reference.sample_context),
        "separable matmul": by(peers.separable_context),
        "embedding_bag": by(peers.embedding_bag_context),
        "separable matmul, compiled": by(peers.compiled(peers.separable_context)),
    }
    peer_names = list(contenders)[1:]
    for backend in backends:
        for name, footprints in footprint_options(shape, backend).items():
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


FUSIONS = [(shape, direction) for shape in shapes.CONTEXT for direction in ("fwd", "fwd+bwd")]
FOUR = shapes.ContextShape(shapes.UCF_S, batch=4)


@pytest.mark.parametrize(("shape", "direction"), [*FUSIONS, (FOUR, "fwd+bwd")], ids=str)
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
    # The compiler sums the bias gradient sequentially over tokens; PyTorch sums in a tree, which rounds far less.
    budgets = {"separable matmul, compiled": 64.0}
    for backend in backends:
        for name, footprints in footprint_options(shape, backend).items():
            for precision, budget in PRECISIONS.items() if backend == "triton" else [(None, 2.0)]:
                full = f"{name}, {precision}" if precision else name
                contenders[full] = by(fuse_context, footprints=footprints, precision=precision, backend=backend)
                budgets[full] = budget
    if CUDA:
        name = "hpdm torch, footprints given"
        contenders |= {f"{name}, tf32": contenders[name]}
    arithmetic = {name: kind for name in contenders for kind in ("tf32x3", "tf32") if name.endswith(f", {kind}")}
    budgets |= {name: PRECISIONS[kind] for name, kind in arithmetic.items()}
    # FLOPs of the formula: the product of the whole concatenation, three times as much with gradients.
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


@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("shape", [shapes.CONTEXT[0], FOUR], ids=str)
def test_fuse_context_against_its_products(record, device, generator, shape, direction):
    """Against the products that no implementation avoids: x and the footprints, each times its half of the weight."""
    d = shape.width
    sources, source_boxes, box = shape.make(generator, device)
    touched = shape.batch * sum(map(math.prod, shape.footprints))
    x, tokens = (torch.randn(n, d, generator=generator).to(device) for n in (shape.batch * shape.tokens, touched))
    weight = (torch.randn(d, 2 * d + 3, generator=generator) / math.sqrt(2 * d)).to(device)
    bias = torch.randn(d, generator=generator).to(device)
    backward = harness.check_direction(direction)
    grads, of_x, of_context = torch.randn_like(x), weight[:, :d], weight[:, d : 2 * d]

    def products() -> None:
        for rows, grad, half in ((x, grads, of_x), (tokens, grads[:touched], of_context)):
            rows @ half.t()
            if backward:
                grad @ half
                grad.t() @ rows

    def fuse(x: Tensor, weight: Tensor, bias: Tensor, *sources: Tensor) -> Tensor:
        grids = (shape.source_grids, shape.grid)
        return fuse_context(x, sources, source_boxes, box, weight, bias, *grids, footprints=shape.footprints)

    leaves = [t.clone().requires_grad_(backward) for t in (x.view(shape.batch, -1, d), weight, bias, *sources)]
    with torch.set_grad_enabled(backward):
        grad = grads.view(leaves[0].shape) if backward else None
        calls = {"the products alone": products, "hpdm": harness.forward_and_backward(fuse, leaves, grad)}
        timers = {name: harness.Timer(device) for name in calls}
        for _ in range(12):
            for name, call in calls.items():
                timers[name].sample(call)
    for name, timer in timers.items():
        record(
            "fuse_context against its products", str(shape), name, direction, timer.seconds()[2:],
            reference=name != "hpdm", arithmetic=harness.arithmetic_of(torch.float32),
            flops=2 * (len(x) + touched) * d * d * (3 if backward else 1),
        )  # fmt: skip


@pytest.mark.parametrize("shape", shapes.TILED_CONTEXT, ids=str)
def test_fuse_context_of_cached_levels(compare, backends, device, generator, shape):
    d = shape.width
    sources, source_boxes, box, index = shape.make_tiles(generator, device)
    x = torch.randn(shape.batch, shape.tokens, d, generator=generator).to(device)
    weight = (torch.randn(d, 2 * d + 3, generator=generator) / math.sqrt(2 * d)).to(device)
    bias = torch.randn(d, generator=generator).to(device)
    grids = (shape.source_grids, shape.grid)
    cached = project_sources(sources, weight)

    def formula(x: Tensor) -> Tensor:
        wide = [[t.to(x.dtype) for t in tensors] for tensors in (sources, (weight, bias))]
        return reference.fuse_context(x, wide[0], source_boxes, box, *wide[1], *grids, index)

    def peer(context: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        """Projects once, too, then samples with ``context`` the rows that each tile reads."""

        def call(x: Tensor) -> Tensor:
            rows = [(s[index[:, k]], b[index[:, k]]) for k, (s, b) in enumerate(zip(cached, source_boxes))]
            picked, boxes = zip(*rows)
            located = torch.cat((x, token_coordinates(box, shape.grid, x.dtype)), dim=2)
            columns = torch.cat((weight[:, :d], weight[:, 2 * d :]), dim=1)
            return torch.nn.functional.linear(located, columns, bias) + context(picked, boxes, box, *grids)

        return call

    contenders = {
        REFERENCE: formula,
        "separable matmul, projected once": peer(peers.separable_context),
        "embedding_bag, projected once": peer(peers.embedding_bag_context),
        "separable matmul, projected once, compiled": peer(peers.compiled(peers.separable_context)),
    }
    peer_names = list(contenders)[1:]
    for backend in backends:
        options = {"source_index": index, "footprints": shape.footprints, "backend": backend}

        def at_once(x: Tensor, options: dict = options) -> Tensor:
            return fuse_context(x, sources, source_boxes, box, weight, bias, *grids, **options)

        def in_two(x: Tensor, options: dict = options) -> Tensor:
            return fuse_projected(x, cached, source_boxes, box, weight, bias, *grids, **options)

        contenders[f"hpdm {backend}, projected for each tile"] = at_once
        contenders[f"hpdm {backend}, projected once"] = in_two
    compare(
        contenders,
        inputs=(x,),
        group="fuse_context, cached levels",
        shape=str(shape),
        direction="fwd",
        reference=REFERENCE,
        peers=peer_names,
        # Only the product of x. Bytes: the touched parts of the caches, x, its weight columns and the output, once.
        bytes=shape.bytes() + 4 * (x.numel() + d * d),
        flops=2 * x.numel() * d,
    )
