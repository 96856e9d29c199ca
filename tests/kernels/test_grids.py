"""Grids have one axis: CUDA limits the second and third to 65,535 programs, fewer than tensors have rows.

Launches are recorded instead of made, on tensors without values, so their sizes can be those of large GPUs.
"""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from hpdm_kernels import _triton
from hpdm_kernels.attention import block_sizes as attention_block_sizes
from hpdm_kernels.attention import triton_backend as attention
from hpdm_kernels.context import block_sizes
from hpdm_kernels.context import triton_backend as context
from hpdm_kernels.context.geometry import Geometry
from hpdm_kernels.context.weight import FusionWeight
from hpdm_kernels.patches import triton_backend as patches
from hpdm_kernels.tiles import triton_backend as tiles
from hpdm_kernels.tiles.geometry import read_origins

PLACES = {context: "kernels", attention: "kernels", patches: "triton_kernels", tiles: "triton_kernels"}


class Recorder:
    """Stands for a kernel and notes the grids of its launches."""

    def __init__(self, name, grids):
        self.name, self.grids = name, grids

    def __getitem__(self, grid):
        self.grids.setdefault(self.name, []).append(grid)
        return lambda *arguments, **options: None


@pytest.fixture
def grids(monkeypatch):
    """Name of each launched kernel -> its grids. Block sizes are those of a GPU, not the interpreter's."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for module, name in PLACES.items():
        kernels = getattr(module, name)
        for kernel in [k for k in vars(kernels) if k.endswith("_kernel")]:
            monkeypatch.setattr(kernels, kernel, Recorder(kernel, found))
        monkeypatch.setattr(module, "INTERPRETED", False, raising=False)
    for module in (block_sizes, attention_block_sizes):
        monkeypatch.setattr(module, "INTERPRETED", False)
    gpu = SimpleNamespace(major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232_448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    for name, tile in {"ROWS": (8, 256), "CONTRACT": (4, 256), "SUMS": (16, 128)}.items():
        monkeypatch.setattr(context, name, block_sizes.Tile(*tile))
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda _: 0)
    return found


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def run_context(batch, rows, width, grid, precision):
    n = math.prod(grid)
    index = None if rows == batch else meta(batch, 1, dtype=torch.long)
    geometry = Geometry([meta(rows, 6)], meta(batch, 6), index, [grid], grid, [grid])
    x, sources, weight = meta(batch, n, width), [meta(rows, n, width)], FusionWeight.split(meta(width, 2 * width + 3))
    _, plan = context.fuse_forward(x, sources, geometry, weight, meta(width), False, precision)
    context.fuse_backward(x, x, sources, geometry, plan, weight, [True] * 4, False, precision)
    _, plan = context.sample_forward(sources, geometry)
    context.sample_backward(x, sources, geometry, plan, [True])


def run_attention(batch, heads, queries, keys):
    q, k = meta(batch, heads, queries, 64), meta(batch, heads, keys, 64)
    out, lse = attention.forward(q, k, k, 1.0, "tf32")
    attention.backward(q, q, k, k, out, lse, 1.0, "tf32")


def run_patches(batch, channels, video, size):
    patches.forward(meta(batch, channels, *video), meta(batch, 6), size)
    patches.backward(meta(batch, channels, *size), meta(batch, 6), video)


def run_tiles(batch, channels, count):
    """Tiles of a film of ``count`` frames, one per frame."""
    origins = torch.stack([torch.arange(count), torch.zeros(count).long(), torch.zeros(count).long()], dim=1)
    plan = read_origins(origins, (1, 8, 8), (count, 8, 8))
    video, cut = meta(batch, channels, count, 8, 8), meta(batch, count, channels, 1, 8, 8)
    tiles.extract(video, plan, (1, 8, 8), False, 1.0)
    tiles.average(cut, plan, (count, 8, 8), None, 0.0, 1.0, True)
    tiles.add(video, cut, plan, 0)
    tiles.step(video, plan, torch.float32, None, 0.0, 1.0)


# For each a launch that needs more than 65,535 programs for something that only some of the kernels split by.
CASES = {
    "an image of 128x128 tokens of width 1024": lambda: run_context(1, 1, 1024, (1, 128, 128), "ieee"),
    "the same in products of its own": lambda: run_context(1, 1, 1024, (1, 128, 128), "tf32x3"),
    "70,000 patches": lambda: run_context(70_000, 70_000, 64, (1, 2, 2), "ieee"),
    "70,000 patches in products of its own": lambda: run_context(70_000, 70_000, 64, (1, 2, 2), "tf32x3"),
    "a cache of 70,000 tiles": lambda: run_context(8, 70_000, 64, (1, 2, 2), "ieee"),
    "a long video": lambda: run_context(1, 1, 64, (70_000, 2, 2), "tf32x3"),
    "tokens of width 20 million": lambda: run_context(1, 1, 20_000_000, (1, 1, 1), "ieee"),
    "attention of 70,000 samples": lambda: run_attention(70_000, 1, 8, 8),
    "attention with 70,000 heads": lambda: run_attention(1, 70_000, 8, 8),
    "attention of 10 million queries": lambda: run_attention(1, 1, 10_000_000, 8),
    "attention to 10 million keys": lambda: run_attention(1, 1, 8, 10_000_000),
    "70,000 videos": lambda: run_patches(70_000, 1, (2, 8, 8), (1, 4, 4)),
    "70,000 channels": lambda: run_patches(1, 70_000, (2, 8, 8), (1, 4, 4)),
    "a video of 100,000 frames": lambda: run_patches(1, 1, (100_000, 8, 8), (70_000, 8, 8)),
    "tiles of a film of 700 channels": lambda: run_tiles(1, 700, 100),
    "tiles of 70,000 videos": lambda: run_tiles(70_000, 1, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_every_size_goes_on_the_first_axis(case, grids, monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    CASES[case]()
    assert all(len(grid) == 1 for launches in grids.values() for grid in launches), grids
    assert max(grid[0] for launches in grids.values() for grid in launches) > 65_535


def test_every_kernel_is_among_the_cases(grids, monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    for run in CASES.values():
        run()
    kernels = {name for module, place in PLACES.items() for name in vars(getattr(module, place))}
    assert set(grids) == {name for name in kernels if name.endswith("_kernel")}


def test_more_programs_than_a_gpu_has_are_refused():
    assert _triton.launch_grid(2**15, 2**15) == (2**30,)
    assert _triton.launch_grid(2**31 - 1) == (2**31 - 1,)
    with pytest.raises(ValueError, match=r"^tensors: got sizes that need 65536 x 32768 = 2147483648 programs"):
        _triton.launch_grid(65_536, 32_768)
