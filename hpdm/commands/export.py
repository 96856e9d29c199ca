"""``hpdm export``: a run's weights as one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from hpdm.training.checkpoint import export


@dataclass(frozen=True)
class ExportOptions:
    """Write a run's weights and config as one safetensors file, which every --run takes in the run's place."""

    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    """Folder of the run, or of one of its checkpoints, written by any number of processes."""
    out: Path
    """File to write, ending in .safetensors."""
    weights: Literal["ema", "model"] = "ema"

    def run(self) -> int:
        """The command ``hpdm export``; returns the exit status."""
        step = export(self.run_folder, self.out, self.weights)
        print(f"{self.out}: {self.weights} weights of step {step}, {self.out.stat().st_size / 1e6:.1f} MB")
        return 0
