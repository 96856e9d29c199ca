"""Tensors of more than 2^31 elements, in bf16: offsets beyond 32 bits. Parts of results are compared with small ops.

The interpreter and small shapes cannot show a 32-bit offset that overflows.
"""

import pytest
import torch

from benchmarks.gpu.checks import needs_cuda
from hpdm_kernels import average_tiles, cross_attention, extract_tiles, sample_context, sample_patches

pytestmark = needs_cuda

LIMIT = 2**31
SIZE = (530, 2016, 2016)
"""A video of one channel with more than 2^31 pixels."""


@pytest.fixture
def video(device):
    """bf16 ``[1, 1, *SIZE]``, 4.3 GB; the tests need three times as much at most."""
    if torch.cuda.get_device_properties(device).total_memory < 24e9:
        pytest.skip("needs a device with 24 GB")
    video = torch.empty(1, 1, *SIZE, dtype=torch.bfloat16, device=device).normal_()
    assert video.numel() > LIMIT
    yield video
    torch.cuda.empty_cache()


def test_extract_tiles(video):
    last = [n - t for n, t in zip(SIZE, (2, 64, 64))]
    tiles = extract_tiles(video, torch.tensor([[0, 0, 0], last]), (2, 64, 64), backend="triton")
    assert torch.equal(tiles[:, 0], video[:, :, :2, :64, :64])
    assert torch.equal(tiles[:, 1], video[:, :, -2:, -64:, -64:])


def test_average_tiles(video):
    """Tiles without overlap: their average is themselves, bit for bit."""
    tile = (53, 2016, 2016)
    origins = torch.tensor([[i, 0, 0] for i in range(0, SIZE[0], tile[0])])
    tiles = video.view(1, 10, 1, *tile)
    averaged = average_tiles(tiles, origins, SIZE, backend="triton")
    assert torch.equal(averaged[:, :, -1], video[:, :, -1])
    assert torch.equal(averaged[:, :, 0], video[:, :, 0])


def test_sample_patches(video):
    """A crop on whole pixels at the far corner is a copy."""
    size = (1, 64, 8)
    box = torch.tensor([[(n - s) / n for n, s in zip(SIZE, size)] + [s / n for n, s in zip(SIZE, size)]])
    patch = sample_patches(video, box.to(video.device), size, backend="triton")
    assert torch.equal(patch, video[:, :, -1:, -64:, -8:])


def test_cross_attention(video):
    """Heads are independent: the last one of many alone gives the same, up to how its sums are cut.

    Outputs are averages of half a million values: about 0.002.
    """
    heads, keys, width = 64, 2**19 + 64, 64
    kv = video.flatten()[: heads * keys * width].view(1, heads, keys, width)
    assert kv.numel() > LIMIT
    q = torch.randn(1, heads, 16, width, dtype=torch.bfloat16, device=video.device)
    out = cross_attention(q, kv, kv, backend="triton")[:, -1:]
    alone = cross_attention(q[:, -1:], kv[:, -1:].clone(), kv[:, -1:].clone(), backend="triton")
    torch.testing.assert_close(out, alone, rtol=2**-6, atol=1e-4)


def test_sample_context(video):
    """The last frame of a patch with more than 2^31 elements is a patch of one frame of its own."""
    grid, width = (64, 256, 129), 1024
    device = video.device
    source = torch.randn(1, 4 * 4 * 4, width, device=device).bfloat16()
    whole = torch.tensor([[0, 0, 0, 1, 1, 1.0]], device=device)
    last = torch.tensor([[63 / 64, 0, 0, 1 / 64, 1, 1]], device=device)
    out = sample_context([source], [whole], whole, [(4, 4, 4)], grid, backend="triton")
    assert out.numel() > LIMIT
    frame = sample_context([source], [whole], last, [(4, 4, 4)], (1, 256, 129), backend="triton")
    torch.testing.assert_close(out[:, -256 * 129 :], frame, rtol=2**-6, atol=2**-8)
