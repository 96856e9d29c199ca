"""Measurement: validate first, then time all contenders in turns in the same run, and say what they ran on.

On the CPU a sample is one call between two readings of ``time.perf_counter``. On CUDA a sample is one call between two
events that are queued behind a flush of the L2 cache and a short sleep of the device, so that neither a warm cache nor
the CPU's launch time counts; nothing synchronises between them.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpdm_kernels.testing import assert_within_budget

Call = Callable[[], Any]

MIN_ROUNDS, MAX_ROUNDS = 3, 50
# About a millisecond on current GPUs: longer than the CPU needs to queue a forward and backward pass of one op.
SLEEP_CYCLES = 2_000_000


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
    """Why a peer could not run here, if so."""
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
    """A :class:`Row` with the median and the interquartile range of ``samples`` (seconds), and the rates they give."""
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


class Timer:
    """Times calls on one device; ``sample`` queues one measurement, ``seconds`` gives them all."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        if device.type == "cuda":
            l2 = torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(max(2 * l2, 2**26), dtype=torch.int8, device=device)

    def sample(self, call: Call) -> None:
        if self.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(SLEEP_CYCLES)
            self.flush.zero_()
            start.record()
            call()
            end.record()
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
    peers: Sequence[str] = (),
    seconds: float = 2.0,
    drive: Callable[[Call, int], None] | None = None,
) -> list[Row]:
    """Validates, then times, every contender on the same inputs; see ``benchmarks/conftest.py`` for the arguments."""
    backward = check_direction(direction)
    if reference not in contenders:
        raise ValueError(f"reference: got {reference!r}, expected one of {', '.join(map(repr, contenders))}")
    device = inputs[0].device
    errors: dict[str, str] = {}

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
            call = forward_and_backward(fn, _leaves(inputs, backward), grad_output)
            try:
                results = call()
            except Exception as error:
                if name not in peers:
                    raise
                errors[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
                continue
            factor = (budgets or {}).get(name, 2.0)
            for what, got, near, true in zip(names, results, plain, truth, strict=True):
                assert_within_budget(f"{group}, {shape}, {name}, {what}", got, near, true, factor=factor)
            calls[name] = call
        del plain, truth, plain_out

        # The call whose memory is counted also says how long a round takes, roughly: a spare call would cost minutes.
        begin = time.perf_counter()
        memory = {name: peak_extra_bytes(call, device) for name, call in calls.items()}
        one_round = time.perf_counter() - begin
        rounds = int(min(MAX_ROUNDS, max(MIN_ROUNDS, seconds / one_round)))

        timers = {name: Timer(device) for name in calls}

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
        )
        for name in calls
    ]
    base = next(row.median_s for row in rows if row.reference)
    for row in rows:
        row.speedup_vs_reference = base / row.median_s if base and row.median_s else None
    rows += [
        Row(group, shape, name, direction, median_s=None, iqr_s=None, rounds=0, error=why)
        for name, why in errors.items()
    ]
    return rows


def ceilings(device: torch.device) -> dict[str, float]:
    """What this machine reaches at best: GB/s of a large copy, TFLOP/s of a large fp32 product, at current settings."""
    cuda = device.type == "cuda"
    source = torch.ones(2**28 if cuda else 2**25, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(8192 if cuda else 1536, 8192 if cuda else 1536, device=device)
    copy, product = Timer(device), Timer(device)
    for _ in range(7):
        copy.sample(lambda: target.copy_(source))
        product.sample(lambda: matrix @ matrix)
    n = matrix.shape[0]
    return {
        "copy_gbs": 2 * source.numel() * source.element_size() / min(copy.seconds()) / 1e9,
        "matmul_fp32_tflops": 2 * n**3 / min(product.seconds()) / 1e12,
    }


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on and with: hardware, versions, commit, command; no names of hosts or paths."""
    machine: dict[str, Any] = {"cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {"gpu": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
    machine |= ceilings(device)
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
