"""The read with its projection: every backend against the formula in fp64, whatever the pieces."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from hpdm_kernels import cross_attention, read_tokens
from hpdm_kernels.attention import api
from hpdm_kernels.attention import torch_backend as cross_attention_torch
from hpdm_kernels.attention.read import token_chunks
from hpdm_kernels.testing import assert_within_budget, max_error, value_and_grads

BACKENDS = ("torch", "triton")


@pytest.fixture(autouse=True)
def _recompute(monkeypatch):
    """However few keys and values there are."""
    monkeypatch.setattr(api, "KEPT_BYTES", 0)


SHAPES = [
    # B, h, M, lengths of the sequences, d, D, rows of a piece
    (1, 1, 1, (1,), 16, 1, 1),
    (2, 3, 5, (7,), 24, 10, 8192),  # one piece
    (5, 2, 9, (6,), 16, 8, 13),  # two samples at a time, and one that is left
    (2, 2, 65, (130,), 64, 24, 50),  # three parts of a sample
    (3, 1, 4, (9, 5), 16, 12, 4),  # two sequences in parts
    (2, 2, 4, (9, 1, 5), 40, 12, 100),  # three sequences, all at once
    (2, 1, 9, (20, 17), 160, 6, 8),  # heads wider than 128
    (1, 2, 5, (11,), 256, 8, 100),
]


def make(
    shape: tuple[int, int, int, tuple[int, ...], int, int, int],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], Tensor]:
    """``q``, the weight and the sequences of tokens; the gradient of the output."""
    b, h, m, lengths, d, width, _ = shape
    q, grad = (torch.randn(b, m, h, d, generator=generator).transpose(1, 2) for _ in range(2))
    weight = torch.randn(2 * h * d, width, generator=generator) / width**0.5
    tokens = [torch.randn(b, n, width, generator=generator) for n in lengths]
    return [t.to(dtype) for t in (q, weight, *tokens)], grad.to(dtype)


def ours(backend: str, **options: object):
    return lambda q, weight, *tokens: read_tokens(q, tokens, weight, backend=backend, precision="ieee", **options)


def some_mask(shape: tuple, generator: torch.Generator) -> Tensor:
    """Half of the tokens at random; none of the last sample, none of the first piece of the others."""
    mask = torch.rand(shape[0], sum(shape[3]), generator=generator) < 0.5
    mask[:, -1] = True
    mask[:, : sum(shape[3]) // 3] = False
    mask[-1] = False
    return mask


def check(shape: tuple, backend: str, device: torch.device, generator: torch.Generator, dtype, masked: bool) -> None:
    inputs, grad = make(shape, generator, dtype)
    inputs, grad = [t.to(device) for t in inputs], grad.to(device)
    mask = some_mask(shape, generator).to(device) if masked else None
    options = {"key_mask": mask, "piece_rows": shape[-1]}
    result = value_and_grads(ours(backend, **options), inputs, grad)
    # In fp64 the formula is its own oracle and errs nowhere: there its error in fp32 stands for it, counted in units in
    # the last place, which is what rounding scales with.
    plain_dtype = torch.float32 if dtype is torch.float64 else dtype
    plain = value_and_grads(ours("reference", **options), [t.to(plain_dtype) for t in inputs], grad.to(plain_dtype))
    true = value_and_grads(ours("reference", **options), [t.double() for t in inputs], grad.double())
    flat = [[out, *grads] for out, grads in (result, plain, true)]
    # With one key the gradient of q is zero, left of terms of up to some 30 that cancel, each rounded once or twice.
    left = torch.finfo(dtype).eps * 100
    for i, (x, p, t) in enumerate(zip(*flat, strict=True)):
        assert x.dtype == dtype
        if t.abs().max() < 1e-12:
            assert x.abs().max() < left, i
        else:
            ulps = 8.0
            if sum(shape[3]) == 1:  # these terms are in the gradients of the weight and the token, too
                ulps += left / (torch.finfo(dtype).eps * t.abs().max().item())
            if dtype is not plain_dtype:
                # Three times what fp32 errs, and an allowance for its luck on a handful of numbers: 14.7 ulps were seen
                # where fp32 was off by 2.
                ulps = 64.0 + 3.0 * max_error(p, t) / (t.abs().max().item() * torch.finfo(plain_dtype).eps)
                p = t
            assert_within_budget(f"{backend}, {i}", x, p, t, ulps=ulps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula(shape, masked, backend, generator, device):
    check(shape, backend, device, generator, torch.float32, masked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_dtypes(shape, masked, dtype, generator, device):
    check(shape, "torch", device, generator, dtype, masked)
    if device.type == "cuda" and dtype is not torch.float64:
        check(shape, "triton", device, generator, dtype, masked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_formula_of_devices_without_fused_attention(masked, dtype, generator):
    q, k, v, grad = (torch.randn(3, 2, n, 16, generator=generator).to(dtype) for n in (5, 9, 9, 5))
    mask = torch.rand(3, 9, generator=generator) < 0.5 if masked else None
    if mask is not None:
        mask[0], mask[1], mask[2, 0] = False, True, True
    out, lse = cross_attention_torch.formula_forward(q, k, v, 0.3, mask)
    fused, fused_lse = cross_attention_torch.forward(q, k, v, 0.3, "ieee", mask)
    eps = torch.finfo(dtype).eps
    near = {"rtol": 16 * eps, "atol": 16 * eps}
    torch.testing.assert_close(out, fused, **near)
    torch.testing.assert_close(lse, fused_lse, **near)
    grads = cross_attention_torch.formula_backward(grad, q, k, v, fused, fused_lse, 0.3, mask)
    for g, f in zip(grads, cross_attention_torch.backward(grad, q, k, v, fused, fused_lse, 0.3, "ieee", mask)):
        torch.testing.assert_close(g, f, **near)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_of_fp32_are_rounded_a_piece_at_a_time(backend, generator, device):
    # As automatic mixed precision has it: queries out of a 16-bit product, tokens and weights in fp32.
    if backend == "triton" and device.type == "cpu":
        pytest.skip("the interpreter is wrong in 16 bits")
    (q, *wide), grad = make(SHAPES[3], generator)
    q, grad = q.bfloat16().to(device), grad.bfloat16().to(device)
    wide = [t.to(device) for t in wide]
    out, (_, *grads) = value_and_grads(ours(backend, piece_rows=50), (q, *wide), grad)
    narrow, (_, *narrow_grads) = value_and_grads(ours(backend, piece_rows=50), (q, *(t.bfloat16() for t in wide)), grad)
    assert torch.equal(out, narrow)
    for g, n in zip(grads, narrow_grads):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g.bfloat16(), n)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_op_alone(backend, generator, device):
    inputs, _ = make(SHAPES[1], generator)
    inputs = [t.to(device) for t in inputs]
    expected, grads = value_and_grads(ours(backend), inputs)
    with torch.autocast(device.type, torch.bfloat16):
        out, again = value_and_grads(ours(backend), inputs)
    assert torch.equal(out, expected)
    assert all(torch.equal(a, g) for a, g in zip(again, grads))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["tokens are a slice", "tokens are expanded", "weight is transposed"])
def test_strides(layout, backend, generator, device):
    (q, weight, tokens), grad = make((2, 2, 5, (9,), 16, 12, 5), generator)
    if layout == "tokens are a slice":
        tokens = torch.randn(3, 11, 14, generator=generator)[1:, 1:10, 1:13]
    elif layout == "tokens are expanded":
        tokens = tokens[:1, :1].expand(2, 9, 12)
    else:
        weight = weight.t().contiguous().t()
    inputs, grad = [t.to(device) for t in (q, weight, tokens)], grad.to(device)
    for rows in (5, 100):
        out, grads = value_and_grads(ours(backend, piece_rows=rows), inputs, grad)
        plain, plain_grads = value_and_grads(ours("reference"), inputs, grad)
        torch.testing.assert_close(out, plain)
        for g, p in zip(grads, plain_grads):
            torch.testing.assert_close(g, p, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_projection_and_cross_attention(backend, generator, device):
    (q, weight, tokens), _ = make(SHAPES[1], generator)
    k, v = (part.unflatten(-1, (3, 24)).transpose(1, 2) for part in F.linear(tokens, weight).chunk(2, dim=-1))
    expected = cross_attention(*(t.to(device) for t in (q, k, v)), backend=backend, precision="ieee", scale=0.7)
    out = read_tokens(q.to(device), tokens.to(device), weight.to(device), scale=0.7, backend=backend, precision="ieee")
    torch.testing.assert_close(out, expected)


def test_pieces_cover_everything_in_order():
    for batch, lengths, rows in ((1, (1,), 1), (5, (6,), 13), (4, (130,), 50), (3, (9, 5, 1), 4), (7, (3, 2), 100)):
        seen = []
        for samples, ranges in token_chunks(batch, lengths, rows):
            first = (samples.stop - samples.start) * sum(lengths)
            assert first <= rows or samples.stop - samples.start == 1
            for piece in ranges:
                size = piece.tokens.stop - piece.tokens.start
                assert 1 <= size <= rows
                assert piece.columns.start == sum(lengths[: piece.sequence]) + piece.tokens.start
                assert piece.columns.stop - piece.columns.start == size
            seen += [
                (b, column)
                for b in range(samples.start, samples.stop)
                for piece in ranges
                for column in range(piece.columns.start, piece.columns.stop)
            ]
        assert seen == [(b, column) for b in range(batch) for column in range(sum(lengths))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeatable_to_the_bit(backend, generator, device):
    inputs, grad = make(SHAPES[3], generator)
    inputs, grad = [t.to(device) for t in inputs], grad.to(device)
    first, first_grads = value_and_grads(ours(backend, piece_rows=50), inputs, grad)
    again, again_grads = value_and_grads(ours(backend, piece_rows=50), inputs, grad)
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(first_grads, again_grads))


@pytest.mark.parametrize("backend", BACKENDS)
def test_keeps_nothing_with_a_row_per_token_but_the_tokens(backend, generator, device):
    (q, weight, tokens), _ = make((2, 3, 4, (50,), 16, 8, 8192), generator)
    leaves = [t.to(device).requires_grad_() for t in (q, weight, tokens)]
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = read_tokens(leaves[0], leaves[2], leaves[1], backend=backend)
    sizes = [t.numel() for t in (*leaves, out)]
    assert sorted(t.numel() for t in saved) == sorted([*sizes, 2 * 3 * 4])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_some_gradients(needed, backend, generator, device):
    inputs, grad = make(SHAPES[1], generator)
    leaves = [t.to(device).requires_grad_(n) for t, n in zip(inputs, needed)]
    ours(backend)(*leaves).backward(grad.to(device))
    _, grads = value_and_grads(ours("reference"), [t.detach() for t in leaves], grad.to(device))
    for leaf, n, expected in zip(leaves, needed, grads):
        assert (leaf.grad is not None) == n
        if n:
            torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_flops_are_counted_in_both_directions(backend, generator, device):
    (q, weight, *tokens), grad = make((2, 3, 4, (5, 2), 16, 8, 3), generator)
    leaves = [t.to(device).requires_grad_() for t in (q, weight, *tokens)]
    projection, product = 2 * 2 * 7 * 8 * 96, 2 * 2 * 3 * 4 * 7 * 16
    with FlopCounterMode(display=False) as counter:
        out = ours(backend, piece_rows=3)(*leaves)
    assert counter.get_total_flops() == projection + 2 * product
    with FlopCounterMode(display=False) as counter:
        out.backward(grad.to(device))
    assert counter.get_total_flops() == 3 * projection + 5 * product


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked, backend, generator, device):
    shape = (2, 2, 4, (9, 5), 16, 12, 4)
    (q, weight, *tokens), _ = make(shape, generator)
    q, weight, *tokens = (t.to(device).detach().requires_grad_() for t in (q, weight, *tokens))
    mask = some_mask(shape, generator).to(device) if masked else None
    rest = (mask, 0.25, 4, "ieee", backend)
    torch.library.opcheck(torch.ops.hpdm.read_tokens_fwd.default, (q, tokens, weight, *rest))
    q, weight, *tokens = (t.detach() for t in (q, weight, *tokens))
    out, lse = torch.ops.hpdm.read_tokens_fwd(q, tokens, weight, *rest)
    arguments = (torch.randn_like(out), q, tokens, weight, out, lse, *rest)
    torch.library.opcheck(torch.ops.hpdm.read_tokens_bwd.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_compiles_as_one_graph(backend, dynamic, generator, device):
    def loss(x: Tensor, tokens: Tensor, text: Tensor, weight: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 16)).transpose(1, 2)
        mask = torch.cat((tokens, text), dim=1)[..., 0] > 0
        out = read_tokens(q, (tokens * 2, text), weight, key_mask=mask, backend=backend)
        return (out + read_tokens(q, tokens, weight, piece_rows=3, backend=backend)).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for rows in (5, 6):
        sizes = ((2, rows, 32), (2, rows + 2, 12), (2, 4, 12), (64, 12))
        inputs = [torch.randn(size, generator=generator).to(device).requires_grad_() for size in sizes]
        expected, actual = loss(*inputs), compiled(*inputs)
        torch.testing.assert_close(actual, expected)
        for a, e in zip(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs)):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


Q, TOKENS, WEIGHT = torch.zeros(2, 3, 5, 8), torch.zeros(2, 7, 10), torch.zeros(48, 10)
BAD = [
    ({"q": None}, TypeError, "q: got NoneType"),
    ({"q": Q[0]}, ValueError, "q: got shape"),
    ({"q": torch.zeros(2, 1, 1, 257)}, ValueError, "q: got head width 257, expected at most 256"),
    ({"tokens": None}, TypeError, "tokens: got NoneType, expected a torch.Tensor or a sequence of them"),
    ({"tokens": []}, ValueError, "tokens: got none"),
    ({"tokens": TOKENS[:1]}, ValueError, "tokens: got shape"),
    ({"tokens": TOKENS[:, :0]}, ValueError, "tokens: got shape"),
    ({"tokens": (TOKENS, TOKENS[..., 1:])}, ValueError, r"tokens[1]: got shape"),
    ({"tokens": (TOKENS, 1)}, TypeError, r"tokens[1]: got int"),
    ({"tokens": TOKENS.int()}, TypeError, "tokens: got dtype torch.int32"),
    ({"tokens": TOKENS.to("meta")}, ValueError, "tokens: got device meta"),
    ({"weight_kv": WEIGHT[:24]}, ValueError, "weight_kv: got shape"),
    ({"weight_kv": WEIGHT[0]}, ValueError, "weight_kv: got shape"),
    ({"weight_kv": WEIGHT.bool()}, TypeError, "weight_kv: got dtype torch.bool"),
    ({"key_mask": torch.ones(2, 7)}, TypeError, "key_mask: got dtype torch.float32"),
    ({"key_mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, "key_mask: got shape"),
    ({"piece_rows": 0}, ValueError, "piece_rows: got 0, expected at least 1"),
    ({"piece_rows": 2.0}, TypeError, "piece_rows: got 2.0, expected an int"),
    ({"scale": float("inf")}, ValueError, "scale: got inf"),
    ({"precision": "fp8"}, ValueError, "precision: got 'fp8'"),
    ({"backend": "cuda"}, ValueError, "backend: got 'cuda'"),
]


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_arguments(change, error, message, backend):
    arguments = {"q": Q, "tokens": TOKENS, "weight_kv": WEIGHT, "backend": backend} | change
    with pytest.raises(error, match=message.replace("[", r"\[")):
        read_tokens(**arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_and_values_are_kept_where_they_are_small(backend, generator, monkeypatch):
    """Then the read is the attention to projected tokens, with its bits; one byte less and they are recomputed."""
    shape = (2, 2, 5, (9, 4), 16, 12, 8192)
    (q, weight, *tokens), grad = make(shape, generator)
    mask = some_mask(shape, generator)

    def projected(q, weight, *tokens):
        k, v = F.linear(torch.cat(tokens, dim=1), weight).unflatten(2, (2, 2, 16)).permute(2, 0, 3, 1, 4)
        return cross_attention(q, k, v, key_mask=mask, backend=backend, precision="ieee")

    def saved(**options):
        """Sizes of what is saved for the backward pass."""
        sizes = []
        with saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            inputs = [t.clone().requires_grad_() for t in (q, weight, *tokens)]
            ours(backend, key_mask=mask, **options)(*inputs)
        return sizes

    inputs = (q, weight, *tokens)
    expected = value_and_grads(projected, inputs, grad)
    kept = value_and_grads(ours(backend, key_mask=mask, recompute=False), inputs, grad)
    torch.testing.assert_close(kept, expected, rtol=0, atol=0)
    size = 2 * 13 * 2 * 2 * 16
    monkeypatch.setattr(api, "KEPT_BYTES", 4 * size)
    assert saved() == saved(recompute=False)
    monkeypatch.setattr(api, "KEPT_BYTES", 4 * size - 1)
    assert saved() == saved(recompute=True)
    assert saved(recompute=True) != saved(recompute=False)


def test_recompute_is_a_choice(generator):
    (q, weight, *tokens), _ = make(SHAPES[0], generator)
    with pytest.raises(TypeError, match="recompute: got 1, expected True, False or None"):
        read_tokens(q, tokens, weight, recompute=1)
