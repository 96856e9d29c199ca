"""Views that strangers pass: every op reads them as it reads a copy, and the shapes for tracing are told right."""

import pytest
import torch

from hpdm_kernels import _backend, read_tokens
from hpdm_kernels._checks import flatten_triples
from tests.kernels.every_op import BOX, CALLS, GRID, ORIGINS, SIZE, SOURCE_GRIDS, TILE, WHOLE


def reversed_axes(t):
    """The same values, in memory as if all axes were in the opposite order."""
    axes = list(range(t.ndim))[::-1]
    return t.permute(axes).contiguous().permute(axes)


def every_second(t):
    """The same values, with NaN between them along the last axis."""
    return torch.stack([t, torch.full_like(t, torch.nan)], dim=-1).flatten(-2)[..., ::2]


def inside(t):
    """The same values, with NaN around them on every axis."""
    big = torch.full([n + 3 for n in t.shape], torch.nan, dtype=t.dtype, device=t.device)
    view = big[tuple(slice(1, 1 + n) for n in t.shape)]
    view.copy_(t)
    return view


def same_rows(t):
    """The first entry of every axis but the last, expanded."""
    return t[(slice(1),) * (t.ndim - 1)].expand(t.shape)


def same_columns(t):
    """The first entry of the last axis, expanded."""
    return t[..., :1].expand(t.shape)


WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 1.0, 0.7, 0.1, 2.0, 3.0, 0.4])  # per axis of a tile
VIEWS = [reversed_axes, every_second, inside, same_rows, same_columns]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", CALLS)
def test_views_are_read_as_copies(name, backend, view, generator, device):
    call = CALLS[name]
    views = [view(t.to(device)) for t in call.inputs(generator)]
    copies = [t.clone(memory_format=torch.contiguous_format) for t in views]
    results = []
    for inputs in (views, copies):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = call.run(backend, *leaves)
        # From the second on: a gradient that is a view, too.
        grad = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)
        grad = view(grad) if inputs is views else view(grad).contiguous()
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    for viewed, copied in zip(*results, strict=True):
        assert viewed.isfinite().all()
        # Equal columns cancel in gradients, so errors are relative to the largest gradient, at least to 1.
        torch.testing.assert_close(viewed, copied, rtol=1e-5, atol=1e-5 * max(1.0, copied.abs().max().item()))


@pytest.mark.parametrize("view", VIEWS)
def test_masks_that_are_views(view, generator):
    q, weight, *tokens = CALLS["read_tokens"].inputs(generator)
    mask = torch.rand(2, 58, generator=generator) < 0.6
    mask = view(mask.float()) == 1
    strided = mask.t().contiguous().t()
    results = []
    for key_mask in (strided, mask.contiguous()):
        leaf = q.detach().requires_grad_()
        out = read_tokens(leaf, tokens, weight, key_mask=key_mask, recompute=True, backend="torch")
        results.append((out, *torch.autograd.grad(out.sum(), leaf)))
    assert all(map(torch.equal, *results))


def registered_calls(backend, generator, device):
    """Name and arguments of one call of every registered op; random tensors are to be made views."""

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device)

    origins = ORIGINS  # on the host
    whole, box = [w.to(device) for w in WHOLE], BOX.to(device)
    geometry = (None, flatten_triples(SOURCE_GRIDS), list(GRID), flatten_triples(SOURCE_GRIDS))
    sources, x, weight, bias = [normal(2, 12, 5), normal(2, 6, 5)], normal(2, 12, 5), normal(5, 13), normal(5)
    q, k, v = normal(2, 3, 4, 8), normal(2, 3, 6, 8), normal(2, 3, 6, 8)
    tokens, weight_kv = normal(2, 40, 5), normal(48, 5)
    out, lse = torch.ops.hpdm.read_tokens_fwd(q, [tokens], weight_kv, None, 0.3, 20, "ieee", backend)
    video, patch, tiles = normal(2, 2, *SIZE), normal(2, 2, 1, 3, 2), normal(2, 4, 2, *TILE)
    fusion = (x, sources, whole, box, weight, bias, *geometry)
    sampling = (sources, whole, box, *geometry)
    _, plan = torch.ops.hpdm.sample_context_fwd(*sampling, backend)
    temporal = normal(2, 3, 4, 24), normal(3, 4), normal(3, 4)
    _, shares = torch.ops.hpdm.temporal_attention_fwd(*temporal, backend)
    calls = {
        "sample_context_fwd": (*sampling, backend),
        "sample_context_bwd": (normal(2, 12, 5), plan, *sampling, [True, False], backend),
        "fuse_context_fwd": (*fusion, False, "ieee", backend),
        "fuse_context_bwd": (normal(2, 12, 5), plan, *fusion, [True] * 5, False, "ieee", backend),
        "project_source_fwd": (sources[0], weight, "ieee", backend),
        "project_source_bwd": (normal(2, 12, 5), sources[0], weight, [True, True], "ieee", backend),
        "read_tokens_fwd": (q, [tokens], weight_kv, None, 0.3, 20, "ieee", backend),
        "read_tokens_bwd": (normal(2, 3, 4, 8), q, [tokens], weight_kv, out, lse, None, 0.3, 20, "ieee", backend),
        "sample_patches_fwd": (video, box, [1, 3, 2], backend),
        "sample_patches_bwd": (patch, box, list(SIZE), backend),
        "extract_tiles": (video, origins, list(TILE), True, 0.5, WEIGHTS, backend),
        "average_tiles": (tiles, origins, list(SIZE), video, 0.3, 0.7, True, WEIGHTS, backend),
        "add_tiles": (video, tiles, origins, 0, WEIGHTS, backend),
        "step_tiles": (video, origins, list(TILE), torch.float32, normal(2, 2, *SIZE), 0.3, 0.7, True, backend),
        "temporal_attention_fwd": (*temporal, backend),
        "temporal_attention_bwd": (normal(2, 3, 4, 8), *temporal, shares, backend),
        "new_tile_sums": (tiles, [2, 2, *SIZE], torch.float32),
    }
    if backend == "triton":
        out, lse = torch.ops.hpdm.cross_attention_fwd(q, k, v, 0.3, "ieee")
        calls["cross_attention_fwd"] = (q, k, v, 0.3, "ieee")
        calls["cross_attention_bwd"] = (normal(2, 3, 4, 8), q, k, v, out, lse, 0.3, "ieee")
        packed = normal(2, 6, 2, 3, 8)
        calls["packed_attention_fwd"] = (q, packed, 0.3, "ieee")
        calls["packed_attention_bwd"] = (normal(2, 3, 4, 8), q, packed, out, lse, 0.3, "ieee")
    return calls


OPS = sorted({op.__name__ for op in _backend.PORTABLE} | {"new_tile_sums"})
LIKE_BOXES = {(2, 6), (4, 3)}  # boxes and origins, whose values must not change


@pytest.mark.parametrize("view", [reversed_axes, every_second, same_rows])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", OPS)
def test_shapes_for_tracing_are_those_of_results(name, backend, view, generator, device):
    """``opcheck`` with views: a result's strides may follow an argument's only where tracing says so."""
    calls = registered_calls(backend, generator, device)
    if name not in calls:
        pytest.skip("the torch backend is PyTorch's own attention")
    if name in ("add_tiles", "step_tiles") and view is same_rows:
        pytest.skip("the buffer is never expanded")
    if backend == "triton" and view is every_second:
        pytest.skip("as for the torch backend, whose layouts this is about")

    def change(argument):
        if isinstance(argument, list):
            return [change(a) for a in argument]
        floats = isinstance(argument, torch.Tensor) and argument.is_floating_point()
        changes = floats and tuple(argument.shape) not in LIKE_BOXES
        return view(argument) if changes else argument

    # The values of a new buffer differ from call to call.
    tests = ("test_schema", "test_faketensor") if name == "new_tile_sums" else torch.library._OPCHECK_DEFAULT_UTILS
    op = getattr(torch.ops.hpdm, name).default
    torch.library.opcheck(op, tuple(change(a) for a in calls[name]), test_utils=tests)
