"""Starts ``hpdm`` commands in forked processes, so that each costs milliseconds and not the imports of PyTorch.

Run as a module, it reads a JSON request per line and answers with one: ``start`` forks a process, in a session of its
own, that runs a command; ``status`` says how one has ended.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import tempfile
import traceback
from typing import Any

import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.utils.data

import hpdm.cli
import hpdm.commands.export
import hpdm.commands.sample
import hpdm.commands.train
import hpdm.patch.presets
from tests.small import small_config

PR_SET_PDEATHSIG = 1
"""Linux: a process asks for a signal when its parent ends, here so that a test that is killed leaves no training."""


def main() -> None:
    # Processes that are killed leave their temporary files, which are removed with this folder.
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        _serve()


def _serve() -> None:
    torch.set_num_threads(1)
    # What is tested are files, signals and processes, so the model is as small as can be.
    hpdm.patch.presets.PRESETS["tiny"] = small_config
    ended: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer: dict[str, Any] = {"pid": _start(request)}
        else:
            _reap(ended)
            answer = {"status": ended.get(request["status"])}
        print(json.dumps(answer), flush=True)


def _reap(ended: dict[int, int]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        ended[pid] = os.waitstatus_to_exitcode(status)


def _start(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, file in ((0, nothing), (1, log), (2, log)):
            os.dup2(file, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.environ.update(request["environment"])
        if request["before"]:
            module, name, arguments = request["before"]
            getattr(importlib.import_module(module), name)(*arguments)
        hpdm.cli.main(request["start"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 98
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
