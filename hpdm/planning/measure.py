"""The memory of a real training step, to hold the predictions of :mod:`hpdm.planning.training_cost` against.

A process of its own, so that nothing else counts. On the CPU the growth of peak resident memory over what the process
held before it built the model; the C library is told to give memory back at once (``MALLOC_*``), or what was freed
would still be resident. On CUDA ``max_memory_allocated``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpdm.patch.boxes import sample_boxes
from hpdm.patch.config import HPDMConfig
from hpdm.patch.model import HPDM
from hpdm.planning.training_cost import TEXT_TOKENS
from hpdm.training.optim import EMA, make_optimizer

# Storages of 64 KiB and more come from the system and go back to it when freed.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def measured_step(
    config: HPDMConfig,
    batch: int = 1,
    kernels: str = "auto",
    recompute: str = "none",
    precision: str = "fp32",
    optimizer: str = "adamw",
    device: str = "auto",
) -> int:
    """Peak memory in bytes of the second training step of a run, in a process of its own.

    Args:
        config, batch, kernels, recompute, precision, optimizer: as for
            :func:`hpdm.planning.training_cost.training_step`, with every backend for ``kernels``.
        device: ``"auto"`` takes CUDA when there is one.

    Raises:
        RuntimeError: the step failed, which includes running out of memory; or peak memory cannot be read here.
    """
    order = {
        "config": config.to_dict(), "batch": batch, "kernels": kernels, "recompute": recompute,
        "precision": precision, "optimizer": optimizer, "device": device,
    }  # fmt: skip
    command = [sys.executable, "-m", "hpdm.planning.measure", json.dumps(order)]
    done = subprocess.run(command, env={**os.environ, **_MALLOC}, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise RuntimeError(f"the measured step failed: {last[0]}")
    return int(json.loads(done.stdout)["peak_bytes"])


def _resident(what: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process in bytes."""
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError as error:
        raise RuntimeError("peak resident memory cannot be read on this system") from error
    found = re.search(rf"{what}:\s+(\d+) kB", text)
    if found is None:
        raise RuntimeError(f"/proc/self/status: got no {what}")
    return 1024 * int(found[1])


def _give_back() -> None:
    """Frees what nothing holds any more, down to the system where the C library can: used again, it would not show."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class NoiseTraining:
    """A model in training on clips of noise: what a step needs does not depend on what the clips show.

    Args:
        config: the model.
        device: where it trains.
        kernels, recompute: as for :class:`hpdm.patch.model.HPDM`.
        precision: ``"fp32"`` or ``"bf16"``.
        optimizer: ``"adamw"`` or ``"lamb"``.
        compiled: whether the model runs under ``torch.compile``.
    """

    def __init__(
        self, config: HPDMConfig, device: torch.device, kernels: str = "auto", recompute: str = "none",
        precision: str = "fp32", optimizer: str = "adamw", compiled: bool = False,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.config, self.device, self.precision = config, device, precision
        with device:
            self.model = HPDM(config, kernels, recompute)
        self.run: Callable[..., Tensor] = torch.compile(self.model) if compiled else self.model
        self.optimizer = make_optimizer(self.model, optimizer, 1e-4, 0.01)
        self.average = EMA(self.model, 0.999)

    def step(self, batch: int) -> Callable[[], None]:
        """A call that runs one whole training step on ``batch`` clips, always the same."""
        config, device = self.config, self.device
        x = torch.randn(batch, config.levels, config.channels, *config.patch, device=device)
        target = torch.randn_like(x)
        inputs: dict[str, Tensor] = {
            "x": x,
            "boxes": sample_boxes(config, batch, torch.Generator().manual_seed(0)).to(device),
            "t": torch.rand(batch, config.levels, device=device),
        }
        if config.conditioning == "class":
            inputs["labels"] = torch.zeros(batch, dtype=torch.long, device=device)
        if config.conditioning == "text":
            inputs["text"] = torch.randn(batch, TEXT_TOKENS, config.text_width, device=device)

        def call() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                loss = (self.run(**inputs) - target).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
            self.optimizer.step()
            self.average.update(self.model)
            self.optimizer.zero_grad(set_to_none=True)

        return call


def _measure(order: dict[str, Any]) -> int:
    name = order["device"]
    device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    config = HPDMConfig.from_dict(order["config"])
    small = config.replace(width=64, latent_width=config.head_width, latents=16, latent_layers=1)
    settings = [order[name] for name in ("kernels", "recompute", "precision", "optimizer")]
    if device.type == "cuda":
        step = NoiseTraining(config, device, *settings).step(order["batch"])
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    # A step of a small model first: libraries load and threads start, which is none of the model's memory.
    NoiseTraining(small, device, *settings).step(order["batch"])()
    _give_back()
    before = _resident("VmRSS")
    step = NoiseTraining(config, device, *settings).step(order["batch"])
    step()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # peak resident memory starts anew
    step()
    return _resident("VmHWM") - before


if __name__ == "__main__":
    print(json.dumps({"peak_bytes": _measure(json.loads(sys.argv[1]))}))
