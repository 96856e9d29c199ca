"""Every registered op passes ``torch.library.opcheck`` on the device, every public function compiles as one graph."""

import pytest
import torch

import hpdm_kernels
from benchmarks.gpu.checks import needs_cuda
from benchmarks.shapes import ContextShape, PatchesShape, Pyramid, TilesShape
from hpdm_kernels import (
    average_tiles,
    cross_attention,
    extract_tiles,
    fuse_context,
    fuse_projected,
    project_sources,
    read_tokens,
    sample_context,
    sample_patches,
)
from hpdm_kernels.testing import value_and_grads

BACKENDS = ("torch", "triton")
SMALL = Pyramid("small", (4, 8, 12), (1, 2, 2), 3, (1, 2, 2), 64, width=48)
CONTEXT = ContextShape(SMALL, batch=2)
TILES = TilesShape(SMALL, batch=2)
PATCHES = PatchesShape(SMALL, 1, batch=2)


def registered_ops():
    """Names of the ops that the library registers, as ``cross_attention_fwd``."""
    assert hpdm_kernels.__name__
    names = torch._C._dispatch_get_all_op_names()
    return sorted({name.removeprefix("hpdm::").split(".")[0] for name in names if name.startswith("hpdm::")})


def attention_inputs(generator, device):
    """Queries, keys and values as the modules have them: views, not contiguous."""
    return [torch.randn(2, n, 3, 16, generator=generator).to(device).transpose(1, 2) for n in (40, 70, 70)]


def context_inputs(generator, device):
    """``x``, weight, bias and sources; what is no tensor with a gradient."""
    sources, boxes, box = CONTEXT.make(generator, device)
    d = CONTEXT.width
    shapes = ((CONTEXT.batch, CONTEXT.tokens, d), (d, 2 * d + 3), (d,))
    x, weight, bias = (torch.randn(size, generator=generator).to(device) for size in shapes)
    return (x, weight / d**0.5, bias, *sources), (boxes, box)


def arguments(op, backend, generator, device):
    """Of ``op``, small; inputs of forward ops want gradients."""

    def want(*tensors):
        return [t.detach().requires_grad_(not op.endswith("_bwd")) for t in tensors]

    if op.startswith("cross_attention"):
        q, k, v = want(*attention_inputs(generator, device))
        mask = (torch.rand(2, 70, generator=generator) < 0.5).to(device)
        if op.endswith("fwd"):
            return (q, k, v, 0.25, "ieee", mask)
        out, lse = torch.ops.hpdm.cross_attention_fwd(q, k, v, 0.25, "ieee", mask)
        return (torch.randn_like(out), q, k, v, out, lse, 0.25, "ieee", mask)
    if op.startswith("read_tokens"):
        q, _, _ = attention_inputs(generator, device)
        sizes = ((2 * 3 * 16, 12), (2, 70, 12), (2, 9, 12))
        q, weight, *tokens = want(q, *(torch.randn(size, generator=generator).to(device) for size in sizes))
        rest = ((torch.rand(2, 79, generator=generator) < 0.5).to(device), 0.25, 30, "ieee", backend)
        if op.endswith("fwd"):
            return (q, tokens, weight, *rest)
        out, lse = torch.ops.hpdm.read_tokens_fwd(q, tokens, weight, *rest)
        return (torch.randn_like(out), q, tokens, weight, out, lse, *rest)
    if op.startswith(("sample_context", "fuse_context")):
        (x, weight, bias, *sources), (boxes, box) = context_inputs(generator, device)
        x, weight, bias, *sources = want(x, weight, bias, *sources)
        grids, bounds = ([n for g in triples for n in g] for triples in (CONTEXT.source_grids, CONTEXT.footprints))
        tail = (None, grids, list(CONTEXT.grid), bounds)
        if op.startswith("sample"):
            shared = (sources, list(boxes), box, *tail)
            return (*shared, backend) if op.endswith("fwd") else (torch.randn_like(x), *shared, [True, False], backend)
        shared = (x, sources, list(boxes), box, weight, bias, *tail)
        if op.endswith("fwd"):
            return (*shared, False, "ieee", backend)
        return (torch.randn_like(x), *shared, [True, True, True, False, True], False, "ieee", backend)
    if op.startswith("project_source"):
        (_, weight, _, source, *_), _ = context_inputs(generator, device)
        source, weight = want(source, weight)
        if op.endswith("fwd"):
            return (source, weight, "ieee", backend)
        return (torch.randn_like(source), source, weight, [True, True], "ieee", backend)
    if op in ("add_tiles", "step_tiles"):
        tiles, video = TILES.make(generator, device)
        if op == "add_tiles":
            return (torch.zeros_like(video), tiles[:, :3].clone(), TILES.origins(), 0, backend)
        return (torch.randn_like(video), TILES.origins(), list(TILES.tile), video.dtype, video, 0.3, 0.7, backend)
    if op.endswith("_tiles"):
        tiles, video = want(*TILES.make(generator, device))
        if op == "extract_tiles":
            return (video, TILES.origins(), list(TILES.tile), False, 1.0, backend)
        return (tiles, TILES.origins(), list(TILES.size), video, 0.3, 0.7, True, backend)
    if op.startswith("sample_patches"):
        video, box = PATCHES.make(generator, device)
        if op.endswith("fwd"):
            return (*want(video), box, list(SMALL.patch), backend)
        grad = torch.randn(2, 3, *SMALL.patch, generator=generator).to(device)
        return (grad.requires_grad_(), box, list(PATCHES.size), backend)
    raise LookupError(f"no arguments for the registered op {op!r}: add them here")


def cases():
    """Each op with each of its backends; the attention ops are Triton's alone."""
    return [
        (op, backend) for op in registered_ops() for backend in BACKENDS if "attention" not in op or backend != "torch"
    ]


@needs_cuda
@pytest.mark.parametrize(("op", "backend"), cases(), ids=str)
def test_opcheck(device, generator, op, backend):
    torch.library.opcheck(getattr(torch.ops.hpdm, op).default, arguments(op, backend, generator, device))


def public_functions(backend, generator, device):
    """Name -> a function of tensors that uses one public function between other operations, and its inputs."""
    q, k, v = attention_inputs(generator, device)
    (x, weight, bias, *sources), (boxes, box) = context_inputs(generator, device)
    grids = {"source_grids": CONTEXT.source_grids, "grid": CONTEXT.grid, "footprints": CONTEXT.footprints}
    tiles, video = TILES.make(generator, device)
    clip, patch_box = PATCHES.make(generator, device)
    return {
        "cross_attention": (lambda q, k, v: cross_attention(q * 2, k, v, backend=backend).sin(), (q, k, v)),
        "sample_context": (
            lambda *s: sample_context([t * 2 for t in s], boxes, box, **grids, backend=backend).sin(),
            tuple(sources),
        ),
        "fuse_context": (
            lambda x, w, b, *s: fuse_context(x * 2, s, boxes, box, w, b, **grids, backend=backend).sin(),
            (x, weight, bias, *sources),
        ),
        "fuse_projected": (
            lambda x, w, b, *s: fuse_projected(
                x * 2, project_sources(s, w, backend=backend), boxes, box, w, b, **grids, backend=backend
            ).sin(),
            (x, weight, bias, *sources),
        ),
        "read_tokens": (
            lambda q, t, w: read_tokens(q * 2, t, w, backend=backend).sin(),
            (q, x.detach(), torch.randn(2 * 3 * 16, CONTEXT.width, generator=generator).to(device)),
        ),
        "average_tiles": (
            lambda t, x: average_tiles(t * 2, origins, TILES.size, x=x, alpha=0.3, beta=0.7, backend=backend).sin(),
            (tiles, video),
        ),
        "extract_tiles": (lambda v: extract_tiles(v * 2, origins, TILES.tile, backend=backend).sin(), (video,)),
        "sample_patches": (lambda v: sample_patches(v * 2, patch_box, SMALL.patch, backend=backend).sin(), (clip,)),
    }


origins = TILES.origins()
PUBLIC = (
    "cross_attention", "read_tokens", "sample_context", "fuse_context", "fuse_projected", "average_tiles",
    "extract_tiles", "sample_patches",
)  # fmt: skip


@needs_cuda
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PUBLIC)
def test_compiles_as_one_graph(device, generator, name, backend):
    fn, inputs = public_functions(backend, generator, device)[name]
    with torch.no_grad():
        grad = torch.randn_like(fn(*inputs))
    expected = value_and_grads(fn, inputs, grad)
    actual = value_and_grads(torch.compile(fn, fullgraph=True), inputs, grad)
    # The compiler fuses the operations around the op, which may round once more or less.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
