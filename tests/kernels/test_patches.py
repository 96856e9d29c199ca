"""Patch extraction against the fp64 formula, its gradient, its exact cases, its contract."""

import functools

import pytest
import torch
import torch.nn.functional as F

from hpdm_kernels import reference, sample_patches
from hpdm_kernels.testing import assert_within_budget, check_op, random_boxes, value_and_grads

BACKENDS = ("torch", "triton")

# (video, patch, scale): shrinking evenly and unevenly, stretching, copying an axis, sizes of 1.
SHAPES = {
    "shrink": ((4, 12, 16), (2, 3, 4), (1.0, 0.5, 0.5)),
    "uneven": ((3, 11, 13), (2, 4, 5), (0.9, 0.7, 0.61)),
    "stretch": ((2, 5, 4), (2, 6, 7), (0.5, 0.6, 0.3)),
    "window": ((2, 9, 12), (1, 3, 4), (0.5, 3 / 9, 4 / 12)),
    "one pixel": ((1, 1, 1), (2, 1, 3), (1.0, 0.2, 1.0)),
    "one output": ((1, 5, 20), (1, 1, 1), (1.0, 0.8, 0.9)),
    "long window": ((1, 4, 60), (1, 4, 2), (1.0, 1.0, 1.0)),
}


def inputs(name, generator, device, dtype=torch.float32, batch=2, channels=2):
    video_size, size, scale = SHAPES[name]
    video = torch.randn(batch, channels, *video_size, generator=generator).to(device, dtype)
    box = random_boxes(batch, scale, generator).to(device)
    grad = torch.randn(batch, channels, *size, generator=generator).to(device, dtype)
    return video, box, size, grad


def check(backend, video, box, size, grad):
    def run(chosen):
        return lambda v: sample_patches(v, box, size, backend=chosen)

    check_op(run(backend), run("reference"), (video,), grad, names=("video",))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
def test_matches_formula(name, backend, generator, device):
    check(backend, *inputs(name, generator, device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["shrink", "stretch"])
def test_other_dtypes(name, dtype, generator, device):
    check("torch", *inputs(name, generator, device, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_edges_of_the_video(backend, generator, device):
    """Windows that reach over the border: stretched boxes in the corners."""
    video = torch.randn(2, 1, 2, 5, 6, generator=generator).to(device)
    box = torch.tensor([[0, 0, 0, 0.5, 0.3, 0.2], [0.5, 0.7, 0.8, 0.5, 0.3, 0.2]], device=device)
    size = (2, 4, 5)
    check(backend, video, box, size, torch.randn(2, 1, *size, generator=generator).to(device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_pixels_are_copied(backend, generator, device):
    video = torch.randn(2, 1, 3, 11, 13, generator=generator).to(device)
    at = [torch.randint(0, n - m + 1, (2,), generator=generator) for n, m in zip((3, 11, 13), (2, 5, 7))]
    rows = [[i / 3, j / 11, k / 13, 2 / 3, 5 / 11, 7 / 13] for i, j, k in zip(*at)]
    out = sample_patches(video, torch.tensor(rows, device=device), (2, 5, 7), backend=backend)
    for b, (i, j, k) in enumerate(zip(*at)):
        assert torch.equal(out[b], video[b, :, i : i + 2, j : j + 5, k : k + 7])


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_video_is_area_interpolation(backend, generator, device):
    video = torch.randn(1, 2, 4, 12, 16, generator=generator).to(device)
    box = torch.tensor([[0.0, 0, 0, 1, 1, 1]], device=device)
    out = sample_patches(video, box, (2, 4, 4), backend=backend)
    torch.testing.assert_close(out, F.interpolate(video, (2, 4, 4), mode="area"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_stays_constant(backend, generator, device):
    """Filters sum to 1, also where they reach over the border."""
    video = torch.full((2, 1, 3, 7, 9), 3.0, device=device)
    for scale in ((0.3, 0.2, 0.1), (1.0, 1.0, 0.8)):
        out = sample_patches(video, random_boxes(2, scale, generator).to(device), (2, 5, 4), backend=backend)
        torch.testing.assert_close(out, torch.full_like(out, 3.0), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_hot_gradients(backend, device):
    """A pixel outside of the box gets none; the gradient of the sum is the coverage, which adds up to the outputs."""
    video = torch.zeros(1, 1, 2, 8, 8, device=device)
    box = torch.tensor([[0, 0.25, 0.5, 1, 0.5, 0.25]], device=device)
    _, (grad,) = value_and_grads(lambda v: sample_patches(v, box, (2, 2, 2), backend=backend), (video,))
    assert grad.sum().item() == pytest.approx(8)
    inside = torch.zeros_like(video)
    inside[:, :, :, 2:6, 4:6] = 1
    assert torch.equal(grad != 0, inside != 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_sample_has_its_own_filter(backend, generator, device):
    """Even and uneven windows, interpolation, a copy and a whole axis in one batch: together as one by one."""
    scales = [(1, 1, 1), (0.5, 0.9, 0.61), (0.5, 3 / 12, 4 / 16), (0.25, 0.5, 0.5), (0.3, 0.1, 0.1)]
    box = torch.cat([random_boxes(1, scale, generator) for scale in scales])
    box[3, :3] = torch.tensor([0.25, 2 / 12, 4 / 16])
    box = box.to(device)
    size = (2, 3, 4)
    video = torch.randn(len(box), 2, 4, 12, 16, generator=generator).to(device)
    grad = torch.randn(len(box), 2, *size, generator=generator).to(device)
    check(backend, video, box, size, grad)
    run = lambda v, box: sample_patches(v, box, size, backend=backend)
    together, (dvideo,) = value_and_grads(functools.partial(run, box=box), (video,), grad)
    for b in range(len(box)):
        row = slice(b, b + 1)
        alone, (dalone,) = value_and_grads(functools.partial(run, box=box[row]), (video[row],), grad[row])
        assert torch.equal(alone, together[row])
        assert torch.equal(dalone, dvideo[row])


@pytest.mark.parametrize("frames", [2, 3072])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_a_dense_tensor_of_zeros_but_for_the_box(dtype, frames, generator, device):
    """Both where freed memory is used again and where there is too much of it for that (glibc: 32 MB)."""
    video = torch.randn(1, 1, frames, 64, 64 * 4 // dtype.itemsize, generator=generator).to(device, dtype)
    box = torch.tensor([[0, 0.25, 0.5, 1, 0.5, 0.25]], device=device)
    used = torch.full_like(video, torch.nan)
    del used
    run = lambda v: sample_patches(v, box, (1, 8, 8), backend="torch")
    _, (grad,) = value_and_grads(run, (video,))
    assert grad.dtype is dtype
    assert grad.stride() == video.stride()
    assert grad.untyped_storage().nbytes() == grad.nbytes
    height, width = video.shape[3:]
    inside = torch.zeros_like(video, dtype=torch.bool)
    inside[..., height // 4 : 3 * height // 4, width // 2 : 3 * width // 4] = True
    assert torch.equal(grad != 0, inside)
    # It belongs to the caller, who may write to it.
    assert torch.equal(grad.clone().add_(1), grad.add_(1))


def test_uint8(generator, device):
    video, box, size, _ = inputs("uneven", generator, device)
    bytes_ = (video * 60 + 128).clamp(0, 255).to(torch.uint8)
    out = sample_patches(bytes_, box, size, backend="torch")
    truth = reference.sample_patches(bytes_.double(), box, size)
    assert out.dtype is torch.float32
    assert not out.requires_grad
    assert_within_budget("patches", out, reference.sample_patches(bytes_, box, size), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_large_footprints_are_cut(dtype, generator, device, monkeypatch):
    monkeypatch.setattr("hpdm_kernels.patches.torch_backend.CPU_PIECE", 100)
    for name in ("shrink", "uneven", "stretch", "window"):
        video, box, size, _ = inputs(name, generator, device)
        video = (video * 60 + 128).clamp(0, 255).to(dtype)
        out = sample_patches(video, box, size, backend="torch")
        plain = reference.sample_patches(video, box, size)
        assert_within_budget(name, out, plain, reference.sample_patches(video.double(), box, size))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend, generator, device):
    video, box, size, grad = inputs("uneven", generator, device)
    strided = video.permute(2, 4, 0, 3, 1).contiguous().permute(2, 4, 0, 3, 1)
    box = torch.cat((box, box), dim=1)[:, ::1][:, :6]
    grad = grad.transpose(2, 4).contiguous().transpose(2, 4)
    assert not strided.is_contiguous()
    assert not box.is_contiguous()
    check(backend, strided, box, size, grad)
    check(backend, video, box, size, torch.ones((), device=device).expand(grad.shape))


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeatable(backend, generator, device):
    video, box, size, grad = inputs("uneven", generator, device)
    one, two = (
        value_and_grads(lambda v: sample_patches(v, box, size, backend=backend), (video,), grad) for _ in range(2)
    )
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1][0], two[1][0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_differentiable(backend, generator, device):
    video, box, size, grad = inputs("shrink", generator, device, batch=1, channels=1)
    video.requires_grad_()
    grad.requires_grad_()
    (back,) = torch.autograd.grad(sample_patches(video, box, size, backend=backend), video, grad, create_graph=True)
    u = torch.randn(video.shape, generator=generator).to(device)
    (again,) = torch.autograd.grad(back, grad, u)
    torch.testing.assert_close(again, sample_patches(u, box, size, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, generator, device):
    video, box, size, grad = inputs("shrink", generator, device, batch=1, channels=1)
    video.requires_grad_()
    torch.library.opcheck(torch.ops.hpdm.sample_patches_fwd.default, (video, box, size, backend))
    torch.library.opcheck(
        torch.ops.hpdm.sample_patches_bwd.default, (grad.requires_grad_(), box, video.shape[2:], backend)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend, generator, device):
    video, box, size, grad = inputs("shrink", generator, device, batch=1, channels=1)
    run = lambda v: sample_patches(v + 1, box, size, backend=backend)
    eager = value_and_grads(run, (video,), grad)
    compiled = value_and_grads(torch.compile(run, fullgraph=True), (video,), grad)
    torch.testing.assert_close(compiled[0], eager[0])
    torch.testing.assert_close(compiled[1][0], eager[1][0])


VIDEO, BOX = torch.zeros(1, 1, 2, 4, 4), torch.tensor([[0, 0, 0, 1, 0.5, 0.5]])
BAD = {
    "video: got list": (TypeError, {"video": [1]}),
    "video: got dtype torch.int64": (TypeError, {"video": VIDEO.long()}),
    "video: got shape": (ValueError, {"video": VIDEO[0]}),
    "box: got dtype": (TypeError, {"box": BOX.double()}),
    "box: got shape": (ValueError, {"box": BOX.expand(2, 6)}),
    "box: row 0 is .* inside the whole video": (ValueError, {"box": BOX + 0.6}),
    "box: row 0": (ValueError, {"box": BOX * torch.tensor([1, 1, 1, 1, 0, 1.0])}),
    "size: got 4": (TypeError, {"size": 4}),
    r"size: got \(1, 0, 2\)": (ValueError, {"size": (1, 0, 2)}),
    "backend: got 'cuda'": (ValueError, {"backend": "cuda"}),
}


@pytest.mark.parametrize("message", BAD)
def test_rejects(message):
    error, change = BAD[message]
    with pytest.raises(error, match=message):
        sample_patches(**({"video": VIDEO, "box": BOX, "size": (1, 2, 2), "backend": "torch"} | change))


def test_triton_refuses_what_it_cannot_run():
    with pytest.raises(RuntimeError, match="sample_patches: backend='triton' cannot run"):
        sample_patches(VIDEO.double(), BOX, (1, 2, 2), backend="triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_mixed_precision_stops_at_the_op(backend, generator):
    video = torch.rand(1, 2, 4, 16, 16, generator=generator)
    box = random_boxes(1, (0.5, 0.7, 0.7), generator)
    plain = sample_patches(video, box, (2, 8, 8), backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = sample_patches(video, box, (2, 8, 8), backend=backend)
    assert torch.equal(mixed, plain)
