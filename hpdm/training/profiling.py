"""Where the time of training steps goes: a trace for chrome://tracing or Perfetto, and a table."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from hpdm import distributed
from hpdm.files import atomic_path, write_text

logger = logging.getLogger(__name__)

SKIPPED = 3
"""Steps before the first one that is recorded: allocations, compilation, the first decoded clips."""


@contextmanager
def profiled(steps: int, folder: Path) -> Iterator[Callable[[], None]]:
    """Gives what to call after every step; records ``steps`` of them on process 0, none for 0.

    Writes ``folder/trace.json`` and ``folder/summary.txt`` as soon as they are recorded.
    """
    if steps == 0 or not distributed.is_first():
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]

    def write(found: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / "trace.json") as temporary:
            found.export_chrome_trace(str(temporary))
        order = "self_cuda_time_total" if ProfilerActivity.CUDA in activities else "self_cpu_time_total"
        write_text(folder / "summary.txt", found.key_averages().table(sort_by=order, row_limit=30) + "\n")
        logger.info("profile of %d steps: %s, %s", steps, folder / "trace.json", folder / "summary.txt")

    plan = schedule(skip_first=SKIPPED, wait=0, warmup=1, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
