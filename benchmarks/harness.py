"""Measurement: validate first, then time all contenders in turns in the same run, and say what they ran on.

On the CPU a sample is one call between two readings of ``time.perf_counter``. On CUDA a sample is one call between two
events that are queued behind a flush of the L2 cache and a sleep of the device, so that neither a warm cache nor the
CPU's launch time counts; nothing synchronises between them. Each row is set against the least time that its bytes and
FLOPs take at the rates of a large copy and a large product in the same process (``benchmarks/gpu/roofline.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import roofline
from hpdm_kernels.testing import assert_within_budget

Call = Callable[[], Any]

MIN_ROUNDS, MAX_ROUNDS = 3, 50
# The device sleeps while the CPU queues the call: half as long again as queueing took last time, between these bounds.
# What takes longer to queue (thousands of launches) is bound by the CPU, and timed as that.
SHORTEST_SLEEP_S, LONGEST_SLEEP_S = 1e-3, 10e-3
# At least what current GPUs run at: a lower clock makes the sleep longer, never shorter.
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
    """What an ideal implementation must move: each input and output once."""
    flops: int | None = None
    """What the formula costs, whatever the contender does."""
    gbs: float | None = None
    tflops: float | None = None
    speedup_vs_reference: float | None = None
    reference: bool = False
    peak_extra_bytes: int | None = None
    """Most memory held at once during one call, beyond what was held before it."""
    error: str | None = None
    """Why it could not run here, or what was wrong with its results."""
    arithmetic: str | None = None
    """How it takes products: ``"ieee"``, ``"tf32x3"``, ``"tf32"`` (fp32 data), ``"bf16"`` or ``"fp16"``."""
    floor_s: float | None = None
    """The least time for ``bytes`` and ``flops`` at the rates measured in the same process."""
    floor_by: str | None = None
    """Which of the two sets the floor: ``"bytes"`` or ``"flops"``."""
    share: float | None = None
    """``floor_s / median_s``; above 1 where a contender needs fewer products than the formula."""
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
    """A :class:`Row` with the median and the interquartile range of ``samples`` (seconds), and the rates they give.

    Without samples nothing ran: the row has no times and no rates.
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
    """How PyTorch takes products of ``dtype`` at its current settings."""
    if dtype in (torch.bfloat16, torch.float16):
        return "bf16" if dtype is torch.bfloat16 else "fp16"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@contextlib.contextmanager
def products_in(arithmetic: str) -> Iterator[None]:
    """PyTorch's own fp32 products take one TF32 pass inside the block if ``arithmetic`` is ``"tf32"``, else none."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if arithmetic == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def add_floor(row: Row, ceilings: Mapping[str, float]) -> Row:
    """Sets the floor of ``row`` and the share of it that was reached."""
    if row.median_s:
        arithmetic = row.arithmetic or arithmetic_of(torch.float32)
        row.floor_s, row.floor_by = roofline.floor(row.bytes, row.flops, arithmetic, ceilings)
        row.share = row.floor_s / row.median_s if row.floor_s else None
    return row


class Timer:
    """Times calls on one device; ``sample`` queues one measurement, ``seconds`` gives them all."""

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
    """Most memory allocated at once during ``call``, beyond what was allocated before it."""
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
    """A call that runs ``fn`` on ``leaves``, with the gradients of all floating leaves if ``grad_output`` is given."""
    wanted = [t for t in leaves if t.requires_grad]

    def call() -> tuple[Tensor, ...]:
        out = fn(*leaves)
        if grad_output is None:
            return (out,)
        return (out.detach(), *torch.autograd.grad(out, wanted, grad_output))

    return call


def _leaves(inputs: Sequence[Tensor], backward: bool, dtype: torch.dtype | None = None) -> list[Tensor]:
    leaves = [t.detach().to(dtype) if dtype and t.is_floating_point() else t.detach() for t in inputs]
    return [t.requires_grad_(backward and t.is_floating_point()) for t in leaves]


def check_direction(direction: str) -> bool:
    """Whether there is a backward pass in ``direction``."""
    if direction not in ("fwd", "fwd+bwd"):
        raise ValueError(f"direction: got {direction!r}, expected 'fwd' or 'fwd+bwd'")
    return direction == "fwd+bwd"


class Wrong(AssertionError):
    """Contenders that may not fail did; ``rows`` has what could be timed all the same."""

    def __init__(self, message: str, rows: list[Row]) -> None:
        super().__init__(message)
        self.rows = rows


def compare(
    contenders: Mapping[str, Callable[..., Tensor]],
    inputs: Sequence[Tensor],
    *,
    group: str,
    shape: str,
    direction: str,
    reference: str,
    oracle: Callable[..., Tensor] | None = None,
    bytes: int | None = None,
    flops: int | None = None,
    budgets: Mapping[str, float] | None = None,
    arithmetic: Mapping[str, str] | None = None,
    peers: Sequence[str] = (),
    seconds: float = 2.0,
    drive: Callable[[Call, int], None] | None = None,
    timer: Callable[[torch.device], Timer] = Timer,
) -> list[Row]:
    """Validates, then times, every contender on the same inputs; see ``benchmarks/conftest.py`` for the arguments.

    With ``seconds=0`` it only validates.

    Raises:
        Wrong: a contender's results are outside of its budget, or one that is no peer could not run. The others are
            timed first.
    """
    backward = check_direction(direction)
    if reference not in contenders:
        raise ValueError(f"reference: got {reference!r}, expected one of {', '.join(map(repr, contenders))}")
    device = inputs[0].device
    usual = arithmetic_of(next((t.dtype for t in inputs if t.is_floating_point()), torch.float32))
    arithmetics = {name: (arithmetic or {}).get(name, usual) for name in contenders}
    errors: dict[str, str] = {}
    wrong: list[str] = []

    with torch.set_grad_enabled(backward):
        plain_leaves = _leaves(inputs, backward)
        plain_out = contenders[reference](*plain_leaves)
        # Fresh and not all ones: a gradient that was dropped or transposed must show.
        grad_output = torch.randn_like(plain_out) if backward else None
        plain = forward_and_backward(contenders[reference], plain_leaves, grad_output)()
        wide = None if grad_output is None else grad_output.double()
        truth = forward_and_backward(oracle or contenders[reference], _leaves(inputs, backward, torch.float64), wide)()
        names = ["output", *(f"gradient {i}" for i in range(len(plain) - 1))]
        calls: dict[str, Call] = {}
        for name, fn in contenders.items():
            call = _in_arithmetic(
                forward_and_backward(fn, _leaves(inputs, backward), grad_output), arithmetics[name], usual
            )
            factor = (budgets or {}).get(name, 2.0)
            try:
                results = call()
                for what, got, near, true in zip(names, results, plain, truth, strict=True):
                    assert_within_budget(f"{group}, {shape}, {name}, {what}", got, near, true, factor=factor)
            except Exception as error:
                errors[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
                if name not in peers or isinstance(error, AssertionError):
                    wrong.append(f"{name}: {errors[name]}")
                continue
            calls[name] = call
        del plain, truth, plain_out, wide

        timers = {name: timer(device) for name in calls} if seconds else {}
        memory = {}
        if seconds:
            # The call whose memory is counted also says how long a round takes, roughly: a spare call costs minutes.
            begin = time.perf_counter()
            memory = {name: peak_extra_bytes(call, device) for name, call in calls.items()}
            one_round = time.perf_counter() - begin
            rounds = int(min(MAX_ROUNDS, max(MIN_ROUNDS, seconds / one_round)))

            def round_robin() -> None:
                for name, call in calls.items():
                    timers[name].sample(call)

            if drive is None:
                for _ in range(rounds):
                    round_robin()
            else:
                drive(round_robin, rounds)

    rows = [
        row_from_samples(
            group,
            shape,
            name,
            direction,
            timers[name].seconds(),
            bytes=bytes,
            flops=flops,
            reference=name == reference,
            peak_extra_bytes=memory[name],
            arithmetic=arithmetics[name],
        )
        for name in timers
    ]
    base = next((row.median_s for row in rows if row.reference), None)
    for row in rows:
        row.speedup_vs_reference = base / row.median_s if base and row.median_s else None
    if seconds:
        rows += [
            Row(group, shape, name, direction, median_s=None, iqr_s=None, rounds=0, error=why)
            for name, why in errors.items()
        ]
    if wrong:
        raise Wrong("; ".join(wrong), rows)
    return rows


def _in_arithmetic(call: Call, arithmetic: str, usual: str) -> Call:
    """``call`` with PyTorch's fp32 products set to ``arithmetic``, where that is not what they are set to anyway."""
    if arithmetic == usual:
        return call

    def with_setting() -> Any:
        with products_in(arithmetic):
            return call()

    return with_setting


def ceilings(device: torch.device) -> dict[str, float]:
    """What this machine reaches at best: GB/s of a copy, TFLOP/s of a product, on CUDA in each arithmetic."""
    cuda = device.type == "cuda"
    source = torch.ones(2**28 if cuda else 2**25, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(8192 if cuda else 1536, 8192 if cuda else 1536, device=device)

    def best(call: Call) -> float:
        timer = Timer(device)
        for _ in range(7):
            timer.sample(call)
        return min(timer.seconds())

    rates = {"copy_gbs": 2 * source.numel() * source.element_size() / best(lambda: target.copy_(source)) / 1e9}
    work = 2 * matrix.shape[0] ** 3 / 1e12
    with products_in("ieee"):
        rates["matmul_fp32_tflops"] = work / best(lambda: matrix @ matrix)
    if cuda:
        with products_in("tf32"):
            rates["matmul_tf32_tflops"] = work / best(lambda: matrix @ matrix)
        half = matrix.bfloat16()
        rates["matmul_bf16_tflops"] = work / best(lambda: half @ half)
    return rates


def environment(device: torch.device, measured: Mapping[str, float] | None = None) -> dict[str, Any]:
    """What the numbers were measured on and with: hardware, versions, commit, command; no names of hosts or paths.

    ``measured``: the ceilings, where they are known already.
    """
    machine: dict[str, Any] = {"cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "gpu": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
        }
    machine |= ceilings(device) if measured is None else measured
    return {
        "machine": machine,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
            "numpy": _version("numpy"),
        },
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "commit": _commit(),
        "command": " ".join([Path(sys.argv[0]).stem.replace("__main__", "pytest"), *sys.argv[1:]]),
    }


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
