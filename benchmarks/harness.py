"""Measurement: validates all contenders, then times them in turns in the same run.

On the CPU a sample is one call between two readings of ``time.perf_counter``. On CUDA a sample is one call between two
events. They are queued behind a flush of the L2 cache and a sleep of the device, so that neither a warm cache nor the
CPU's launch time counts; nothing synchronizes between them. Each row is compared with its floor: the least time that
its bytes and FLOPs take at the rates of a large copy and a large product in the same process
(``benchmarks/gpu/roofline.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import roofline
from hpdm_kernels.testing import assert_within_budget

Call = Callable[[], Any]

MIN_ROUNDS, MAX_ROUNDS = 3, 50
# The device sleeps while the CPU queues the call: 1.5 times as long as queueing took last time, within these bounds.
# A call that takes longer to queue (thousands of launches) is limited by the CPU, and its sample includes that.
SHORTEST_SLEEP_S, LONGEST_SLEEP_S = 1e-3, 10e-3
# An upper bound of the clock of current GPUs: on a slower clock the sleep is longer, never shorter.
CYCLES_PER_SECOND = 2e9


@dataclasses.dataclass
class Row:
    """One contender at one shape; one row of the tables and of the JSON files."""

    group: str
    shape: str
    contender: str
    direction: str
    median_s: float | None
    iqr_s: float | None
    rounds: int
    bytes: int | None = None
    """Bytes that an ideal implementation moves: each input and output once."""
    flops: int | None = None
    """FLOPs of the formula, whatever the contender does."""
    gbs: float | None = None
    tflops: float | None = None
    speedup_vs_reference: float | None = None
    reference: bool = False
    peak_extra_bytes: int | None = None
    """Peak memory during one call, beyond what was allocated before it."""
    error: str | None = None
    """Why the contender could not run, or what was wrong with its results."""
    arithmetic: str | None = None
    """How it computes products: ``"ieee"``, ``"tf32x3"``, ``"tf32"`` (fp32 data), ``"bf16"`` or ``"fp16"``."""
    floor_s: float | None = None
    """The least time for ``bytes`` and ``flops`` at the rates measured in the same process."""
    floor_by: str | None = None
    """Which of the two decides the floor: ``"bytes"`` or ``"flops"``."""
    share: float | None = None
    """``floor_s / median_s``; above 1 if the contender needs fewer FLOPs than the formula."""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def row_from_samples(
    group: str,
    shape: str,
    contender: str,
    direction: str,
    samples: Sequence[float],
    *,
    bytes: int | None = None,
    flops: int | None = None,
    **fields: Any,
) -> Row:
    """A :class:`Row` with the median and the interquartile range of ``samples`` (seconds), and rates from the median.

    Without samples the row has no times and no rates.
    """
    if not samples:
        return Row(group, shape, contender, direction, None, None, 0, bytes=bytes, flops=flops, **fields)
    values = torch.tensor(samples, dtype=torch.float64)
    low, median, high = (values.quantile(q).item() for q in (0.25, 0.5, 0.75))
    return Row(
        group=group,
        shape=shape,
        contender=contender,
        direction=direction,
        median_s=median,
        iqr_s=high - low,
        rounds=len(samples),
        bytes=bytes,
        flops=flops,
        gbs=bytes / median / 1e9 if bytes else None,
        tflops=flops / median / 1e12 if flops else None,
        **fields,
    )


def arithmetic_of(dtype: torch.dtype) -> str:
    """How PyTorch computes products of ``dtype`` with its current setting."""
    if dtype in (torch.bfloat16, torch.float16):
        return "bf16" if dtype is torch.bfloat16 else "fp16"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@contextlib.contextmanager
def products_in(arithmetic: str) -> Iterator[None]:
    """Inside the block PyTorch's fp32 products take one TF32 pass if ``arithmetic`` is ``"tf32"``, else full fp32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if arithmetic == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def add_floor(row: Row, ceilings: Mapping[str, float]) -> Row:
    """Sets ``floor_s``, ``floor_by`` and ``share`` of ``row`` and returns it."""
    if row.median_s:
        arithmetic = row.arithmetic or arithmetic_of(torch.float32)
        row.floor_s, row.floor_by = roofline.floor(row.bytes, row.flops, arithmetic, ceilings)
        row.share = row.floor_s / row.median_s if row.floor_s else None
    return row


class Timer:
    """Times calls on one device: ``sample`` queues one measurement, ``seconds`` returns all of them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.queueing = 0.0
        if device.type == "cuda":
            l2 = torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(max(2 * l2, 2**26), dtype=torch.int8, device=device)

    def sample(self, call: Call) -> None:
        if self.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            sleep = min(max(1.5 * self.queueing, SHORTEST_SLEEP_S), LONGEST_SLEEP_S)
            torch.cuda._sleep(int(sleep * CYCLES_PER_SECOND))
            self.flush.zero_()
            start.record()
            begin = time.perf_counter()
            call()
            end.record()
            self.queueing = time.perf_counter() - begin
            self.events.append((start, end))
        else:
            begin = time.perf_counter()
            call()
            self.times.append(time.perf_counter() - begin)

    def seconds(self) -> list[float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [start.elapsed_time(end) / 1e3 for start, end in self.events]
        return self.times


def peak_extra_bytes(call: Call, device: torch.device) -> int:
    """Peak memory in bytes during ``call``, beyond what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def forward_and_backward(fn: Callable[..., Tensor], leaves: Sequence[Tensor], grad_output: Tensor | None) -> Call:
    """A call that runs ``fn`` on ``leaves``; with ``grad_output`` also the gradients of leaves that require one."""
    differentiable = [t for t in leaves if t.requires_grad]

    def call() -> tuple[Tensor, ...]:
        out = fn(*leaves)
        if grad_output is None:
            return (out,)
        return (out.detach(), *torch.autograd.grad(out, differentiable, grad_output))

    return call


def _leaves(inputs: Sequence[Tensor], backward: bool, dtype: torch.dtype | None = None) -> list[Tensor]:
    leaves = [t.detach().to(dtype) if dtype and t.is_floating_point() else t.detach() for t in inputs]
    return [t.requires_grad_(backward and t.is_floating_point()) for t in leaves]


def check_direction(direction: str) -> bool:
    """Whether ``direction`` includes the backward pass.

    Raises:
        ValueError: an unknown direction.
    """
    if direction not in ("fwd", "fwd+bwd"):
        raise ValueError(f"direction: got {direction!r}, expected 'fwd' or 'fwd+bwd'")
    return direction == "fwd+bwd"


def context_lost(device: torch.device) -> bool:
    """Whether a failed kernel has made the CUDA context of this process unusable."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


class Wrong(AssertionError):
    """A contender that must not fail did; ``rows`` has the measurements of the others."""

    def __init__(self, message: str, rows: list[Row]) -> None:
        super().__init__(message)
        self.rows = rows


@dataclasses.dataclass(frozen=True)
class Task:
    """The task on which contenders are compared; ``benchmarks/conftest.py`` has an example."""

    group: str
    """The table that the rows go to."""
    shape: str
    direction: str
    """``"fwd"``, or ``"fwd+bwd"``: also the gradients of all floating-point inputs."""
    reference: str
    """The contender whose error sets the budget and whose time is the base of the speed-ups."""
    oracle: Callable[..., Tensor] | None = None
    """Called on fp64 inputs for the exact results; the reference if not given."""
    bytes: int | None = None
    flops: int | None = None
    budgets: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Allowed multiple of the reference's error by contender; 2 by default."""
    arithmetic: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """How a contender computes products, if not by PyTorch's setting."""
    peers: Sequence[str] = ()
    """Contenders that need not run on this machine; if they run, their results must be within the budget."""

    def row(self, contender: str, samples: Sequence[float], **fields: Any) -> Row:
        """A row of this task's table."""
        return row_from_samples(
            self.group, self.shape, contender, self.direction, samples, reference=contender == self.reference, **fields
        )


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a contender could not be timed."""

    message: str
    allowed: bool
    """Whether the contender is a peer that cannot run on this machine."""


def compare(
    contenders: Mapping[str, Callable[..., Tensor]],
    inputs: Sequence[Tensor],
    *,
    seconds: float = 2.0,
    drive: Callable[[Call, int], None] | None = None,
    timer: Callable[[torch.device], Timer] = Timer,
    **task_fields: Any,
) -> list[Row]:
    """Validates, then times, every contender on the same inputs.

    Args:
        contenders: functions of the inputs, by their name in the tables.
        inputs: tensors; with ``"fwd+bwd"`` all floating-point ones get gradients.
        seconds: time for all contenders together; 0: only validate, and return no rows.
        drive: ``drive(run_round, rounds)`` must call ``run_round``, one round of all contenders, ``rounds`` times.
        timer: creates the timer of one contender.
        task_fields: the fields of :class:`Task`.

    Raises:
        Wrong: a contender's error exceeds its budget, or a contender other than a peer could not run. The others are
            timed first, unless the CUDA context is lost.
    """
    task = Task(**task_fields)
    backward = check_direction(task.direction)
    if task.reference not in contenders:
        raise ValueError(f"reference: got {task.reference!r}, expected one of {', '.join(map(repr, contenders))}")
    device = inputs[0].device
    usual = arithmetic_of(next((t.dtype for t in inputs if t.is_floating_point()), torch.float32))
    arithmetic = {name: task.arithmetic.get(name, usual) for name in contenders}
    rows: list[Row] = []
    with torch.set_grad_enabled(backward):
        calls, failures = _validate(task, contenders, inputs, arithmetic, usual)
        if seconds and not (failures and context_lost(device)):
            samples, memory = _time(calls, device, seconds, drive, timer)
            work = {"bytes": task.bytes, "flops": task.flops}
            rows = [
                task.row(name, samples[name], peak_extra_bytes=memory[name], arithmetic=arithmetic[name], **work)
                for name in calls
            ]
    base = next((row.median_s for row in rows if row.reference), None)
    for row in rows:
        row.speedup_vs_reference = base / row.median_s if base and row.median_s else None
    if seconds:
        rows += [
            row_from_samples(task.group, task.shape, name, task.direction, [], error=failure.message)
            for name, failure in failures.items()
        ]
    wrong = [f"{name}: {failure.message}" for name, failure in failures.items() if not failure.allowed]
    if wrong:
        raise Wrong("; ".join(wrong), rows)
    return rows


def _validate(
    task: Task,
    contenders: Mapping[str, Callable[..., Tensor]],
    inputs: Sequence[Tensor],
    arithmetic: Mapping[str, str],
    usual: str,
) -> tuple[dict[str, Call], dict[str, Failure]]:
    """The calls of the contenders that pass, and the failures of the others.

    If a contender makes the CUDA context unusable, those after it are not tried.
    """
    backward = check_direction(task.direction)
    reference = contenders[task.reference]
    leaves = _leaves(inputs, backward)
    # Random instead of ones, to reveal gradients that are dropped or transposed.
    grad_output = torch.randn_like(reference(*leaves)) if backward else None
    plain = forward_and_backward(reference, leaves, grad_output)()
    wide_grad = None if grad_output is None else grad_output.double()
    oracle = forward_and_backward(task.oracle or reference, _leaves(inputs, backward, torch.float64), wide_grad)()
    results = ["output", *(f"gradient {i}" for i in range(len(plain) - 1))]
    calls: dict[str, Call] = {}
    failures: dict[str, Failure] = {}
    for name, fn in contenders.items():
        call = _in_arithmetic(forward_and_backward(fn, _leaves(inputs, backward), grad_output), arithmetic[name], usual)
        factor = task.budgets.get(name, 2.0)
        try:
            for result, actual, plain_value, true_value in zip(results, call(), plain, oracle, strict=True):
                label = f"{task.group}, {task.shape}, {name}, {result}"
                assert_within_budget(label, actual, plain_value, true_value, factor=factor)
        except Exception as error:
            message = str(error).strip().splitlines()[0] if str(error) else ""
            allowed = name in task.peers and not isinstance(error, AssertionError)
            failures[name] = Failure(f"{type(error).__name__}: {message}", allowed)
            if context_lost(inputs[0].device):
                break
            continue
        calls[name] = call
    return calls, failures


def _time(
    calls: Mapping[str, Call],
    device: torch.device,
    seconds: float,
    drive: Callable[[Call, int], None] | None,
    timer: Callable[[torch.device], Timer],
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every sample, and peak memory of one call beyond what was allocated before it, by contender."""
    timers = {name: timer(device) for name in calls}
    # The calls that measure memory also estimate the time of a round, because an additional call may take minutes.
    begin = time.perf_counter()
    memory = {name: peak_extra_bytes(call, device) for name, call in calls.items()}
    one_round = time.perf_counter() - begin
    rounds = int(min(MAX_ROUNDS, max(MIN_ROUNDS, seconds / one_round)))

    def run_round() -> None:
        for name, call in calls.items():
            timers[name].sample(call)

    if drive is None:
        for _ in range(rounds):
            run_round()
    else:
        drive(run_round, rounds)
    return {name: timers[name].seconds() for name in calls}, memory


def _in_arithmetic(call: Call, arithmetic: str, usual: str) -> Call:
    """``call`` with PyTorch's fp32 products set to ``arithmetic``; ``usual`` is the current setting."""
    if arithmetic == usual:
        return call

    def with_setting() -> Any:
        with products_in(arithmetic):
            return call()

    return with_setting
