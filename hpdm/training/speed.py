"""How well a run uses its device: peak memory, achieved TFLOP/s, and their share of what the device could do."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable

import torch

PEAKS = {
    "A100": {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0},
    "H100 PCIe": {"fp32": 51.0, "tf32": 378.0, "bf16": 756.0},
    "H100 NVL": {"fp32": 60.0, "tf32": 417.5, "bf16": 835.0},
    "H100 80GB HBM3": {"fp32": 67.0, "tf32": 494.7, "bf16": 989.4},
    "H200": {"fp32": 67.0, "tf32": 494.7, "bf16": 989.4},
}
"""Largest TFLOP/s of matrix products without sparsity, by a part of the device's name, from NVIDIA's data sheets. That
of a CPU depends on its clock, so there is none here."""


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """The peak of a device at ``"fp32"``, ``"tf32"`` or ``"bf16"`` by :data:`PEAKS`; ``None`` where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peaks[precision] for part, peaks in PEAKS.items() if part in name), None)


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has had at once so far: allocated on its GPU, or resident for a run on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class Speed:
    """The columns of the log about the use of the device.

    Args:
        device: this rank's.
        flops: gives the FLOPs of one step on this rank; ``None`` as long as they are not known.
        peak: TFLOP/s of the device; ``None`` where it is not known.
    """

    def __init__(self, device: torch.device, flops: Callable[[], float | None], peak: float | None) -> None:
        self.device, self.flops, self.peak = device, flops, peak

    def columns(self, steps_per_s: float) -> dict[str, float]:
        """``memory_gb`` (1e9 bytes) and, where they are known, ``tflop_per_s`` and its share of the peak, ``mfu``."""
        columns = {"memory_gb": peak_memory(self.device) / 1e9}
        flops = self.flops()
        if flops is not None:
            columns["tflop_per_s"] = flops * steps_per_s / 1e12
            if self.peak is not None:
                columns["mfu"] = columns["tflop_per_s"] / self.peak
        return columns
