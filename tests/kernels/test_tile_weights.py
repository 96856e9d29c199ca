"""Averages of tiles with weights per axis: against the fp64 formula, their gradients, their contract."""

import itertools

import pytest
import torch

from hpdm_kernels import TileAccumulator, average_tiles, reference
from hpdm_kernels.modules import TileAverage
from hpdm_kernels.testing import assert_within_budget, check_op
from tests.kernels.test_tile_accumulator import COVERS, EVERY, accumulate
from tests.kernels.test_tiles import product


def drawn(grid, generator, device, dtype=torch.float32, batch=2, channels=2):
    tile, size, origins = COVERS[grid]
    shapes = (batch, len(origins), channels, *tile), (batch, channels, *size), (batch, channels, *size)
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    weights = [(2 * torch.randn(n, generator=generator)).exp() for n in tile]
    return *tensors, origins, tile, size, weights


def check(backend, tiles, x, grad, origins, size, weights, alpha=0.7, beta=-1.3):
    def run(chosen):
        return lambda t, x: average_tiles(
            t, origins, size, x=x, alpha=alpha, beta=beta, weights=weights, backend=chosen
        )

    # A tile's share may be tiny, so its rounding counts relative to what it was multiplied by.
    check_op(
        run(backend), run("reference"), (tiles, x), grad, ulps=8.0, repeat=True, products=True, names=("tiles", "x")
    )


def by_definition(tiles, origins, size, weights):
    """``sum(weight * tile) / sum(weight)``, voxel by voxel in fp64."""
    f, h, w = (weight.double() for weight in weights)
    weight = f[:, None, None] * h[:, None] * w
    total, count = (
        torch.zeros(*tiles.shape[:1], tiles.shape[2], *size, dtype=torch.float64),
        torch.zeros(*size).double(),
    )
    for t, (i, j, k) in enumerate(origins.tolist()):
        place = (..., slice(i, i + len(f)), slice(j, j + len(h)), slice(k, k + len(w)))
        total[place] += weight * tiles[:, t].double()
        count[place] += weight
    return total / count


@pytest.mark.parametrize(
    ("backend", "grid"), [*(("torch", grid) for grid in COVERS), ("triton", "irregular"), ("triton", "aligned")]
)
def test_value_and_gradients_match_the_formula(backend, grid, generator, device):
    tiles, x, grad, origins, _, size, weights = drawn(grid, generator, device)
    check(backend, tiles, x, grad, origins, size, weights)
    plain = average_tiles(tiles.cpu().double(), origins, size, weights=weights, backend="reference")
    torch.testing.assert_close(plain, by_definition(tiles.cpu(), origins, size, weights), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype, generator, device):
    tiles, x, grad, origins, _, size, weights = drawn("irregular", generator, device, dtype)
    check("torch", tiles, x, grad, origins, size, weights)


def test_strided_inputs_and_small_pieces(generator, device, monkeypatch):
    monkeypatch.setattr("hpdm_kernels.tiles.torch_backend.CPU_PIECE", 1)
    tiles, x, grad, origins, _, size, weights = drawn("half", generator, device)
    tiles = tiles.permute(3, 5, 0, 2, 1, 4).contiguous().permute(2, 4, 3, 0, 5, 1)
    weights = [torch.stack((weight, torch.full_like(weight, torch.nan)), dim=1)[:, 0] for weight in weights]
    check("torch", tiles, torch.cat((x, x), dim=-1)[..., ::2], grad.mT.contiguous().mT, origins, size, weights)


@pytest.mark.parametrize(
    ("backend", "grid"),
    [*itertools.product(("reference", "torch"), ("half", "irregular", "three quarters")), ("triton", "aligned")],
)
def test_chunks_do_not_change_a_bit(backend, grid, generator, device):
    tiles, x, _, origins, tile, size, weights = drawn(grid, generator, device, batch=1, channels=2)
    sums = TileAccumulator(origins, tile, size, weights=weights, backend=backend)
    results = [accumulate(sums, tiles, chunk, x=x, alpha=0.7, beta=-1.3) for chunk in (1, 5, 1000)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    if backend == "triton":  # one kernel serves both
        assert torch.equal(
            results[0], average_tiles(tiles, origins, size, x=x, alpha=0.7, beta=-1.3, weights=weights, backend=backend)
        )
    oracle = reference.average_tiles(tiles.double(), origins, size, x.double(), 0.7, -1.3, weights)
    plain = reference.average_tiles(tiles, origins, size, x, 0.7, -1.3, weights)
    sizes = reference.average_tiles(tiles.double().abs(), origins, size, x.double().abs(), 0.7, 1.3, weights)
    assert_within_budget("average", results[0], plain, oracle, ulps=8.0, size=sizes.max().item())


@pytest.mark.parametrize("backend", EVERY)
def test_the_weights_of_one_tile_alone_change_nothing(backend, generator, device):
    """However extreme: products of three that would overflow, or vanish."""
    tiles = torch.randn(1, 2, 3, 2, 3, 8, generator=generator).to(device)
    origins, size = product((0,), (0,), (0, 4)), (2, 3, 12)
    weights = [torch.tensor([1e-38, 3e38]), torch.tensor([3e38, 1e-45, 1.0]), torch.full((8,), 1e38)]
    weights[2][:4] = 3e38
    for out in (
        average_tiles(tiles, origins, size, weights=weights, backend=backend),
        accumulate(TileAccumulator(origins, tiles.shape[3:], size, weights=weights, backend=backend), tiles, 1),
    ):
        assert torch.equal(out[..., :4], tiles[:, 0, ..., :4])
        assert torch.equal(out[..., 8:], tiles[:, 1, ..., 4:])
        torch.testing.assert_close(out[..., 4:8], (tiles[:, 0, ..., 4:] + 3 * tiles[:, 1, ..., :4]) / 4)


@pytest.mark.parametrize("backend", EVERY)
def test_a_bad_number_reaches_its_voxel_alone(backend, generator, device):
    tiles, _, _, origins, tile, size, weights = drawn("aligned", generator, device)
    tiles[1, 4, 0, 1, 2, 3] = torch.nan
    sums = TileAccumulator(origins, tile, size, weights=weights, backend=backend)
    for out in (average_tiles(tiles, origins, size, weights=weights, backend=backend), accumulate(sums, tiles, 5)):
        assert out.isnan().sum() == 1


def test_twice_differentiable_and_checked(generator, device):
    backend = "torch"
    tiles, x, grad, origins, tile, size, weights = drawn("half", generator, device, batch=1, channels=1)
    run = lambda t: average_tiles(t, origins, size, weights=weights, backend=backend)
    u = torch.randn(tiles.shape, generator=generator).to(device)
    tiles.requires_grad_()
    grad.requires_grad_()
    (back,) = torch.autograd.grad(run(tiles), tiles, grad, create_graph=True)
    (again,) = torch.autograd.grad(back, grad, u)
    torch.testing.assert_close(again, run(u))
    flat = torch.cat(weights)
    x.requires_grad_()
    torch.library.opcheck(
        torch.ops.hpdm.average_tiles.default, (tiles, origins, size, x, 0.3, 0.7, True, flat, backend)
    )
    torch.library.opcheck(torch.ops.hpdm.extract_tiles.default, (x, origins, tile, True, 0.5, flat, backend))
    sums = torch.zeros(1, 1, *size, device=device)
    torch.library.opcheck(torch.ops.hpdm.add_tiles.default, (sums, u[:, 2:5], origins, 2, flat, backend))
    step = (sums, origins, tile, torch.float32, x.detach(), 0.3, 0.7, False, backend)
    torch.library.opcheck(torch.ops.hpdm.step_tiles.default, step)


def test_compiles_whole(generator, device):
    tiles, x, grad, origins, tile, size, weights = drawn("half", generator, device)
    sums = TileAccumulator(origins, tile, size, weights=weights, backend="torch")

    def run(t, x, w):
        with torch.no_grad():
            accumulated = accumulate(sums, t, 4, x=x, alpha=0.3)
        return average_tiles(t * 2, origins, size, x=x, alpha=0.3, weights=w, backend="torch") + accumulated

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for fn in (run, compiled, compiled):
        leaf = tiles.detach().requires_grad_()
        out = fn(leaf, x, weights)
        results.append((out.detach(), *torch.autograd.grad(out, leaf, grad)))
    assert all(map(torch.equal, results[1], results[0]))
    assert all(map(torch.equal, results[2], results[0]))


def test_the_accumulator_and_the_module_keep_their_own(generator, device):
    tiles, _, _, origins, tile, size, weights = drawn("half", generator, device)
    expected = average_tiles(tiles, origins, size, weights=weights, backend="torch")
    sums = TileAccumulator(origins, tile, size, weights=weights, backend="torch")
    module = TileAverage(origins, size, weights=weights, backend="torch")
    for weight in weights:
        weight += 1
    torch.testing.assert_close(accumulate(sums, tiles, 3), expected)
    assert torch.equal(module(tiles), expected)
    assert not torch.equal(average_tiles(tiles, origins, size, weights=weights, backend="torch"), expected)


TILES, ORIGINS, SIZE = torch.zeros(1, 4, 1, 1, 2, 2), product((0,), (0, 1), (0, 2)), (1, 3, 4)
ONE, TWO = torch.ones(1), torch.ones(2)
BAD = {
    r"^weights: got Tensor, expected three tensors": (TypeError, torch.ones(3, 2)),
    r"^weights: got 2 entries, expected three": (TypeError, [ONE, TWO]),
    r"^weights\[1\]: got list, expected a torch.Tensor": (TypeError, (ONE, [1.0, 1.0], TWO)),
    r"^weights\[0\]: got dtype torch.float64": (TypeError, (ONE.double(), TWO, TWO)),
    r"^weights\[2\]: got shape \(1,\), expected \[2\]": (ValueError, (ONE, TWO, ONE)),
    r"^weights\[1\]: got 0.0 at index 1, expected positive": (ValueError, (ONE, torch.tensor([1.0, 0.0]), TWO)),
    r"^weights\[0\]: got -1.0 at index 0": (ValueError, (-ONE, TWO, TWO)),
    r"^weights\[2\]: got nan at index 0": (ValueError, (ONE, TWO, TWO * torch.nan)),
    r"^weights\[2\]: got inf at index 0": (ValueError, (ONE, TWO, TWO * torch.inf)),
    r"^weights\[1\]: got a tensor that requires a gradient": (ValueError, (ONE, TWO.clone().requires_grad_(), TWO)),
    r"^weights\[0\]: got a tensor on the device meta": (ValueError, (ONE.to("meta"), TWO, TWO)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_weights_are_refused(message):
    error, weights = BAD[message]
    for backend in ("reference", "torch"):
        with pytest.raises(error, match=message):
            average_tiles(TILES, ORIGINS, SIZE, weights=weights, backend=backend)
    with pytest.raises(error, match=message):
        TileAccumulator(ORIGINS, (1, 2, 2), SIZE, weights=weights)


def test_transforms():
    """A loop over weights gives each its own average, except on the reference, which reads them once."""
    tiles = torch.arange(16.0).reshape(TILES.shape)
    run = lambda w, backend: average_tiles(tiles, ORIGINS, SIZE, weights=(ONE, TWO, w), backend=backend)
    several = torch.tensor([[1.0, 1.0], [1.0, 3.0], [5.0, 0.1]])
    out = torch.func.vmap(lambda w: run(w, "torch"))(several)
    assert torch.equal(out, torch.stack([run(w, "torch") for w in several]))
    with pytest.raises(ValueError, match=r"^weights: got tensors that torch\.func\.vmap maps over"):
        torch.func.vmap(lambda w: run(w, "reference"))(several)
    for backend in ("reference", "torch"):
        with pytest.raises(ValueError, match=r"^weights\[2\]: got a tensor that requires a gradient"):
            torch.func.grad(lambda w, b=backend: run(w, b).sum())(TWO)
