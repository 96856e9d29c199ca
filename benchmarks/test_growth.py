"""Cost against the number of tokens, 2^10 to 2^18: measured for the ops, predicted for a whole training step.

The ops run forward and backward. At the fewest tokens they are validated in fp64, at more tokens against each other.

- ``fuse_context``: 128 channels, two sources with as many tokens as the patch, as on the last level of UCF-S. The model
  has 1,024 channels, which changes the share of the products but not the growth.
- ``cross_attention``: 768 latents and one head of width 64; heads are independent of each other.
- The paper's formulas run up to 2^16 tokens only, since beyond that they need gigabytes of memory.
- The training step is that of HPDM-S at full resolution, from 16x32x32 to 64x256x256, with one level and so without
  context. :mod:`hpdm.planning.training_cost` predicts its memory without weights, optimizer state and ema.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from benchmarks import harness, peers, shapes
from benchmarks.tables import exponent
from hpdm import presets, systems
from hpdm.planning.training_cost import training_step
from hpdm_kernels import cross_attention, fuse_context, reference

GRIDS = ((16, 8, 8), (16, 16, 16), (16, 32, 32), (64, 32, 32), (64, 64, 64))
LATENTS, HEAD_WIDTH, WIDTH = 768, 64, 128
MOST_TOKENS_OF_FORMULA = 2**16
THREE_TF32 = 16.0
MOST_ROUNDS, SECONDS = 5, 1.0
DIRECTION = "fwd+bwd"

Contenders = Mapping[str, Callable[..., Tensor]]
Case = tuple[Contenders, Sequence[Tensor], dict[str, int]]


def add_exponents(rows: Sequence[harness.Row]) -> None:
    """Adds to every contender's rows the exponents ``p`` with which time and memory grow: ``~ tokens^p``."""
    for name in {row.contender for row in rows}:
        of_contender = [row for row in rows if row.contender == name]
        for field, note in (("median_s", "time_exponent"), ("peak_extra_bytes", "memory_exponent")):
            points = [(row.extra["tokens"], getattr(row, field)) for row in of_contender if getattr(row, field)]
            if points:
                p = exponent(*zip(*points))
                for row in of_contender:
                    row.extra[note] = p


def grow(compare, record, group, limits, cases: Callable[[tuple[int, int, int]], Case], arithmetic=None) -> None:
    """Measures the contenders with every grid up to their limits; the first contender is the reference.

    ``arithmetic``: how contenders compute products, if not by PyTorch's setting.
    """
    arithmetic = arithmetic or {}
    rows: list[harness.Row] = []
    for grid in GRIDS:
        n = math.prod(grid)
        contenders, inputs, costs = cases(grid)
        contenders = {name: fn for name, fn in contenders.items() if n <= limits.get(name, n)}
        options = {"group": group, "shape": f"{'x'.join(map(str, grid))} tokens", "direction": DIRECTION, **costs}
        if grid == GRIDS[0]:
            first = next(iter(contenders))
            budgets = dict.fromkeys(arithmetic, THREE_TF32)
            options |= {"arithmetic": arithmetic, "budgets": budgets}
            measured = compare(contenders, inputs, reference=first, seconds=0.2, **options)
        else:
            measured = measure(record, contenders, inputs, arithmetic, reference=rows[0].contender, **options)
        for row in measured:
            row.extra["tokens"] = n
        rows += measured
    add_exponents(rows)


def measure(
    record, contenders, inputs, arithmetic, *, group, shape, direction, reference, **costs
) -> list[harness.Row]:
    """Like ``compare``, but checks against the first contender: an fp64 oracle would double the memory."""
    device = inputs[0].device
    leaves = [t.detach().requires_grad_() for t in inputs]
    with torch.no_grad():
        size = next(iter(contenders.values()))(*inputs)
    grad_output = torch.randn_like(size)
    del size
    calls = {name: harness.forward_and_backward(fn, leaves, grad_output) for name, fn in contenders.items()}
    timers = {name: harness.Timer(device) for name in calls}
    memory, expected = {}, None
    begin = time.perf_counter()
    for name, call in calls.items():
        results: list[tuple[Tensor, ...]] = []
        # One call serves as warm-up, measurement of memory, and check.
        memory[name] = harness.peak_extra_bytes(lambda call=call, results=results: results.append(call()), device)
        expected = expected or results[0]
        for n, (ours, first) in enumerate(zip(results[0], expected, strict=True)):
            error = (ours - first).abs().max() / first.abs().max()
            assert error < 1e-4, f"{group}, {shape}, {name}: result {n} differs by {error:.1e} of the largest value"
    del expected, results, ours, first  # free memory before timing
    rounds = int(min(MOST_ROUNDS, max(2, SECONDS / (time.perf_counter() - begin))))
    for _ in range(rounds):
        for name, call in calls.items():
            timers[name].sample(call)
    return [
        record(
            group, shape, name, direction, timer.seconds(), reference=name == reference,
            peak_extra_bytes=memory[name], arithmetic=arithmetic.get(name), **costs,
        )
        for name, timer in timers.items()
    ]  # fmt: skip


def test_fuse_context(compare, record, backends, device, generator):
    def cases(grid: tuple[int, int, int]) -> Case:
        f, h, w = grid
        shape = shapes.ContextShape(shapes.Pyramid("growth", (f, 4 * h, 4 * w), (1, 4, 4), 3, (2, 2, 2), 256, WIDTH))
        sources, source_boxes, box = shape.make(generator, device)
        x = torch.randn(1, shape.tokens, WIDTH, generator=generator).to(device)
        weight = (torch.randn(WIDTH, 2 * WIDTH + 3, generator=generator) / math.sqrt(2 * WIDTH)).to(device)
        bias = torch.randn(WIDTH, generator=generator).to(device)

        def by(fn: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
            return lambda x, w, b, *s: fn(x, s, source_boxes, box, w, b, shape.source_grids, grid, **options)

        contenders = {
            "reference (grid_sample)": by(reference.fuse_context),
            "separable matmul": by(peers.separable_fuse),
            **{f"hpdm {b}": by(fuse_context, footprints=shape.footprints, backend=b) for b in backends},
        }
        costs = {
            "bytes": shape.bytes(DIRECTION) + 3 * 4 * (x.numel() + weight.numel()),
            "flops": 3 * 2 * shape.tokens * WIDTH * (2 * WIDTH + 3),
        }
        return contenders, (x, weight, bias, *sources), costs

    limits = {"reference (grid_sample)": MOST_TOKENS_OF_FORMULA, "separable matmul": MOST_TOKENS_OF_FORMULA}
    grow(compare, record, f"growth: fuse_context, {WIDTH} channels, 2 sources", limits, cases)


@pytest.mark.parametrize("reads", [True, False], ids=["read", "write"])
def test_cross_attention(compare, record, backends, device, generator, reads):
    def cases(grid: tuple[int, int, int]) -> Case:
        n = math.prod(grid)
        queries, keys = (LATENTS, n) if reads else (n, LATENTS)
        inputs = [torch.randn(1, 1, rows, HEAD_WIDTH, generator=generator).to(device) for rows in (queries, keys, keys)]

        def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return reference.cross_attention(q, k, v, HEAD_WIDTH**-0.5)

        def ours(backend: str) -> Callable[..., Tensor]:
            return lambda q, k, v: cross_attention(q, k, v, backend=backend)

        contenders = {"reference (plain softmax)": plain, **{f"hpdm {b}": ours(b) for b in backends}}
        return (
            contenders,
            inputs,
            {
                "bytes": 4 * HEAD_WIDTH * 6 * (queries + keys),
                "flops": 7 * 2 * queries * keys * HEAD_WIDTH,
            },
        )

    what = f"{LATENTS} latents read tokens" if reads else f"tokens read {LATENTS} latents"
    limits = {"reference (plain softmax)": MOST_TOKENS_OF_FORMULA}
    # PyTorch's fused fp32 attention on CUDA always takes three TF32 passes.
    arithmetic = {"hpdm torch": "tf32x3"} if device.type == "cuda" else {}
    grow(compare, record, f"growth: cross_attention, {what}", limits, cases, arithmetic)


def test_training_step_memory(record):
    rows = []
    for f, h, w in GRIDS[::2]:
        patch = (f, 4 * h, 4 * w)
        config = presets.hpdm_s().with_pyramid(patch, patch)
        for kernels in ("reference", "torch"):
            cost = training_step(systems.get("patch"), config, 1, kernels)
            size = cost.peak_bytes - cost.static_bytes
            row = record(
                "growth: HPDM-S training step at full resolution, predicted", "x".join(map(str, patch)),
                "reference" if kernels == "reference" else f"hpdm {kernels}", DIRECTION, [], flops=cost.flops,
                reference=kernels == "reference", peak_extra_bytes=size, extra={"tokens": config.tokens},
            )  # fmt: skip
            rows.append(row)
    add_exponents(rows)
