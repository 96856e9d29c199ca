"""Configs, models and runs that are small enough for tests. The fixtures of ``tests/conftest.py`` are made of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hpdm import HPDM, HPDMConfig, presets, runs, systems
from hpdm.runs import RunConfig
from hpdm.training import options
from hpdm.training.checkpoint import save_checkpoint
from hpdm.training.ema import EMA, ConstantDecay
from hpdm.training.optim import make_optimizer
from hpdm.training.options import TrainOptions
from hpdm.training.trainer import Trainer


def small_config(**changes: Any) -> HPDMConfig:
    """Three levels of patches of 2x8x8 pixels, 16 wide."""
    values = {"patch": (2, 8, 8), "tokenizer": (2, 2, 2), "width": 16, "latents": 4, "latent_width": 16}
    return presets.tiny().replace(**(values | {"head_width": 16, "conditioning_width": 16} | changes))


def random_model(
    config: HPDMConfig, kernels: str = "torch", recompute: str = "none", scale: float = 0.1, seed: int = 0
) -> HPDM:
    """A model in eval mode as after some training: no weight is zero and no layer the identity."""
    torch.manual_seed(seed)
    model = HPDM(config, kernels, recompute).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model


def save_as_run(
    model: HPDM, folder: Path, names: Sequence[str] = (), training: Mapping[str, Any] | None = None
) -> Path:
    """Writes a run folder whose only checkpoint, of step 1, has the weights of ``model``; returns ``folder``."""
    about = RunConfig(systems.get("patch"), model.config, list(names), dict(training or {}))
    runs.save_run_config(folder, about)
    save_checkpoint(folder, 1, model, EMA(model, ConstantDecay(0.9)), make_optimizer(model, "adamw", 1e-3, 0.0))
    return folder


def train_options(clips: Path, out: Path, **changes: Any) -> TrainOptions:
    """Six steps on clips of 8x32x32 pixels in patches of 2x8x8: three levels."""
    values = {
        "data": clips, "out": out, "patch": (2, 8, 8), "resolution": (8, 32, 32), "steps": 6, "batch": 3, "warmup": 2,
        "optimizer": "adamw", "lr": 1e-3, "log_every": 1, "save_every": 3, "kernels": "torch", "workers": 0,
    }  # fmt: skip
    return options.train_options(**(values | changes))


def change_config(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes what a run's ``config.json`` holds, and leaves it as earlier versions wrote it, without a hash."""
    path = run / "config.json"
    values = json.loads(path.read_text())
    values.pop("sha256", None)
    change(values)
    path.write_text(json.dumps(values | {"format": 2}))


def stop_after_checkpoint(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every training run of this process stop once its checkpoint of ``step`` is complete."""
    real = Trainer.save

    def save(self: Trainer, **what: bool) -> None:
        real(self, **what)
        if self.step == step == self.saved:
            self.saver.wait()
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save", save)
