"""The memory of a real training step, measured to check the predictions of :mod:`hpdm.planning.training_cost`.

The step runs in a process of its own, so that nothing else is counted. On the CPU its memory is peak resident memory
minus the resident memory before the model was built. The environment variables ``MALLOC_*`` make the C library return
freed memory at once, which would otherwise count as resident. On CUDA it is ``max_memory_allocated``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpdm.distributed import pick_device
from hpdm.system import System
from hpdm.training.ema import EMA, PowerLaw
from hpdm.training.optim import make_optimizer
from hpdm.training.step import update

# Storages of 64 KiB and more are mapped one by one, and unmapped when freed.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def measured_step(
    system: System,
    config: Any,
    batch: int = 1,
    kernels: str = "auto",
    recompute: str = "none",
    precision: str = "fp32",
    optimizer: str = "adamw",
    averages: int = 1,
    device: str = "auto",
) -> int:
    """Peak memory in bytes of the second training step of a run, in a process of its own.

    Args:
        system, config, batch, kernels, recompute, precision, optimizer, averages: as for
            :func:`hpdm.planning.training_cost.training_step`, with every backend for ``kernels``.
        device: ``"auto"`` takes CUDA when there is one.

    Raises:
        RuntimeError: the step failed, which includes running out of memory; or peak memory cannot be read here.
    """
    step = {
        "system": (type(system).__module__, type(system).__name__), "config": config.to_dict(), "batch": batch,
        "kernels": kernels, "recompute": recompute, "precision": precision, "optimizer": optimizer,
        "averages": averages, "device": device,
    }  # fmt: skip
    command = [sys.executable, "-m", "hpdm.planning.measure", json.dumps(step)]
    process = subprocess.run(command, env={**os.environ, **_MALLOC}, capture_output=True, text=True)
    if process.returncode:
        last = process.stderr.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
        raise RuntimeError(f"the measured step failed: {last[0]}")
    return int(json.loads(process.stdout)["peak_bytes"])


class NoiseTraining:
    """A model in training on noise. The cost of a step does not depend on the content of the clips.

    Args:
        system: kind of the model.
        config: the model's.
        device: where it trains.
        kernels, recompute: as for :meth:`hpdm.system.System.build`.
        precision: ``"fp32"`` or ``"bf16"``.
        optimizer: ``"adamw"``, ``"lamb"`` or ``"muon"``.
        averages: number of moving averages of the weights.
        compiled: whether the model runs under ``torch.compile``.
    """

    def __init__(
        self, system: System, config: Any, device: torch.device, kernels: str = "auto", recompute: str = "none",
        precision: str = "fp32", optimizer: str = "adamw", averages: int = 1, compiled: bool = False,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.system, self.config, self.device, self.precision = system, config, device, precision
        with device:
            self.model = system.build(config, kernels, recompute)
        self.call: Callable[..., Tensor] = torch.compile(self.model) if compiled else self.model
        # The formulas get the optimizer of the library: what would be lost by a slower one is not theirs.
        backend = "auto" if kernels == "reference" else kernels
        self.optimizer = make_optimizer(
            self.model, optimizer, 1e-4, 0.01, hidden_modules=system.hidden_modules(self.model), kernels=backend
        )
        self.ema = EMA(self.model, *[PowerLaw(0.05)] * averages)

    def step(self, batch: int) -> Callable[[], None]:
        """A function that runs one whole training step on ``batch`` clips, the same clips in every call."""
        inputs = {name: t.to(self.device) for name, t in self.system.example_inputs(self.config, batch).items()}
        inputs["x"] = torch.randn(inputs["x"].shape, device=self.device)
        target = torch.randn_like(inputs["x"])

        def run() -> None:
            update(
                self.model,
                self.optimizer,
                self.ema,
                [lambda: (self.system.predict(self.config, self.call, inputs) - target).square().mean()],
                autocast=lambda: torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"),
            )
            self.optimizer.zero_grad(set_to_none=True)

        return run


def _measure(step: dict[str, Any]) -> int:
    """Peak bytes of a step, run in the process that :func:`measured_step` starts, with its description of the step."""
    module, name = step["system"]
    system, device = getattr(import_module(module), name)(), pick_device(step["device"])
    config, batch = system.config_from_dict(step["config"]), step["batch"]
    settings = [step[name] for name in ("kernels", "recompute", "precision", "optimizer", "averages")]
    if device.type == "cuda":
        run = NoiseTraining(system, config, device, *settings).step(batch)
        run()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    # Warm up with a small model, so that loading libraries and starting threads is not measured.
    NoiseTraining(system, _smallest(system), device, *settings).step(batch)()
    _return_freed_memory()
    before = _resident("VmRSS")
    run = NoiseTraining(system, config, device, *settings).step(batch)
    run()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM, peak resident memory
    run()
    return _resident("VmHWM") - before


def _smallest(system: System) -> Any:
    """The config of the preset with the fewest pixels."""
    return min((config() for config in system.presets.values()), key=lambda config: math.prod(config.resolution))


def _resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process in bytes."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError as error:
        raise RuntimeError("peak resident memory cannot be read on this system") from error
    match = re.search(rf"{field}:\s+(\d+) kB", status)
    if match is None:
        raise RuntimeError(f"/proc/self/status: got no {field}")
    return 1024 * int(match[1])


def _return_freed_memory() -> None:
    """Returns freed memory to the system if the C library can; reused memory would not show as growth."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    print(json.dumps({"peak_bytes": _measure(json.loads(sys.argv[1]))}))
