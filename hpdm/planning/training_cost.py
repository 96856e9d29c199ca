"""Memory and work of a training step, predicted on any machine: one step of the real model on fake tensors.

The step is that of :func:`hpdm.training.step.update`, and :class:`hpdm.planning.ledger.Ledger` counts it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpdm.planning.groups import OPTIMIZER
from hpdm.planning.ledger import Ledger, fake_fp32
from hpdm.planning.roofline import GPUS, least_seconds
from hpdm.system import System
from hpdm.training.ema import EMA, PowerLaw
from hpdm.training.optim import make_optimizer
from hpdm.training.step import update
from hpdm_kernels import _triton
from hpdm_kernels.dry_run import launches_left_out

KERNELS = ("reference", "torch", "triton")
PRECISIONS = ("fp32", "bf16")
RECOMPUTE = ("none", "selective", "block")
CATEGORIES = ("weights", "gradients", "optimizer_state", "ema", "inputs", "activations", "temporaries")
LASTING = ("weights", "gradients", "optimizer_state", "ema")
"""The categories that do not depend on the batch, and that several processes may share out."""


@dataclass(frozen=True)
class StepCost:
    """The predicted cost of one training step. Bytes are those alive at the peak of memory."""

    kernels: str
    recompute: str
    precision: str
    optimizer: str
    averages: int
    batch: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_state_bytes: int
    ema_bytes: int
    """The moving averages of the weights."""
    inputs_bytes: int
    """The network's inputs (noised pixels, times, conditioning) and the target."""
    activations_bytes: int
    """What the forward pass keeps for the backward pass and is still alive at the peak."""
    temporaries_bytes: int
    """Everything else: results within the backward pass or the optimizer, recomputed activations, workspace."""
    passing_bytes: int
    """Most bytes of everything but :data:`LASTING` at once, which may be at another moment than the peak."""
    flops: int
    """FLOPs of matrix products and attention: forward, backward and recomputation; a multiply-add is two."""
    first_pass_flops: int
    """Those of them that forward passes without gradients need: the first pass of self-conditioning."""
    moved_bytes: int
    """Memory traffic if every operation reads each input and writes each result once."""
    moved_by_group: dict[str, int]
    """The same by :data:`hpdm.planning.groups.GROUPS`: what the bytes are moved for."""
    least_pass_seconds: dict[str, float]
    """By name of the GPU, modeled: the least time of forward and backward pass, with products of one TF32 pass, or of
    bf16. No schedule of these operations is faster, see :mod:`hpdm.planning.roofline`."""
    least_optimizer_seconds: dict[str, float]
    """The same of clipping, the optimizer and the moving averages."""

    @property
    def static_bytes(self) -> int:
        """What is alive between two steps: weights, optimizer state, moving averages."""
        return self.weights_bytes + self.optimizer_state_bytes + self.ema_bytes

    @property
    def peak_bytes(self) -> int:
        """The largest number of bytes alive at once in the step."""
        return sum(getattr(self, f"{category}_bytes") for category in CATEGORIES)


def training_step(
    system: System,
    config: Any,
    batch: int = 1,
    kernels: str = "torch",
    recompute: str = "none",
    precision: str = "fp32",
    optimizer: str = "adamw",
    averages: int = 1,
) -> StepCost:
    """Predicts one training step: the second one of a run, so that the optimizer has its state.

    Args:
        system: kind of the model.
        config: the model's.
        batch: clips per step and device, at least 1.
        kernels: ``"reference"`` (the paper's formulas), ``"torch"`` (the library's ops in PyTorch's operations) or
            ``"triton"`` (as kernels on an H100: the same tensors are kept, but their workspaces are other ones).
        recompute: what the backward pass computes again, ``"none"``, ``"selective"`` or ``"block"``.
        precision: ``"fp32"``, or ``"bf16"`` for automatic mixed precision with weights and their statistics in fp32.
        optimizer: ``"adamw"``, ``"lamb"`` or ``"muon"``.
        averages: number of moving averages of the weights, at least 1.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: ``"triton"`` without Triton, or with ``TRITON_INTERPRET=1``, whose block sizes are no GPU's.
    """
    if batch < 1:
        raise ValueError(f"batch: got {batch}, expected at least 1")
    if averages < 1:
        raise ValueError(f"averages: got {averages}, expected at least 1")
    if kernels not in KERNELS:
        raise ValueError(f"kernels: got {kernels!r}, expected one of {', '.join(map(repr, KERNELS))}")
    if kernels == "triton" and _triton.INTERPRETED:
        raise RuntimeError("kernels: got 'triton' with TRITON_INTERPRET=1, whose block sizes are not those of a GPU")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, expected one of {', '.join(map(repr, PRECISIONS))}")
    with fake_fp32(), launches_left_out() if kernels == "triton" else nullcontext():
        ledger, passes, first_pass = _count(system, config, batch, kernels, recompute, precision, optimizer, averages)
    passing, rest = ledger.operations[:passes], ledger.operations[passes:]
    at_peak = ledger.at_peak()
    return StepCost(
        kernels=kernels,
        recompute=recompute,
        precision=precision,
        optimizer=optimizer,
        averages=averages,
        batch=batch,
        passing_bytes=sum(ledger.at_peak(leaving_out=LASTING).values()),
        flops=ledger.flops,
        first_pass_flops=first_pass,
        moved_bytes=ledger.moved,
        moved_by_group=dict(ledger.moved_by_group),
        least_pass_seconds={gpu.name: least_seconds(passing, gpu, precision) for gpu in GPUS},
        least_optimizer_seconds={gpu.name: least_seconds(rest, gpu, precision) for gpu in GPUS},
        **{f"{category}_bytes": at_peak.get(category, 0) for category in CATEGORIES},
    )


def _count(
    system: System, config: Any, batch: int, kernels: str, recompute: str, precision: str, optimizer_name: str,
    averages: int,
) -> tuple[Ledger, int, int]:  # fmt: skip
    """Counts the second step of a run; also how many operations come before the optimizer's, and the FLOPs of a first
    pass.
    """
    model = system.build(config, kernels, recompute)
    parameters = list(model.parameters())
    # The formulas get PyTorch's optimizer, as they get its layers: what would be lost by a slower one is not theirs.
    backend = "torch" if kernels == "reference" else kernels
    optimizer = make_optimizer(model, optimizer_name, 1e-3, 0.01, (), system.hidden_modules(model), backend)
    ema = EMA(model, *[PowerLaw(0.05)] * averages)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()  # makes the optimizer's state
    optimizer.zero_grad(set_to_none=True)
    inputs = system.example_inputs(config, batch)
    target = torch.empty_like(inputs["x"])
    ledger, passes, first_pass = Ledger(kernels), 0, 0

    def network(**arguments: Any) -> Any:
        nonlocal first_pass
        before = ledger.flops
        out = model(**arguments)
        if not torch.is_grad_enabled():
            first_pass += ledger.flops - before
        return out

    def phase(name: str) -> None:
        nonlocal passes
        if name == "backward":
            ledger.label_living("activations")
        else:
            passes, ledger.group = len(ledger.operations), OPTIMIZER
            ledger.label([p.grad for p in parameters if p.grad is not None], "gradients")

    with ledger:
        ledger.label(parameters, "weights")
        ledger.label(_state_of(optimizer), "optimizer_state")
        ledger.label([t for shadow in ema.shadows for t in shadow.values()], "ema")
        ledger.label([*inputs.values(), target], "inputs")
        update(
            model,
            optimizer,
            ema,
            [lambda: (system.predict(config, network, inputs) - target).square().mean()],
            autocast=lambda: torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
            phase=phase,
        )
    return ledger, passes, first_pass


def _state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]


def largest_batch(memory: int, cost: Callable[[int], StepCost]) -> int:
    """The largest batch whose peak fits into ``memory`` bytes, 0 if not even one clip does.

    Args:
        memory: bytes.
        cost: the prediction for a batch.

    The peak is nearly constant for small batches, where the optimizer's step sets it, and then grows linearly with
    the activations. So doubling, then interpolation and bisection in turns, takes few predictions.
    """
    fits, fits_bytes = 0, 0
    fails, fails_bytes = 1, cost(1).peak_bytes
    while fails_bytes <= memory:
        fits, fits_bytes = fails, fails_bytes
        fails *= 2
        fails_bytes = cost(fails).peak_bytes
    halve = False
    while fails - fits > 1:
        # Bisect in every other round: where the peak is nearly constant, interpolation alone would be slow.
        share = 0.5 if halve else (memory - fits_bytes) / (fails_bytes - fits_bytes)
        halve = not halve
        guess = min(max(fits + int(share * (fails - fits)), fits + 1), fails - 1)
        peak = cost(guess).peak_bytes
        if peak <= memory:
            fits, fits_bytes = guess, peak
        else:
            fails, fails_bytes = guess, peak
    return fits
