"""The nn.Module wrappers say what the functions say."""

import pytest
import torch

from hpdm_kernels import average_tiles, fuse_context, sample_patches
from hpdm_kernels.modules import ContextFusion, CrossAttention, PatchSampler, SelfAttention, TileAverage
from hpdm_kernels.testing import random_boxes


@pytest.mark.parametrize("coordinates", [True, False])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_context_fusion(coordinates, backend, generator):
    grid, width = (2, 3, 2), 5
    module = ContextFusion(width, coordinates=coordinates, backend=backend)
    x, source = (torch.randn(2, 12, width, generator=generator) for _ in range(2))
    whole = torch.tensor([[0, 0, 0, 1.0, 1, 1]]).repeat(2, 1)
    box = random_boxes(2, (0.5, 0.5, 0.5), generator)
    got = module(x, [source], [whole], box, [grid], grid)
    want = fuse_context(x, (source,), (whole,), box, module.weight, module.bias, [grid], grid, backend="reference")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_attention_modules_match_pytorchs(backend, generator):
    torch.manual_seed(0)
    module = CrossAttention(10, 6, 8, 10, head_width=4, backend=backend)
    peer = torch.nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.eye(8).repeat(3, 1))
        peer.out_proj.weight.copy_(torch.eye(8))
    q, context = torch.randn(2, 5, 10, generator=generator), torch.randn(2, 7, 6, generator=generator)
    k, v = module.to_kv(context).chunk(2, dim=-1)
    want = module.to_out(peer(module.to_q(q), k, v, need_weights=False)[0])
    torch.testing.assert_close(module(q, context), want, rtol=1e-4, atol=1e-5)
    own = SelfAttention(8, head_width=4, backend=backend)
    x = torch.randn(2, 5, 8, generator=generator)
    q, k, v = own.to_qkv(x).chunk(3, dim=-1)
    torch.testing.assert_close(own(x), own.to_out(peer(q, k, v, need_weights=False)[0]), rtol=1e-4, atol=1e-5)


def test_patch_and_tile_modules(generator):
    video = torch.randn(1, 2, 4, 8, 8, generator=generator)
    box = random_boxes(1, (0.5, 0.5, 0.5), generator)
    assert torch.equal(PatchSampler((2, 4, 4))(video, box), sample_patches(video, box, (2, 4, 4)))
    origins = torch.tensor([[0, 0, 0], [0, 0, 2], [0, 0, 4]])
    tiles = torch.randn(1, 3, 2, 4, 8, 4, generator=generator)
    module = TileAverage(origins, (4, 8, 8))
    want = average_tiles(tiles, origins, (4, 8, 8), x=video, alpha=0.5, beta=2.0)
    assert torch.equal(module(tiles, video, 0.5, 2.0), want)
    assert not list(module.parameters())
    assert not list(module.buffers())


def test_bad_widths_and_backends_are_named():
    with pytest.raises(ValueError, match="width: got 10, expected a multiple of head_width = 4"):
        CrossAttention(8, 8, 10, 8, head_width=4)
    with pytest.raises(ValueError, match="width: got 10"):
        SelfAttention(10, head_width=4)
    with pytest.raises(ValueError, match="backend: got 'fast'"):
        ContextFusion(4, backend="fast")
