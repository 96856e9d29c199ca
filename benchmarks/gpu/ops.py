"""Checks that registered ops pass ``torch.library.opcheck`` on the device and public functions compile as one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import Case
from benchmarks.shapes import ContextShape, PatchesShape, Pyramid, TilesShape
from hpdm_kernels import (
    average_tiles,
    bias_gelu,
    cross_attention,
    extract_tiles,
    fuse_context,
    fuse_projected,
    gated_residual,
    group_norm_act,
    modulated_norm,
    packed_attention,
    project_sources,
    read_tokens,
    sample_context,
    sample_patches,
    temporal_attention,
)
from hpdm_kernels.testing import steps, value_and_grads

BACKENDS = ("torch", "triton")
SMALL = Pyramid("small", (4, 8, 12), (1, 2, 2), 3, (1, 2, 2), 64, width=48)
CONTEXT = ContextShape(SMALL, batch=2)
TILES = TilesShape(SMALL, batch=2)
PATCHES = PatchesShape(SMALL, 1, batch=2)


ORIGINS = TILES.origins()
Arguments = tuple[Any, ...]


def registered_ops() -> list[str]:
    """Names of the ops that the library registers and that compute something, such as ``cross_attention_fwd``."""
    names = [name.removeprefix("hpdm::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("hpdm::")]
    # Tests register ops of their own; new_tile_sums gives memory without contents, which opcheck would compare.
    found = {name.split(".")[0] for name in names if not name.startswith("test_")}
    return sorted(found - {"new_tile_sums"})


def attention_inputs(generator: torch.Generator, device: torch.device) -> list[Tensor]:
    """Queries ``[2, 3, 40, 16]``, keys and values ``[2, 3, 70, 16]``: strided views, as in the modules."""
    return [torch.randn(2, n, 3, 16, generator=generator).to(device).transpose(1, 2) for n in (40, 70, 70)]


def context_inputs(generator: torch.Generator, device: torch.device) -> tuple[Arguments, Arguments]:
    """The differentiable inputs ``(x, weight, bias, *sources)``, and ``(source boxes, box)``."""
    sources, boxes, box = CONTEXT.make(generator, device)
    d = CONTEXT.width
    shapes = ((CONTEXT.batch, CONTEXT.tokens, d), (d, 2 * d + 3), (d,))
    x, weight, bias = (torch.randn(size, generator=generator).to(device) for size in shapes)
    return (x, weight / d**0.5, bias, *sources), (boxes, box)


def leaves(op: str, *tensors: Tensor) -> list[Tensor]:
    """``tensors`` as inputs of ``op``: they require gradients, unless it is a backward op."""
    return [t.detach().requires_grad_(not op.endswith("_bwd")) for t in tensors]


def attention_arguments(op: str, backend: str, generator: torch.Generator, device: torch.device) -> Arguments:
    q, k, v = leaves(op, *attention_inputs(generator, device))
    mask = (torch.rand(2, 70, generator=generator) < 0.5).to(device)
    if op.endswith("fwd"):
        return (q, k, v, 0.25, "ieee", mask)
    out, lse = torch.ops.hpdm.cross_attention_fwd(q, k, v, 0.25, "ieee", mask)
    return (torch.randn_like(out), q, k, v, out, lse, 0.25, "ieee", mask)


def packed_arguments(op: str, backend: str, generator: torch.Generator, device: torch.device) -> Arguments:
    q, k, v = attention_inputs(generator, device)
    q, packed = leaves(op, q, torch.stack([t.transpose(1, 2) for t in (k, v)], dim=2))
    mask = (torch.rand(2, 70, generator=generator) < 0.5).to(device)
    if op.endswith("fwd"):
        return (q, packed, 0.25, "ieee", mask)
    out, lse = torch.ops.hpdm.packed_attention_fwd(q, packed, 0.25, "ieee", mask)
    return (torch.randn_like(out), q, packed, out, lse, 0.25, "ieee", mask)


def read_arguments(op: str, backend: str, generator: torch.Generator, device: torch.device) -> Arguments:
    q, _, _ = attention_inputs(generator, device)
    sizes = ((2 * 3 * 16, 12), (2, 70, 12), (2, 9, 12))
    q, weight, *tokens = leaves(op, q, *(torch.randn(size, generator=generator).to(device) for size in sizes))
    settings = ((torch.rand(2, 79, generator=generator) < 0.5).to(device), 0.25, 30, "ieee", backend)
    if op.endswith("fwd"):
        return (q, tokens, weight, *settings)
    out, lse = torch.ops.hpdm.read_tokens_fwd(q, tokens, weight, *settings)
    return (torch.randn_like(out), q, tokens, weight, out, lse, *settings)


def context_arguments(op: str, backend: str, generator: torch.Generator, device: torch.device) -> Arguments:
    (x, weight, bias, *sources), (boxes, box) = context_inputs(generator, device)
    x, weight, bias, *sources = leaves(op, x, weight, bias, *sources)
    grids, bounds = ([n for g in triples for n in g] for triples in (CONTEXT.source_grids, CONTEXT.footprints))
    tail = (None, grids, list(CONTEXT.grid), bounds)
    if op.startswith("sample"):
        shared = (sources, list(boxes), box, *tail)
        if op.endswith("fwd"):
            return (*shared, backend)
        _, plan = torch.ops.hpdm.sample_context_fwd(*shared, backend)
        return (torch.randn_like(x), plan, *shared, [True, False], backend)
    shared = (x, sources, list(boxes), box, weight, bias, *tail)
    if op.endswith("fwd"):
        return (*shared, False, "ieee", backend)
    with torch.no_grad():
        _, plan = torch.ops.hpdm.fuse_context_fwd(*shared, False, "ieee", backend)
    return (torch.randn_like(x), plan, *shared, [True, True, True, False, True], False, "ieee", backend)


def project_arguments(op: str, backend: str, generator: torch.Generator, device: torch.device) -> Arguments:
    (_, weight, _, source, *_), _ = context_inputs(generator, device)
    source, weight = leaves(op, source, weight)
    if op.endswith("fwd"):
        return (source, weight, "ieee", backend)
    return (torch.randn_like(source), source, weight, [True, True], "ieee", backend)


def tile_arguments(op: str, backend: str, generator: torch.Generator, device: torch.device) -> Arguments:
    tiles, video = TILES.make(generator, device)
    weights = torch.rand(sum(TILES.tile), generator=generator) + 0.1
    if op == "add_tiles":
        return (torch.zeros_like(video), tiles[:, :3].clone(), ORIGINS, 0, weights, backend)
    if op == "step_tiles":
        return (torch.randn_like(video), ORIGINS, list(TILES.tile), video.dtype, video, 0.3, 0.7, True, backend)
    tiles, video = leaves(op, tiles, video)
    if op == "extract_tiles":
        return (video, ORIGINS, list(TILES.tile), True, 1.0, weights, backend)
    return (tiles, ORIGINS, list(TILES.size), video, 0.3, 0.7, True, weights, backend)


def patch_arguments(op: str, backend: str, generator: torch.Generator, device: torch.device) -> Arguments:
    video, box = PATCHES.make(generator, device)
    if op.endswith("fwd"):
        return (*leaves(op, video), box, list(SMALL.patch), backend)
    grad = torch.randn(2, 3, *SMALL.patch, generator=generator).to(device)
    return (grad.requires_grad_(), box, list(PATCHES.size), backend)


def row_arguments(op: str, backend: str, generator: torch.Generator, device: torch.device) -> Arguments:
    shape, vector = (2, 19, 24), (2, 24)
    tensors = [torch.randn(size, generator=generator).to(device) for size in (shape, shape, *[vector] * 3)]
    x, branch, gate, shift, scale = leaves(op, *tensors)
    if op.startswith("gated_residual"):
        return (x, branch, gate, backend)
    if op.startswith("bias_gelu"):
        grad = (torch.randn_like(x[0]),) if op.endswith("bwd") else ()
        return (*grad, *leaves(op, x[0], gate[0]), backend)
    if op == "modulated_norm_fwd":
        return (x, shift, scale, 1e-5, backend)
    if op == "residual_norm_fwd":
        return (x, branch, gate, shift, scale, 1e-5, backend)
    y, out, mean, rstd = torch.ops.hpdm.residual_norm_fwd(x, branch, gate, shift, scale, 1e-5, backend)
    return (torch.randn_like(y), torch.randn_like(out), y, mean, rstd, shift, scale, branch, gate, backend)


def group_arguments(op: str, backend: str, generator: torch.Generator, device: torch.device) -> Arguments:
    sizes = ((2, 3, 4, 5, 24), (24,), (24,), (2, 3, 24), (2, 3, 24))
    tensors = leaves(op, *(torch.randn(size, generator=generator).to(device) for size in sizes))
    settings = (6, True, True, [1, 0, 1, 1, 0, 2])
    if op.endswith("fwd"):
        return (*tensors, *settings, 1e-5, backend)
    out, mean, rstd = torch.ops.hpdm.group_norm_act_fwd(*tensors, *settings, 1e-5, backend)
    return (torch.randn_like(out), tensors[0], mean, rstd, *tensors[1:], *settings, backend)


def temporal_arguments(op: str, backend: str, generator: torch.Generator, device: torch.device) -> Arguments:
    shapes = ((2, 5, 19, 3 * 2 * 24), (7, 24), (7, 24))
    tensors = leaves(op, *(torch.randn(size, generator=generator).to(device) for size in shapes))
    if op.endswith("fwd"):
        return (*tensors, backend)
    out, weights = torch.ops.hpdm.temporal_attention_fwd(*tensors, backend)
    return (torch.randn_like(out), *tensors, weights, backend)


def step_arguments(op: str, backend: str, generator: torch.Generator, device: torch.device) -> Arguments:
    a = steps.copied(steps.draw(generator, averages=2, op="lamb_step"), lambda t: t.to(device))
    averages, moments = [t for average in a["averages"] for t in average], (a["exp_avgs"], a["exp_avg_sqs"])
    applied, adam = torch.tensor(True, device=device), (0.9, 0.999, 1e-6, 0.05)
    if op == "adamw_step":
        factors = (a["rates"], a["grad_scale"], applied, 0.01)
        return (a["params"], a["grads"], *moments, averages, a["steps"], *factors, *adam, backend)
    if op == "lamb_moments":
        return (a["params"], a["grads"], *moments, a["steps"], a["grad_scale"], applied, *adam, backend)
    trust = torch.rand(len(a["params"]), generator=generator).to(device)
    return (a["params"], *moments, averages, a["steps"] + 1, trust, a["rates"], applied, 0.01, *adam, backend)


ARGUMENTS = {
    "cross_attention": attention_arguments, "packed_attention": packed_arguments, "read_tokens": read_arguments,
    "sample_context": context_arguments, "fuse_context": context_arguments, "project_source": project_arguments,
    "sample_patches": patch_arguments, "add_tiles": tile_arguments, "step_tiles": tile_arguments,
    "extract_tiles": tile_arguments, "average_tiles": tile_arguments, "modulated_norm": row_arguments,
    "residual_norm": row_arguments, "gated_residual": row_arguments, "bias_gelu": row_arguments,
    "group_norm_act": group_arguments, "temporal_attention": temporal_arguments,
    "adamw_step": step_arguments, "lamb_moments": step_arguments, "lamb_apply": step_arguments,
}  # fmt: skip


def arguments(op: str, backend: str, generator: torch.Generator, device: torch.device) -> Arguments:
    """Small arguments for the registered op ``op``."""
    for family, make in ARGUMENTS.items():
        if op.startswith(family):
            return make(op, backend, generator, device)
    raise LookupError(f"op: got {op!r}, which has no arguments yet; add them to ARGUMENTS")


def ops_and_backends() -> list[tuple[str, str]]:
    """Each op with each of its backends; cross-attention has only Triton, PyTorch's own being the other."""
    only_triton = ("cross_attention", "packed_attention")
    return [(op, b) for op in registered_ops() for b in BACKENDS if not op.startswith(only_triton) or b != "torch"]


def opcheck(op: str, backend: str, device: torch.device, generator: torch.Generator) -> None:
    """PyTorch's own checks of a registered op: schema, fake tensors, autograd, AOT dispatch."""
    torch.library.opcheck(getattr(torch.ops.hpdm, op).default, arguments(op, backend, generator, device))


def public_functions(
    backend: str, generator: torch.Generator, device: torch.device
) -> dict[str, tuple[Callable[..., Tensor], Arguments]]:
    """By name: a function that uses one public function between other operations, and its inputs."""
    q, k, v = attention_inputs(generator, device)
    (x, weight, bias, *sources), (boxes, box) = context_inputs(generator, device)
    grids = {"source_grids": CONTEXT.source_grids, "grid": CONTEXT.grid, "footprints": CONTEXT.footprints}
    tiles, video = TILES.make(generator, device)
    clip, patch_box = PATCHES.make(generator, device)
    rows = [torch.randn(2, 19, 24, generator=generator).to(device) for _ in range(2)]
    vectors = [torch.randn(2, 24, generator=generator).to(device) for _ in range(3)]
    frames = torch.randn(2, 3, 4, 5, 24, generator=generator).to(device)
    return {
        "cross_attention": (lambda q, k, v: cross_attention(q * 2, k, v, backend=backend).sin(), (q, k, v)),
        "packed_attention": (
            lambda q, packed: packed_attention(q * 2, packed, backend=backend).sin(),
            (q, torch.stack([t.transpose(1, 2) for t in (k, v)], dim=2)),
        ),
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
            lambda q, t, w: read_tokens(q * 2, t, w, recompute=True, backend=backend).sin(),
            (q, x.detach(), torch.randn(2 * 3 * 16, CONTEXT.width, generator=generator).to(device)),
        ),
        "average_tiles": (
            lambda t, x: average_tiles(t * 2, ORIGINS, TILES.size, x=x, alpha=0.3, beta=0.7, backend=backend).sin(),
            (tiles, video),
        ),
        "extract_tiles": (lambda v: extract_tiles(v * 2, ORIGINS, TILES.tile, backend=backend).sin(), (video,)),
        "sample_patches": (lambda v: sample_patches(v * 2, patch_box, SMALL.patch, backend=backend).sin(), (clip,)),
        "modulated_norm": (
            lambda x, *t: torch.stack(modulated_norm(x * 2, *t, backend=backend)).sin(),
            (rows[0], *vectors[:2], rows[1], vectors[2]),
        ),
        "gated_residual": (lambda x, *t: gated_residual(x * 2, *t, backend=backend).sin(), (*rows, vectors[2])),
        "bias_gelu": (lambda x, b: bias_gelu(x * 2, b, backend=backend).sin(), (rows[0], vectors[0][0])),
        "group_norm_act": (
            lambda x, w, b, *t: group_norm_act(x * 2, w, b, 6, *t, pad=((1, 1),) * 3, backend=backend).sin(),
            (frames, vectors[0][0], vectors[0][1], *vectors[1:]),
        ),
        "temporal_attention": (
            lambda qkv, *t: temporal_attention(qkv * 2, *t, backend=backend).sin(),
            tuple(torch.randn(size, generator=generator).to(device) for size in ((1, 4, 9, 48), (5, 8), (5, 8))),
        ),
    }


PUBLIC = (
    "cross_attention", "packed_attention", "read_tokens", "sample_context", "fuse_context", "fuse_projected",
    "average_tiles", "extract_tiles", "sample_patches", "modulated_norm", "gated_residual", "bias_gelu",
    "group_norm_act",
    "temporal_attention",
)  # fmt: skip


def compiles(name: str, backend: str, device: torch.device, generator: torch.Generator) -> None:
    """A public function compiles without a graph break; its value and gradients equal the eager ones."""
    fn, inputs = public_functions(backend, generator, device)[name]
    with torch.no_grad():
        grad = torch.randn_like(fn(*inputs))
    expected = value_and_grads(fn, inputs, grad)
    actual = value_and_grads(torch.compile(fn, fullgraph=True), inputs, grad)
    # The compiler fuses the operations around the op, which changes their rounding.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def cases() -> Iterator[Case]:
    """All cases."""
    for op, backend in ops_and_backends():
        yield Case(f"opcheck[{op}-{backend}]", partial(opcheck, op, backend))
    for name in PUBLIC:
        for backend in BACKENDS:
            yield Case(f"compiles_as_one_graph[{name}-{backend}]", partial(compiles, name, backend))
