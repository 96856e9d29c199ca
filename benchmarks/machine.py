"""Describes the machine of a measurement: its hardware, versions, and the best rates that it reaches."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Call, Timer, products_in


def ceilings(device: torch.device) -> dict[str, float]:
    """The best rates of this machine: GB/s of a large copy, TFLOP/s of a large product, on CUDA in each arithmetic."""
    cuda = device.type == "cuda"
    source = torch.ones(2**28 if cuda else 2**25, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(8192 if cuda else 1536, 8192 if cuda else 1536, device=device)

    def best(call: Call) -> float:
        timer = Timer(device)
        for _ in range(7):
            timer.sample(call)
        return min(timer.seconds())

    rates = {"copy_gbs": 2 * source.numel() * source.element_size() / best(lambda: target.copy_(source)) / 1e9}
    work = 2 * matrix.shape[0] ** 3 / 1e12
    with products_in("ieee"):
        rates["matmul_fp32_tflops"] = work / best(lambda: matrix @ matrix)
    if cuda:
        with products_in("tf32"):
            rates["matmul_tf32_tflops"] = work / best(lambda: matrix @ matrix)
        half = matrix.bfloat16()
        rates["matmul_bf16_tflops"] = work / best(lambda: half @ half)
    return rates


def environment(device: torch.device, measured: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The setting of a measurement: hardware, versions, commit and command, without host names or paths.

    ``measured``: the ceilings, if they are known already; ``None`` measures them.
    """
    machine: dict[str, Any] = {"cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "gpu": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
        }
    machine |= ceilings(device) if measured is None else measured
    return {
        "machine": machine,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
            "numpy": _version("numpy"),
        },
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "commit": _commit(),
        "command": " ".join([Path(sys.argv[0]).stem.replace("__main__", "pytest"), *sys.argv[1:]]),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
