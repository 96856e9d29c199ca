"""Measures the training steps of the paper's tables: memory at batch 1, largest batch under a cap, videos/s.

The paper's GPU had 80 GB. Larger GPUs are limited to that, so that results are comparable.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import harness
from hpdm import HPDMConfig, presets, systems
from hpdm.planning.measure import NoiseTraining
from hpdm.planning.roofline import gpu_named
from hpdm.planning.training_cost import training_step

PATCH_DIFFUSION = systems.get("patch")
CAP_BYTES = 80_000_000_000
MOST_CLIPS = 64
ROUNDS = 3
OutOfMemory = torch.cuda.OutOfMemoryError


@dataclass(frozen=True)
class Contender:
    """A way to run the same model: kernels, recomputation, ``torch.compile``, arithmetic of fp32 products."""

    name: str
    kernels: str
    recompute: str = "none"
    compiled: bool = False
    products: str = "tf32"
    """``"tf32"`` (one TF32 pass, as with `hpdm train --precision tf32`) or ``"ieee"``."""


# The most telling come first, since a run may end before the last.
CONTENDERS = (
    Contender("hpdm triton", "triton"),
    Contender("reference", "reference"),
    Contender("hpdm triton, recompute selective", "triton", "selective"),
    Contender("hpdm triton, fp32", "triton", products="ieee"),
    Contender("reference, fp32", "reference", products="ieee"),
    Contender("reference, torch.compile", "reference", compiled=True),
    Contender("hpdm triton, recompute block", "triton", "block"),
)


def ablations(base: HPDMConfig) -> dict[str, tuple[HPDMConfig, float]]:
    """The setups of Table 3 at 64x256^2 in patches of 16x64^2, with the published videos/s on one A100."""
    return {
        "shallow fusion": (base.replace(fusion="shallow"), 4.91),
        "context detached": (base.replace(detach_context=True), 4.4),
        "no adaptive computation": (base.without_adaptive_computation(), 2.73),
        "no coordinates": (base.replace(coordinates=False), 4.47),
        "default": (base, 4.4),
    }


@functools.cache
def formula_flops(config: HPDMConfig) -> int:
    """FLOPs of one clip by the paper's formulas, whatever a contender does; cached, because counting is slow."""
    return training_step(PATCH_DIFFUSION, config, 1, "reference").flops


@functools.cache
def modeled_videos_per_s(config: HPDMConfig, device_name: str) -> float | None:
    """What no step of the kernels' operations can exceed on this GPU; ``None`` for a GPU whose rates are not known."""
    gpu = gpu_named(device_name)
    return None if gpu is None else 1 / training_step(PATCH_DIFFUSION, config, 1, "torch").least_pass_seconds[gpu.name]


def base_config() -> HPDMConfig:
    """The model of Table 1: the table's static memory (6.1 to 6.4 GB) is five fp32 copies of HPDM-M's weights."""
    return presets.hpdm_m()


@dataclass(frozen=True)
class Measured:
    """Memory and time of one contender with one model."""

    peak_bytes: int
    """Peak memory at batch 1, including weights and optimizer state."""
    batch: int
    """The largest tested batch that fits under the cap."""
    samples: list[float]
    """Seconds per step at that batch."""


def total_peak_bytes(call: Callable[[], None], device: torch.device) -> int:
    """Peak memory in bytes while ``call`` runs: on CUDA all allocated memory, on the CPU only what the call adds."""
    if device.type != "cuda":
        return harness.peak_extra_bytes(call, device)
    before = torch.cuda.memory_allocated(device)
    return before + harness.peak_extra_bytes(call, device)


def measure(config: HPDMConfig, contender: Contender, device: torch.device, cap: int = CAP_BYTES) -> Measured:
    """Measures memory at batch 1, finds the largest batch that fits, then times it.

    The batch is extrapolated from the peaks of one and two clips, since memory grows linearly, and reduced by a tenth
    until it fits. It is at most :data:`MOST_CLIPS`.

    Raises:
        OutOfMemory: not even one clip fits.
    """
    with harness.products_in(contender.products):
        return _measure(config, contender, device, cap)


def _measure(config: HPDMConfig, contender: Contender, device: torch.device, cap: int) -> Measured:
    """:func:`measure` in PyTorch's present arithmetic."""
    training = NoiseTraining(
        PATCH_DIFFUSION, config, device, contender.kernels, contender.recompute, compiled=contender.compiled
    )

    def peak(batch: int) -> int:
        call = training.step(batch)
        call()  # the first step allocates the optimizer state, and compiles
        return total_peak_bytes(call, device)

    one = peak(1)
    if one > cap:
        raise OutOfMemory(f"one clip needs {one / 1e9:.1f} GB, the cap is {cap / 1e9:.1f} GB")
    batch = 1
    try:
        batch = int(min(MOST_CLIPS, 1 + (cap - one) // max(1, peak(2) - one)))
    except OutOfMemory:
        release(device)
    while True:
        try:
            call = training.step(batch)
            call()
            timer = harness.Timer(device)
            for _ in range(ROUNDS):
                timer.sample(call)
            return Measured(one, batch, timer.seconds())
        except OutOfMemory:
            if batch == 1:
                raise
            training.optimizer.zero_grad(set_to_none=True)
            release(device)
            batch = max(1, batch * 9 // 10)


def release(device: torch.device) -> None:
    """Returns unused cached memory to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
