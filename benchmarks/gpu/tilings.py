"""Times the attention kernels in other block sizes than the shipped ones: ``python -m benchmarks.gpu.tilings``.

The table in ``hpdm_kernels/attention/block_sizes.py`` is the result of such runs. For each kernel and arithmetic this
prints the fastest block sizes at the paper's shapes, their registers, stack and shared memory, and the shipped ones
beside them. Processes compile side by side first; then all are timed alone on the device.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.harness import Timer
from benchmarks.shapes import UCF_M, AttentionShape
from hpdm.files import write_json
from hpdm_kernels.attention import triton_backend
from hpdm_kernels.attention.block_sizes import Gpu, Tiling, gpu_tiling

KERNELS = ("fwd", "bwd_q", "bwd_kv")
ARITHMETIC = {"16bit": (torch.bfloat16, "ieee"), "tf32": (torch.float32, "tf32"), "ieee": (torch.float32, "ieee")}
SHAPES = (AttentionShape(UCF_M, True, 8), AttentionShape(UCF_M, False, 8), AttentionShape(UCF_M, True, 1))
SAMPLES = 7
DEVICE = torch.device("cuda")


def candidates(kernel: str, products: str, width: int, gpu: Gpu) -> list[Tiling]:
    """The shipped tiling, and others with ``programs`` still 1."""
    found = [gpu_tiling(kernel, products, width, gpu, whole=True)]
    looped = (16, 32, 64) if kernel == "bwd_kv" or products == "ieee" else (32, 64, 128)
    for kept, other, warps, stages in itertools.product((64, 128), looped, (4, 8), (1, 2, 3)):
        parts = min(4, other * width // (128 * warps)) if products == "tf32" else 0
        m, n = (other, kept) if kernel == "bwd_kv" else (kept, other)
        if not any(tile[:5] == (m, n, warps, stages, parts) for tile in found):
            found.append(Tiling(m, n, warps, stages, parts))
    return found


class Watched:
    """A kernel that keeps what its last launch compiled."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.compiled = kernel, None

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            self.compiled = self.kernel[grid](*arguments, **options)

        return launch


class Left:
    """A kernel whose launches are left out."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **options: None


@contextlib.contextmanager
def using(kernel: str, tile: Tiling, others: bool = True) -> Iterator[Watched]:
    """Inside the block ``kernel`` uses ``tile``; without ``others`` the backward launches no other kernel."""
    shipped, kernels = triton_backend.tiling, triton_backend.kernels
    name = f"cross_attention_{kernel}_kernel"
    watched = Watched(getattr(kernels, name))
    replaced = {f"cross_attention_{k}_kernel": getattr(kernels, f"cross_attention_{k}_kernel") for k in KERNELS}
    replaced = {k: v if others else Left() for k, v in replaced.items()} | {name: watched}
    replaced["cross_attention_combine_kernel"] = kernels.cross_attention_combine_kernel
    with (
        patch.object(triton_backend, "tiling", lambda k, *rest: tile if k == kernel else shipped(k, *rest)),
        patch.object(triton_backend, "kernels", SimpleNamespace(**replaced)),
    ):
        yield watched


def arguments(shape: tuple[int, int, int, int, int], products: str) -> dict[str, Any]:
    """Random inputs of the forward and of the backward, batch, heads, queries, keys and width given."""
    b, h, m, n, d = shape
    dtype, precision = ARITHMETIC[products]
    q, k, v, grad = (torch.randn(b, rows, h, d, device=DEVICE).to(dtype).transpose(1, 2) for rows in (m, n, n, m))
    forward = {"q": q, "k": k, "v": v, "scale": d**-0.5, "precision": precision}
    out, lse = triton_backend.forward(**forward)
    return {"fwd": forward, "bwd": forward | {"grad": grad, "out": out, "lse": lse}}


def results(kernel: str, inputs: dict[str, Any]) -> list[Tensor]:
    """What ``kernel`` writes."""
    if kernel == "fwd":
        return list(triton_backend.forward(**inputs["fwd"]))
    gradients = triton_backend.backward(**inputs["bwd"])
    return list(gradients[:1] if kernel == "bwd_q" else gradients[1:])


def programs(compiled: Any, warps: int) -> int:
    """How many programs of a compiled kernel a multiprocessor holds at a time."""
    device = torch.cuda.get_device_properties(DEVICE)
    registers = -(-compiled.n_regs // 8) * 8 * 32 * warps
    shared = compiled.metadata.shared + 1024
    return max(1, min(device.shared_memory_per_multiprocessor // shared, 65536 // registers, 64 // warps))


def tried(kernel: str, products: str, width: int, timed: bool) -> list[dict[str, Any]]:
    """One row for each candidate: its resources, its difference from the shipped one, its seconds by shape."""
    device: Any = torch.cuda.get_device_properties(DEVICE)
    gpu = Gpu(device.major * 10 + device.minor, device.shared_memory_per_block_optin)
    small = arguments((1, 2, 128, 128, width), products)
    shapes = {str(s): (s.batch, s.heads, s.queries, s.keys, width) for s in SHAPES} if timed else {}
    inputs = {name: arguments(shape, products) for name, shape in shapes.items()}
    expected = results(kernel, small)
    rows = []
    for tile in candidates(kernel, products, width, gpu):
        row: dict[str, Any] = {"kernel": kernel, "products": products, "width": width, "tiling": list(tile)}
        rows.append(row)
        try:
            with using(kernel, tile) as watched:
                actual = results(kernel, small)
            torch.cuda.synchronize(DEVICE)
        except Exception as error:  # too much shared memory, or a layout that Triton cannot compile
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            continue
        compiled: Any = watched.compiled
        tile = tile._replace(programs=programs(compiled, tile.num_warps))
        difference = max(((a - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True))
        row |= {"tiling": list(tile), "registers": compiled.n_regs, "stack": compiled.n_spills}
        row |= {"shared": compiled.metadata.shared, "difference": difference, "seconds": {}}
        for name, values in inputs.items():
            with using(kernel, tile, others=False):
                timer = Timer(DEVICE)
                for _ in range(SAMPLES + 2):
                    timer.sample(lambda values=values: results(kernel, values))
            row["seconds"][name] = statistics.median(timer.seconds()[2:])
    return rows


def table(rows: Sequence[dict[str, Any]], most: int = 8) -> str:
    """The fastest rows by the sum of their times, and the shipped one, the first of ``rows``."""
    lines = [f"{rows[0]['kernel']} {rows[0]['products']} d{rows[0]['width']}"]
    lines += [f"  not possible: {sum('error' in row for row in rows)} of {len(rows)}"]
    ranked = sorted((row for row in rows if "error" not in row), key=lambda row: sum(row["seconds"].values()))
    for row in ranked:
        if ranked.index(row) < most or row is rows[0]:
            m, n, warps, stages, parts, at_once = row["tiling"]
            times = "  ".join(f"{1e6 * s:7.1f}" for s in row["seconds"].values())
            lines.append(
                f"  {m:3}x{n:<3} {warps} warps {stages} stages {parts} parts {at_once} programs"
                f" {row['registers']:3} regs {row['stack']:3} stack {row['shared']:6} B  {times} us"
                f"  {row['difference']:.0e}" + ("  shipped" if row is rows[0] else "")
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tilings")
    parser.add_argument("--products", nargs="+", choices=ARITHMETIC, default=["16bit", "tf32"])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--width", type=int, default=64, help="of the heads")
    parser.add_argument("--jobs", type=int, default=min(14, os.cpu_count() or 1), help="compilers at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all rows here")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    tasks = list(itertools.product(options.kernels, options.products))
    if options.part:  # only compiles, into Triton's cache
        index, count = map(int, options.part.split("/"))
        every = candidates

        def some(*key: Any) -> list[Tiling]:
            return every(*key)[index::count]

        with patch(f"{__name__}.candidates", some):
            for kernel, products in tasks:
                tried(kernel, products, options.width, timed=False)
        return 0
    this = [sys.executable, "-m", "benchmarks.gpu.tilings", "--width", str(options.width), "--products"]
    this += [*options.products, "--kernels", *options.kernels]
    compilers = [subprocess.Popen([*this, "--part", f"{i}/{options.jobs}"]) for i in range(options.jobs)]
    for compiler in compilers:
        compiler.wait()
    rows = []
    for kernel, products in tasks:
        rows += (found := tried(kernel, products, options.width, timed=True))
        print(table(found), flush=True)
    print("times at " + "; ".join(map(str, SHAPES)))
    if options.json:
        write_json(options.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
