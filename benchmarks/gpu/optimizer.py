"""Checks the steps of the optimizers at odd shapes and at those of a model, with gradients of every dtype."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from benchmarks.gpu.cases import DTYPES, Case
from hpdm_kernels.testing import steps

SHAPES = {"odd": steps.SHAPES, "large": ((1024, 4096), (4096,), (3, 1025, 77), (2048, 2051))}


def step(
    op: str, shapes: Sequence[Sequence[int]], dtype: str, backend: str, device: torch.device, generator: torch.Generator
) -> None:
    """Against fp64; the same bits twice."""
    arguments = steps.draw(generator, shapes, averages=2, grad_dtype=DTYPES[dtype], op=op)
    arguments = steps.copied(arguments, lambda t: t.to(device))
    # PyTorch adds up norms of millions of numbers in fp32 with an error of some more units.
    got, again = steps.check_step(op, arguments, backend, ulps=32.0), steps.after(op, arguments, backend)
    assert all(torch.equal(t, again[name]) for name, t in got.items())


def skipped(op: str, backend: str, device: torch.device, generator: torch.Generator) -> None:
    """A step that is not applied changes nothing, whatever the gradients hold."""
    arguments = steps.copied(steps.draw(generator, averages=2, op=op), lambda t: t.to(device))
    arguments["grads"][0].fill_(float("nan"))
    own = steps.copied(arguments)
    steps.OPS[op](**own, apply=torch.tensor(False, device=device), backend=backend)
    before = steps.results(arguments)
    assert all(torch.equal(t, before[name]) for name, t in steps.results(own).items())


def cases() -> Iterator[Case]:
    """All cases."""
    for op in steps.OPS:
        for backend in ("torch", "triton"):
            for name, shapes in SHAPES.items():
                for dtype in DTYPES:
                    yield Case(f"{op}[{name}-{dtype}-{backend}]", partial(step, op, shapes, dtype, backend))
            yield Case(f"{op}_skipped[{backend}]", partial(skipped, op, backend))
