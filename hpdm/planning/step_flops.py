"""FLOPs of a run's training step, predicted beside the run in a process of its own.

The prediction takes seconds. A run need not wait for it: it starts once the run has lasted a while, so that short runs
do without, and the number is there some seconds later.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from importlib import import_module
from typing import Any

from hpdm.planning.training_cost import training_step
from hpdm.system import System

logger = logging.getLogger(__name__)

START_S = 20.0
"""Seconds of training after which the prediction starts."""


class StepFlops:
    """Called for the FLOPs of this rank's part of a step: forward and backward without recomputation.

    The definition is that of model FLOPs: what ``--recompute`` computes again is not counted, nor is the first pass of
    self-conditioning. So numbers of runs with different settings can be compared.

    Args:
        system, config: the model.
        clips: clips of a step on this rank.
        start_s: seconds from the first call to the start of the prediction.
    """

    def __init__(self, system: System, config: Any, clips: int, start_s: float = START_S) -> None:
        self._question = json.dumps(
            {"system": [type(system).__module__, type(system).__name__], "config": config.to_dict()}
        )
        self._clips, self._start_s = clips, start_s
        self._first_call: float | None = None
        self._process: subprocess.Popen[str] | None = None
        self._finished = False
        self._flops: float | None = None

    def __call__(self) -> float | None:
        """The FLOPs; ``None`` until they are predicted, and for good if they cannot be, which the log tells."""
        now = time.monotonic()
        self._first_call = now if self._first_call is None else self._first_call
        if self._process is None:
            if now >= self._first_call + self._start_s:
                self._process = self._started()
        elif not self._finished and self._process.poll() is not None:
            self._finished = True
            self._flops = self._result(self._process)
        return self._flops

    def close(self) -> None:
        """Ends the prediction if it still runs."""
        if self._process is not None and not self._finished:
            self._finished = True
            self._process.kill()
            self._process.communicate()

    def _started(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "hpdm.planning.step_flops", self._question],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the training process
        )

    def _result(self, process: subprocess.Popen[str]) -> float | None:
        out, error = process.communicate()
        if process.returncode:
            reason = error.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
            logger.warning("the log has no tflop_per_s: the step's FLOPs cannot be predicted (%s)", reason[0])
            return None
        return float(json.loads(out)["flops"]) * self._clips


def main(question: str) -> None:
    """Prints the FLOPs of a step on one clip; they grow in proportion to the clips."""
    values = json.loads(question)
    module, name = values["system"]
    system = getattr(import_module(module), name)()
    if hasattr(os, "nice"):
        os.nice(10)
    cost = training_step(system, system.config_from_dict(values["config"]))
    print(json.dumps({"flops": cost.flops - cost.first_pass_flops}))


if __name__ == "__main__":
    main(sys.argv[1])
