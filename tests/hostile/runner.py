"""Runs commands of ``hpdm`` in processes of their own, which start in no time; what they print and write."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hpdm.cli import main

ROOT = Path(__file__).parents[2]
CRASHED = 98
_PRELOADED = [
    "tests.hostile.runner", "torch", "safetensors.torch", "hpdm.commands.train", "hpdm.commands.sample",
    "hpdm.commands.evaluate", "hpdm.commands.data", "hpdm.commands.export", "hpdm.training.trainer", "av", "PIL.Image",
]  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int | None
    """``None``: it did not, and was killed."""
    out: str
    errors: str
    seconds: float
    """Of a processor, of it and its decoding process: on a busy machine it may take longer."""
    megabytes: int
    """The most that it or its decoding process had in memory."""

    @property
    def error_lines(self) -> list[str]:
        """The lines on standard error that are no progress bars and no log."""
        lines = re.split(r"[\r\n]+", self.errors)
        return [line for line in lines if line.strip() and not re.search(r"%\||\dit/s|\?it/s|^hpdm[._][\w.]+: ", line)]


def run(
    arguments: Sequence[object], folder: Path, setup: Callable[[], None] | None = None, limit_s: float = 60
) -> Ended:
    """Runs ``hpdm ARGUMENTS`` in a folder.

    Args:
        arguments: of the command.
        folder: its working directory; what it prints goes into ``folder/.printed``.
        setup: called in the process before the command, a function at the top of a module.
        limit_s: seconds after which it is killed.
    """
    printed = folder / ".printed"
    printed.mkdir(parents=True, exist_ok=True)
    (printed / "end").unlink(missing_ok=True)
    process = _context().Process(target=_command, args=([str(a) for a in arguments], str(folder), setup))
    process.start()
    process.join(limit_s)
    if process.is_alive():
        process.kill()
        process.join()
    out, errors = ((printed / name).read_bytes().decode(errors="surrogateescape") for name in ("out", "errors"))
    end = json.loads((printed / "end").read_text()) if (printed / "end").exists() else {}
    return Ended(end.get("status"), out, errors, end.get("seconds", limit_s), end.get("megabytes", 0))


@cache
def _context() -> Any:
    os.environ["PYTHONPATH"] = str(ROOT)  # for the process from which the others are forked
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _command(arguments: list[str], folder: str, setup: Callable[[], None] | None) -> None:
    printed = Path(folder) / ".printed"
    for number, name in ((1, "out"), (2, "errors")):
        os.dup2(os.open(printed / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False, errors="backslashreplace") for n in (1, 2))
    os.chdir(folder)
    os.environ |= {"HPDM_CACHE": f"{folder}/.cache", "HOME": folder, "TMPDIR": folder}
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark of memory starts anew
    started, status = time.process_time(), CRASHED
    try:
        if setup is not None:
            setup()
        main(arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    from hpdm.data.decoder_process import process

    own = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    children = process.memory() >> 20
    process.stop()
    of_children = resource.getrusage(resource.RUSAGE_CHILDREN)
    children = max(children, of_children.ru_maxrss >> 10)
    seconds = time.process_time() - started + of_children.ru_utime + of_children.ru_stime
    end = {"status": status, "seconds": seconds, "megabytes": max(int(own.split()[1]) >> 10, children)}
    (printed / "end").write_text(json.dumps(end))
    os._exit(0)


def tree(folder: Path) -> set[str]:
    """The files and links below a folder, without what the runner and the decoders keep there."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names = (path.relative_to(folder).as_posix() for path in paths)
    return {name for name in names if not re.search(r"(^|/)\.(printed|cache)/|\.tar\.index\.json$", name)}


def control_characters(text: str) -> set[str]:
    """The characters of a text that a terminal obeys, but for those of lines and progress bars."""
    return {c for c in text if (ord(c) < 32 or 127 <= ord(c) < 160 or 0xDC80 <= ord(c) <= 0xDCFF) and c not in "\n\r\t"}
