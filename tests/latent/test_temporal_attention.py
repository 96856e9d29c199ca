"""Temporal attention with relative positions against two loops over frames, written out."""

import pytest
import torch
import torch.nn.functional as F

from hpdm.latent.temporal_attention import PositionNorm, TemporalAttention


def rand(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def two_loops(q, k, v, keys, values):
    """Shaw et al. 2018, eq. 3 and 4, for one sequence ``[T, d]``."""
    frames, width = q.shape
    farthest = (len(keys) - 1) // 2
    out = []
    for t in range(frames):
        rows = [farthest + max(-farthest, min(farthest, s - t)) for s in range(frames)]
        scores = torch.stack([q[t] @ (k[s] + keys[rows[s]]) / width**0.5 for s in range(frames)])
        shares = scores.exp() / scores.exp().sum()
        out.append(sum(shares[s] * (v[s] + values[rows[s]]) for s in range(frames)))
    return torch.stack(out)


def test_every_row_of_the_tables_is_used(generator):
    """2 T - 1 rows, no more."""
    attention = TemporalAttention(8, 2, 4, farthest=3).double()
    torch.nn.init.normal_(attention.out.weight, generator=generator)
    attention(rand(generator, 1, 4, 2, 2, 8)).square().sum().backward()
    assert attention.keys.shape == attention.values.shape == (7, 4)
    for table in (attention.keys, attention.values):
        assert (table.grad.abs().sum(dim=1) > 0).all()


def test_gradients_of_the_norm(generator):
    norm = PositionNorm(2, 4).double()
    assert torch.autograd.gradcheck(norm, [rand(generator, 1, 3, 2, 4).requires_grad_()])


def test_position_norm_is_group_norm_along_time(generator):
    norm = PositionNorm(3, 12, 1e-5).double()
    torch.nn.init.normal_(norm.weight, generator=generator)
    torch.nn.init.normal_(norm.bias, generator=generator)
    x = rand(generator, 2, 5, 6, 12)
    rows = x.permute(0, 2, 3, 1).flatten(0, 1)  # [B N, C, T]
    wanted = F.group_norm(rows, 3, norm.weight, norm.bias, 1e-5).unflatten(0, (2, 6)).permute(0, 3, 1, 2)
    torch.testing.assert_close(norm(x), wanted)


@pytest.mark.parametrize("kernels", ["auto", "reference", "torch"])
def test_the_module_attends_along_time_at_each_position(kernels, generator):
    attention = TemporalAttention(12, 3, 4, farthest=2, kernels=kernels).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    x = rand(generator, 2, 5, 2, 3, 12)
    found = attention(x)
    for b, h, w in ((0, 0, 0), (1, 1, 2), (0, 1, 1)):
        column = x[b, :, h, w]  # [T, C]
        normal = F.group_norm(column.T[None], 4, attention.norm.weight, attention.norm.bias, 1e-5)[0].T
        q, k, v = attention.qkv(normal).chunk(3, dim=-1)
        heads = [
            two_loops(q[:, part], k[:, part], v[:, part], attention.keys, attention.values)
            for part in (slice(0, 4), slice(4, 8), slice(8, 12))
        ]
        torch.testing.assert_close(found[b, :, h, w], column + attention.out(torch.cat(heads, dim=1)))


def test_it_starts_as_the_identity(generator):
    x = torch.randn(1, 4, 2, 2, 8, generator=generator)
    assert torch.equal(TemporalAttention(8, 2, 4, farthest=3)(x), x)
