"""The host's time per call of the kernels: what Python, PyTorch and Triton do before a GPU starts.

Below it a GPU is idle, however fast its kernels are. It is the CPU time of the process per call, on any machine:
launches are recorded instead of made (``benchmarks/launches.py``), and tensors are small, so that PyTorch's own
operations, which run on the CPU, take little. A real launch takes several microseconds more, so the number of launches
is noted, too.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest
import torch

from benchmarks.launches import available, recorded_launches
from hpdm_kernels import (
    TileAccumulator,
    average_tiles,
    bias_gelu,
    cross_attention,
    extract_tiles,
    fuse_context,
    fuse_projected,
    gated_residual,
    group_norm_act,
    modulated_norm,
    sample_context,
    sample_patches,
    temporal_attention,
)

pytestmark = pytest.mark.skipif(not available(), reason="Triton is not installed, or interprets the kernels")

CALLS_PER_SAMPLE, MOST_SAMPLES = 20, 100
GRID, WIDTH = (2, 4, 4), 64
FOOTPRINTS = [(2, 2, 2), (2, 3, 3)]
# As many tiles as the last level of the paper's text-to-video model has; small ones.
TILE, TILED, CHUNK = (2, 6, 8), (16, 48, 64), 8
ORIGINS = torch.tensor(list(itertools.product(range(0, 15), range(0, 43, 3), range(0, 57, 4))))


def fusion(op: Callable[..., torch.Tensor]) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
    """``op`` as a function of its differentiable inputs, and these; two sources."""
    n = GRID[0] * GRID[1] * GRID[2]
    boxes = [torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]), torch.tensor([[0.25, 0.25, 0.25, 0.5, 0.5, 0.5]])]
    box = torch.tensor([[0.3, 0.3, 0.35, 0.25, 0.25, 0.25]])
    inputs = [torch.randn(1, n, WIDTH), torch.randn(WIDTH, 2 * WIDTH + 3), torch.randn(WIDTH)]
    inputs += [torch.randn(1, n, WIDTH) for _ in boxes]

    def run(x, weight, bias, *sources):
        return op(x, sources, boxes, box, weight, bias, [GRID] * 2, GRID, footprints=FOOTPRINTS, backend="triton")

    return run, inputs


def sampled(*arguments, **options):
    """:func:`sample_context` with the arguments of a fusion."""
    _, sources, boxes, box, _, _, *grids = arguments
    return sample_context(sources, boxes, box, *grids, **options)


def without_gradient(run, inputs):
    return lambda: run(*inputs)


def backward_only(run, inputs):
    inputs = [t.requires_grad_() for t in inputs]
    out = run(*inputs)
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True, allow_unused=True)


def accumulated():
    sums = TileAccumulator(ORIGINS, TILE, TILED, backend="triton")
    chunk = torch.zeros(1, CHUNK, 3, *TILE)

    def add():
        if sums.added + CHUNK > sums.tiles:
            sums.reset()
        sums.add(chunk)

    return add


def attention():
    return [torch.randn(1, 2, 32, 64) for _ in range(3)]


def attend(q, k, v):
    return cross_attention(q, k, v, backend="triton")


def patches():
    video, box = torch.randn(1, 3, 4, 16, 16), torch.tensor([[0.25, 0.25, 0.25, 0.5, 0.5, 0.5]])
    return lambda v: sample_patches(v, box, (2, 8, 8), backend="triton"), [video]


def rows(op, *names):
    """``op`` of these of its tensors."""
    sizes = dict.fromkeys(("x", "branch"), (2, 16, 64)) | dict.fromkeys(("shift", "scale", "gate"), (2, 64))
    return lambda *t: op(*t, backend="triton"), [torch.randn(sizes.get(name, (64,))) for name in names]


def groups():
    sizes = ((1, 2, 4, 4, 64), (64,), (64,), (1, 2, 64), (1, 2, 64))
    run = lambda x, w, b, *t: group_norm_act(x, w, b, 32, *t, backend="triton")
    return run, [torch.randn(size) for size in sizes]


def second_of(run, inputs):
    return lambda *t: run(*t)[1], inputs


NORM = ("x", "shift", "scale", "branch", "gate")


def temporal():
    inputs = [torch.randn(size) for size in ((1, 4, 16, 3 * 128), (7, 64), (7, 64))]
    return lambda *t: temporal_attention(*t, backend="triton"), inputs


def extracted():
    batch, video = ORIGINS[:CHUNK].clone(), torch.randn(1, 3, *TILED)
    return lambda: extract_tiles(video, batch, TILE, backend="triton")


def averaged():
    tiles = torch.zeros(1, len(ORIGINS), 1, *TILE)
    return lambda: average_tiles(tiles, ORIGINS, TILED, backend="triton")


CASES: dict[tuple[str, str], Callable[[], Callable[[], object]]] = {
    ("fuse_context, 2 sources", "fwd"): lambda: without_gradient(*fusion(fuse_context)),
    ("fuse_context, 2 sources", "bwd"): lambda: backward_only(*fusion(fuse_context)),
    ("fuse_projected, 2 sources", "fwd"): lambda: without_gradient(*fusion(fuse_projected)),
    ("sample_context, 2 sources", "fwd"): lambda: without_gradient(*fusion(sampled)),
    ("sample_context, 2 sources", "bwd"): lambda: backward_only(*fusion(sampled)),
    ("TileAccumulator.add, 8 of 3375 tiles", "fwd"): accumulated,
    ("extract_tiles, 8 tiles", "fwd"): extracted,
    ("average_tiles, 3375 tiles", "fwd"): averaged,
    ("sample_patches", "fwd"): lambda: without_gradient(*patches()),
    ("sample_patches", "bwd"): lambda: backward_only(*patches()),
    ("cross_attention", "fwd"): lambda: without_gradient(attend, attention()),
    ("cross_attention", "bwd"): lambda: backward_only(attend, attention()),
    ("modulated_norm after a gated residual", "fwd"): lambda: without_gradient(*rows(modulated_norm, *NORM)),
    ("modulated_norm after a gated residual", "bwd"): lambda: backward_only(*second_of(*rows(modulated_norm, *NORM))),
    ("gated_residual", "bwd"): lambda: backward_only(*rows(gated_residual, "x", "branch", "gate")),
    ("group_norm_act, modulated", "fwd"): lambda: without_gradient(*groups()),
    ("group_norm_act, modulated", "bwd"): lambda: backward_only(*groups()),
    ("bias_gelu", "fwd"): lambda: without_gradient(*rows(bias_gelu, "x", "bias")),
    ("bias_gelu", "bwd"): lambda: backward_only(*rows(bias_gelu, "x", "bias")),
    ("temporal_attention", "fwd"): lambda: without_gradient(*temporal()),
    ("temporal_attention", "bwd"): lambda: backward_only(*temporal()),
}


@pytest.mark.parametrize(("shape", "direction"), CASES, ids=str)
def test_host_time(record, request, shape, direction):
    with recorded_launches() as launches:
        call = CASES[shape, direction]()
        for _ in range(CALLS_PER_SAMPLE):
            call()
        launches.clear()
        call()
        count = len(launches)
        assert count > 0
        samples: list[float] = []
        end = time.perf_counter() + request.config.getoption("--seconds")
        while len(samples) < MOST_SAMPLES and (not samples or time.perf_counter() < end):
            begin = time.process_time()
            for _ in range(CALLS_PER_SAMPLE):
                call()
            samples.append((time.process_time() - begin) / CALLS_PER_SAMPLE)
    record("host time", shape, "hpdm triton", direction, samples, extra={"launches": count})
