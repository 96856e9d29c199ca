"""Attention to parts of one projection: that of the parts to the bit, with one gradient and without copies."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hpdm_kernels import cross_attention, packed_attention
from hpdm_kernels._backend import PORTABLE
from hpdm_kernels.attention import triton_backend
from hpdm_kernels.modules import CrossAttention, SelfAttention
from hpdm_kernels.testing import poisoned_allocations, value_and_grads

BACKENDS = ("reference", "torch", "triton")
SHAPES = [
    # B, h, M, N, d; for self-attention there are N queries
    (1, 1, 1, 1, 16),
    (2, 3, 5, 7, 24),
    (2, 2, 3, 9, 1),
    (1, 2, 65, 130, 48),
    (1, 2, 128, 128, 32),  # whole blocks: no masks
    (1, 1, 300, 20, 16),  # a split loop over queries
    (3, 1, 2, 40, 160),
]


def make(shape: tuple[int, ...], apart: bool, generator: torch.Generator) -> tuple[Tensor | None, Tensor, Tensor]:
    """Queries or ``None``, the packed tensor and the gradient of the output."""
    b, h, m, n, d = shape
    q = torch.randn(b, h, m, d, generator=generator) if apart else None
    packed = torch.randn(b, n, 2 if apart else 3, h, d, generator=generator)
    return q, packed, torch.randn(b, h, m if apart else n, d, generator=generator)


def of_parts(q: Tensor | None, packed: Tensor, **options: object) -> Tensor:
    """What the op stands for, by indices."""
    parts = [packed[:, :, i].transpose(1, 2) for i in range(packed.shape[2])]
    return cross_attention(*(parts if q is None else (q, *parts)), **options)


def some_keys(packed: Tensor, generator: torch.Generator) -> Tensor:
    """A mask of half of the keys; the last sample has none."""
    mask = torch.rand(packed.shape[:2], generator=generator) < 0.5
    mask[-1] = False
    return mask.to(packed.device)


def check(q: Tensor | None, packed: Tensor, grad: Tensor, **options: object) -> None:
    """Values and gradients are those of the parts to the bit."""
    out, grads = value_and_grads(lambda q, packed: packed_attention(q, packed, **options), (q, packed), grad)
    expected, expected_grads = value_and_grads(lambda q, packed: of_parts(q, packed, **options), (q, packed), grad)
    assert torch.equal(out, expected)
    assert out.stride() == expected.stride()
    for name, g, e in zip(("q", "packed"), grads, expected_grads, strict=True):
        assert (g is None) == (e is None)
        assert g is None or torch.equal(g, e), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_attention_of_the_parts(shape, apart, backend, generator, device):
    tensors = [t if t is None else t.to(device) for t in make(shape, apart, generator)]
    check(*tensors, backend=backend, precision="ieee")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("apart", [True, False])
def test_options(apart, backend, generator, device):
    q, packed, grad = (t if t is None else t.to(device) for t in make((3, 2, 5, 40, 24), apart, generator))
    check(q, packed, grad, backend=backend, precision="ieee", scale=0.3, key_mask=some_keys(packed, generator))


@pytest.mark.parametrize("ranges", [(1, 1), (1, 3), (2, 1), (3, 2)], ids=str)
@pytest.mark.parametrize("apart", [True, False])
def test_split_loops(apart, ranges, generator, device, monkeypatch):
    """Each of the two backward kernels writes its result itself or adds up partial ones; all write every element."""
    steps_of = []

    def split(_, __, steps, ___):
        wanted = (1, *ranges)[len(steps_of) % 3]
        per_range = -(-steps // wanted)
        steps_of.append(steps)
        assert -(-steps // per_range) == wanted, "too short a loop"
        return wanted, per_range

    monkeypatch.setattr(triton_backend, "_grid_split", split)
    q, packed, grad = (t if t is None else t.to(device) for t in make((2, 2, 300, 300, 24), apart, generator))
    with poisoned_allocations():
        check(q, packed, grad, backend="triton", precision="ieee")
    assert len(steps_of) == 6


@pytest.mark.parametrize("layout", ["every second column", "parts in front", "inside", "expanded"])
@pytest.mark.parametrize("apart", [True, False])
def test_any_memory(apart, layout, generator, device):
    q, packed, grad = (t if t is None else t.to(device) for t in make((2, 3, 5, 9, 16), apart, generator))
    if layout == "every second column":
        packed = torch.stack([packed, torch.full_like(packed, math.nan)], dim=-1).flatten(-2)[..., ::2]
    elif layout == "parts in front":
        packed = packed.permute(2, 3, 0, 1, 4).contiguous().permute(2, 3, 0, 1, 4)
    elif layout == "inside":
        packed = torch.nn.functional.pad(packed, (1, 1) * 5, value=math.nan)[(slice(1, -1),) * 5]
    else:
        packed = packed[:, :1].expand(packed.shape)
    assert not packed.is_contiguous()
    check(q, packed, grad, backend="triton", precision="ieee")


@pytest.mark.parametrize("apart", [True, False])
def test_gradient_is_one_contiguous_tensor(apart, generator, device):
    q, packed, grad = (t if t is None else t.to(device) for t in make((2, 3, 5, 9, 16), apart, generator))
    with poisoned_allocations():
        out, lse = torch.ops.hpdm.packed_attention_fwd(q, packed, 0.25, "ieee", None)
        grads = torch.ops.hpdm.packed_attention_bwd(grad, q, packed, out, lse, 0.25, "ieee", None)
    assert [g.shape for g in grads] == [t.shape for t in (q, packed) if t is not None]
    assert grads[-1].is_contiguous()
    assert all(g.isfinite().all() for g in grads)


class Operations(TorchDispatchMode):
    """Counts the operations of PyTorch by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("backend", "copies"), [("triton", 0), ("torch", 1)])
@pytest.mark.parametrize("module", ["CrossAttention", "SelfAttention"])
def test_modules_do_not_put_gradients_together(module, backend, copies, generator, device):
    x = torch.randn(2, 40, 32, generator=generator).to(device).requires_grad_()
    if module == "SelfAttention":
        out = SelfAttention(32, head_width=16, backend=backend).to(device)(x)
    else:
        out = CrossAttention(32, 32, 48, 32, head_width=16, backend=backend).to(device)(x, x)
    with Operations() as operations:
        out.sum().backward()
    assert operations.count["cat"] + operations.count["stack"] == copies


@pytest.mark.parametrize("apart", [True, False])
def test_repeatable_to_the_bit(apart, generator, device):
    q, packed, grad = (t if t is None else t.to(device) for t in make((1, 2, 70, 300, 40), apart, generator))
    first, again = (
        value_and_grads(lambda q, packed: packed_attention(q, packed, backend="triton"), (q, packed), grad)
        for _ in range(2)
    )
    assert torch.equal(first[0], again[0])
    assert all(a is b or torch.equal(a, b) for a, b in zip(first[1], again[1]))


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_opcheck(masked, apart, generator, device):
    q, packed, grad = (t if t is None else t.to(device) for t in make((2, 2, 5, 9, 16), apart, generator))
    options = (0.25, "ieee", some_keys(packed, generator) if masked else None)
    leaves = [t if t is None else t.clone().requires_grad_() for t in (q, packed)]
    torch.library.opcheck(torch.ops.hpdm.packed_attention_fwd.default, (*leaves, *options))
    out, lse = torch.ops.hpdm.packed_attention_fwd(q, packed, *options)
    torch.library.opcheck(torch.ops.hpdm.packed_attention_bwd.default, (grad, q, packed, out, lse, *options))


@pytest.mark.parametrize("apart", [True, False])
def test_portable_functions_give_what_the_ops_give(apart, generator, device):
    q, packed, grad = (t if t is None else t.to(device) for t in make((2, 2, 5, 20, 16), apart, generator))
    options = (0.25, "ieee", some_keys(packed, generator))
    fwd, bwd = torch.ops.hpdm.packed_attention_fwd, torch.ops.hpdm.packed_attention_bwd
    out, lse = fwd(q, packed, *options)
    torch.testing.assert_close(PORTABLE[fwd](q, packed, *options), (out, lse))
    arguments = (grad, q, packed, out, lse, *options)
    portable, ours = PORTABLE[bwd](*arguments), bwd(*arguments)
    torch.testing.assert_close(portable, ours)
    assert portable[-1].is_contiguous()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_as_one_graph(backend, dynamic, generator, device):
    def loss(x: Tensor, y: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 16)).transpose(1, 2)
        read = packed_attention(q, y.unflatten(-1, (2, 2, 16)), key_mask=y[..., 0] > 0, backend=backend)
        own = packed_attention(None, torch.cat([x, y], dim=-1).unflatten(-1, (3, 2, 16)), backend=backend)
        return (read + own).transpose(1, 2).flatten(2).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for rows in (5, 6):
        x = torch.randn(2, rows, 32, generator=generator).to(device).requires_grad_()
        y = torch.randn(2, rows, 64, generator=generator).to(device).requires_grad_()
        expected, actual = loss(x, y), compiled(x, y)
        torch.testing.assert_close(actual, expected)
        for a, e in zip(torch.autograd.grad(actual, (x, y)), torch.autograd.grad(expected, (x, y))):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("apart", [True, False])
def test_flops_and_what_is_saved(apart, generator, device):
    tensors = make((2, 3, 20 if apart else 30, 30, 16), apart, generator)
    q, packed, grad = (t if t is None else t.to(device) for t in tensors)
    leaves = [t if t is None else t.requires_grad_() for t in (q, packed)]
    product = 2 * 2 * 3 * (20 if apart else 30) * 30 * 16
    saved: list[Tensor] = []
    with FlopCounterMode(display=False) as forward, saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = packed_attention(*leaves, backend="triton")
    assert forward.get_total_flops() == 2 * product
    sizes = [t.numel() for t in (q, packed, out) if t is not None] + [out.numel() // 16]
    assert sorted(t.numel() for t in saved) == sorted(sizes)
    with FlopCounterMode(display=False) as backward:
        out.backward(grad)
    assert backward.get_total_flops() == 5 * product


Q, GOOD, OWN = torch.zeros(2, 3, 5, 8), torch.zeros(2, 4, 2, 3, 8), torch.zeros(2, 4, 3, 3, 8)
BAD = [
    ({"q": [1.0]}, TypeError, "q: got list"),
    ({"q": Q.int()}, TypeError, "q: got dtype torch.int32"),
    ({"q": Q[0]}, ValueError, "q: got shape"),
    ({"q": torch.zeros(1, 1, 1, 257)}, ValueError, "q: got head width 257, expected at most 256"),
    ({"q": None}, ValueError, "packed: got shape (2, 4, 2, 3, 8), expected [B, M, 3, h, d]"),
    ({"packed": None}, TypeError, "packed: got NoneType"),
    ({"packed": OWN}, ValueError, "packed: got shape (2, 4, 3, 3, 8), expected [2, N, 2, 3, 8]"),
    ({"packed": GOOD[:1]}, ValueError, "packed: got shape"),
    ({"packed": GOOD[:, :0]}, ValueError, "packed: got shape"),
    ({"packed": GOOD.flatten(2)}, ValueError, "packed: got shape"),
    ({"packed": GOOD[..., :4]}, ValueError, "packed: got shape"),
    ({"packed": GOOD.double()}, TypeError, "packed: got dtype torch.float64, expected torch.float32 as for q"),
    ({"packed": GOOD.to("meta")}, ValueError, "packed: got device meta, expected cpu as for q"),
    ({"q": None, "packed": OWN.int()}, TypeError, "packed: got dtype torch.int32"),
    ({"q": None, "packed": OWN[..., :0]}, ValueError, "packed: got shape"),
    ({"q": None, "packed": torch.zeros(1, 1, 3, 1, 257)}, ValueError, "packed: got head width 257"),
    ({"key_mask": torch.ones(2, 4)}, TypeError, "key_mask: got dtype torch.float32, expected one of torch.bool"),
    ({"key_mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, "key_mask: got shape (2, 5), expected [2, 4]"),
    ({"key_mask": torch.ones(2, 4, dtype=torch.bool, device="meta")}, ValueError, "expected cpu as for packed"),
    ({"scale": math.inf}, ValueError, "scale: got inf"),
    ({"scale": "1"}, TypeError, "scale: got '1'"),
    ({"precision": "fp8"}, ValueError, "precision: got 'fp8'"),
    ({"backend": "cuda"}, ValueError, "backend: got 'cuda'"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_arguments(change, error, message, backend):
    arguments = {"q": Q, "packed": GOOD, "backend": backend} | change
    with pytest.raises(error) as caught:
        packed_attention(**arguments)
    assert message in str(caught.value)
