"""The paper's Tables 1 and 3: predicted everywhere, measured on CUDA.

Table 1 has memory at batch 1 and training videos/s at the largest batch under 80 GB, at full resolution and in patches.
Table 3 has the training speed of five setups. Both were published for one A100. The predictions
(:mod:`hpdm.planning.table1`) count the same step on fake tensors. Measured rows: our kernels with each recompute
setting, the paper's formulas, and these with ``torch.compile``; products take one TF32 pass unless the contender's
name ends in fp32. A row says so if a step does not fit in memory.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import paper
from hpdm.planning.table1 import CELLS, Cell, size, table1
from hpdm.planning.training_cost import training_step

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; predicted above")
BASE = paper.base_config()
SETUPS = paper.ablations(BASE)
# Full resolution comes first within a contender, because the rows in patches are compared with it.
MEASURED = [(contender, cell) for contender in paper.CONTENDERS for cell in CELLS]


def shape_of(cell: Cell) -> str:
    """Label of a cell, such as ``64x256x256 in 16x64x64, adaptive``."""
    sizes = size(cell.resolution) + (f" in {size(cell.patch)}" if cell.patch != cell.resolution else " at once")
    return sizes + (", adaptive" if cell.adaptive else "")


def test_table_1_predicted(record):
    for cell, row in zip(CELLS, table1(paper.PATCH_DIFFUSION, BASE), strict=True):
        published, gb, tflop = cell.published_gb, row["kernels_gb_by_recompute"], row["kernels_tflop_per_video"]
        record(
            "table 1, memory at batch 1 predicted", shape_of(cell), "hpdm", "training step", [],
            extra={
                "published_gb": published, "reference_gb": row["reference_gb"],
                **{f"recompute_{name}_gb": gb[name] for name in gb},
                "least_of_published": row["kernels_gb"] / published if published else None,
                **{f"{name}_tflop": tflop[name] for name in tflop},
                "published_videos_per_s": cell.published_videos_per_s,
                **{f"{name} modeled_videos_per_s": most for name, most in row["modeled_videos_per_s"].items()},
            },
        )  # fmt: skip


def test_table_3_predicted(record):
    for name, (config, published) in SETUPS.items():
        plain, ours = (training_step(paper.PATCH_DIFFUSION, config, 1, kernels) for kernels in ("reference", "torch"))
        record(
            "table 3, work predicted", name, "hpdm", "training step", [],
            extra={
                "published_videos_per_s": published,
                "reference_tflop": plain.flops / 1e12, "kernels_tflop": ours.flops / 1e12,
                "reference_gb": plain.peak_bytes / 1e9, "kernels_gb": ours.peak_bytes / 1e9,
            },
        )  # fmt: skip


@pytest.fixture(scope="session")
def full_resolution():
    """videos/s at full resolution by contender and size, as the base of speed-ups."""
    return {}


@pytest.fixture
def capped(device):
    """Limits the GPU's memory to the paper's 80 GB."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, paper.CAP_BYTES / total))
        yield
        torch.cuda.set_per_process_memory_fraction(1.0)
        paper.release(device)


def measured_row(record, device, group, shape, contender, config, published):
    """Measures and records one row. Returns ``None`` if the step runs out of memory, which the row then says."""
    flops = paper.formula_flops(config)
    try:
        measured = paper.measure(config, contender, device)
    except paper.OutOfMemory as error:
        row = record(group, shape, contender.name, "training step", [], extra=dict(published))
        row.error = f"out of memory: {str(error).splitlines()[0][:80]}"
        return None
    row = record(
        group, shape, contender.name, "training step", measured.samples, flops=flops * measured.batch,
        reference=contender.name == "reference", arithmetic=contender.products, extra=dict(published),
    )  # fmt: skip
    row.extra |= {
        "measured_gb": measured.peak_bytes / 1e9,
        "batch": measured.batch,
        "videos_per_s": measured.batch / row.median_s,
        "modeled_videos_per_s": paper.modeled_videos_per_s(config, torch.cuda.get_device_name(device)),
    }
    return row


@needs_cuda
@pytest.mark.parametrize(
    ("contender", "cell"), MEASURED, ids=[f"{c.name}-{shape_of(cell)}".replace(" ", "_") for c, cell in MEASURED]
)
def test_table_1_measured(record, device, capped, full_resolution, contender, cell):
    published = {"published_gb": cell.published_gb, "published_videos_per_s": cell.published_videos_per_s}
    row = measured_row(record, device, "table 1", shape_of(cell), contender, cell.config(BASE), published)
    if row is None:
        return
    key = contender.name, cell.resolution
    if cell.patch == cell.resolution:
        full_resolution[key] = row.extra["videos_per_s"]
    elif key in full_resolution:
        row.extra["speedup_over_full"] = row.extra["videos_per_s"] / full_resolution[key]


@needs_cuda
@pytest.mark.parametrize("contender", paper.CONTENDERS[:2], ids=lambda c: c.name.replace(" ", "_"))
@pytest.mark.parametrize("setup", SETUPS, ids=lambda s: s.replace(" ", "_"))
def test_table_3_measured(record, device, capped, setup, contender):
    config, published = SETUPS[setup]
    measured_row(record, device, "table 3", setup, contender, config, {"published_videos_per_s": published})
