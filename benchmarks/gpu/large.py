"""Checks ops on bf16 tensors of more than 2^31 elements. Parts of the results are compared with small ops.

Neither the interpreter nor small shapes can reveal a 32-bit offset that overflows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.cases import Case, needs_memory
from hpdm_kernels import average_tiles, cross_attention, extract_tiles, sample_context, sample_patches

LIMIT = 2**31
SIZE = (530, 2016, 2016)
"""A video of one channel with more than 2^31 pixels."""


def extracted(video: Tensor) -> None:
    """The first and the last tile equal slices of the video."""
    last = [n - t for n, t in zip(SIZE, (2, 64, 64))]
    tiles = extract_tiles(video, torch.tensor([[0, 0, 0], last]), (2, 64, 64), backend="triton")
    assert torch.equal(tiles[:, 0], video[:, :, :2, :64, :64])
    assert torch.equal(tiles[:, 1], video[:, :, -2:, -64:, -64:])


def averaged(video: Tensor) -> None:
    """The average of tiles without overlap equals the tiles, bit for bit."""
    tile = (53, 2016, 2016)
    origins = torch.tensor([[i, 0, 0] for i in range(0, SIZE[0], tile[0])])
    mean = average_tiles(video.view(1, 10, 1, *tile), origins, SIZE, backend="triton")
    assert torch.equal(mean[:, :, -1], video[:, :, -1])
    assert torch.equal(mean[:, :, 0], video[:, :, 0])


def patches(video: Tensor) -> None:
    """A patch on whole pixels in the last corner is a copy."""
    size = (1, 64, 8)
    box = torch.tensor([[(n - s) / n for n, s in zip(SIZE, size)] + [s / n for n, s in zip(SIZE, size)]])
    patch = sample_patches(video, box.to(video.device), size, backend="triton")
    assert torch.equal(patch, video[:, :, -1:, -64:, -8:])


def attention(video: Tensor) -> None:
    """Heads are independent: the last of many heads equals the same head alone, up to how its loop is split.

    Outputs are averages of half a million values, so they are small.
    """
    heads, keys, width = 64, 2**19 + 64, 64
    kv = video.flatten()[: heads * keys * width].view(1, heads, keys, width)
    assert kv.numel() > LIMIT
    q = torch.randn(1, heads, 16, width, dtype=torch.bfloat16, device=video.device)
    out = cross_attention(q, kv, kv, backend="triton")[:, -1:]
    alone = cross_attention(q[:, -1:], kv[:, -1:].clone(), kv[:, -1:].clone(), backend="triton")
    torch.testing.assert_close(out, alone, rtol=2**-6, atol=1e-4)


def context(video: Tensor) -> None:
    """The last frame of a patch with more than 2^31 elements equals a patch of that frame alone."""
    grid, width = (64, 256, 129), 1024
    device = video.device
    source = torch.randn(1, 4 * 4 * 4, width, device=device).bfloat16()
    whole = torch.tensor([[0, 0, 0, 1, 1, 1.0]], device=device)
    last = torch.tensor([[63 / 64, 0, 0, 1 / 64, 1, 1]], device=device)
    out = sample_context([source], [whole], whole, [(4, 4, 4)], grid, backend="triton")
    assert out.numel() > LIMIT
    frame = sample_context([source], [whole], last, [(4, 4, 4)], (1, 256, 129), backend="triton")
    torch.testing.assert_close(out[:, -256 * 129 :], frame, rtol=2**-6, atol=2**-8)


def on_a_large_video(check: Callable[[Tensor], None], device: torch.device, generator: torch.Generator) -> None:
    """Runs ``check`` on a video ``[1, 1, *SIZE]``; a check needs at most three times the video's 4.3 GB."""
    needs_memory(device, 24)
    video = torch.empty(1, 1, *SIZE, dtype=torch.bfloat16, device=device).normal_()
    assert video.numel() > LIMIT
    try:
        check(video)
    finally:
        del video
        torch.cuda.empty_cache()


def cases() -> Iterator[Case]:
    """All cases."""
    checks = {
        "extract_tiles": extracted, "average_tiles": averaged, "sample_patches": patches,
        "cross_attention": attention, "sample_context": context,
    }  # fmt: skip
    for name, check in checks.items():
        yield Case(name, partial(on_a_large_video, check))
