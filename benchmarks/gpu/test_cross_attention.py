"""The attention kernels at odd and real shapes, every arithmetic."""

import pytest
import torch

from benchmarks.gpu.checks import ARITHMETIC, check, needs_cuda
from hpdm_kernels import cross_attention, reference

pytestmark = needs_cuda

# batch, heads, queries, keys, head width: degenerate, odd, and the paper's read and write (Table 8). Not one key: the
# gradients are then zero, and PyTorch's error, which is the yardstick, too.
SHAPES = ((1, 1, 1, 64, 16), (2, 3, 17, 33, 24), (1, 2, 130, 257, 64), (1, 2, 65, 127, 128), (1, 4, 768, 4096, 64))
SHAPES += ((1, 4, 4096, 768, 64), (1, 2, 100, 3, 32), (1, 4, 768, 12288, 64), (2, 8, 768, 768, 64))


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_attention(request, device, shape, arithmetic):
    dtype, precision, factor = ARITHMETIC[arithmetic]
    b, h, m, n, d = shape
    q, k, v = (torch.randn(b, h, rows, d, device=device).to(dtype) for rows in (m, n, n))
    scale = d**-0.5
    check(
        request,
        lambda q, k, v: cross_attention(q, k, v, precision=precision, backend="triton"),
        lambda q, k, v: reference.cross_attention(q, k, v, scale),
        (q, k, v),
        factor=factor,
        tf32=precision == "tf32",
    )


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_strided_inputs(request, device, arithmetic):
    """Heads split out of one projection, as the modules do."""
    dtype, precision, factor = ARITHMETIC[arithmetic]
    qkv = torch.randn(2, 100, 3 * 4 * 64, device=device).to(dtype)
    q, k, v = (part.unflatten(-1, (4, 64)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    check(
        request,
        lambda q, k, v: cross_attention(q, k, v, precision=precision, backend="triton"),
        lambda q, k, v: reference.cross_attention(q, k, v, 64**-0.5),
        (q, k, v),
        factor=factor,
        tf32=precision == "tf32",
    )
