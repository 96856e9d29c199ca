"""The checks of a CUDA device: a :class:`Case` has a name and can be run by pytest or without it.

Each file of checks has a function ``cases()``. ``benchmarks/gpu/run.py`` runs the cases of one file without pytest;
``test_cases.py`` passes the cases of all files to pytest.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.tf32 import value_and_grads_in_tf32
from hpdm_kernels.testing import Comparison, compare_op, value_and_grads

FOLDER = Path(__file__).parent
FILES = (
    "attention", "fusion", "context", "tiles", "patches", "rows", "groups", "temporal", "large", "ops", "graphs",
    "optimizer",
)  # fmt: skip

# How products are computed: (dtype, precision argument, allowed multiple of the plain implementation's error). The
# plain implementation computes products in its dtype; for one TF32 pass it rounds operands (benchmarks/gpu/tf32.py).
# 3xTF32 drops the product of the two low parts and cuts these to 11 bits, an error of a few units of 2^-24 per product.
# Full fp32 rounds only sums, so 3xTF32 may err more where sums are short.
# One TF32 pass rounds the same operands as its plain implementation, but others of their last bits: the ratio of the
# largest errors of a few hundred elements reaches 2.2 by chance, while that of the root mean squares, which must not
# exceed RMS_FACTOR, is 1.0 on average and at most 1.2 from a few thousand elements on. It is 2.6 and more for operands
# that are truncated.
ARITHMETIC = {
    "fp32-ieee": (torch.float32, "ieee", 2.0),
    "fp32-3xtf32": (torch.float32, "tf32x3", 4.0),
    "fp32-1xtf32": (torch.float32, "tf32", 3.0),
    "bf16": (torch.bfloat16, "ieee", 2.0),
    "fp16": (torch.float16, "ieee", 2.0),
}
RMS_FACTOR = 2.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Check = Callable[[torch.device, torch.Generator], Comparison | None]


class Skipped(Exception):
    """The device cannot run this case; the message says why."""


@dataclass(frozen=True)
class Case:
    """One check. It creates its inputs when it runs, so that listing the cases needs no device and no memory."""

    name: str
    check: Check
    """Raises if something is wrong. If it returns a comparison, :func:`run` evaluates it."""


def against_formula(
    ours: Callable[..., Tensor], formula: Callable[..., Tensor], inputs: Sequence[Tensor], arithmetic: str | None = None
) -> Comparison:
    """Compares value and gradients of ``ours`` with ``formula`` in fp64, and the bits of two runs of ``ours``.

    Args:
        ours: the op under test, called on ``inputs``.
        formula: the plain implementation; in fp64 it is the oracle.
        inputs: floating-point tensors, which all get gradients.
        arithmetic: a key of :data:`ARITHMETIC` for ops with products.
    """
    _, precision, factor = ARITHMETIC[arithmetic] if arithmetic else (None, "ieee", 2.0)
    plain, rms_factor = (value_and_grads_in_tf32, RMS_FACTOR) if precision == "tf32" else (value_and_grads, None)
    return compare_op(ours, formula, inputs, factor=factor, rms_factor=rms_factor, repeat=True, plain=plain)


def capture(step: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """Captures ``step`` in a CUDA graph; returns it, and the results, which a replay overwrites."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles, and lets cuBLAS take its memory
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured


def needs_memory(device: torch.device, gigabytes: float) -> None:
    """Skips the case on a device with less memory."""
    if torch.cuda.get_device_properties(device).total_memory < gigabytes * 1e9:
        raise Skipped(f"needs a device with {gigabytes:.0f} GB")


def run(case: Case, device: torch.device) -> dict[str, Any]:
    """Runs ``case``. Returns ``outcome`` (passed, failed or skipped), ``message`` and measurements of a comparison.

    ``error_of_budget`` is the largest error as a multiple of its budget; ``repeats`` tells whether two runs gave the
    same bits. Both are also reported for failures.
    """
    measured: dict[str, Any] = {}
    try:
        comparison = case.check(device, torch.Generator().manual_seed(0))
        if comparison is not None:
            # JSON has no infinity.
            measured = {"error_of_budget": min(comparison.share, 1e9), "repeats": comparison.same_bits}
        if comparison is not None and comparison.problem:
            raise AssertionError(comparison.problem)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # kernel errors are asynchronous: raise them in this case
    except Skipped as reason:
        return {"outcome": "skipped", "message": str(reason)}
    except Exception as error:
        traceback.print_exc()
        return {"outcome": "failed", "message": f"{type(error).__name__}: {error}"[:500], **measured}
    return {"outcome": "passed", "message": "", **measured}


def cases_of(file: str) -> Iterator[tuple[str, Case]]:
    """``(id, case)`` of one of :data:`FILES`; an id looks like ``benchmarks/gpu/tiles.py::extract_tiles[...]``."""
    for case in importlib.import_module(f"benchmarks.gpu.{file}").cases():
        yield f"benchmarks/gpu/{file}.py::{case.name}", case
