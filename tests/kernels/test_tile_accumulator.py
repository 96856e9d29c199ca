"""Tiles averaged chunk by chunk: against the fp64 formula, the same bits for any chunks, its contract."""

import itertools

import pytest
import torch

from hpdm_kernels import TileAccumulator, average_tiles, reference
from hpdm_kernels.modules import TileAverage
from hpdm_kernels.testing import assert_within_budget
from hpdm_kernels.tiles.geometry import read_origins
from tests.kernels.test_tiles import GRIDS, inputs, product

EVERY = ("reference", "torch", "triton")
CHUNKS = (1, 3, 1000)
COVERS = GRIDS | {
    "three quarters": ((1, 2, 8), (2, 3, 16), product((0, 1), (0, 1), range(0, 9, 2))),
    "a quarter": ((1, 4, 8), (1, 7, 20), product((0,), (0, 3), (0, 6, 12))),
    "aligned": ((2, 4, 8), (4, 4, 16), product((0, 2), (0,), (0, 4, 8))),
}


def accumulate(sums, tiles, chunk, **step):
    for first in range(0, tiles.shape[1], chunk):
        sums.add(tiles[:, first : first + chunk], first)
    return sums.step(**step)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("grid", COVERS)
def test_matches_formula_with_any_chunks(grid, backend, generator, device, monkeypatch):
    monkeypatch.setitem(GRIDS, grid, COVERS[grid])
    tiles, x, _, origins, tile, size = inputs(grid, generator, device, batch=1, channels=2)
    step = {"x": x, "alpha": 0.7, "beta": -1.3}
    oracle = reference.average_tiles(tiles.double(), origins, size, x.double(), 0.7, -1.3)
    plain = reference.average_tiles(tiles, origins, size, x, 0.7, -1.3)
    sums = TileAccumulator(origins, tile, size, backend=backend)
    results = [accumulate(sums, tiles, chunk, **step) for chunk in CHUNKS]
    assert_within_budget("average", results[0], plain, oracle)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("backend", EVERY)
def test_without_x(backend, generator, device):
    tiles, _, _, origins, tile, size = inputs("irregular", generator, device)
    out = accumulate(TileAccumulator(origins, tile, size, backend=backend), tiles, 2)
    truth = reference.average_tiles(tiles.double(), origins, size, None, 0.0, 1.0)
    assert_within_budget("average", out, reference.average_tiles(tiles, origins, size, None, 0.0, 1.0), truth)


@pytest.mark.parametrize("backend", EVERY)
def test_nothing_is_left_of_an_earlier_step(backend, generator, device):
    tiles, _, _, origins, tile, size = inputs("half", generator, device)
    sums = TileAccumulator(origins, tile, size, backend=backend)
    sums.add(torch.full_like(tiles[:, :5], torch.nan))
    sums.reset()
    want = accumulate(sums, tiles, 4)
    assert torch.isfinite(want).all()
    accumulate(sums, torch.full_like(tiles, torch.nan), 4)
    assert torch.equal(accumulate(sums, tiles, 4), want)
    # Another batch takes another buffer.
    assert torch.equal(accumulate(sums, tiles[:1], 4), want[:1])
    assert torch.equal(accumulate(TileAccumulator(origins, tile, size, backend=backend), tiles, 5), want)


@pytest.mark.parametrize("backend", EVERY)
def test_strided_chunks(backend, generator, device):
    tiles, x, _, origins, tile, size = inputs("half", generator, device)
    strided = tiles.permute(3, 5, 0, 2, 1, 4).contiguous().permute(2, 4, 3, 0, 5, 1)
    wide = torch.cat((x, x), dim=-1)[..., ::2]
    assert not strided[:, :5].is_contiguous()
    sums = TileAccumulator(origins, tile, size, backend=backend)
    got = accumulate(sums, strided, 5, x=wide, alpha=0.5)
    assert torch.equal(got, accumulate(sums, tiles, 5, x=wide.contiguous(), alpha=0.5))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype, backend, generator, device):
    tiles, x, _, origins, tile, size = inputs("irregular", generator, device, dtype)
    sums = TileAccumulator(origins, tile, size, backend=backend)
    got = [accumulate(sums, tiles, chunk, x=x, alpha=0.7, beta=-1.3) for chunk in CHUNKS]
    oracle = reference.average_tiles(tiles.double(), origins, size, x.double(), 0.7, -1.3)
    plain = reference.average_tiles(tiles, origins, size, x, 0.7, -1.3)
    assert_within_budget("average", got[0], plain, oracle)
    assert all(torch.equal(got[0], other) for other in got[1:])


def test_16_bit_sums_are_fp32(device):
    """257 ones in bf16: a 16-bit sum would stop at 256."""
    tiles = torch.ones(1, 257, 1, 1, 1, 257, dtype=torch.bfloat16, device=device)
    sums = TileAccumulator(product((0,), (0,), range(257)), (1, 1, 257), (1, 1, 513), backend="torch")
    out = accumulate(sums, tiles, 10)
    assert torch.equal(out, torch.ones_like(out))


def test_a_voxel_adds_its_tiles_in_their_order():
    """(1e8 + 1) - 1e8 is 0 in fp32, other orders give 1: every backend takes the tiles one by one, first to last."""
    tiles = torch.tensor([1e8, 1.0, -1e8]).reshape(1, 3, 1, 1, 1, 1).expand(1, 3, 1, 1, 1, 6).contiguous()
    origins = product((0,), (0,), (0, 2, 4))
    for backend in EVERY if not torch.cuda.is_available() else EVERY[:2]:
        out = accumulate(TileAccumulator(origins, (1, 1, 6), (1, 1, 10), backend=backend), tiles, 2)
        assert out[0, 0, 0, 0, 4:6].tolist() == [0.0, 0.0]


def test_holds_the_video_and_one_chunk(generator, device):
    """The buffer of sums is made once."""
    tiles, _, _, origins, tile, size = inputs("half", generator, device)
    sums = TileAccumulator(origins, tile, size, backend="torch")
    accumulate(sums, tiles, 4)
    before = sums._sums
    accumulate(sums, tiles, 7)
    assert sums._sums is before
    assert before.numel() == tiles.shape[0] * tiles.shape[2] * torch.Size(size).numel()


@pytest.mark.parametrize("backend", EVERY)
def test_opcheck(backend, generator, device):
    tiles, x, _, origins, tile, size = inputs("half", generator, device, batch=1, channels=1)
    sums = torch.zeros(1, 1, *size, device=device)
    torch.library.opcheck(torch.ops.hpdm.add_tiles.default, (sums, tiles[:, 2:5], origins, 2, None, backend))
    step = (sums, origins, tile, torch.float32, x, 0.3, 0.7, True, backend)
    torch.library.opcheck(torch.ops.hpdm.step_tiles.default, step)


@pytest.mark.parametrize("backend", EVERY)
def test_steps_inside_and_outside_of_inference_mode(backend, generator, device):
    """The buffer outlives the mode it is made in."""
    tiles, _, _, origins, tile, size = inputs("half", generator, device)
    sums = TileAccumulator(origins, tile, size, backend=backend)
    with torch.inference_mode():
        inside = accumulate(sums, tiles.clone(), 3)
    outside = accumulate(sums, tiles, 3)
    with torch.inference_mode():
        again = accumulate(sums, tiles.clone(), 3)
    assert inside.is_inference()
    assert not outside.is_inference()
    assert torch.equal(inside, outside)
    assert torch.equal(again, outside)


@pytest.mark.parametrize(
    ("backend", "inference"), [("reference", False), ("torch", False), ("torch", True), ("triton", True)]
)
def test_the_first_step_compiles_as_one_graph(backend, inference, generator, device):
    tiles, x, _, origins, tile, size = inputs("half", generator, device)
    expected = accumulate(TileAccumulator(origins, tile, size, backend=backend), tiles, 4, x=x, alpha=0.5)
    sums = TileAccumulator(origins, tile, size, backend=backend)
    torch._dynamo.reset()
    step = torch.compile(lambda t, x: accumulate(sums, t, 4, x=x, alpha=0.5), fullgraph=True, backend="aot_eager")
    with torch.inference_mode(inference):
        first = step(tiles, x)
    second = step(tiles, x)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


def test_origins_are_the_accumulators_own():
    mine = ORIGINS.clone()
    sums, module = make(origins=mine, backend="torch"), TileAverage(mine, (1, 3, 4), backend="torch")
    mine += 1
    assert torch.equal(sums.origins, ORIGINS)
    sums.add(TILES + 1)
    assert torch.equal(sums.step(), torch.ones_like(X))
    assert torch.equal(module(TILES + 1), torch.ones_like(X))


def test_boxes():
    plan = read_origins(product((0, 2), (0, 2, 4), (0, 3)), (3, 3, 5), (5, 7, 8))
    assert plan.box(0, 12) == [(0, 5), (0, 7), (0, 8)]
    assert plan.box(1, 2) == [(0, 3), (0, 3), (3, 8)]
    assert plan.box(2, 4) == [(0, 3), (2, 5), (0, 8)]
    assert plan.box(3, 5) == [(0, 3), (2, 7), (0, 8)]
    assert plan.box(5, 7) == [(0, 5), (0, 7), (0, 8)]
    for first, stop in itertools.combinations(range(13), 2):
        box = plan.box(first, stop)
        for origin in plan.origins[first:stop]:
            assert all(a <= o and o + n <= b for (a, b), o, n in zip(box, origin, (3, 3, 5)))


def test_sets_of_cells_cover_the_axis_once():
    for tile, size, origins in COVERS.values():
        plan = read_origins(origins, tile, size)
        for axis in plan.axes:
            found = {}
            for cells in axis.cell_sets():
                for n in range(cells.count):
                    start, first = cells.start + n * cells.step, cells.first + n * cells.tile_step
                    cover = range(first, first + len(cells.offsets))
                    assert start not in found
                    found[start] = (start, start + cells.length, cover)
                    assert [axis.origins[t] + at for t, at in zip(cover, cells.offsets)] == [start] * len(cover)
            assert [found[start] for start in sorted(found)] == axis.cells()


TILES, X = torch.zeros(1, 4, 1, 1, 2, 2), torch.zeros(1, 1, 1, 3, 4)
ORIGINS = product((0,), (0, 1), (0, 2))


def make(**change):
    return TileAccumulator(**({"origins": ORIGINS, "tile_size": (1, 2, 2), "size": (1, 3, 4)} | change))


@pytest.mark.parametrize(
    ("message", "error", "change"),
    [
        ("tile_size: got", TypeError, {"tile_size": (1, 2.0, 2)}),
        ("size: got 4", TypeError, {"size": 4}),
        ("origins: got shape", ValueError, {"origins": ORIGINS[:, :2]}),
        ("origins: got dtype", TypeError, {"origins": ORIGINS.float()}),
        ("origins: row 1", ValueError, {"size": (1, 3, 3)}),
        ("product grid in row-major order", ValueError, {"origins": ORIGINS.flip(0)}),
        ("no tile covers height 3 to 3", ValueError, {"size": (1, 4, 4)}),
        ("backend: got 'cuda'", ValueError, {"backend": "cuda"}),
    ],
)
def test_constructor_rejects(message, error, change):
    with pytest.raises(error, match=message):
        make(**change)


@pytest.mark.parametrize(
    ("message", "error", "tiles", "first"),
    [
        ("tiles: got list", TypeError, [1], None),
        ("tiles: got dtype torch.int64", TypeError, TILES.long(), None),
        ("tiles: got shape", ValueError, TILES[0], None),
        (r"tiles: got shape \(1, 2, 1, 1, 2, 1\)", ValueError, TILES[:, :2, ..., :1], None),
        ("tiles: got shape", ValueError, TILES[:, :0], None),
        (r"tiles: got shape \(2,", ValueError, TILES[:, :2].expand(2, -1, -1, -1, -1, -1), None),
        ("tiles: got dtype torch.float64", TypeError, TILES[:, :2].double(), None),
        ("tiles: got 4 tiles, expected at most 3: 1 of 4", ValueError, TILES, None),
        ("first: got 0, expected 1", ValueError, TILES[:, :2], 0),
        ("first: got 2, expected 1", ValueError, TILES[:, 2:], 2),
        ("tiles: got a tensor that requires a gradient", ValueError, TILES[:, :2].clone().requires_grad_(), None),
    ],
)
def test_add_rejects_and_goes_on(message, error, tiles, first):
    sums = make(backend="torch")
    sums.add(TILES[:, :1] + 1)
    with pytest.raises(error, match=message):
        sums.add(tiles, first)
    sums.add(TILES[:, 1:] + 1)
    assert torch.equal(sums.step(), torch.ones_like(X))


def test_step_rejects_and_goes_on():
    sums = make(backend="torch")
    with pytest.raises(ValueError, match="tiles: got 0 of 4 tiles"):
        sums.step()
    sums.add(TILES[:, :3] + 1)
    with pytest.raises(ValueError, match="tiles: got 3 of 4 tiles"):
        sums.step(X, 1.0)
    sums.add(TILES[:, 3:] + 1)
    with pytest.raises(ValueError, match="tiles: got 1 tiles, expected at most 0"):
        sums.add(TILES[:, :1])
    with pytest.raises(ValueError, match=r"alpha: got 0\.5 without x"):
        sums.step(alpha=0.5)
    with pytest.raises(TypeError, match="alpha: got None"):
        sums.step(alpha=None)
    with pytest.raises(TypeError, match="beta: got '1'"):
        sums.step(beta="1")
    with pytest.raises(ValueError, match="beta: got a tensor, one that requires a gradient"):
        sums.step(beta=torch.ones((), requires_grad=True))
    with pytest.raises(ValueError, match="x: got shape"):
        sums.step(X[..., :2], 1.0)
    with pytest.raises(TypeError, match="x: got dtype"):
        sums.step(X.double(), 1.0)
    with pytest.raises(ValueError, match="x: got a tensor that requires a gradient"):
        sums.step(X.clone().requires_grad_(), 1.0)
    assert torch.equal(sums.step(X, 1.0, 2.0), torch.full_like(X, 2.0))
    with pytest.raises(ValueError, match="tiles: got 0 of 4 tiles"):
        sums.step()


def test_triton_refuses_what_it_cannot_run():
    sums = make(backend="triton")
    with pytest.raises(RuntimeError, match="TileAccumulator: backend='triton' cannot run"):
        sums.add(TILES.double())


def test_average_has_the_same_sums_on_triton(generator, device):
    """There one kernel serves both; the portable average adds axis by axis instead, which rounds otherwise."""
    tiles, _, _, origins, tile, size = inputs("irregular", generator, device)
    got = accumulate(TileAccumulator(origins, tile, size, backend="triton"), tiles, 3)
    assert torch.equal(got, average_tiles(tiles, origins, size, backend="triton"))
