"""``hpdm export``: a run's weights as one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from hpdm import runs
from hpdm.tensor_file import FilePrecision


@dataclass(frozen=True)
class ExportOptions:
    """Write a run's weights and config as one safetensors file, which every --run takes in the run's place."""

    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    """Folder of the run, or of one of its checkpoints, written by any number of processes."""
    out: Path
    """File to write, ending in .safetensors."""
    weights: str = "ema"
    """Weights of the run: "ema" is their (first) moving average, "ema-0.10" that of a relative width, if the run has
    several, "model" those of the last step."""
    precision: FilePrecision = "fp32"
    """Of the weights in the file; "fp16" takes half of the disk."""


def run(options: ExportOptions) -> int:
    """The command ``hpdm export``; returns the exit status."""
    step = runs.export(options.run_folder, options.out, options.weights, options.precision)
    size = options.out.stat().st_size / 1e6
    print(f"{options.out}: {options.weights} weights of step {step}, {size:.1f} MB")
    return 0
