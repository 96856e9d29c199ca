"""The blocks of the U-Net against PyTorch's operations in three dimensions, and formulas written out."""

import pytest
import torch
import torch.nn.functional as F

from hpdm.latent.unet_blocks import FrameConv, ResidualBlock, SpatialAttention, TextAttention, VideoNorm


def rand(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def randomized(module, generator):
    """The module in fp64, as after some training."""
    for parameter in module.double().parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return module


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 1, 2, 2), (3, 5, 8, 4)])
def test_folded_convolutions_are_convolutions_of_1_3_3(stride, shape, generator):
    conv = randomized(FrameConv(5, 7, stride), generator)
    x = rand(generator, *shape, 5)
    wanted = F.conv3d(x.movedim(-1, 1), conv.weight[:, :, None], conv.bias, (1, stride, stride), (0, 1, 1))
    found = conv(x)
    assert found.is_contiguous()
    torch.testing.assert_close(found, wanted.movedim(1, -1))


@pytest.mark.parametrize("over", ["clip", "frame"])
def test_normalization_is_group_norm_of_a_clip_or_of_each_frame(over, generator):
    norm = randomized(VideoNorm(3, 12, over), generator)
    x = rand(generator, 2, 4, 3, 5, 12)
    videos = x.movedim(-1, 1)  # [B, C, T, H, W]
    pieces = [videos] if over == "clip" else videos.split(1, dim=2)
    wanted = torch.cat([F.group_norm(piece, 3, norm.weight, norm.bias, 1e-5) for piece in pieces], dim=2)
    torch.testing.assert_close(norm(x), wanted.movedim(1, -1))


def test_a_residual_block_is_its_formula(generator):
    """With scale and shift of each frame after the second normalization, which is that of the new width."""
    block = randomized(ResidualBlock(6, 9, 10, 3, "clip"), generator)
    x, vector = rand(generator, 2, 3, 4, 4, 6), rand(generator, 2, 3, 10)
    scale, shift = (part[:, :, None, None] for part in block.modulation(vector).split(9, dim=-1))
    h = block.in_conv(F.silu(block.in_norm(x)))
    h = F.silu(block.out_norm(h) * (1 + scale) + shift)
    torch.testing.assert_close(block(x, vector), block.skip(x) + block.out_conv(h))
    assert block.out_norm.num_channels == 9


def test_equal_times_are_one_time(generator):
    block = randomized(ResidualBlock(6, 6, 10, 3, "frame"), generator)
    x, vector = rand(generator, 2, 3, 4, 4, 6), rand(generator, 2, 1, 10)
    torch.testing.assert_close(block(x, vector), block(x, vector.expand(-1, 3, -1)))


def naive(q, k, v, mask=None):
    """Attention of one head, ``[N, d]``; ``mask [S]`` says which keys may be read."""
    scores = q @ k.T / q.shape[1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=1) @ v


def test_spatial_attention_is_that_of_each_frame(generator):
    attention = randomized(SpatialAttention(8, 2, 4), generator)
    x = rand(generator, 2, 3, 2, 4, 8)
    found = attention(x)
    for b in range(2):
        for t in range(3):
            frame = F.group_norm(x[b, t].movedim(-1, 0)[None], 4, attention.norm.weight, attention.norm.bias, 1e-5)
            q, k, v = attention.qkv(frame[0].flatten(1).T).chunk(3, dim=1)
            heads = [naive(q[:, part], k[:, part], v[:, part]) for part in (slice(0, 4), slice(4, 8))]
            wanted = x[b, t].flatten(0, 1) + attention.out(torch.cat(heads, dim=1))
            torch.testing.assert_close(found[b, t].flatten(0, 1), wanted)


def test_text_attention_reads_what_is_text(generator):
    attention = randomized(TextAttention(8, 5, 2, 4), generator)
    x, text = rand(generator, 2, 3, 2, 2, 8), rand(generator, 2, 6, 5)
    mask = torch.tensor([[True, True, False, False, False, False], [True] * 6])
    found = attention(x, text, mask)
    for b in range(2):
        q = attention.q(attention.norm(x)[b]).flatten(0, 2)
        k, v = attention.kv(text[b]).chunk(2, dim=1)
        heads = [naive(q[:, part], k[:, part], v[:, part], mask[b]) for part in (slice(0, 4), slice(4, 8))]
        torch.testing.assert_close(found[b], x[b] + attention.out(torch.cat(heads, dim=1)).reshape(x[b].shape))
    padded = torch.where(mask[..., None], text, rand(generator, 2, 6, 5))
    torch.testing.assert_close(attention(x, padded, mask), found)
    torch.testing.assert_close(attention(x, text, None)[1], found[1])


def test_blocks_start_as_the_identity(generator):
    x, vector = torch.randn(1, 2, 4, 4, 8, generator=generator), torch.randn(1, 2, 10, generator=generator)
    assert torch.equal(ResidualBlock(8, 8, 10, 4, "clip")(x, vector), x)
    assert torch.equal(SpatialAttention(8, 2, 4)(x), x)
    assert torch.equal(TextAttention(8, 5, 2, 4)(x, torch.randn(1, 3, 5, generator=generator), None), x)
    wider = ResidualBlock(8, 12, 10, 4, "clip")
    assert torch.equal(wider(x, vector), wider.skip(x))
