"""Tries an op on random configurations, forward and backward, against formulas of its own in fp64.

A configuration follows from one seed: sizes, dtypes, views of every kind, boxes at edges and a little outside, the
subset of gradients, the memory of the output's gradient, the sizes of temporaries. A result is wrong if it errs more
than twice as much as the plain formula in the same dtype, and some rounding of the terms that it sums. A share of the
configurations has one argument spoiled; those must raise an error that names it.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hpdm_kernels.context import torch_backend as context_backend
from hpdm_kernels.groupnorm import api as groups_api
from hpdm_kernels.groupnorm import torch_backend as groups_backend
from hpdm_kernels.optimizer import torch_backend as optimizer_backend
from hpdm_kernels.patches import torch_backend as patches_backend
from hpdm_kernels.rows import api as rows_api
from hpdm_kernels.rows import torch_backend as rows_backend
from hpdm_kernels.temporal import api as temporal_api
from hpdm_kernels.testing import (
    random_attention,
    random_context,
    random_groups,
    random_pixels,
    random_rows,
    random_steps,
    random_temporal,
)
from hpdm_kernels.testing.case import Case, as_tuple, evaluate, leaves, sizes_of, widened
from hpdm_kernels.testing.draw import Draw
from hpdm_kernels.testing.errors import max_error, poisoned_allocations
from hpdm_kernels.testing.wrong import is_clear, spoil
from hpdm_kernels.tiles import torch_backend as tiles_backend

OPS: dict[str, Callable[[Draw, torch.dtype, str], Case]] = {
    "sample_context": random_context.sample_context,
    "fuse_context": random_context.fuse_context,
    "project_sources": random_context.project_sources,
    "fuse_projected": random_context.fuse_projected,
    "cross_attention": random_attention.cross_attention,
    "packed_attention": random_attention.packed_attention,
    "read_tokens": random_attention.read_tokens,
    "sample_patches": random_pixels.sample_patches,
    "extract_tiles": random_pixels.extract_tiles,
    "average_tiles": random_pixels.average_tiles,
    "TileAccumulator": random_pixels.tile_accumulator,
    "modulated_norm": random_rows.modulated_norm,
    "gated_residual": random_rows.gated_residual,
    "bias_gelu": random_rows.bias_gelu,
    "group_norm_act": random_groups.group_norm_act,
    "temporal_attention": random_temporal.temporal_attention,
    "adamw_step": random_steps.adamw_step,
    "lamb_step": random_steps.lamb_step,
}
"""Public name of each op -> what draws a valid configuration of it."""

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
WRONG_SHARE = 0.2
# Limits of temporaries, which small tensors would never reach.
LIMITS = (
    (context_backend, "FORWARD_SCRATCH"), (context_backend, "SCRATCH"), (patches_backend, "CPU_PIECE"),
    (tiles_backend, "CPU_PIECE"), (rows_backend, "PIECE"), (rows_api, "LEAST"), (optimizer_backend, "PIECE"),
    (groups_api, "LEAST"), (groups_backend, "PIECE"), (temporal_api, "LEAST"),
)  # fmt: skip


class Failure(NamedTuple):
    """A configuration that went wrong."""

    op: str
    backend: str
    seed: int
    problem: str

    def replay(self) -> str:
        """The command that tries this configuration again."""
        return (
            f"python -m hpdm_kernels.testing fuzz --op {self.op} --backend {self.backend} --seed {self.seed} "
            "--configurations 1"
        )


class Report(NamedTuple):
    """What :func:`fuzz` found."""

    valid: int
    """Number of valid configurations that were tried."""
    spoiled: int
    """Number of configurations with a spoiled argument."""
    failures: list[Failure]


@contextlib.contextmanager
def _small_temporaries(draw: Draw) -> Iterator[None]:
    """Sets the limits of temporaries to random small numbers, in half of all configurations."""
    before = [getattr(module, name) for module, name in LIMITS]
    try:
        if draw.chance(0.5):
            for module, name in LIMITS:
                setattr(module, name, draw.choose((1, 7, 40, 300)))
        yield
    finally:
        for (module, name), value in zip(LIMITS, before):
            setattr(module, name, value)


def _gradients(draw: Draw, case: Case) -> list[Tensor]:
    """A gradient for each output, in memory of any kind; none if the op has no gradient."""
    with torch.no_grad():
        outputs = as_tuple(case.formula(**case.arguments))
    kinds = ("normal", "expanded number")
    return [
        draw.normal(*out.shape, dtype=out.dtype)
        if draw.choose(kinds) == "normal"
        else torch.ones((), dtype=out.dtype).expand(out.shape)
        for out in outputs
    ]


def check(case: Case, backend: str, draw: Draw) -> str | None:
    """Runs a valid configuration; a description of what is wrong with its results, or ``None``."""
    inputs = leaves(case.arguments, case.differentiable)
    wanted = [draw.chance(0.6) for _ in inputs]
    grads = _gradients(draw, case)
    names = case.differentiable
    wide, wide_grads = widened(case.arguments, Tensor.double), [g.double() for g in grads]
    oracle = evaluate(case.formula, wide, names, wanted, wide_grads)
    plain = evaluate(case.formula, case.arguments, names, wanted, grads)
    sizes = sizes_of(case, wide, wanted, wide_grads)
    try:
        with _small_temporaries(draw), poisoned_allocations():
            results = evaluate(case.function, case.arguments | {"backend": backend}, names, wanted, grads)
    except Exception as error:  # whatever a valid call raises is a fault
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"raised {type(error).__name__} at {where.name}:{where.lineno}: {str(error).splitlines()[0][:200]}"
    precision = max((torch.finfo(t.dtype).eps for t in (*inputs, *results) if t.is_floating_point()), default=0.0)
    for i, (got, simple, true, size) in enumerate(zip(results, plain, oracle, sizes, strict=True)):
        label = f"output {i}" if i < len(grads) else f"gradient {i - len(grads)} of {wanted}"
        if got.shape != true.shape or got.dtype != simple.dtype:
            return f"{label}: {got.dtype} {tuple(got.shape)}, expected {simple.dtype} {tuple(true.shape)}"
        fine = torch.finfo(torch.float64 if precision < 1e-10 else torch.float32).eps
        budget = 2 * max_error(simple, true) + (case.ulps * precision + case.fine_ulps * fine) * size
        deviation = max_error(got, true)
        if not deviation <= budget:
            return f"{label}: error {deviation:.2e}, allowed {budget:.2e} (terms sum to {size:.2e}), {got.dtype}"
    return None


def check_spoiled(case: Case, backend: str, draw: Draw) -> str | None:
    """Runs a configuration with one wrong argument; a description of what was not refused clearly, or ``None``."""
    arguments, what = spoil(draw, {"backend": backend, **case.arguments})
    try:
        case.function(**arguments)
    except Exception as error:  # the kind of error is what is judged
        if is_clear(error):
            return None
        return f"{what}: unclear {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return f"{what}: accepted"


def try_seed(op: str, backend: str, seed: int) -> tuple[bool, str | None]:
    """One configuration: whether it was valid, and what went wrong, or ``None``."""
    draw = Draw(seed, longest=6) if backend == "triton" else Draw(seed)
    dtype = torch.float32 if backend == "triton" else draw.choose(DTYPES)
    case = OPS[op](draw, dtype, backend)
    if draw.chance(WRONG_SHARE):
        return False, check_spoiled(case, backend, draw)
    return True, check(case, backend, draw)


def fuzz(
    op: str,
    backend: str,
    *,
    seed: int = 0,
    configurations: int | None = None,
    seconds: float | None = None,
    on_failure: Callable[[Failure], None] | None = None,
) -> Report:
    """Tries configurations with the seeds ``seed``, ``seed + 1``, ... until one of the limits is reached.

    Args:
        op: a key of :data:`OPS`.
        backend: ``"reference"``, ``"torch"``, or ``"triton"`` in its interpreter, which is right for fp32 alone.
        seed: of the first configuration.
        configurations: number to try; ``None`` for no limit.
        seconds: time to spend; the configuration that is running then is finished. ``None`` for no limit.
        on_failure: called with each failure when it is found.

    Raises:
        ValueError: unknown op, or no limit at all.
    """
    if op not in OPS:
        raise ValueError(f"op: got {op!r}, expected one of {', '.join(OPS)}")
    if configurations is None and seconds is None:
        raise ValueError("configurations: got no limit, expected a number of configurations or of seconds")
    start, counts, failures = time.monotonic(), [0, 0], []
    while configurations is None or sum(counts) < configurations:
        if seconds is not None and time.monotonic() - start >= seconds:
            break
        valid, problem = try_seed(op, backend, seed + sum(counts))
        if problem:
            failures.append(Failure(op, backend, seed + sum(counts), problem))
            if on_failure is not None:
                on_failure(failures[-1])
        counts[valid] += 1
    return Report(counts[True], counts[False], failures)
