"""The context's kernels beyond the formulas: edges of tiles, caches read in place, no needless product, memory."""

import copy
import gc
import math
import unittest.mock

import pytest
import torch

from benchmarks import harness
from hpdm_kernels import _triton, footprint_size, reference
from hpdm_kernels.context import block_sizes, triton_backend
from hpdm_kernels.context.geometry import Geometry
from hpdm_kernels.context.weight import FusionWeight
from hpdm_kernels.testing import assert_within_budget, random_boxes

pytestmark = pytest.mark.skipif(not _triton.INTERPRETED, reason="compiled kernels are checked by benchmarks/gpu")

PRECISION = "ieee"
SCALE = (0.5, 0.4, 0.6)
SMALL = block_sizes.ContextTile(2, 2, 16, 16)
CASES = {
    # Several tiles per axis, none of them whole numbers; sources finer and coarser than the patch.
    "odd": {"grid": (2, 3, 5), "source_grids": [(3, 4, 7), (1, 2, 2)], "width": 20},
    "one token": {"grid": (1, 1, 1), "source_grids": [(1, 1, 1)], "width": 1},
    "one line": {"grid": (1, 1, 5), "source_grids": [(2, 1, 5)], "width": 32},
    "one column": {"grid": (5, 3, 1), "source_grids": [(4, 4, 1)], "width": 16},
}


@pytest.fixture(params=[None, SMALL], ids=["one tile", "many tiles"])
def tile(request):
    """The interpreter's tiles hold everything here, the GPU's do not: with small ones their edges are tested, too."""
    with unittest.mock.patch.object(
        block_sizes, "INTERPRETED_CONTEXT", request.param or block_sizes.INTERPRETED_CONTEXT
    ):
        yield


def tf32(x):
    """The nearest numbers of 11 significant bits, ties away from zero."""
    mantissa, exponent = torch.frexp(x.double().abs())
    return torch.ldexp((mantissa * 2**11 + 0.5).floor(), exponent - 11).copysign(x).to(x.dtype)


class Problem:
    """Nested boxes; ``rows`` of each source may serve the samples in any order."""

    def __init__(self, generator, grid, source_grids, width, batch=2, rows=None):
        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        whole = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]])
        self.box = random_boxes(batch, SCALE, generator)
        self.index = None
        if rows is not None:
            self.index = torch.randint(0, rows, (batch, len(source_grids)), generator=generator)
        self.boxes = [whole.repeat(rows or batch, 1) for _ in source_grids]
        self.sources = [normal(rows or batch, math.prod(g), width) for g in source_grids]
        self.x, self.grad = normal(batch, math.prod(grid), width), normal(batch, math.prod(grid), width)
        self.weight, self.bias = normal(width, 2 * width + 3) / width**0.5, normal(width)
        self.grid, self.source_grids = grid, source_grids

    def footprints(self):
        return [tuple(map(footprint_size, SCALE, self.grid, grid)) for grid in self.source_grids]

    def fuse(self, footprints=None, precision=PRECISION, projected=False):
        geometry = Geometry(
            self.boxes, self.box, self.index, self.source_grids, self.grid, footprints or self.source_grids
        )
        weight = FusionWeight.split(self.weight)
        out, _ = triton_backend.fuse_forward(self.x, self.sources, geometry, weight, self.bias, projected, precision)
        return out

    def as_operands(self):
        """The same problem, whose operands of products are TF32 numbers."""
        other = copy.copy(self)
        width = self.weight.shape[0]
        other.x, other.sources = tf32(self.x), list(map(tf32, self.sources))
        other.weight = torch.cat((tf32(self.weight[:, : 2 * width]), self.weight[:, 2 * width :]), dim=1)
        return other

    def expect(self, projected=False, dtype=torch.float64):
        formula = reference.fuse_projected if projected else reference.fuse_context
        x, weight, bias, *sources = (t.to(dtype) for t in (self.x, self.weight, self.bias, *self.sources))
        return formula(x, sources, self.boxes, self.box, weight, bias, self.source_grids, self.grid, self.index)

    def check(self, got, projected=False):
        assert_within_budget("out", got, self.expect(projected, torch.float32), self.expect(projected))


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
@pytest.mark.parametrize("case", CASES)
def test_forward(case, precision, projected, generator):
    """``ieee`` is PyTorch's own setting: context is added to its product; ``tf32x3`` is the kernel's."""
    problem = Problem(generator, **CASES[case])
    problem.check(problem.fuse(precision=precision, projected=projected), projected)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("case", ["odd", "one line"])
def test_operands_of_one_tf32_pass_are_rounded(case, generator):
    """Not truncated, as the matrix units do by themselves. ``odd`` multiplies in a kernel that adds to the context."""
    problem = Problem(generator, **CASES[case])
    problem.as_operands().check(problem.fuse(precision="tf32"))
    cached = copy.copy(problem)
    cached.x, cached.weight = problem.as_operands().x, problem.as_operands().weight
    cached.check(problem.fuse(precision="tf32", projected=True), projected=True)


@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("projected", [False, True])
def test_caches_are_read_in_place(projected, rows, generator):
    """Rows of a cache with gaps between rows and tokens, as slices of a larger one have."""
    problem = Problem(generator, **CASES["odd"], batch=3, rows=rows)
    caches = [torch.full((2 * s.shape[0], 3 * s.shape[1], s.shape[2] + 12), math.nan) for s in problem.sources]
    for cache, source in zip(caches, problem.sources):
        cache[::2, 1::3, 4:-8] = source
    problem.sources = [cache[::2, 1::3, 4:-8] for cache in caches]
    problem.check(problem.fuse(projected=projected), projected)


def test_a_projected_cache_is_neither_copied_nor_multiplied(generator):
    problem = Problem(generator, (2, 2, 4), [(4, 4, 4)], 32, rows=3)
    with (
        unittest.mock.patch.object(triton_backend, "_gather", side_effect=AssertionError("copied")),
        unittest.mock.patch.object(triton_backend, "_matmul", wraps=triton_backend._matmul) as products,
    ):
        problem.check(problem.fuse(projected=True), projected=True)
    assert products.call_count == 1


@pytest.mark.parametrize(("rows", "footprints"), [(5, True), (1, False)])
def test_no_source_token_is_multiplied_twice(rows, footprints, generator):
    """Footprints are projected where they have fewer tokens than the source, else the source, which needs no copy."""
    problem = Problem(generator, (4, 4, 4), [(6, 6, 6)], 16, batch=3, rows=rows)
    sizes = problem.footprints()
    with (
        unittest.mock.patch.object(triton_backend, "_gather", wraps=triton_backend._gather) as gather,
        unittest.mock.patch.object(triton_backend, "_matmul", wraps=triton_backend._matmul) as products,
    ):
        problem.check(problem.fuse(sizes))
    assert gather.call_count == footprints
    multiplied = 3 * math.prod(sizes[0]) if footprints else rows * 6**3
    assert multiplied < (rows * 6**3 if footprints else 3 * math.prod(sizes[0]))
    assert [call.args[0].shape[0] for call in products.call_args_list] == [multiplied, 3 * 4**3]


@pytest.mark.parametrize("with_coordinates", [False, True])
@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32"])
@pytest.mark.parametrize("needs_grad", [(True, True), (True, False), (False, True)])
def test_project(needs_grad, precision, with_coordinates, generator):
    rows, d = 70, 20
    source, grad = torch.randn(rows, d, generator=generator), torch.randn(rows, d, generator=generator)
    whole = torch.randn(d, 2 * d + 3 * with_coordinates, generator=generator)
    weight = FusionWeight.split(whole)
    got = triton_backend.project(source, weight, precision)
    gradients = triton_backend.project_backward(grad, source, weight, needs_grad, precision)
    if precision == "tf32":
        source, grad, whole = map(tf32, (source, grad, whole))
    context = whole[:, d : 2 * d]
    assert_within_budget("projected", got, source @ context.t(), source.double() @ context.double().t())
    plain_weight = torch.zeros_like(whole)
    plain_weight[:, d : 2 * d] = grad.t() @ source
    true_weight = plain_weight.double()
    true_weight[:, d : 2 * d] = grad.double().t() @ source.double()
    plain, true = [grad @ context, plain_weight], [grad.double() @ context.double(), true_weight]
    chosen = [i for i, needed in enumerate(needs_grad) if needed]
    assert len(gradients) == len(chosen)
    for i, gradient in zip(chosen, gradients):
        assert_within_budget(f"gradient {i}", gradient, plain[i], true[i])
    if needs_grad[1]:
        assert not gradients[-1][:, :d].any()
        assert not gradients[-1][:, 2 * d :].any()


@pytest.mark.parametrize("projected", [False, True])
def test_forward_holds_the_output_and_the_projections(projected, generator):
    d, batch, grid = 64, 2, (8, 8, 16)
    problem = Problem(generator, grid, [grid] * 2, d, batch)
    sizes = problem.footprints()
    problem.check(problem.fuse(sizes, projected=projected), projected)
    gather = triton_backend._gather

    def gather_alone(*args):
        # The interpreter keeps its views of the arguments until they are collected.
        out = gather(*args)
        gc.collect()
        return out

    with unittest.mock.patch.object(triton_backend, "_gather", gather_alone):
        peak = harness.peak_extra_bytes(lambda: problem.fuse(sizes, projected=projected), torch.device("cpu"))
    projections = 0 if projected else batch * sum(map(math.prod, sizes))
    packed, tables = 2 * d, 2**14  # columns of the weight in rows of their own
    assert peak <= 4 * d * (batch * math.prod(grid) + projections + packed) + tables
