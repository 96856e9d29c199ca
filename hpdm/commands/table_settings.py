"""What the result of an evaluation depends on, so that a table's cells are used again only for the same settings."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hpdm.commands.evaluate_options import EvaluateOptions
from hpdm.evaluation.detector import Detector, Kind
from hpdm.runs import Run

SAMPLES = 512
"""Videos for FVD, KVD and Inception score: FVD@512, as in the paper's tables."""

DETECTORS: dict[str, Kind] = {"detector": "features", "classifier": "classes"}

_NOT_IN_THE_RESULT = {"run_folder", "sampler", "json", "device", "kernels", "statistics", "data"}
"""Options that change the result by rounding at most, and those that a table adds itself."""


def measured_with(options: EvaluateOptions, loaded: Run) -> dict[str, Any]:
    """The settings of an evaluation but for its run and its sampler, and the step of the run."""
    settings = {name: value for name, value in asdict(options).items() if name not in _NOT_IN_THE_RESULT}
    for name, kind in DETECTORS.items():
        if settings[name] is not None:
            settings[name] = Detector(settings[name], kind).sha256
    return settings | {"data": str(options.data.resolve()), "step": loaded.step}
