"""Profiles of training steps: a trace for chrome://tracing or Perfetto, and a table of the slowest operations."""

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
"""Steps before the first one recorded, whose time goes to allocations, compilation and the first clips."""


@contextmanager
def profiled(steps: int, folder: Path) -> Iterator[Callable[[], None]]:
    """Records training steps within the block, on rank 0, and writes ``folder/trace.json`` and ``folder/summary.txt``.

    Args:
        steps: number of steps to record; 0 for no profile. The files are written after the last of them.
        folder: created when needed.

    Yields:
        A function to call after every step.
    """
    if steps == 0 or not distributed.is_first():
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]

    def write(result: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / "trace.json") as temporary:
            result.export_chrome_trace(str(temporary))
        order = "self_cuda_time_total" if ProfilerActivity.CUDA in activities else "self_cpu_time_total"
        write_text(folder / "summary.txt", result.key_averages().table(sort_by=order, row_limit=30) + "\n")
        logger.info("profile of %d steps: %s, %s", steps, folder / "trace.json", folder / "summary.txt")

    plan = schedule(skip_first=SKIPPED, wait=0, warmup=1, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
