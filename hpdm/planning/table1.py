"""The paper's Table 1, memory and training speed by patch size, predicted, next to the published numbers."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from hpdm.checks import Triple
from hpdm.planning.training_cost import RECOMPUTE, StepCost, training_step
from hpdm.system import System

RESOLUTIONS: tuple[Triple, ...] = ((64, 256, 256), (64, 512, 512))


@dataclass(frozen=True)
class Cell:
    """One cell of Table 1: batch 1 in GB, and videos/s at the largest batch, both on one A100 80 GB."""

    method: str
    resolution: Triple
    patch: Triple
    adaptive: bool
    published_gb: float | None
    """``None`` where the paper ran out of memory."""
    published_videos_per_s: float | None

    def config(self, base: Any) -> Any:
        """The model of this cell, with the widths of ``base``.

        64x512^2 is not ``patch * ratio^l`` with one ratio per axis. The number of levels follows from height and width,
        which determine the memory; the frames are assumed to grow at every level as well, which changes only the sizes
        of the footprints.

        Args:
            base: a config of a model of patches, with ``with_pyramid`` and ``without_adaptive_computation``.
        """
        growth = self.resolution[1] // self.patch[1]
        config = base.with_pyramid(self.patch, tuple(n * growth for n in self.patch))
        return config if self.adaptive else config.without_adaptive_computation()


def _cells() -> tuple[Cell, ...]:
    published = (
        ("full resolution", None, False, (65.3, 1.24, None, None)),
        ("HPDM", (32, 128, 128), False, (29.0, 2.64, 41.3, 1.55)),
        ("HPDM", (32, 128, 128), True, (23.4, 3.58, 29.9, 2.49)),
        ("HPDM", (16, 64, 64), False, (18.1, 4.25, 22.1, 2.78)),
        ("HPDM", (16, 64, 64), True, (14.2, 6.71, 16.3, 4.96)),
    )
    return tuple(
        Cell(method, resolution, patch or resolution, adaptive, numbers[2 * n], numbers[2 * n + 1])
        for n, resolution in enumerate(RESOLUTIONS)
        for method, patch, adaptive, numbers in published
    )


CELLS = _cells()
"""All ten, in the order of the paper."""


def table1(system: System, base: Any, jobs: int | None = None) -> list[dict[str, Any]]:
    """The ten cells, predicted at batch 1 in fp32 with LAMB: the formulas, and the kernels with each recompute setting.

    Args:
        system: kind of the model.
        base: a config, for the widths; the paper does not say which of its models it ran.
        jobs: processes, default one per core.

    Returns:
        One row per cell. ``kernels_gb`` is the smallest memory over the recompute settings, and ``recompute`` the
        setting that gives it. ``tflop_per_video`` is the work of the formulas without recomputation,
        ``kernels_tflop_per_video`` that of the kernels with each setting. ``modeled_videos_per_s`` is what no step of
        the kernels can exceed on a GPU, by its name: see :mod:`hpdm.planning.roofline`; nothing is computed again, and
        the batch is so large that the optimizer takes no time.
    """
    settings = [("reference", "none"), *(("torch", recompute) for recompute in RECOMPUTE)]
    steps = [(cell.config(base), *setting) for cell in CELLS for setting in settings]
    # The longest predictions (full resolution) first, so that all processes end at about the same time.
    longest_first = sorted(range(len(steps)), key=lambda n: -steps[n][0].tokens)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=context) as pool:
        results = pool.map(partial(_predict, system), [steps[n] for n in longest_first])
        cost_of = dict(zip(longest_first, results))
    costs = [cost_of[n] for n in range(len(steps))]
    return [_row(cell, costs[n * len(settings) : (n + 1) * len(settings)], base) for n, cell in enumerate(CELLS)]


def _predict(system: System, step: tuple[Any, str, str]) -> StepCost:
    config, kernels, recompute = step
    return training_step(system, config, 1, kernels, recompute, optimizer="lamb")


def _row(cell: Cell, costs: Sequence[StepCost], base: Any) -> dict[str, Any]:
    """The row of a cell; ``costs`` are those of the formulas and of each recompute setting."""
    reference, *kernels = costs
    best = min(kernels, key=lambda cost: cost.peak_bytes)
    return {
        "method": cell.method,
        "resolution": size(cell.resolution),
        "patch": size(cell.patch),
        "adaptive": cell.adaptive,
        "levels_per_block": list(cell.config(base).levels_per_block),
        "published_gb": cell.published_gb,
        "published_videos_per_s": cell.published_videos_per_s,
        "reference_gb": reference.peak_bytes / 1e9,
        "kernels_gb": best.peak_bytes / 1e9,
        "recompute": best.recompute,
        "kernels_gb_by_recompute": {cost.recompute: cost.peak_bytes / 1e9 for cost in kernels},
        "tflop_per_video": reference.flops / 1e12,
        "kernels_tflop_per_video": {cost.recompute: cost.flops / 1e12 for cost in kernels},
        "modeled_videos_per_s": {name: 1 / seconds for name, seconds in kernels[0].least_pass_seconds.items()},
    }


def size(triple: Sequence[int]) -> str:
    """``64x256x256``."""
    return "x".join(map(str, triple))
