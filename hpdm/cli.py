"""The command line: ``hpdm {train,sample,evaluate,table,export,plan,data} ...``.

A command's module is imported only when the command is run, so that ``hpdm --help`` is fast.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

import hpdm
from hpdm.printable import PrintableFormatter, PrintableStream, printable

INTERRUPTED = 130
"""Exit status after Ctrl-C, by the convention of shells: 128 plus the signal's number."""
MISUSED = 2
"""Exit status of a command line that cannot be parsed, the same as tyro's."""


class Command(NamedTuple):
    """A word after ``hpdm``."""

    module: str
    """Module in ``hpdm.commands`` that has a function ``run(options) -> exit status``."""
    options: str
    """Name of the type of the options: a dataclass, or a union of them for a command with subcommands."""
    options_module: str | None
    """Module that defines this type; the command's own if ``None``."""
    summary: str


COMMANDS = {
    "train": Command("train", "TrainOptions", "hpdm.training.options", "Train a model on videos."),
    "sample": Command("sample", "SampleOptions", None, "Sample videos from a trained run."),
    "evaluate": Command("evaluate", "EvaluateOptions", None, "Measure a run: its denoising error, or its samples."),
    "table": Command(
        "table", "TableCommand", None, "Train, sample and measure what the paper's Tables 3 and 4 compare."
    ),
    "export": Command("export", "ExportOptions", None, "Write a run's weights and config as one file."),
    "plan": Command("plan", "PlanCommand", None, "Predict parameters, memory and work of a model, without a GPU."),
    "data": Command("data", "DataCommand", None, "Render synthetic clips, look into videos, pack, embed, encode."),
}


def usage() -> str:
    """What ``hpdm --help`` prints."""
    lines = [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([
        "usage: hpdm [-h] [--version] COMMAND ...",
        "",
        "Hierarchical Patch Diffusion Models for video.",
        "",
        "commands:",
        *lines,
        "",
        "`hpdm COMMAND --help` lists the options of a command.",
    ])  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its status.

    An error that a user can cause (bad options, missing or damaged files, a full disk, a missing device) prints one
    line on standard error and exits with status 1; ``HPDM_DEBUG=1`` shows its traceback. Any other error is a bug and
    always shows its traceback.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    word, word_arguments = (words[0], words[1:]) if words else ("", [])
    if word in ("-h", "--help"):
        print(usage())
        sys.exit(0)
    if word == "--version":
        print(f"hpdm {hpdm.__version__}")
        sys.exit(0)
    if word not in COMMANDS:
        got = repr(word) if word else "no command"
        print(f"{usage()}\n\nhpdm: error: got {got}, expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(MISUSED)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter("%(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    _end(_reporting_errors(lambda: _run(word, word_arguments)))


def _end(status: int) -> NoReturn:
    """Ends the process. One of several does not tidy up: that would wait for what the others may never send."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(status)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe
            stream.flush()
    os._exit(status)


def _run(word: str, arguments: Sequence[str]) -> int:
    import tyro

    command = COMMANDS[word]
    module = import_module(f"hpdm.commands.{command.module}")
    kind: Any = getattr(import_module(command.options_module or module.__name__), command.options)
    config = (tyro.conf.OmitSubcommandPrefixes,)
    options = tyro.cli(kind, prog=f"hpdm {word}", args=arguments, config=config)
    # What is printed holds names of classes and files, which may hold what a terminal obeys.
    with redirect_stdout(PrintableStream(sys.stdout)):
        status: int = module.run(options)
    return status


def _reporting_errors(command: Callable[[], int]) -> int:
    """The exit status of ``command``; 1 after an error that a user can cause."""
    try:
        status = command()
        sys.stdout.flush()
        return status
    except (ValueError, OSError, RuntimeError, FloatingPointError, ImportError, MemoryError) as error:
        if os.environ.get("HPDM_DEBUG") == "1":
            raise
        reason = "out of memory" if isinstance(error, MemoryError) else str(error).strip()
        print(printable(f"hpdm: error: {reason}"), file=sys.stderr)
        _give_up_stdout()
        return 1
    except KeyboardInterrupt as interruption:
        return getattr(interruption, "status", INTERRUPTED)


def _give_up_stdout() -> None:
    """Drops what cannot be printed, as the disk is full or the pipe is closed: Python would try again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
