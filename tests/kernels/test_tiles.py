"""Tiles: extraction and averaging against the fp64 formula, their gradients, their contract."""

import itertools

import numpy as np
import pytest
import torch

from hpdm_kernels import average_tiles, extract_tiles, reference
from hpdm_kernels.testing import assert_within_budget, check_op, value_and_grads
from hpdm_kernels.tiles.geometry import Axis, read_origins

BACKENDS = ("torch", "triton")


def product(*axes):
    return torch.tensor(list(itertools.product(*axes)))


# (tile, size, origins)
GRIDS = {
    "half": ((2, 4, 6), (3, 6, 12), product((0, 1), (0, 2), (0, 3, 6))),
    "irregular": ((2, 5, 7), (2, 7, 16), product((0,), (0, 2), (0, 4, 8, 9))),
    "disjoint": ((1, 3, 4), (2, 6, 4), product((0, 1), (0, 3), (0,))),
    "ones": ((1, 1, 1), (1, 1, 3), product((0,), (0,), (0, 1, 2))),
    "whole": ((2, 3, 5), (2, 3, 5), product((0,), (0,), (0,))),
    "pushed back": ((1, 2, 3), (1, 2, 10), product((0,), (0,), (0, 2, 4, 6, 7))),
    "triple": ((1, 1, 6), (1, 1, 10), product((0,), (0,), (0, 2, 4))),
}


def inputs(grid, generator, device, dtype=torch.float32, batch=2, channels=2):
    tile, size, origins = GRIDS[grid]
    tiles = torch.randn(batch, len(origins), channels, *tile, generator=generator).to(device, dtype)
    x = torch.randn(batch, channels, *size, generator=generator).to(device, dtype)
    grad = torch.randn(batch, channels, *size, generator=generator).to(device, dtype)
    return tiles, x, grad, origins, tile, size


def check_average(backend, tiles, x, grad, origins, size, alpha=0.7, beta=-1.3):
    def run(chosen):
        return lambda t, x: average_tiles(t, origins, size, x=x, alpha=alpha, beta=beta, backend=chosen)

    check_op(run(backend), run("reference"), (tiles, x), grad, names=("tiles", "x"))


def check_extract(backend, video, grad, origins, tile):
    def run(chosen):
        return lambda v: extract_tiles(v, origins, tile, backend=chosen)

    assert torch.equal(run(backend)(video), run("reference")(video))
    check_op(run(backend), run("reference"), (video,), grad, names=("video",))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", GRIDS)
def test_average_matches_formula(grid, backend, generator, device):
    tiles, x, grad, origins, _, size = inputs(grid, generator, device)
    check_average(backend, tiles, x, grad, origins, size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", GRIDS)
def test_extract_matches_formula(grid, backend, generator, device):
    tiles, x, _, origins, tile, _ = inputs(grid, generator, device)
    check_extract(backend, x, tiles, origins, tile)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extract_takes_any_origins(backend, generator, device):
    """Repeated, unordered, with gaps: no product grid."""
    origins = torch.tensor([[0, 0, 0], [2, 1, 3], [1, 0, 2], [2, 1, 3]], dtype=torch.int32)
    video = torch.randn(1, 2, 4, 4, 7, generator=generator).to(device)
    grad = torch.randn(1, 4, 2, 2, 3, 4, generator=generator).to(device)
    check_extract(backend, video, grad, origins, (2, 3, 4))
    gaps = product((0, 2), (0,), (0, 3))
    check_extract(backend, video, grad[..., :1], gaps, (2, 3, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_x(backend, generator, device):
    tiles, _, _, origins, _tile, size = inputs("half", generator, device)
    out = average_tiles(tiles, origins, size, backend=backend)
    truth = reference.average_tiles(tiles.double(), origins, size, None, 0.0, 1.0)
    assert_within_budget("average", out, reference.average_tiles(tiles, origins, size, None, 0.0, 1.0), truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_average_undoes_extraction(backend, generator, device):
    _, x, _, origins, tile, size = inputs("irregular", generator, device)
    again = average_tiles(extract_tiles(x, origins, tile, backend=backend), origins, size, backend=backend)
    torch.testing.assert_close(again, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype, generator, device):
    tiles, x, grad, origins, tile, size = inputs("irregular", generator, device, dtype)
    check_average("torch", tiles, x, grad, origins, size)
    check_extract("torch", x, tiles, origins, tile)


def test_16_bit_sums_are_fp32(device):
    """256 ones and a 1 in bf16: a 16-bit sum would stop at 256."""
    origins = product((0,), (0,), range(257))
    tiles = torch.ones(1, 257, 1, 1, 1, 257, dtype=torch.bfloat16, device=device)
    out = average_tiles(tiles, origins, (1, 1, 513), backend="torch")
    assert torch.equal(out, torch.ones_like(out))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend, generator, device):
    tiles, x, grad, origins, tile, size = inputs("half", generator, device)
    strided = tiles.permute(3, 5, 0, 2, 1, 4).contiguous().permute(2, 4, 3, 0, 5, 1)
    x = torch.cat((x, x), dim=-1)[..., ::2]
    assert not strided.is_contiguous()
    assert not x.is_contiguous()
    grad = grad.transpose(3, 4).contiguous().transpose(3, 4)
    check_average(backend, strided, x, grad, origins, size)
    check_extract(backend, x, strided, origins, tile)
    check_average(backend, tiles, x, torch.ones((), device=device).expand(x.shape), origins, size)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces_smaller_than_cells(backend, generator, device, monkeypatch):
    """The average in PyTorch cuts cells that are too large for the cache."""
    monkeypatch.setattr("hpdm_kernels.tiles.torch_backend.CPU_PIECE", 1)
    tiles, x, grad, origins, _, size = inputs("half", generator, device)
    check_average(backend, tiles, x, grad, origins, size)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeatable(backend, generator, device):
    tiles, x, grad, origins, tile, size = inputs("irregular", generator, device)
    run = lambda t, x: average_tiles(t, origins, size, x=x, alpha=0.3, beta=0.7, backend=backend)
    cut = lambda v: extract_tiles(v, origins, tile, backend=backend)
    for fn, args, g in ((run, (tiles, x), grad), (cut, (x,), tiles)):
        one, two = value_and_grads(fn, args, g), value_and_grads(fn, args, g)
        assert torch.equal(one[0], two[0])
        assert all(torch.equal(a, b) for a, b in zip(one[1], two[1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_differentiable(backend, generator, device):
    """The gradient's gradient of a linear op is the op: d<g, A(t)>/dt = A'g, d<A'g, u>/dg = A u."""
    tiles, _x, grad, origins, _, size = inputs("half", generator, device)
    tiles.requires_grad_()
    grad.requires_grad_()
    out = average_tiles(tiles, origins, size, backend=backend)
    (back,) = torch.autograd.grad(out, tiles, grad, create_graph=True)
    u = torch.randn(tiles.shape, generator=generator).to(device)
    (again,) = torch.autograd.grad(back, grad, u)
    torch.testing.assert_close(again, average_tiles(u, origins, size, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, generator, device):
    tiles, x, _, origins, tile, size = inputs("half", generator, device, batch=1, channels=1)
    tiles.requires_grad_()
    x.requires_grad_()
    torch.library.opcheck(
        torch.ops.hpdm.average_tiles.default, (tiles, origins, size, x, 0.3, 0.7, True, None, backend)
    )
    torch.library.opcheck(torch.ops.hpdm.extract_tiles.default, (x, origins, tile, False, 1.0, None, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend, generator, device):
    tiles, x, _grad, origins, tile, size = inputs("half", generator, device)

    def step(t, x):
        out = average_tiles(t * 2, origins, size, x=x, alpha=0.3, beta=0.7, backend=backend)
        return extract_tiles(out + 1, origins, tile, backend=backend).sin()

    g = torch.randn(tiles.shape, generator=generator).to(device)
    eager = value_and_grads(step, (tiles, x), g)
    compiled = value_and_grads(torch.compile(step, fullgraph=True), (tiles, x), g)
    torch.testing.assert_close(compiled[0], eager[0])
    for a, b in zip(compiled[1], eager[1]):
        torch.testing.assert_close(a, b)


def test_origins_are_read_once(device):
    origins = GRIDS["half"][2]
    one = read_origins(origins, (2, 4, 6), (3, 6, 12))
    assert read_origins(origins.clone().int(), (2, 4, 6), (3, 6, 12)) is one


def test_runs_and_cells():
    axis = Axis(10, 3, (0, 2, 4, 6, 7))
    assert axis.runs() == [(0, 4, 2), (4, 1, 3)]
    assert axis.counts() == [1, 1, 2, 1, 2, 1, 2, 2, 2, 1]
    assert all(all(o <= a and b <= o + 3 for o in axis.origins[n.start : n.stop]) for a, b, n in axis.cells())


TILES, VIDEO = torch.zeros(1, 4, 1, 1, 2, 2), torch.zeros(1, 1, 1, 3, 4)
ORIGINS = product((0,), (0, 1), (0, 2))
BAD_AVERAGES = {
    "tiles: got list": (TypeError, {"tiles": [1]}),
    "tiles: got dtype torch.int64": (TypeError, {"tiles": TILES.long()}),
    "tiles: got shape": (ValueError, {"tiles": TILES[0]}),
    "size: got 4": (TypeError, {"size": 4}),
    "size: got tiles of": (ValueError, {"size": (1, 1, 4)}),
    "origins: got shape": (ValueError, {"origins": ORIGINS[:3]}),
    "origins: got dtype": (TypeError, {"origins": ORIGINS.float()}),
    r"origins: row 1 is \(0, 0, 2\), expected a tile": (ValueError, {"size": (1, 3, 3)}),
    "origins: row 0": (ValueError, {"origins": ORIGINS - 1}),
    "product grid in row-major order": (ValueError, {"origins": ORIGINS.flip(0)}),
    r"4 tiles.*\(there are 1 x 1 x 1": (ValueError, {"origins": ORIGINS[:1].expand(4, 3)}),
    "no tile covers height 3 to 3": (ValueError, {"size": (1, 4, 4)}),
    "no tile covers width 2 to 2": (ValueError, {"origins": product((0,), (0, 1), (0, 3)), "size": (1, 3, 5)}),
    "no tile covers frames 0 to 0": (ValueError, {"origins": ORIGINS + torch.tensor([1, 0, 0]), "size": (2, 3, 4)}),
    "x: got shape": (ValueError, {"x": VIDEO[..., :2], "alpha": 1.0}),
    "x: got dtype": (TypeError, {"x": VIDEO.double(), "alpha": 1.0}),
    "alpha: got 0.5 without x": (ValueError, {"alpha": 0.5}),
    "alpha: got None, expected a finite number": (TypeError, {"alpha": None}),
    "alpha: got nan": (ValueError, {"x": VIDEO, "alpha": float("nan")}),
    "alpha: got a tensor, one that requires a gradient": (
        ValueError,
        {"x": VIDEO, "alpha": torch.ones((), requires_grad=True)},
    ),
    r"alpha: got a tensor, shape \(2,\)": (ValueError, {"x": VIDEO, "alpha": torch.ones(2)}),
    "beta: got '1', expected a finite number": (TypeError, {"beta": "1"}),
    "beta: got True": (TypeError, {"beta": True}),
    "beta: got inf": (ValueError, {"beta": float("inf")}),
    "beta: got a tensor, one that requires": (ValueError, {"beta": torch.ones((), requires_grad=True)}),
    "backend: got 'cuda'": (ValueError, {"backend": "cuda"}),
}


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("message", BAD_AVERAGES)
def test_average_rejects(message, backend):
    error, change = BAD_AVERAGES[message]
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the arguments are on the CPU")
    arguments = {"tiles": TILES, "origins": ORIGINS, "size": (1, 3, 4), "backend": backend} | change
    with pytest.raises(error, match=message):
        average_tiles(**arguments)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_factors_may_be_any_kind_of_number(backend):
    expected = average_tiles(TILES + 1, ORIGINS, (1, 3, 4), x=VIDEO + 3, alpha=2.0, beta=0.5, backend=backend)
    for kind in (np.float32, np.float64, torch.tensor, lambda n: torch.tensor([n])):
        out = average_tiles(
            TILES + 1, ORIGINS, (1, 3, 4), x=VIDEO + 3, alpha=kind(2.0), beta=kind(0.5), backend=backend
        )
        assert torch.equal(out, expected)
    assert torch.equal(
        average_tiles(TILES + 1, ORIGINS, (1, 3, 4), beta=2, backend=backend), 2 * torch.ones_like(VIDEO)
    )


def test_factors_may_change_in_compiled_code():
    step = lambda alpha: average_tiles(TILES + 1, ORIGINS, (1, 3, 4), x=VIDEO + 3, alpha=alpha, backend="torch")
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for alpha in (0.0, 0.25, 0.5, 1):
        assert torch.equal(compiled(alpha), step(alpha))


BAD_EXTRACTIONS = {
    "video: got shape": (ValueError, {"video": VIDEO[0]}),
    "tile_size: got": (TypeError, {"tile_size": (1, 2.0, 2)}),
    "tile_size: got tiles of": (ValueError, {"tile_size": (2, 2, 2)}),
    "origins: got shape": (ValueError, {"origins": ORIGINS[:, :2]}),
    "origins: row 2": (ValueError, {"tile_size": (1, 3, 2)}),
    "backend: got": (ValueError, {"backend": "cuda"}),
}


@pytest.mark.parametrize("message", BAD_EXTRACTIONS)
def test_extract_rejects(message):
    error, change = BAD_EXTRACTIONS[message]
    with pytest.raises(error, match=message):
        extract_tiles(**({"video": VIDEO, "origins": ORIGINS, "tile_size": (1, 2, 2), "backend": "torch"} | change))


def test_triton_refuses_what_it_cannot_run():
    with pytest.raises(RuntimeError, match="average_tiles: backend='triton' cannot run"):
        average_tiles(TILES.double(), ORIGINS, (1, 3, 4), backend="triton")
    with pytest.raises(RuntimeError, match="extract_tiles: backend='triton' cannot run"):
        extract_tiles(VIDEO.double(), ORIGINS, (1, 2, 2), backend="triton")
