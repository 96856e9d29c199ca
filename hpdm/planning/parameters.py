"""The number of parameters of a model, by part."""

from __future__ import annotations

from typing import Any

import torch

from hpdm.system import System


def parameters_by_part(system: System, config: Any) -> dict[str, int]:
    """Number of parameters per part of the model, in the order of the system's ``parameter_parts``."""
    with torch.device("meta"):
        model = system.build(config, kernels="reference")
    counts = {part: 0 for part, _ in system.parameter_parts}
    for name, parameter in model.named_parameters():
        counts[next(part for part, text in system.parameter_parts if text in name)] += parameter.numel()
    return counts
