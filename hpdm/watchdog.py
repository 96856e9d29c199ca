"""Watches the processes of a run, so that no wait for one of them is without end or without a name.

Every process reports to the group's store once a second: that it is alive, and where it is in its work. Each looks for
processes that are dead, that do not answer, or that are behind while all others wait. The first one that finds one
tells all, and each process ends: its main thread may sit in a collective that never returns.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist

from hpdm.lock import start_of_process
from hpdm.printable import printable

INTERVAL = 1.0
"""Seconds between reports."""
GRACE = 2.0
"""Seconds in which a process may still end by itself, with an error of its own, once another one is found dead."""
LAST_CHECKPOINT = 30.0
"""Seconds for a last checkpoint after the launcher is gone."""


class Report(NamedTuple):
    """What a process says of itself."""

    beat: int
    """Counts its reports."""
    status: str
    """"running", "done" or "failed"."""
    step: int
    """The step that it is at; -1 before the first."""
    part: int
    """Part of the step, in the order of the work."""
    what: str
    """The same in words; empty where it may take any time."""


class _Seen(NamedTuple):
    report: Report
    alive: float  # when the report last changed
    moved: float  # when step or part last changed


class Watchdog:
    """The threads of one process: one talks to the store, and may wait for it for ever; the other one does not wait.

    Args:
        store: of the group, for this object alone. Process 0 has it, or the launcher.
        rank, world_size: of the process.
        timeout: seconds after which a process that does not answer is given up.
        end: called with the reason when the process must end; it does not return in practice.
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, timeout: float, end: Callable[[str], None] | None = None
    ) -> None:
        self.store, self.rank, self.world_size, self.timeout = store, rank, world_size, timeout
        self.end = end or _end_process
        self.reason: str | None = None
        """Why the run must end, once that is known."""
        self._beat, self._status = 0, "running"
        self._place = (-1, 0, "")  # one object, since the main thread sets it and others read it
        self._reports: dict[int, Report] = {}
        self._seen: dict[int, _Seen] = {}
        self._told = time.monotonic()  # when the store last answered
        self._lost = False  # the store has ended
        self._found: str | None = None  # a reason of this process, which the others do not know yet
        self._since: dict[str, float] = {}  # when a reason was first found
        # Of torchrun's processes the parent is the launcher; others may outlive the shell that began them.
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._stop, self._known, self._asked = threading.Event(), threading.Event(), threading.Event()
        self._talking = threading.Thread(target=self._talk, name="hpdm-watchdog-store", daemon=True)
        self._watching = threading.Thread(target=self._watch, name="hpdm-watchdog", daemon=True)

    def start(self) -> None:
        """Introduces the process to the others and starts the threads. A collective."""
        about = {"host": socket.gethostname(), "pid": os.getpid(), "start": start_of_process(os.getpid())}
        self.store.set(f"who/{self.rank}", json.dumps(about))
        self._tell()
        ranks = range(self.world_size)
        self.store.wait([f"{kind}/{rank}" for rank in ranks for kind in ("who", "report")])
        self._who: list[dict[str, Any]] = [json.loads(self.store.get(f"who/{rank}")) for rank in ranks]
        self._talking.start()
        self._watching.start()

    def at(self, step: int, part: int, what: str) -> None:
        """Says where the process is. With ``what`` empty it may take any time, as for a validation."""
        self._place = (step, part, what)

    def leave(self, failed: bool) -> None:
        """Ends the threads; the others are told whether the process failed."""
        self._stop.set()
        self._watching.join(INTERVAL)
        self._talking.join(INTERVAL)
        self._status = "failed" if failed else "done"
        if self.reason is None and not self._talking.is_alive():
            with contextlib.suppress(RuntimeError):  # the process with the store is gone already
                self._tell()

    def wait_for_reason(self) -> str | None:
        """What the watchdogs find within some seconds: the cause of an error that a collective has just raised."""
        self._asked.set()
        self._known.wait(2 * INTERVAL + GRACE)
        return self.reason

    def _talk(self) -> None:
        """Tells the store where this process is, and asks it for the others."""
        others = range(1, self.world_size) if self.rank == 0 else (0,)
        while not self._stop.wait(INTERVAL):
            try:
                self._beat += 1
                self._tell()
                self._reports = {rank: Report(*json.loads(self.store.get(f"report/{rank}"))) for rank in others}
                if self._found is not None:
                    self.store.compare_set("reason", "", self._found)  # the first one wins, so that all say the same
                if self.store.check(["reason"]):
                    reason = self.store.get("reason").decode()
                    if self.rank == 0:  # with which the store may end: the others are to read it, too
                        self._stop.wait(2 * INTERVAL)
                    self._conclude(reason)
                    return
            except RuntimeError:
                self._lost = True
                return
            self._told = time.monotonic()

    def _report(self) -> Report:
        return Report(self._beat, self._status, *self._place)

    def _tell(self) -> None:
        self.store.set(f"report/{self.rank}", json.dumps(self._report()))

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL) and self.reason is None:
            if self._parent not in (None, os.getppid()):
                self._launcher_is_gone()
                return
            reason = self._store_is_gone() or self._dead_here() or self._silent() or self._behind()
            if reason is None:
                self._since.clear()
                continue
            first = self._since.setdefault(reason, time.monotonic())
            if not self._asked.is_set() and time.monotonic() - first < GRACE:
                continue
            self._found = reason
            if self._lost or self._asked.is_set() or (not self._stop.wait(4 * INTERVAL) and self.reason is None):
                self._conclude(reason)

    def _conclude(self, reason: str) -> None:
        """Ends this process, unless it ends by itself."""
        if self._stop.is_set() or self.reason is not None:
            return
        self.reason = reason
        self._known.set()
        if not self._asked.is_set():
            self.end(reason)

    def _launcher_is_gone(self) -> None:
        """Asks this process to save and stop: whoever starts the run again must not find it running."""
        os.kill(os.getpid(), signal.SIGTERM)
        if not self._stop.wait(LAST_CHECKPOINT):
            self.end(f"the launcher is gone, and there was no end within {LAST_CHECKPOINT:.0f} s")

    def _store_is_gone(self) -> str | None:
        if time.monotonic() - self._told >= self.timeout:
            return f"{self._name(0)}, which connects all processes, has not answered for {self.timeout:.0f} s"
        if self._lost:
            return self._dead_here() or f"{self._name(0)}, which connects all processes, has ended"
        return None

    def _dead_here(self) -> str | None:
        """A process of this machine that has died."""
        for rank, who in enumerate(self._who):
            if who["host"] == self._who[self.rank]["host"] and start_of_process(who["pid"]) != who["start"]:
                report = self._reports.get(rank)
                if report is None or report.status == "running":
                    return f"{self._name(rank)} has died"
        return None

    def _silent(self) -> str | None:
        """Rank 0 looks at all processes, the others at rank 0."""
        now = time.monotonic()
        for rank, report in {self.rank: self._report(), **self._reports}.items():
            seen = self._seen.get(rank) or _Seen(report, now, now)
            alive = now if report != seen.report else seen.alive
            moved = now if report[2:4] != seen.report[2:4] or not report.what else seen.moved
            self._seen[rank] = _Seen(report, alive, moved)
            if report.status == "failed":
                return f"{self._name(rank)} has ended with an error"
            if rank != self.rank and report.status == "running" and now - alive >= self.timeout:
                return f"{self._name(rank)} has not answered for {self.timeout:.0f} s"
        return None

    def _behind(self) -> str | None:
        """A process that hangs while others are ahead of it; rank 0 looks for all."""
        if self.rank != 0:
            return None
        running = {rank: seen for rank, seen in self._seen.items() if seen.report.status == "running"}
        last = min(running, key=lambda rank: running[rank].report[2:4])
        report = running[last].report
        ahead = any(seen.report[2:4] > report[2:4] for seen in running.values())
        if report.what and ahead and time.monotonic() - running[last].moved >= self.timeout:
            return f"{self._name(last)} hangs at step {report.step}, {report.what}, for {self.timeout:.0f} s"
        return None

    def _name(self, rank: int) -> str:
        who = self._who[rank]
        return f"process {rank} ({who['pid']} on {who['host']})"


def _end_process(reason: str) -> None:
    """Says why and ends this process at once, whatever its main thread waits for."""
    print(printable(f"hpdm: error: {reason}"), file=sys.stderr, flush=True)
    os._exit(1)
