"""Cross-attention: every backend against the formula in fp64, forward and backward."""

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hpdm_kernels import _triton, cross_attention, reference
from hpdm_kernels._backend import PORTABLE
from hpdm_kernels._layout import dense_rows
from hpdm_kernels.attention.triton_backend import split_loop
from hpdm_kernels.testing import max_error, value_and_grads

BACKENDS = ("torch", "triton")
NAMES = ("out", "grad_q", "grad_k", "grad_v")
SHAPES = [
    # B, h, M, N, d
    (1, 1, 1, 1, 16),
    (2, 3, 5, 7, 24),
    (1, 2, 65, 130, 64),
    (1, 1, 3, 200, 80),
    (1, 1, 300, 2, 1),
    (2, 1, 4, 1, 3),
    (1, 2, 128, 256, 32),  # whole blocks: no masks
    (1, 1, 150, 140, 128),
    (2, 1, 9, 37, 160),
    (1, 2, 128, 140, 256),
]


def make(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """``q``, ``k``, ``v`` and the gradient of the output."""
    b, h, m, n, d = shape
    return [torch.randn(b, h, rows, d, generator=generator).to(dtype) for rows in (m, n, n, m)]


def with_backend(backend: str, **options: object) -> Callable[..., Tensor]:
    return lambda q, k, v: cross_attention(q, k, v, backend=backend, precision="ieee", **options)


def sizes_before_cancelling(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float, key_mask: Tensor | None
) -> list[float]:
    """Largest output and gradients if all terms of every sum had the same sign.

    Rounding is relative to the terms, not to what is left of them: with one key ``q`` and ``k`` have no gradient.
    """
    p = reference.cross_attention(q, k, torch.eye(k.shape[2], dtype=q.dtype, device=q.device), scale, key_mask)
    dp = grad.abs() @ v.abs().transpose(-1, -2)
    ds = p * (dp + (p * dp).sum(-1, keepdim=True)) * abs(scale)
    sizes = (p @ v.abs(), ds @ k.abs(), ds.transpose(-1, -2) @ q.abs(), p.transpose(-1, -2) @ grad.abs())
    return [t.max().item() for t in sizes]


def check(
    inputs: list[Tensor],
    backend: str,
    device: torch.device,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> None:
    """Output and gradients of ``backend`` err at most twice as much as the formula's, against the formula in fp64."""
    q, k, v, grad = (t.to(device) for t in inputs)
    key_mask = None if key_mask is None else key_mask.to(device)
    factor = q.shape[-1] ** -0.5 if scale is None else scale

    def plain(*tensors: Tensor) -> Tensor:
        return reference.cross_attention(*tensors, factor, key_mask)

    out, grads = value_and_grads(with_backend(backend, scale=scale, key_mask=key_mask), (q, k, v), grad)
    plain_out, plain_grads = value_and_grads(plain, (q, k, v), grad)
    wide = [t.double() for t in (q, k, v, grad)]
    true_out, true_grads = value_and_grads(plain, wide[:3], wide[3])
    eps = torch.finfo(q.dtype).eps
    # Weights taken again carry the rounding of the score, of its scaling and of the log-sum-exp, fp32 for 16-bit inputs
    # too. PyTorch's fused attention for the CPU also approximates exp, to 20 units in the last place.
    scores = (wide[0] @ wide[1].transpose(-1, -2) * factor).abs().max().item()
    ulps = 4 * eps + min(eps, torch.finfo(torch.float32).eps) * (3 * scores + 20 * (backend == "torch"))
    results = zip(NAMES, [out, *grads], [plain_out, *plain_grads], [true_out, *true_grads])
    for (name, x, p, true), size in zip(results, sizes_before_cancelling(*wide, factor, key_mask)):
        assert x.dtype == q.dtype, name
        assert x.shape == true.shape, name
        budget = 2 * max_error(p, true) + ulps * size
        assert max_error(x, true) <= budget, f"{backend}, {tuple(q.shape)}, {name}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula(shape, backend, generator, device):
    check(make(shape, generator), backend, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7, 24), (1, 2, 65, 130, 64)], ids=str)
def test_dtypes_torch(shape, dtype, generator, device):
    check(make(shape, generator, dtype), "torch", device)


@pytest.mark.skipif(_triton.INTERPRETED, reason="the interpreter is wrong in 16 bits")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dtypes_triton(shape, dtype, generator, device):
    check(make(shape, generator, dtype), "triton", device)


@pytest.mark.skipif(_triton.INTERPRETED, reason="the interpreter ignores the precision of products")
@pytest.mark.parametrize(("precision", "eps"), [("tf32x3", 2.0**-20), ("tf32", 2.0**-10)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_precisions(shape, precision, eps, generator, device):
    q, k, v, grad = (t.to(device) for t in make(shape, generator))
    call = lambda q, k, v: cross_attention(q, k, v, backend="triton", precision=precision)
    plain = lambda q, k, v: cross_attention(q, k, v, backend="reference")
    out, grads = value_and_grads(call, (q, k, v), grad)
    true_out, true_grads = value_and_grads(plain, [t.double() for t in (q, k, v)], grad.double())
    size = max(t.abs().max().item() for t in (true_out, *true_grads, grad))
    for name, x, true in zip(NAMES, [out, *grads], [true_out, *true_grads]):
        assert max_error(x, true) <= 16 * eps * size, name


@pytest.mark.parametrize("precision", [None, "ieee", "tf32x3", "tf32"])
@pytest.mark.parametrize("backend", ["auto", "reference", *BACKENDS])
def test_every_precision_is_accepted(precision, backend, generator, device):
    q, k, v, _ = (t.to(device) for t in make((1, 2, 5, 9, 16), generator))
    out = cross_attention(q, k, v, precision=precision, backend=backend)
    torch.testing.assert_close(out, reference.cross_attention(q, k, v, 0.25), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, -0.7, 5.0, 1])
def test_scale(scale, backend, generator, device):
    check(make((1, 2, 9, 135, 20), generator), backend, device, scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores(backend, generator, device):
    q, k, v, grad = make((1, 1, 9, 135, 16), generator)
    check([40 * q, 40 * k, v, grad], backend, device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["fused projection", "last axis strided", "expanded keys", "expanded gradient"])
def test_strides(layout, backend, generator, device):
    b, h, m, d = 2, 3, 7, 24
    q, k, v, grad = make((b, h, m, m, d), generator)
    if layout == "fused projection":
        q, k, v = torch.randn(b, m, 3 * h * d, generator=generator).view(b, m, 3, h, d).permute(2, 0, 3, 1, 4)
        grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "last axis strided":
        q, k, v, grad = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v, grad))
    elif layout == "expanded keys":
        k, v = k[:1, :1].expand(b, h, m, d), v[:, :, :1].expand(b, h, m, d)
    else:
        grad = grad[:1, :1, :1, :1].expand(b, h, m, d)
    check([q, k, v, grad], backend, device)


def test_fused_projections_are_read_in_place(generator):
    fused = torch.randn(2, 7, 3 * 4 * 24, generator=generator)
    for x in fused.view(2, 7, 3, 4, 24).permute(2, 0, 3, 1, 4):
        assert dense_rows(x) is x


def test_heads_merge_without_a_copy(generator, device):
    q, k, v, _ = (t.to(device) for t in make((2, 3, 5, 7, 16), generator))
    out = cross_attention(q, k, v, backend="triton")
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_outside_of_the_inputs_is_read_into_results(backend, generator, device):
    def embed(t: Tensor) -> Tensor:
        b, h, rows, d = t.shape
        big = torch.full((b, h, rows + 300, d + 140), float("nan"))
        big[:, :, 1 : rows + 1, 3 : d + 3] = t
        return big[:, :, 1 : rows + 1, 3 : d + 3]

    check([embed(t) for t in make((1, 2, 5, 133, 24), generator)], backend, device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_nan_key_poisons_its_head_alone(backend, generator, device):
    q, k, v, grad = (t.to(device) for t in make((2, 2, 5, 140, 16), generator))
    k[1, 0, 137, 3] = float("nan")
    out, grads = value_and_grads(with_backend(backend), (q, k, v), grad)
    assert out[1, 0].isnan().all()
    assert all(g[1, 0].isnan().any() for g in grads)
    others = torch.tensor([[True, True], [False, True]], device=device)
    assert all(t[others].isfinite().all() for t in (out, *grads))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_value_and_query(backend, generator, device):
    q, k, v, _ = (t.to(device) for t in make((1, 1, 5, 140, 16), generator))
    q[0, 0, 2, 0] = float("nan")
    v[0, 0, 139, 4] = float("nan")
    out = with_backend(backend)(q, k, v)[0, 0]
    expected = torch.zeros(5, 16, dtype=torch.bool, device=device)
    expected[2], expected[:, 4] = True, True
    assert torch.equal(out.isnan(), expected)


def make_mask(batch: int, keys: int, generator: torch.Generator) -> Tensor:
    """Half of the keys at random, at least one per sample; of the last sample all, of the one before it none."""
    mask = torch.rand(batch, keys, generator=generator) < 0.5
    mask[torch.arange(batch), torch.randint(keys, (batch,), generator=generator)] = True
    if batch > 1:
        mask[-1], mask[-2] = True, False
    return mask


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape", [(4, 3, 5, 7, 24), (3, 2, 65, 300, 64), (2, 1, 3, 1, 16), (1, 2, 128, 256, 32)], ids=str
)
def test_key_mask(shape, backend, generator, device):
    check(make(shape, generator), backend, device, key_mask=make_mask(shape[0], shape[3], generator))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_key_mask_dtypes_torch(dtype, generator, device):
    check(make((3, 2, 9, 20, 16), generator, dtype), "torch", device, key_mask=make_mask(3, 20, generator))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_hidden_keys_do_not_matter(backend, generator, device):
    # Cut off at the first sample's length, and hidden: the same.
    q, k, v, grad = (t.to(device) for t in make((1, 2, 9, 300, 16), generator))
    mask = (torch.arange(300, device=device) < 140)[None]
    out, grads = value_and_grads(with_backend(backend, key_mask=mask), (q, k, v), grad)
    cut, cut_grads = value_and_grads(with_backend(backend), (q, k[:, :, :140], v[:, :, :140]), grad)
    torch.testing.assert_close(out, cut)
    torch.testing.assert_close(grads[0], cut_grads[0])
    for g, c in zip(grads[1:], cut_grads[1:]):
        torch.testing.assert_close(g[:, :, :140], c)
        assert (g[:, :, 140:] == 0).all()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("keys", [7, 300], ids=["whole walk", "split walk"])
def test_without_keys_everything_is_zero(keys, backend, generator, device):
    q, k, v, grad = (t.to(device) for t in make((2, 2, 9, keys, 16), generator))
    mask = torch.ones(2, keys, dtype=torch.bool, device=device)
    mask[1] = False
    out, grads = value_and_grads(with_backend(backend, key_mask=mask), (q, k, v), grad)
    assert all((t[1] == 0).all() and (t[0] != 0).any() for t in (out, *grads))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["expanded", "strided"])
def test_strided_masks(layout, backend, generator, device):
    mask = make_mask(4, 18, generator)
    mask = mask[:1].expand(4, 18) if layout == "expanded" else mask[:, ::2]
    check(make((4, 1, 5, mask.shape[1], 16), generator), backend, device, key_mask=mask)


NOT_FINITE = {
    "a NaN in a query": ("q", math.nan),
    "a NaN in a key": ("k", math.nan),
    "a NaN in a value": ("v", math.nan),
    "inf in a query": ("q", math.inf),
    "-inf in a query": ("q", -math.inf),
    "inf in a key": ("k", math.inf),
    "-inf in a key": ("k", -math.inf),
    "inf in a value": ("v", math.inf),
    "-inf in a value": ("v", -math.inf),
    "all scores -inf": ("k", -1e25),
    "all scores inf": ("k", 1e25),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keys", [9, 300], ids=["whole walk", "split walk"])
@pytest.mark.parametrize("case", NOT_FINITE)
def test_infinities_and_nans_are_those_of_sdpa(case, keys, backend, generator, device):
    tensors = dict(zip("qkv", (t.to(device) for t in make((1, 2, 5, keys, 16), generator))))
    name, value = NOT_FINITE[case]
    if case.startswith("all"):
        tensors["q"][..., 0], tensors["k"][..., 0] = 1e25, value
    else:
        tensors[name][0, 1, -1, 2] = value
    out = with_backend(backend)(**tensors)
    # PyTorch's fused attention for the CPU gives zeros for a query of NaN if keys are few; its plain one gives NaN.
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(*tensors.values())
    assert torch.equal(out.isnan(), expected.isnan())
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_whose_scores_are_all_minus_infinity_have_no_gradients(backend, generator, device):
    q, k, v, grad = (t.to(device) for t in make((1, 1, 5, 280, 16), generator))
    q[:, :, 2:, 0], q[:, :, :2, 0], k[..., 0] = 1e25, 0.0, -1e25
    out, grads = value_and_grads(with_backend(backend), (q, k, v), grad)
    few, few_grads = value_and_grads(with_backend(backend), (q[:, :, :2], k, v), grad[:, :, :2])
    assert (out[:, :, 2:] == 0).all()
    assert (grads[0][:, :, 2:] == 0).all()
    torch.testing.assert_close(out[:, :, :2], few)
    for g, f in zip((grads[0][:, :, :2], *grads[1:]), few_grads):
        torch.testing.assert_close(g[..., 1:], f[..., 1:])  # column 0 is what is left of terms of 1e25


@pytest.mark.parametrize("overflowing", [range(130), range(130, 280)], ids=["first keys", "last keys"])
def test_scores_of_minus_infinity_have_no_weight(overflowing, generator, device):
    # A whole block, and a whole range of a split walk, without weight.
    q, k, v, grad = (t.to(device) for t in make((1, 1, 5, 280, 16), generator))
    q[..., 0], k[..., 0] = 1e25, 0.0
    k[:, :, list(overflowing), 0] = -1e25
    out, grads = value_and_grads(with_backend("triton"), (q, k, v), grad)
    plain, _ = value_and_grads(lambda *t: reference.cross_attention(*t, 0.25), (q, k, v), grad)
    assert plain.isfinite().all()
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
    assert all(g.isfinite().all() for g in grads[1:])


def test_infinite_key_leaves_absent_queries_out(generator, device):
    # A key at -infinity has no weight and takes no gradient; rows of zeros beyond the queries would make it NaN.
    q, k, v, grad = (t.to(device) for t in make((1, 1, 5, 9, 16), generator))
    q[..., 0] = q[..., 0].abs() + 0.1
    k[0, 0, 4, 0] = float("-inf")
    _, (_, grad_k, grad_v) = value_and_grads(with_backend("triton"), (q, k, v), grad)
    assert grad_k.isfinite().all()
    assert grad_v.isfinite().all()
    assert (grad_v[0, 0, 4] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
def test_repeatable_to_the_bit(masked, backend, generator, device):
    q, k, v, grad = (t.to(device) for t in make((1, 2, 70, 300, 40), generator))
    call = with_backend(backend, key_mask=make_mask(1, 300, generator).to(device) if masked else None)
    first, first_grads = value_and_grads(call, (q, k, v), grad)
    again, again_grads = value_and_grads(call, (q, k, v), grad)
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(first_grads, again_grads))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_some_gradients(needed, backend, generator, device):
    tensors = [t.to(device) for t in make((1, 2, 5, 9, 16), generator)]
    leaves = [t.clone().requires_grad_(n) for t, n in zip(tensors, needed)]
    with_backend(backend)(*leaves).backward(tensors[3])
    _, grads = value_and_grads(with_backend("reference"), tensors[:3], tensors[3])
    for leaf, n, expected in zip(leaves, needed, grads):
        assert (leaf.grad is not None) == n
        if n:
            torch.testing.assert_close(leaf.grad, expected)


def test_splits_cover_the_walk():
    for programs, slots, extra in product((1, 2, 3, 7, 100, 10**6), (1, 8, 132, 264), (0, 4)):
        for steps in (1, 2, 3, 5, 64, 1000):
            splits, per_split = split_loop(programs, steps, slots, extra)
            assert (splits - 1) * per_split < steps <= splits * per_split
            # No range is shorter than what its program costs, except the last one.
            assert splits == 1 or per_split >= extra


@pytest.mark.parametrize(("programs", "steps", "slots"), [(144, 64, 132), (96, 64, 132), (1, 200, 216), (20, 48, 108)])
def test_splits_shorten_the_walk(programs, steps, slots):
    """Measured in steps from the first program's start to the last one's end, 4 of them for each part of a loop."""

    def length(splits, per_split):
        return math.ceil(programs * splits / slots) * (per_split + 4 * (splits > 1))

    ours = split_loop(programs, steps, slots, 4)
    assert length(*ours) < length(1, steps)
    # The former rule: as many ranges as give two programs per multiprocessor, whatever they need.
    former = max(1, min(2 * slots // programs, steps // 4))
    assert length(*ours) <= length(former, math.ceil(steps / former))


def test_enough_programs_are_not_split():
    assert split_loop(10**6, 1000, 132, 4) == (1, 1000)
    assert split_loop(132, 64, 132, 4) == (1, 64)


def test_saves_inputs_output_and_log_sum_exp_alone(generator, device):
    q, k, v, _ = (t.to(device).requires_grad_() for t in make((2, 3, 40, 50, 16), generator))
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        cross_attention(q, k, v, backend="triton")
    assert sorted(t.numel() for t in saved) == sorted([q.numel(), k.numel(), v.numel(), q.numel(), 2 * 3 * 40])


def test_flops_are_counted_in_both_directions(generator, device):
    q, k, v, grad = (t.to(device) for t in make((2, 3, 4, 5, 16), generator))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    product = 2 * 2 * 3 * 4 * 5 * 16
    with FlopCounterMode(display=False) as forward:
        out = cross_attention(*leaves, backend="triton")
    assert forward.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as backward:
        out.backward(grad)
    assert backward.get_total_flops() == 5 * product


@pytest.mark.parametrize("masked", [False, True])
def test_portable_functions_give_what_the_ops_give(masked, generator, device):
    q, k, v, grad = (t.to(device) for t in make((2, 2, 5, 9, 16), generator))
    options = (0.25, "ieee", make_mask(2, 9, generator).to(device) if masked else None)
    fwd, bwd = torch.ops.hpdm.cross_attention_fwd, torch.ops.hpdm.cross_attention_bwd
    out, lse = fwd(q, k, v, *options)
    torch.testing.assert_close(PORTABLE[fwd](q, k, v, *options), (out, lse))
    arguments = (grad, q, k, v, out, lse, *options)
    torch.testing.assert_close(PORTABLE[bwd](*arguments), bwd(*arguments))


@pytest.mark.parametrize("m", [5, 130], ids=["whole walks", "split walks"])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked, m, generator, device):
    b, h, d = 1, 2, 16
    fused = torch.randn(b, m, 3 * h * d, generator=generator).to(device)
    q, k, v = (t.detach().requires_grad_() for t in fused.view(b, m, 3, h, d).permute(2, 0, 3, 1, 4))
    k, v = (t.detach()[:, :, : m - 1].requires_grad_() for t in (k, v))
    mask = make_mask(b, m - 1, generator).to(device) if masked else None
    torch.library.opcheck(torch.ops.hpdm.cross_attention_fwd.default, (q, k, v, 0.25, "ieee", mask))
    q, k, v = q.detach(), k.detach(), v.detach()
    out, lse = torch.ops.hpdm.cross_attention_fwd(q, k, v, 0.25, "ieee", mask)
    torch.library.opcheck(
        torch.ops.hpdm.cross_attention_bwd.default, (torch.randn_like(out), q, k, v, out, lse, 0.25, "ieee", mask)
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph(backend, dynamic, generator, device):
    def loss(x: Tensor, y: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 16)).transpose(1, 2)
        k, v = y.unflatten(-1, (2, 2, 16)).permute(2, 0, 3, 1, 4)
        mask = y[..., 0] > 0
        masked = cross_attention(q, k, v, key_mask=mask, backend=backend)
        return (masked + cross_attention(q, k, v, backend=backend)).transpose(1, 2).flatten(2).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for rows in (5, 6):
        x = torch.randn(2, rows, 32, generator=generator).to(device).requires_grad_()
        y = torch.randn(2, 7, 64, generator=generator).to(device).requires_grad_()
        expected, actual = loss(x, y), compiled(x, y)
        torch.testing.assert_close(actual, expected)
        for a, e in zip(torch.autograd.grad(actual, (x, y)), torch.autograd.grad(expected, (x, y))):
            torch.testing.assert_close(a, e)


GOOD = torch.zeros(2, 3, 5, 8)
BAD = [
    ({"q": None}, TypeError, "q: got NoneType"),
    ({"q": GOOD.int()}, TypeError, "q: got dtype torch.int32"),
    ({"q": GOOD[0]}, ValueError, "q: got shape"),
    ({"q": GOOD[:, :, :0]}, ValueError, "q: got shape"),
    ({"q": torch.zeros(1, 1, 1, 257)}, ValueError, "q: got head width 257, expected at most 256"),
    ({"k": GOOD[:1]}, ValueError, "k: got shape"),
    ({"k": GOOD[:, :2]}, ValueError, "k: got shape"),
    ({"k": GOOD[..., :4]}, ValueError, "k: got shape"),
    ({"k": GOOD[:, :, :0]}, ValueError, "k: got shape"),
    ({"k": GOOD.double()}, TypeError, "k: got dtype torch.float64, expected torch.float32"),
    ({"k": GOOD.to("meta")}, ValueError, "k: got device meta"),
    ({"v": GOOD[:, :, :4]}, ValueError, "v: got shape"),
    ({"v": GOOD.half()}, TypeError, "v: got dtype torch.float16"),
    ({"v": [1.0]}, TypeError, "v: got list"),
    ({"key_mask": torch.ones(2, 5)}, TypeError, "key_mask: got dtype torch.float32, expected one of torch.bool"),
    ({"key_mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "key_mask: got shape"),
    ({"key_mask": torch.ones(2, 3, 5, 5, dtype=torch.bool)}, ValueError, "key_mask: got shape"),
    ({"key_mask": [True]}, TypeError, "key_mask: got list"),
    ({"scale": math.inf}, ValueError, "scale: got inf"),
    ({"scale": math.nan}, ValueError, "scale: got nan"),
    ({"scale": "1"}, TypeError, "scale: got '1'"),
    ({"precision": "fp8"}, ValueError, "precision: got 'fp8'"),
    ({"backend": "cuda"}, ValueError, "backend: got 'cuda'"),
]


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_arguments(change, error, message, backend):
    arguments = {"q": GOOD, "k": GOOD, "v": GOOD, "backend": backend} | change
    with pytest.raises(error, match=message.replace("[", r"\[")):
        cross_attention(**arguments)


@pytest.mark.skipif(not _triton.INTERPRETED, reason="about the interpreter")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_triton_says_why_it_cannot_run(dtype):
    x = GOOD.to(dtype)
    with pytest.raises(RuntimeError, match="cross_attention: backend='triton' cannot run"):
        cross_attention(x, x, x, backend="triton")
