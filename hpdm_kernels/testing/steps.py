"""Steps of optimizers for tests: random tensors, what a step leaves of them, and the same by formulas of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import hpdm_kernels
from hpdm_kernels.testing.case import Arguments
from hpdm_kernels.testing.errors import assert_within_budget, largest, poisoned_allocations

OPS: dict[str, Callable[..., Any]] = {"adamw_step": hpdm_kernels.adamw_step, "lamb_step": hpdm_kernels.lamb_step}
LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs")
SHAPES = ((5, 7, 3), (), (1,), (0, 4), (257,), (64, 33), (1, 1), (2, 3, 2, 5))
"""Odd and degenerate ones."""


def draw(
    generator: torch.Generator,
    shapes: Sequence[Sequence[int]] = SHAPES,
    averages: int = 1,
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    op: str = "adamw_step",
) -> Arguments:
    """Arguments of a step: tensors in the middle of a training, each after another number of steps."""
    random = lambda: [torch.randn(tuple(s), generator=generator, dtype=torch.float64) for s in shapes]
    as_dtype = lambda tensors, to: [t.to(to) for t in tensors]
    n = len(shapes)
    arguments: Arguments = {
        "params": as_dtype(random(), dtype),
        "grads": as_dtype(random(), grad_dtype or dtype),
        "exp_avgs": as_dtype([0.3 * t for t in random()], dtype),
        "exp_avg_sqs": as_dtype([t.square() + 0.1 for t in random()], dtype),
        "averages": [as_dtype(random(), dtype) for _ in range(averages)],
        "steps": torch.arange(n).float(),
        "rates": torch.tensor([0.02, 1.0, 0.7][:averages], dtype=torch.float64),
        "grad_scale": torch.tensor(0.37),
        "lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.05,
    }  # fmt: skip
    if op == "lamb_step":
        arguments["least_norms"] = torch.tensor([3.0 if i % 3 == 0 else 0.0 for i in range(n)])
    return arguments


def shifted(t: Tensor) -> Tensor:
    """A copy that does not begin at a multiple of 16 bytes."""
    return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)


def _clone(t: Tensor) -> Tensor:
    """A copy with the strides of ``t``, at a multiple of 16 bytes only where ``t`` is."""
    return shifted(t) if t.data_ptr() % 16 and t.is_contiguous() else t.clone()


def copied(arguments: Arguments, change: Callable[[Tensor], Tensor] = _clone) -> Arguments:
    """``arguments`` with all floating-point tensors changed."""

    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(v) for v in value]
        return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: convert(value) for name, value in arguments.items()}


def results(arguments: Arguments, norms: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
    """All tensors that a step may change, by name, and the norms that it returns."""
    lists = {name: arguments[name] for name in ("params", "exp_avgs", "exp_avg_sqs")}
    lists |= {f"averages[{k}]": average for k, average in enumerate(arguments["averages"])}
    named = {f"{name}[{i}]": t for name, tensors in lists.items() for i, t in enumerate(tensors)}
    return named | {"steps": arguments["steps"]} | dict(zip(("weights", "updates", "trust"), norms or ()))


def after(op: str, arguments: Arguments, backend: str) -> dict[str, Tensor]:
    """What a step leaves of copies of ``arguments``."""
    own = copied(arguments)
    with poisoned_allocations():
        norms = OPS[op](**own, backend=backend)
    return results(own, norms)


def by_formula(op: str, arguments: Arguments, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same computed in ``dtype`` out of place, with numbers of Python instead of tensors on the device."""
    own = copied(arguments, lambda t: t.to(dtype, copy=True))
    lr, (beta1, beta2), decay = arguments["lr"], arguments["betas"], arguments["weight_decay"]
    scale = 1.0 if arguments.get("grad_scale") is None else float(arguments["grad_scale"])
    least = arguments.get("least_norms")
    norms = []
    for i, (w, g) in enumerate(zip(own["params"], own["grads"])):
        count = float(arguments["steps"][i]) + 1
        own["steps"][i] = count
        g = g * scale
        m = own["exp_avgs"][i].mul(beta1).add(g, alpha=1 - beta1)
        v = own["exp_avg_sqs"][i].mul(beta2).addcmul(g, g, value=1 - beta2)
        step = m.div(1 - beta1**count) / (v.div(1 - beta2**count).sqrt() + arguments["eps"])
        step = step.add(w, alpha=decay)
        length, of_step = (torch.linalg.vector_norm(t.double()).item() for t in (w, step))
        counted = length if least is None else max(length, float(least[i]))
        trust = counted / of_step if counted > 0 and of_step > 0 else 1.0
        norms.append(torch.tensor((length, of_step, trust), dtype=dtype))
        w = w - lr * (trust if op == "lamb_step" else 1.0) * step
        own["params"][i], own["exp_avgs"][i], own["exp_avg_sqs"][i] = w, m, v
        for average, rate in zip(own["averages"], arguments["rates"].tolist() if own["averages"] else ()):
            average[i] = (1 - rate) * average[i] + rate * w
    return results(own, torch.stack(norms, dim=1).unbind() if op == "lamb_step" else None)


def sizes(op: str, arguments: Arguments) -> dict[str, float]:
    """Largest sum of absolute terms of each result: where terms cancel, a step errs by more than its own digits."""
    positive = copied(arguments, Tensor.abs)
    # Minus times minus: the step is added to the weights, not subtracted.
    positive["lr"] = -arguments["lr"]
    sums = {name: largest(t) for name, t in by_formula(op, positive, torch.float64).items()}
    scale = 1.0 if arguments.get("grad_scale") is None else abs(float(arguments["grad_scale"]))
    for i, (mean, grad) in enumerate(zip(positive["exp_avgs"], positive["grads"])):
        # Of mean + (1 - beta1) (grad - mean), which the old mean may outweigh.
        sums[f"exp_avgs[{i}]"] = largest(mean.double() + scale * grad.double())
    if op == "adamw_step":
        return sums
    terms = by_formula(op, positive | {"least_norms": None}, torch.float64)
    true = by_formula(op, arguments, torch.float64)
    # By how much the terms of a tensor's step outweigh it; so much more may the ratio err that it is rescaled by.
    lost = (terms["updates"] / true["updates"].clamp(min=1e-30)).clamp(min=1.0)
    sums |= {"updates": largest(terms["updates"]), "trust": largest(true["trust"] * lost)}
    for i, p in enumerate(positive["params"]):
        # The longest entry of a step is at most as long as the step.
        moved = arguments["lr"] * (true["trust"] * lost * terms["updates"])[i].item()
        sums[f"params[{i}]"] = largest(p) + moved
        for k, average in enumerate(positive["averages"]):
            sums[f"averages[{k}][{i}]"] = largest(average[i]) + sums[f"params[{i}]"]
    return sums


def check_step(op: str, arguments: Arguments, backend: str, ulps: float = 8.0) -> dict[str, Tensor]:
    """Fails unless every result errs at most twice as much as the plain formula, and ``ulps``; returns the results."""
    dtype = arguments["params"][0].dtype
    got = after(op, arguments, backend)
    plain, oracle = by_formula(op, arguments, dtype), by_formula(op, arguments, torch.float64)
    if got.keys() != oracle.keys():
        raise AssertionError(f"{op}: got {sorted(got)}, expected {sorted(oracle)}")
    terms = sizes(op, arguments)
    for name, value in got.items():
        expected = plain[name].to(value.dtype)
        allowed = ulps if dtype is torch.float32 else 64.0
        assert_within_budget(name, value, expected, oracle[name], ulps=allowed, size=terms[name])
    return got
