"""The attention kernels at odd and real shapes, every arithmetic."""

import pytest
import torch

from benchmarks.gpu.checks import ARITHMETIC, check, needs_cuda
from benchmarks.harness import products_in
from hpdm_kernels import cross_attention, reference
from hpdm_kernels.attention.read import read_tokens

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


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("shape", [(3, 2, 17, 33, 24), (3, 2, 130, 257, 64), (2, 4, 768, 4096, 64)], ids=str)
def test_key_mask(request, device, shape, arithmetic):
    """Half of the keys hidden; of the last sample all."""
    dtype, precision, factor = ARITHMETIC[arithmetic]
    b, h, m, n, d = shape
    q, k, v = (torch.randn(b, h, rows, d, device=device).to(dtype) for rows in (m, n, n))
    mask = torch.rand(b, n, device=device) < 0.5
    mask[:-1, 0], mask[-1] = True, False
    check(
        request,
        lambda q, k, v: cross_attention(q, k, v, key_mask=mask, precision=precision, backend="triton"),
        lambda q, k, v: reference.cross_attention(q, k, v, d**-0.5, mask),
        (q, k, v),
        factor=factor,
        tf32=precision == "tf32",
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("rows", [100, 8192], ids=["parts of a sample", "samples together"])
def test_read_tokens(request, device, arithmetic, backend, rows):
    dtype, precision, factor = ARITHMETIC[arithmetic]
    if backend == "torch" and precision == "tf32x3":
        pytest.skip("PyTorch's own products: as ieee")
    q = torch.randn(3, 130, 4, 64, device=device).transpose(1, 2).to(dtype)
    tokens = torch.randn(3, 257, 96, device=device).to(dtype)
    weight = (torch.randn(2 * 4 * 64, 96, device=device) / 96**0.5).to(dtype)
    with products_in("tf32" if precision == "tf32" else "ieee"):
        check(
            request,
            lambda q, t, w: read_tokens(q, t, w, piece_rows=rows, precision=precision, backend=backend),
            lambda q, t, w: read_tokens(q, t, w, backend="reference"),
            (q, tokens, weight),
            factor=factor,
            tf32=precision == "tf32",
        )
