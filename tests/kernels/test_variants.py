"""How many variants of a kernel real use compiles: Triton makes one for every integer that is 1 or a multiple of 16.

Launches are recorded, not made (``benchmarks/launches.py``), so no GPU is needed; but in a process of their own, since
kernels of this one are interpreted.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CODE = """
import itertools, json, math
import torch
from benchmarks.launches import recorded_launches
from hpdm_kernels import TileAccumulator, extract_tiles, footprint_size, fuse_context, sample_patches

def variants(launches):
    found = {}
    for launch in launches:
        found.setdefault(launch.kernel, set()).add(launch.variant)
    return {kernel: len(keys) for kernel, keys in found.items()}

def add_tiles(tiles, per_call):
    # Tiles of a level at 50 % overlap: 4x16x16 pixels, `tiles` along each axis; chunks as a sampler adds them.
    tile, size = (4, 16, 16), [n * (tiles + 1) // 2 for n in (4, 16, 16)]
    origins = torch.tensor(list(itertools.product(*(range(0, m - n + 1, n // 2) for n, m in zip(tile, size)))))
    sums = TileAccumulator(origins, tile, size, backend="triton")
    for first in range(0, len(origins), per_call):
        n = min(per_call, len(origins) - first)
        sums.add(torch.zeros(1, 1, 1, 1, 1, 1).expand(1, n, 1, 1, 1, 1).expand(1, n, 1, *tile).contiguous())
    sums.step()

def fuse(batch, grid, levels, width=64):
    # Levels of a pyramid of ratio 2; the last one reads all others.
    scales = [0.5**level for level in range(levels)]
    boxes = [torch.tensor([[0.0] * 3 + [scale] * 3]).repeat(batch, 1) for scale in scales]
    footprints = [[footprint_size(scales[-1] / scale, n, n) for n in grid] for scale in scales[:-1]]
    n = math.prod(grid)
    x, sources = torch.randn(batch, n, width), [torch.randn(batch, n, width) for _ in scales[1:]]
    weight, bias = torch.randn(width, 2 * width + 3), torch.randn(width)
    inputs = [t.requires_grad_() for t in (x, weight, bias, *sources)]
    out = fuse_context(
        x, sources, boxes[:-1], boxes[-1], weight, bias, [grid] * len(sources), grid, footprints=footprints,
        backend="triton",
    )
    torch.autograd.grad(out.sum(), inputs)

found = {}
for tiles, per_call in ((3, 4), (7, 8), (15, 8), (15, 15)):
    with recorded_launches() as launches:
        add_tiles(tiles, per_call)
    found[f"{tiles**3} tiles by {per_call}"] = variants(launches)
with recorded_launches() as launches:
    for batch, grid, levels in itertools.product((1, 2, 3, 16), ((2, 4, 4), (4, 8, 8), (3, 5, 7)), (2, 3, 4)):
        fuse(batch, grid, levels)
found["context"] = variants(launches)
with recorded_launches() as launches:
    for batch, frames, size in itertools.product((1, 3, 16), (1, 8, 16), (16, 36, 64)):
        box = torch.tensor([[0.0] * 3 + [1.0] * 3]).repeat(batch, 1)
        sample_patches(torch.zeros(batch, 3, 16, 64, 64), box, (frames, size, 64), backend="triton")
found["patches"] = variants(launches)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("level", ["27 tiles by 4", "343 tiles by 8", "3375 tiles by 8", "3375 tiles by 15"])
def test_a_level_of_tiles_needs_one_kernel_to_add_and_one_to_step(level, found):
    assert found[level] == {"average_tiles_kernel": 2}


def test_the_context_needs_one_kernel_for_all_levels_and_batches(found):
    """Of the transposed interpolation there is one for each axis."""
    assert found["context"] == {
        "_context_geometry_kernel": 1, "_context_gather_kernel": 1, "_add_context_kernel": 1,
        "_coordinate_sums_kernel": 1, "_context_contract_kernel": 3, "_context_scatter_kernel": 1,
    }  # fmt: skip


def test_patches_need_one_kernel_for_all_batches_and_sizes(found):
    assert found["patches"] == {"sample_patches_fwd_kernel": 1}
