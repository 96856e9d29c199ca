"""The paper's Table 1, memory and training speed by patch size, predicted next to what was published."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from hpdm.patch.config import HPDMConfig
from hpdm.patch.rin import Recompute
from hpdm.planning.training_cost import StepCost, training_step

Triple = tuple[int, int, int]

RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "block")
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

    def config(self, base: HPDMConfig) -> HPDMConfig:
        """The model of this cell, with the widths of ``base``.

        64x512^2 is not ``patch * ratio^l`` for one ratio per axis. The levels follow from height and width, which set
        the memory; frames are taken to grow at every level too, which touches only the size of the footprints.
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


def _predict(job: tuple[HPDMConfig, str, str]) -> StepCost:
    config, kernels, recompute = job
    return training_step(config, 1, kernels, recompute)


def table1(base: HPDMConfig, jobs: int | None = None) -> list[dict[str, Any]]:
    """The ten cells, predicted at batch 1 in fp32: the paper's formulas, and the kernels with each recompute setting.

    Args:
        base: the widths; the paper does not say which of its models it ran.
        jobs: processes at work at once, default one per core.

    Returns:
        One row per cell. ``kernels_gb`` is the row's smallest, ``recompute`` the setting that gives it;
        ``tflop_per_video`` the work of the formulas without recomputation, ``kernels_tflop_per_video`` that of each
        setting.
    """
    settings = [("reference", "none"), *(("torch", recompute) for recompute in RECOMPUTE)]
    orders = [(cell.config(base), *setting) for cell in CELLS for setting in settings]
    # The many pieces of full resolution take longest: first, so that no process is left alone with them.
    queue = sorted(range(len(orders)), key=lambda n: -orders[n][0].tokens)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=context) as pool:
        done = dict(zip(queue, pool.map(_predict, [orders[n] for n in queue])))
    costs = [done[n] for n in range(len(orders))]
    return [_row(cell, costs[n * len(settings) : (n + 1) * len(settings)], base) for n, cell in enumerate(CELLS)]


def _row(cell: Cell, costs: Sequence[StepCost], base: HPDMConfig) -> dict[str, Any]:
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
    }


def size(triple: Sequence[int]) -> str:
    """``64x256x256``."""
    return "x".join(map(str, triple))


def table1_text(preset: str, rows: Sequence[dict[str, Any]]) -> str:
    """The rows for a terminal."""
    lines = [
        f"Table 1 with {preset}: peak memory of one fp32 training step at batch 1 [GB]; work per video [TFLOP]",
        f"{'':<48}{'':>10}{'':>10}  {'kernels on, recompute':^29} {'of':>10}  {'TFLOP, recompute':^26}",
        f"{'method':<17}{'resolution':<12}{'patch':<12}{'adaptive':<9}{'published':>9}{'reference':>10}  "
        f"{'none':>9}{'selective':>10}{'block':>9}  {'published':>9}  {'none':>8}{'selective':>10}{'block':>8}",
    ]
    for row in rows:
        published, gb, work = row["published_gb"], row["kernels_gb_by_recompute"], row["kernels_tflop_per_video"]
        share = "-" if published is None else f"{row['kernels_gb'] / published:.2f}x"
        lines.append(
            f"{row['method']:<17}{row['resolution']:<12}{row['patch']:<12}{'yes' if row['adaptive'] else 'no':<9}"
            f"{'OOM' if published is None else f'{published:.1f}':>9}{row['reference_gb']:>10.1f}  "
            f"{gb['none']:>9.1f}{gb['selective']:>10.1f}{gb['block']:>9.1f}  {share:>9}  "
            f"{work['none']:>8.2f}{work['selective']:>10.2f}{work['block']:>8.2f}"
        )
    return "\n".join(lines)
