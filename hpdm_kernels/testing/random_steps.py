"""Random configurations of the optimizers: lists of any tensors, gradients in any memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hpdm_kernels.testing import steps
from hpdm_kernels.testing.case import Arguments, Case
from hpdm_kernels.testing.draw import Draw


def adamw_step(draw: Draw, dtype: torch.dtype, backend: str) -> Case:
    """A configuration of :func:`hpdm_kernels.adamw_step`; ``dtype`` is that of the gradients."""
    return _case("adamw_step", draw, dtype)


def lamb_step(draw: Draw, dtype: torch.dtype, backend: str) -> Case:
    """A configuration of :func:`hpdm_kernels.lamb_step`; ``dtype`` is that of the gradients."""
    return _case("lamb_step", draw, dtype)


def _case(op: str, draw: Draw, dtype: torch.dtype) -> Case:
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    shapes = [tuple(draw.rows(40) for _ in range(draw.random.randint(1, 3))) for _ in range(draw.size(5))]
    whole = steps.draw(draw.generator, shapes, draw.random.randint(0, 1), wide, dtype, op)
    if draw.chance(0.2):  # in another order of memory, all alike
        axes = lambda t: (
            t.permute(*reversed(range(t.ndim))).contiguous().permute(*reversed(range(t.ndim))) if t.ndim > 1 else t
        )
        whole = steps.copied(whole, axes)
    whole["grads"] = [draw.view(g) for g in whole["grads"]]
    if draw.chance(0.3):
        whole["grads"][0] = torch.zeros_like(whole["grads"][0])
    if op == "lamb_step" and draw.chance(0.3):
        whole["least_norms"] = None
    whole |= {"lr": draw.choose((0.0, 1e-4, 0.02, 1)), "eps": draw.choose((1e-8, 1e-3))}
    whole["weight_decay"] = draw.choose((0, 0.1))
    fixed: Arguments = {
        "betas": draw.choose(((0.9, 0.999), (0.0, 0.5))),
        "grad_scale": draw.choose((None, torch.tensor(0.3), torch.tensor([1.5], dtype=torch.float64))),
    }
    # One average at most, as the lists of averages would be a level deeper than what is spoiled.
    whole["average"] = next(iter(whole.pop("averages")), None)
    whole["rates"] = torch.tensor([draw.choose((0.0, 0.01, 0.8, 1.0))], dtype=torch.float64)
    arguments = {name: tuple(v) if isinstance(v, list) else v for name, v in whole.items() if name not in fixed}
    if arguments["average"] is None:
        del arguments["average"], arguments["rates"]

    def run(backend: str = "auto", average: Any = None, **given: Any) -> tuple[Tensor, ...]:
        # What is no list of tensors is passed on, for the op to refuse it.
        own = {
            name: [t.clone() if isinstance(t, Tensor) else t for t in value] if isinstance(value, tuple) else value
            for name, value in (given | {"averages": average}).items()
        }
        own["averages"] = [] if average is None else [own["averages"]]
        if isinstance(own["steps"], Tensor):
            own["steps"] = own["steps"].clone()
        norms = steps.OPS[op](**own, **fixed, backend=backend)
        # Steps are counted in fp32 whatever the dtype; they say nothing about the precision of the rest.
        return tuple(t.to(wide) for t in steps.results(own, norms).values())

    def formula(average: Any = None, **given: Any) -> tuple[Tensor, ...]:
        return tuple(steps.by_formula(op, _whole(given, average) | fixed, given["params"][0].dtype).values())

    def sizes(given: Arguments, grads: Sequence[Tensor]) -> list[float]:
        own = dict(given)
        return list(steps.sizes(op, _whole(own, own.pop("average", None)) | fixed).values())

    # In fp64 the oracle errs as much as the result.
    return Case(run, formula, arguments, (), 16.0, sizes=sizes)


def _whole(given: Arguments, average: Any) -> Arguments:
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    return lists | {"averages": [] if average is None else [list(average)]}
