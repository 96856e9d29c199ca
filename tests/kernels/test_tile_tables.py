"""The tables that the tile kernels read: whom they belong to, how long they live, when origins are read again.

A captured CUDA graph goes on reading the tables of its launches at their addresses. So they must live as long as the
tensor of origins, or the accumulator, of which they were made.
"""

import gc
import weakref

import numpy as np
import pytest
import torch

from hpdm_kernels import TileAccumulator, extract_tiles, reference
from hpdm_kernels.tiles import triton_backend
from hpdm_kernels.tiles.geometry import read_origins
from tests.kernels.test_tiles import product

pytest.importorskip("triton")

TILE, SIZE = (1, 2, 4), (1, 4, 12)
ORIGINS = product((0,), (0, 2), (0, 4, 8))
MANY = 100


class Recorder:
    """Stands for a kernel; notes the tables, which are the integer tensors, and the options of its launches."""

    def __init__(self):
        self.tables, self.options = [], []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            found = [a for a in arguments if isinstance(a, torch.Tensor) and not a.is_floating_point()]
            self.tables.append([weakref.ref(table) for table in found])
            self.options.append(options)

        return launch


@pytest.fixture
def kernels(monkeypatch):
    """Both kernels, by name."""
    found = {}
    for name in ("extract_tiles_kernel", "average_tiles_kernel"):
        found[name] = Recorder()
        monkeypatch.setattr(triton_backend.triton_kernels, name, found[name])
    return found


def use_other_origins(device):
    """Cuts tiles at as many other origins, as a sampler of several videos does."""
    video = torch.zeros(1, 1, 1, 4, 12 + MANY, device=device)
    for n in range(MANY):
        extract_tiles(video, torch.tensor([[0, 0, n]]), TILE, backend="triton")
    gc.collect()


def test_an_accumulators_tables_live_as_long_as_it_does(kernels, device):
    sums = TileAccumulator(ORIGINS.clone(), TILE, SIZE, backend="triton")
    sums.add(torch.zeros(1, 3, 1, *TILE, device=device))
    use_other_origins(device)
    sums.add(torch.zeros(1, 3, 1, *TILE, device=device))
    first, second = ([table() for table in tables] for tables in kernels["average_tiles_kernel"].tables)
    assert len(first) == len(second) > 0
    assert all(a is b and a is not None for a, b in zip(first, second))


def test_tables_of_extraction_live_as_long_as_the_origins(kernels, device):
    origins, video = ORIGINS.clone(), torch.zeros(1, 1, *SIZE, device=device)
    extract_tiles(video, origins, TILE, backend="triton")
    use_other_origins(device)
    tables = kernels["extract_tiles_kernel"].tables
    assert tables[0]
    assert all(table() is not None for table in tables[0])
    del origins
    use_other_origins(device)
    assert all(table() is None for table in tables[0])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_changed_origins_are_read_again(backend, generator, device):
    video = torch.randn(1, 1, *SIZE, generator=generator).to(device)
    values = np.zeros((3, 3), dtype=np.int64)
    origins = torch.from_numpy(values)
    for _ in range(2):
        values += [0, 1, 2]  # PyTorch does not see this change
        expected = reference.extract_tiles(video, origins, TILE)
        assert torch.equal(extract_tiles(video, origins, TILE, backend=backend), expected)
        origins[1] = torch.tensor([0, 0, 0])
        expected = reference.extract_tiles(video, origins, TILE)
        assert torch.equal(extract_tiles(video, origins, TILE, backend=backend), expected)
        values[1] = values[0]


def test_one_tensor_of_origins_serves_several_sizes():
    one = read_origins(ORIGINS, TILE, SIZE, cover=True)
    other = read_origins(ORIGINS, TILE, (1, 5, 13))
    assert one.obstacle is None
    assert other.obstacle is not None
    assert read_origins(ORIGINS, TILE, SIZE) is one
    assert read_origins(ORIGINS, TILE, (1, 5, 13)) is other


@pytest.mark.parametrize(("width", "vector"), [(8, 4), (10, 1), (11, 1), (12, 4)])
def test_groups_of_columns_end_with_the_video(width, vector, kernels, device):
    """Columns beyond the last tile have a gradient, too: a group across the border would write behind the tensor."""
    video = torch.zeros(1, 1, 1, 1, width, device=device, requires_grad=True)
    tiles = extract_tiles(video, product((0,), (0,), (0, 4)), (1, 1, 4), backend="triton")
    torch.autograd.grad(tiles, video, torch.ones_like(tiles))
    assert kernels["average_tiles_kernel"].options[0]["VECTOR"] == vector
