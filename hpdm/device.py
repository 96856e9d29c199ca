"""Which device a command runs on."""

from __future__ import annotations

import torch


def pick_device(name: str) -> torch.device:
    """``"auto"`` is CUDA when there is one, else the CPU.

    Raises:
        RuntimeError: CUDA asked for and not there, or no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device: got {name!r}, but PyTorch sees no CUDA device")
    return device
