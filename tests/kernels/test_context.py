"""Context: sampling and fusion against the fp64 formulas, gradients, and what registered ops must provide."""

import math
import unittest.mock

import pytest
import torch

from benchmarks import harness
from hpdm_kernels import fuse_context, fuse_projected, project_sources, reference, sample_context
from hpdm_kernels._backend import PORTABLE
from hpdm_kernels.context import ops, torch_backend
from hpdm_kernels.testing import check_op, random_boxes, value_and_grads

BACKENDS = ("torch", "triton")


class Problem:
    """Random nested boxes, sources and weights; source k lies inside source k - 1, the patch inside the last."""

    def __init__(
        self, generator, grid, source_grids, scales, batch=2, width=6, coordinates=True, bias=True, dtype=torch.float32
    ):
        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        boxes = []
        for scale in scales:
            boxes.append(random_boxes(batch, scale, generator, boxes[-1] if boxes else None))
        *self.source_boxes, self.box = boxes
        self.grid, self.source_grids, self.index = grid, source_grids, None
        self.sources = [normal(batch, math.prod(g), width) for g in source_grids]
        self.x, self.grad = normal(batch, math.prod(grid), width), normal(batch, math.prod(grid), width)
        self.weight = normal(width, 2 * width + 3 * coordinates) / width**0.5
        self.bias = normal(width) if bias else None

    def share_rows(self, generator):
        """Two rows per source, which all samples share; they cover the whole video."""
        batch = len(self.box)
        whole = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]])
        self.sources = [s.repeat(2, 1, 1)[:2] for s in self.sources]
        self.source_boxes = [whole.repeat(2, 1) for _ in self.sources]
        self.index = torch.randint(0, 2, (batch, len(self.sources)), generator=generator)
        return self

    def sample(self, backend, **options):
        def call(*sources):
            return sample_context(
                sources, self.source_boxes, self.box, self.source_grids, self.grid,
                source_index=self.index, backend=backend, **options,
            )  # fmt: skip

        return call

    def fuse(self, backend, **options):
        def call(x, weight, bias, *sources):
            return fuse_context(
                x, sources, self.source_boxes, self.box, weight, bias, self.source_grids, self.grid,
                source_index=self.index, backend=backend, **options,
            )  # fmt: skip

        return call

    def cached(self, backend, precision=None, **options):
        """Fusion in two steps, of which a sampler takes the first once."""

        def call(x, weight, bias, *sources):
            projected = project_sources(sources, weight, precision=precision, backend=backend)
            return fuse_projected(
                x, projected, self.source_boxes, self.box, weight, bias, self.source_grids, self.grid,
                source_index=self.index, precision=precision, backend=backend, **options,
            )  # fmt: skip

        return call

    @property
    def fuse_inputs(self):
        return (self.x, self.weight, self.bias, *self.sources)

    def calls(self):
        return ((self.sample, self.sources), (self.fuse, self.fuse_inputs), (self.cached, self.fuse_inputs))


def check(problem, backend, grad=None, calls=None, repeat=False, products=False, **options):
    grad = problem.grad if grad is None else grad
    for make, inputs in calls or problem.calls():
        check_op(make(backend, **options), make("reference"), inputs, grad, repeat=repeat, products=products)


WHOLE = (1.0, 1.0, 1.0)
CASES = {
    "pyramid": {
        "grid": (4, 4, 4),
        "source_grids": [(4, 4, 4)] * 2,
        "scales": [WHOLE, (0.5,) * 3, (0.25,) * 3],
        "batch": 3,
    },
    "odd": {
        "grid": (3, 5, 1),
        "source_grids": [(4, 2, 7), (1, 6, 3), (5, 1, 2)],
        "width": 5,
        "scales": [WHOLE, (0.7, 0.5, 1.0), (0.6, 0.5, 0.3), (0.3, 0.2, 0.25)],
    },
    "ratio 1 in time": {"grid": (3, 4, 4), "source_grids": [(3, 4, 4)], "scales": [WHOLE, (1.0, 0.5, 0.5)]},
    "four sources": {
        "grid": (2, 3, 2),
        "source_grids": [(2, 3, 2)] * 4,
        "scales": [(0.7**k,) * 3 for k in range(5)],
        "width": 3,
    },
    "one token": {
        "grid": (1, 1, 1),
        "source_grids": [(1, 1, 1)],
        "scales": [WHOLE, (0.5,) * 3],
        "batch": 1,
        "width": 1,
    },
    "same box": {"grid": (2, 3, 4), "source_grids": [(2, 3, 4)], "scales": [WHOLE, WHOLE], "batch": 1},
    "coarse of fine": {
        "grid": (1, 2, 3),
        "source_grids": [(5, 7, 4)],
        "scales": [WHOLE, (0.9, 1.0, 0.8)],
        "bias": False,
    },
    "no coordinates": {
        "grid": (2, 2, 3),
        "source_grids": [(3, 2, 4)],
        "scales": [WHOLE, (0.5,) * 3],
        "coordinates": False,
    },
    "nothing extra": {
        "grid": (2, 2, 3),
        "source_grids": [(3, 2, 4)],
        "scales": [WHOLE, (0.5,) * 3],
        "coordinates": False,
        "bias": False,
    },
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_matches_the_paper(case, backend, generator):
    check(Problem(generator, **CASES[case]), backend, products=case == "one token")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["pyramid", "odd", "no coordinates"])
def test_other_dtypes(case, dtype, generator):
    check(Problem(generator, dtype=dtype, **CASES[case]), "torch")


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_may_share_rows_of_a_source(backend, generator):
    check(Problem(generator, **{**CASES["pyramid"], "batch": 5}).share_rows(generator), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_int32_rows(backend, generator):
    problem = Problem(generator, **CASES["pyramid"]).share_rows(generator)
    problem.index = problem.index.int()
    check(problem, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend, generator):
    problem = Problem(generator, **CASES["pyramid"])
    problem.x = problem.x.transpose(1, 2).contiguous().transpose(1, 2)
    problem.sources[0] = torch.cat((problem.sources[0],) * 2, dim=2)[:, :, 1::2].repeat(1, 2, 1)[:, ::2]
    problem.sources[1] = problem.sources[1].transpose(0, 2).contiguous().transpose(0, 2)
    problem.weight = problem.weight.t().contiguous().t()
    problem.box = torch.stack((problem.box, problem.box), dim=2)[:, :, 0]
    check(problem, backend, problem.grad.transpose(0, 1).contiguous().transpose(0, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_gradient(backend, generator):
    problem = Problem(generator, **CASES["pyramid"])
    check(problem, backend, problem.grad[:1].expand_as(problem.grad))


@pytest.mark.parametrize("backend", BACKENDS)
def test_larger_footprints_change_nothing(backend, generator):
    check(Problem(generator, **CASES["pyramid"]), backend, footprints=[(3, 4, 4), (4, 4, 4)])


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_kernels_own_products(precision, generator):
    # The interpreter takes the products of "tf32x3" exactly; compiled kernels drop that of the two low parts.
    problem = Problem(generator, **CASES["ratio 1 in time"])
    check(problem, "triton", calls=problem.calls()[1:], precision=precision)


def test_gradients_of_one_tf32_pass(generator):
    """Operands are rounded by at most 2**-11 of themselves, twice where a product follows on the interpolation."""
    problem = Problem(generator, **CASES["ratio 1 in time"])
    for make, inputs in problem.calls()[1:]:
        want = value_and_grads(make("reference"), [t.double() for t in inputs], problem.grad.double())
        got = value_and_grads(make("triton", precision="tf32"), inputs, problem.grad)
        for a, b in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
            error = (a - b).abs().max()
            assert error <= 2**-9 * b.abs().max() * problem.x.shape[2] ** 0.5


def test_projecting_first_is_the_same_formula(generator):
    problem = Problem(generator, **CASES["odd"], dtype=torch.float64)
    at_once, in_two = (make("reference")(*problem.fuse_inputs) for make in (problem.fuse, problem.cached))
    torch.testing.assert_close(in_two, at_once)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice(backend, generator):
    plain, shared = (Problem(generator, **CASES["ratio 1 in time"]) for _ in range(2))
    for problem in (plain, shared.share_rows(generator)):
        check(problem, backend, repeat=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_gradient_alone(backend, generator):
    problem = Problem(generator, **{**CASES["pyramid"], "batch": 1})
    for make, inputs in problem.calls():
        everything = value_and_grads(make(backend), inputs, problem.grad)[1]
        for chosen in range(len(inputs)):
            leaves = [t.detach().requires_grad_(i == chosen) for i, t in enumerate(inputs)]
            make(backend)(*leaves).backward(problem.grad)
            torch.testing.assert_close(leaves[chosen].grad, everything[chosen])
            assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != chosen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_as_two_sources(backend, generator):
    problem = Problem(generator, **CASES["pyramid"])
    problem.source_boxes[1] = problem.source_boxes[0]

    def call(chosen):
        def run(source):
            return problem.sample(chosen)(source, source)

        return run

    got = value_and_grads(call(backend), problem.sources[:1], problem.grad)
    want = value_and_grads(call("reference"), problem.sources[:1], problem.grad)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1][0], want[1][0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_saves_inputs_and_the_plan_alone(backend, generator):
    """The plan is 64 bytes per sample and source on ``triton``, and empty elsewhere."""
    problem = Problem(generator, **CASES["pyramid"])
    inputs = [t.clone().requires_grad_() for t in problem.fuse_inputs]
    known = {t.data_ptr() for t in (*inputs, problem.box, *problem.source_boxes)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        problem.fuse(backend)(*inputs)
    (plan,) = [t for t in saved if t.data_ptr() not in known]
    assert plan.nbytes == (64 * len(problem.box) * len(problem.sources) if backend == "triton" else 0)
    assert len(saved) > 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_projected_sources_have_the_gradients_of_interpolation_alone(backend, generator):
    """With sources as leaves the weight's context columns get exact zeros: nothing of them is read."""
    problem = Problem(generator, **CASES["pyramid"])

    def make(chosen):
        return lambda x, weight, bias, *projected: fuse_projected(
            x, projected, problem.source_boxes, problem.box, weight, bias, problem.source_grids, problem.grid,
            backend=chosen,
        )  # fmt: skip

    check(problem, backend, calls=[(make, problem.fuse_inputs)])
    d = problem.x.shape[2]
    assert not value_and_grads(make(backend), problem.fuse_inputs, problem.grad)[1][1][:, d : 2 * d].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_gradient_where_the_context_needs_none(backend, generator):
    """Projected sources without gradients, no coordinates and no bias: no source's interpolation is transposed."""
    problem = Problem(generator, **CASES["nothing extra"])

    def make(chosen):
        def call(weight):
            x, *projected = (t.to(weight.dtype) for t in (problem.x, *problem.sources))
            return fuse_projected(
                x, projected, problem.source_boxes, problem.box, weight, None, problem.source_grids, problem.grid,
                backend=chosen,
            )  # fmt: skip

        return call

    check(problem, backend, calls=[(make, [problem.weight])])


@pytest.mark.parametrize("projected", [False, True])
def test_forward_takes_the_output_and_the_projected_footprints(projected, generator):
    batch, d, grid = 2, 128, (16, 16, 16)
    problem = Problem(generator, grid, [grid] * 2, [WHOLE, (0.5,) * 3, (0.25,) * 3], batch, d)
    footprints = [(6, 6, 6), (10, 10, 10)]
    call = fuse_projected if projected else fuse_context

    def run():
        call(
            problem.x, problem.sources, problem.source_boxes, problem.box, problem.weight, problem.bias,
            problem.source_grids, grid, footprints=footprints, backend="torch",
        )  # fmt: skip

    one_frame = (10 + 16) * 10 * d
    tables = 2**16
    rows = batch * (math.prod(grid) + sum(map(math.prod, footprints)))
    with unittest.mock.patch.object(torch_backend, "FORWARD_SCRATCH", one_frame):
        run()
        assert harness.peak_extra_bytes(run, torch.device("cpu")) <= 4 * (rows * d + one_frame) + tables


def op_arguments(problem, backend, fuse, projected=False):
    flat = [n for g in problem.source_grids for n in g]
    shared = (problem.sources, problem.source_boxes, problem.box)
    tail = (problem.index, flat, list(problem.grid), flat)
    if fuse:
        return (problem.x, *shared, problem.weight, problem.bias, *tail, projected, "ieee", backend)
    return (*shared, *tail, backend)


@pytest.mark.parametrize(("backend", "shared"), [("torch", False), ("torch", True), ("triton", True)])
def test_opcheck(backend, shared, generator):
    case = {
        "grid": (2, 2, 3),
        "source_grids": [(2, 3, 2), (1, 2, 2)],
        "scales": [WHOLE, (0.5,) * 3, (0.3,) * 3],
        "width": 3,
    }
    problem = Problem(generator, **case)
    if shared:
        problem.share_rows(generator)
    grad = problem.grad
    args, fuse_args = op_arguments(problem, backend, False), op_arguments(problem, backend, True)
    _, plan = ops.sample_fwd(*args)
    torch.library.opcheck(ops.sample_bwd, (grad, plan, *args[:-1], [True, False], args[-1]))
    cached_args = op_arguments(problem, backend, True, projected=True)
    for fusion in (fuse_args, cached_args):
        wanted = [True, True, True, False, True]
        torch.library.opcheck(ops.fuse_bwd, (grad, plan, *fusion[:-3], wanted, *fusion[-3:]))
    project_args = (problem.sources[0], problem.weight)
    for wanted in ([True, True], [False, True]):
        torch.library.opcheck(ops.project_bwd, (problem.sources[0], *project_args, wanted, "ieee", backend))
    for tensor in (problem.x, problem.weight, problem.bias, *problem.sources):
        tensor.requires_grad_()
    torch.library.opcheck(ops.sample_fwd, args)
    torch.library.opcheck(ops.fuse_fwd, fuse_args)
    torch.library.opcheck(ops.fuse_fwd, cached_args)
    torch.library.opcheck(ops.project_fwd, (*project_args, "ieee", backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend, generator):
    problem = Problem(generator, **{**CASES["pyramid"], "batch": 1})
    for make, inputs in problem.calls():
        # The sizes of the footprints cannot be read while tracing: the whole source grid, and bounds from the caller.
        for options in ({}, {"footprints": [(4, 3, 3), (4, 4, 4)]}):
            got = value_and_grads(torch.compile(make(backend, **options), fullgraph=True), inputs, problem.grad)
            want = value_and_grads(make("reference"), inputs, problem.grad)
            torch.testing.assert_close(got, want)


def test_auto_is_torch_on_the_cpu(generator):
    problem = Problem(generator, **CASES["pyramid"])
    assert torch.equal(problem.fuse("auto")(*problem.fuse_inputs), problem.fuse("torch")(*problem.fuse_inputs))


def test_reference_is_the_reference(generator):
    problem = Problem(generator, **CASES["pyramid"])
    want = reference.sample_context(
        problem.sources, problem.source_boxes, problem.box, problem.source_grids, problem.grid
    )
    assert torch.equal(problem.sample("reference")(*problem.sources), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_precision_stops_at_the_op(backend, generator):
    problem = Problem(generator, **CASES["pyramid"])
    for make, inputs in problem.calls():
        plain = value_and_grads(make(backend), inputs, problem.grad)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = value_and_grads(make(backend), inputs, problem.grad)
        assert torch.equal(mixed[0], plain[0])
        for got, true in zip(mixed[1], plain[1], strict=True):
            assert torch.equal(got, true)


def all_ops(problem, backend):
    """Every registered op of the context with arguments, the backward ones for some gradients."""
    sample_args, fuse_args = op_arguments(problem, backend, False), op_arguments(problem, backend, True)
    project_args = (problem.sources[0], problem.weight, "ieee", backend)
    some_sources = [k == 1 for k in range(len(problem.sources))]
    registered = torch.ops.hpdm
    return [
        (registered.sample_context_fwd, sample_args),
        (
            registered.sample_context_bwd,
            (problem.grad, registered.sample_context_fwd(*sample_args)[1], *sample_args[:-1], some_sources, backend),
        ),
        (registered.fuse_context_fwd, fuse_args),
        (
            registered.fuse_context_bwd,
            (
                problem.grad,
                registered.fuse_context_fwd(*fuse_args)[1],
                *fuse_args[:-3],
                [True, True, False, *some_sources],
                *fuse_args[-3:],
            ),
        ),
        (registered.project_source_fwd, project_args),
        (registered.project_source_bwd, (problem.sources[0], *project_args[:2], [True, True], *project_args[2:])),
    ]


def test_portable_functions_do_what_the_ops_do(generator):
    problem = Problem(generator, **CASES["pyramid"])
    for (op, arguments), (_, of_kernels) in zip(all_ops(problem, "torch"), all_ops(problem, "triton")):
        got, want = PORTABLE[op](*of_kernels), op(*arguments)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("projected", [False, True])
def test_flop_formulas_count_the_products(projected, generator):
    """What the op declares is what a counter finds in the portable implementation, which it cannot see into."""
    problem = Problem(generator, **CASES["odd"])
    *args, _, _, _ = op_arguments(problem, "torch", True, projected)
    registered = torch.ops.hpdm
    _, plan = registered.fuse_context_fwd(*args, projected, "ieee", "torch")
    for wanted in ([True] * 6, [False, True, False, False, False, False], [True, False, True, False, True, False]):
        calls = [
            (registered.fuse_context_fwd, (*args, projected, "ieee", "torch")),
            (registered.fuse_context_bwd, (problem.grad, plan, *args, wanted, projected, "ieee", "torch")),
        ]
        with torch.utils.flop_counter.FlopCounterMode(display=False) as declared:
            for op, arguments in calls:
                op(*arguments)
        with torch.utils.flop_counter.FlopCounterMode(display=False) as found:
            for op, arguments in calls:
                PORTABLE[op](*arguments)
        products = sum(n for op, n in found.get_flop_counts()["Global"].items() if op is torch.ops.aten.mm)
        coordinates = 2 * problem.x.shape[2] * math.prod(problem.grid[:2]) * len(problem.box) * 2 * wanted[1]
        assert declared.get_total_flops() == products - coordinates
