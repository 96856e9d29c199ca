"""Derivatives by torch.func and in forward mode: the right one, or an error that says which backend has it."""

import pytest
import torch
from torch.autograd import forward_ad

from hpdm_kernels import TileAccumulator, average_tiles, extract_tiles, sample_context, sample_patches
from tests.kernels.every_op import BOX, CALLS, GRID, ORIGINS, SIZE, SOURCE_GRIDS, TILE, WHOLE

# PyTorch's own attention on the CPU differentiates under torch.func; its 3-D grid_sample has no forward mode.
PYTORCHS = ("cross_attention", "packed_attention", "packed_attention of itself")
OURS = [(name, b) for name in CALLS for b in ("torch", "triton") if name not in PYTORCHS or b == "triton"]
NO_FORWARD_MODE = ("sample_context", "fuse_context", "fuse_projected", "fuse_projected without coordinates")


def setup(name, backend, generator, device):
    """The op as a function of its inputs, the inputs, a gradient of the output."""
    inputs = tuple(t.to(device) for t in CALLS[name].inputs(generator))

    def op(*tensors):
        return CALLS[name].run(backend, *tensors)

    return op, inputs, torch.randn_like(op(*inputs))


def plain_gradients(op, inputs, grad):
    leaves = [t.clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(op(*leaves), leaves, grad)


@pytest.mark.parametrize("name", CALLS)
def test_reference_has_the_gradients_of_autograd(name, generator, device):
    op, inputs, grad = setup(name, "reference", generator, device)
    expected = plain_gradients(op, inputs, grad)
    everything = tuple(range(len(inputs)))
    by_grad = torch.func.grad(lambda *t: (op(*t) * grad).sum(), argnums=everything)(*inputs)
    by_vjp = torch.func.vjp(op, *inputs)[1](grad)
    for a, b, e in zip(by_grad, by_vjp, expected, strict=True):
        torch.testing.assert_close(a, e)
        torch.testing.assert_close(b, e)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in NO_FORWARD_MODE])
def test_reference_has_tangents(name, generator, device):
    op, inputs, grad = setup(name, "reference", generator, device)
    tangents = tuple(torch.randn_like(t) for t in inputs)
    expected = sum((g * t).sum() for g, t in zip(plain_gradients(op, inputs, grad), tangents))
    tangent = torch.func.jvp(op, inputs, tangents)[1]
    torch.testing.assert_close((tangent * grad).sum(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NO_FORWARD_MODE)
def test_reference_says_where_pytorch_has_no_forward_mode(name, generator, device):
    op, inputs, _ = setup(name, "reference", generator, device)
    with pytest.raises(NotImplementedError, match="grid_sampler_3d"):
        torch.func.jvp(op, inputs, tuple(torch.ones_like(t) for t in inputs))


@pytest.mark.parametrize("name", CALLS)
def test_reference_is_mapped(name, generator, device):
    op, inputs, grad = setup(name, "reference", generator, device)
    pairs = tuple(torch.stack([t, torch.randn_like(t)]) for t in inputs)
    expected = torch.stack([op(*(p[i] for p in pairs)) for i in range(2)])
    torch.testing.assert_close(torch.func.vmap(op)(*pairs), expected)

    def loss(*tensors):
        return (op(*tensors) * grad).sum()

    of_each = torch.func.vmap(torch.func.grad(loss))(*pairs)
    for i in range(2):
        torch.testing.assert_close(of_each[i], plain_gradients(op, [p[i] for p in pairs], grad)[0])


TRANSFORMS = {
    "grad": lambda op, inputs: torch.func.grad(lambda *t: op(*t).sum())(*inputs),
    "grad of the last": lambda op, inputs: torch.func.grad(lambda *t: op(*t).sum(), argnums=len(inputs) - 1)(*inputs),
    "vjp": lambda op, inputs: torch.func.vjp(op, *inputs),
    "jacrev": lambda op, inputs: torch.func.jacrev(op)(*inputs),
    "jvp": lambda op, inputs: torch.func.jvp(op, inputs, tuple(torch.ones_like(t) for t in inputs)),
    "jacfwd": lambda op, inputs: torch.func.jacfwd(op)(*inputs),
    "a dual": lambda op, inputs: dual(op, inputs),
    "jvp of vmap": lambda op, inputs: torch.func.jvp(torch.func.vmap(op), twice(inputs), twice(inputs)),
    "grad of vmap": lambda op, inputs: torch.func.grad(lambda *t: torch.func.vmap(op)(*t).sum())(*twice(inputs)),
    "vmap of grad": lambda op, inputs: torch.func.vmap(torch.func.grad(lambda *t: op(*t).sum()))(*twice(inputs)),
}


def dual(op, inputs):
    with forward_ad.dual_level():
        return op(*inputs[:-1], forward_ad.make_dual(inputs[-1], torch.ones_like(inputs[-1])))


def twice(inputs):
    return tuple(torch.stack([t, t]) for t in inputs)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("name", "backend"), OURS)
def test_registered_ops_name_the_backend_that_can(name, backend, transform, generator, device):
    op, inputs, _ = setup(name, backend, generator, device)
    message = f"^{name.split()[0]}: backend='{backend}' has no derivative .* use backend='reference'$"
    with pytest.raises(NotImplementedError, match=message):
        TRANSFORMS[transform](op, inputs)


@pytest.mark.parametrize(("name", "backend"), OURS)
def test_what_is_not_differentiated_passes(name, backend, generator, device):
    """Inside of a transform of something else, and with a tensor that the transform wraps, but does not track."""
    op, inputs, _ = setup(name, backend, generator, device)
    expected = op(*inputs)
    factor = torch.ones((), device=device)
    plain = torch.func.grad(lambda z: (z * op(*inputs)).sum())(factor)
    wrapped = torch.func.grad(lambda z: (z * op(*(t * 1 for t in inputs))).sum())(factor)
    tangent = torch.func.jvp(lambda z: z * op(*inputs), (factor,), (factor,))[1]
    torch.testing.assert_close(plain, expected.sum())
    torch.testing.assert_close(wrapped, expected.sum())
    torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize("name", ["sample_patches", "extract_tiles", "average_tiles", "project_sources"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ops_of_single_tensors_are_mapped(name, backend, generator, device):
    op, inputs, _ = setup(name, backend, generator, device)
    pairs = tuple(torch.stack([t, torch.randn_like(t)]) for t in inputs)
    expected = torch.stack([op(*(p[i] for p in pairs)) for i in range(2)])
    torch.testing.assert_close(torch.func.vmap(op)(*pairs), expected)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_values_are_still_checked(backend, device):
    """Boxes and origins that no transform wraps are read inside of one, too."""
    outside, source = BOX + 0.75, torch.zeros(2, 12, 5, device=device)
    video = torch.zeros(2, 2, *SIZE, device=device)

    def check(z):
        if device.type == "cpu":
            with pytest.raises(ValueError, match=r"^box: row 0 is"):
                sample_context((source,), WHOLE[:1], outside, SOURCE_GRIDS[:1], GRID, backend=backend)
            index = torch.tensor([[0], [2]])  # the transform wraps what is made inside of it
            with pytest.raises(ValueError, match=r"^source_index: column 0"):
                sample_context((source,), WHOLE[:1], BOX, SOURCE_GRIDS[:1], GRID, source_index=index, backend=backend)
            with pytest.raises(ValueError, match=r"^box: row 0 is"):
                sample_patches(video, outside, (1, 2, 2), backend=backend)
        with pytest.raises(ValueError, match=r"^origins: row 1 is"):
            extract_tiles(video, (ORIGINS * 2).int(), TILE, backend=backend)
        return z.sum()

    torch.func.grad(check)(torch.ones(2))
    torch.func.vmap(check)(torch.ones(2))


def test_mapped_origins_are_refused():
    tiles = torch.zeros(2, 4, 2, *TILE)
    with pytest.raises(ValueError, match=r"^origins: got a tensor that torch.func.vmap maps over"):
        torch.func.vmap(lambda o: average_tiles(tiles, o, SIZE, backend="reference"))(torch.stack([ORIGINS] * 2))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_accumulator_refuses_tangents(backend):
    tiles, x = torch.zeros(1, 4, 1, *TILE), torch.zeros(1, 1, *SIZE)
    sums = TileAccumulator(ORIGINS, TILE, SIZE, backend=backend)
    with forward_ad.dual_level():
        with pytest.raises(ValueError, match=r"^tiles: got a tensor that requires a gradient"):
            sums.add(forward_ad.make_dual(tiles, tiles))
        sums.add(tiles)
        with pytest.raises(ValueError, match=r"^x: got a tensor that requires a gradient"):
            sums.step(forward_ad.make_dual(x, x), 1.0)
    with pytest.raises(ValueError, match=r"^x: got a tensor that requires a gradient"):
        torch.func.grad(lambda x: sums.step(x, 1.0).sum())(x)
    assert torch.equal(sums.step(x, 1.0), x)
