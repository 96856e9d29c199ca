"""Runs a function or a command in several processes that form a process group of ``torch.distributed`` (gloo)."""

from __future__ import annotations

import inspect
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_CALL = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("ranks", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["ranks"] = module
spec.loader.exec_module(module)
getattr(module, sys.argv[2])(*sys.argv[3:])
"""


def run_ranks(
    target: Callable[..., Any] | Sequence[Any],
    world_size: int,
    *arguments: Any,
    timeout: float = 300.0,
    **environment: str,
) -> list[str]:
    """Runs ``target`` once per rank, with the variables that ``torchrun`` sets, and one thread each.

    Args:
        target: a function at the top of a file, called with ``arguments`` as strings; or the arguments of Python, such
            as ``["-m", "hpdm", "plan"]``, which ``arguments`` come after.
        world_size: number of processes.
        timeout: seconds for all of them.
        environment: further variables.

    Returns:
        What each rank printed, by rank.

    Raises:
        AssertionError: a rank failed or none was done in time; has its output. The others are killed.
    """
    if callable(target):
        target = ["-c", _CALL, inspect.getsourcefile(target), target.__name__]
    command = [sys.executable, "-W", "ignore", *map(str, (*target, *arguments))]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world_size)}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), **environment}
    with ExitStack() as stack:
        files = [[stack.enter_context(tempfile.TemporaryFile()) for _ in range(2)] for _ in range(world_size)]
        ranks = [
            subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=error,
                env=variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank, (out, error) in enumerate(files)
        ]  # fmt: skip
        try:
            status = _wait(ranks, timeout)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        printed = [[_text(file) for file in pair] for pair in files]
    failed = [rank for rank, code in enumerate(status) if code != 0]
    if failed:
        first = failed[0]
        raise AssertionError(f"rank {first} of {world_size}: status {status[first]}\n{''.join(printed[first])}")
    return [out for out, _ in printed]


def _wait(ranks: Sequence[subprocess.Popen[bytes]], timeout: float) -> list[int | None]:
    """Exit statuses once all ranks are done, one has failed, or the time is over; ``None`` for those that still run."""
    end = time.monotonic() + timeout
    while True:
        status = [rank.poll() for rank in ranks]
        if None not in status or any(status) or time.monotonic() > end:
            # The rank that failed first: those that only wait for it are not to blame.
            return [code if code or not any(status) else 0 for code in status]
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _text(file: Any) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
