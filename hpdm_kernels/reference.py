"""The ops as the paper writes them, in plain PyTorch: the ``"reference"`` backend.

All functions are differentiable by autograd and take any floating-point dtype. In float64 they are the oracle that the
other backends are compared with. Arguments are not checked: the public functions have done that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hpdm_kernels.boxes import coordinate_dtype, relative_box, token_coordinates, token_positions


def sample_context(
    sources: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    source_grids: Sequence[Sequence[int]],
    grid: Sequence[int],
    source_index: Tensor | None = None,
) -> Tensor:
    """Paper eq. 7: the mean over sources of 3-D ``grid_sample`` (trilinear, border): ``[B, N, D]``."""
    dtype = sources[0].dtype
    # 3-D grid_sample has no 16-bit CPU kernel, and 16-bit interpolation weights would lose accuracy.
    work = coordinate_dtype(dtype)
    total: Tensor | None = None
    for k, (source, source_box, (f, h, w)) in enumerate(zip(sources, source_boxes, source_grids)):
        if source_index is not None:
            source, source_box = source[source_index[:, k]], source_box[source_index[:, k]]
        b, _, d = source.shape
        volume = source.to(work).reshape(b, f, h, w, d).permute(0, 4, 1, 2, 3)  # [B, D, F_k, H_k, W_k]
        positions = token_coordinates(relative_box(box.to(work), source_box.to(work)), grid, work)  # [B, N, 3]
        # grid_sample expects coordinates in the order w, h, f and in the range -1 to 1.
        positions = (2 * positions - 1).flip(-1).reshape(b, *grid, 3)  # [B, F, H, W, 3]
        sampled = F.grid_sample(volume, positions, mode="bilinear", padding_mode="border", align_corners=False)
        sampled = sampled.flatten(2).transpose(1, 2)  # [B, N, D]
        total = sampled if total is None else total + sampled
    if total is None:
        raise ValueError("sources: got none, expected at least one")
    return (total / len(sources)).to(dtype)


def fuse_context(
    x: Tensor,
    sources: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    source_grids: Sequence[Sequence[int]],
    grid: Sequence[int],
    source_index: Tensor | None = None,
) -> Tensor:
    """Paper eq. 9: ``concat[x, ctx, c] @ W.T + b``, ``[B, N, D]``; ``W`` is ``[D, 2D+3]``, or ``[D, 2D]`` without c."""
    parts = [x, sample_context(sources, source_boxes, box, source_grids, grid, source_index)]  # [B, N, D] each
    if weight.shape[1] > 2 * x.shape[2]:
        parts.append(token_coordinates(box, grid, x.dtype))  # [B, N, 3]
    return F.linear(torch.cat(parts, dim=-1), weight, bias)  # [B, N, D]


def project_sources(sources: Sequence[Tensor], weight: Tensor) -> tuple[Tensor, ...]:
    """Each source times the context columns of eq. 9's ``W``: ``[B_k, N_k, D] -> [B_k, N_k, D]``."""
    d = weight.shape[0]
    return tuple(F.linear(source, weight[:, d : 2 * d]) for source in sources)


def fuse_projected(
    x: Tensor,
    projected: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    source_grids: Sequence[Sequence[int]],
    grid: Sequence[int],
    source_index: Tensor | None = None,
) -> Tensor:
    """:func:`fuse_context` of projected sources, ``[B, N, D]``: sampling and projecting commute."""
    d = x.shape[2]
    out = F.linear(x, weight[:, :d], bias)  # [B, N, D]
    out = out + sample_context(projected, source_boxes, box, source_grids, grid, source_index)
    if weight.shape[1] > 2 * d:
        out = out + F.linear(token_coordinates(box, grid, x.dtype), weight[:, 2 * d :])
    return out


def cross_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None = None) -> Tensor:
    """``softmax(q @ k.T * scale) @ v`` with the score matrix in memory: ``[B,h,M,d], [B,h,N,d] -> [B,h,M,d]``.

    Keys where ``key_mask [B, N]`` is false have weight 0; a sample without any visible key gives zeros.
    """
    scores = q @ k.transpose(-1, -2) * scale  # [B, h, M, N]
    if key_mask is None:
        return torch.softmax(scores, dim=-1) @ v
    hidden = ~key_mask[:, None, None]  # [B, 1, 1, N]
    # The softmax of a row without visible keys is NaN; the second masked_fill makes its value and its gradient 0.
    return torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1).masked_fill(hidden, 0.0) @ v


def extract_tiles(video: Tensor, origins: Tensor, tile_size: Sequence[int]) -> Tensor:
    """One slice per row of ``origins [T, 3]``, stacked: ``[B,C,F,H,W] -> [B,T,C,f,h,w]``."""
    f, h, w = tile_size
    slices = [video[:, :, i : i + f, j : j + h, k : k + w] for i, j, k in origins.tolist()]
    return torch.stack(slices, dim=1)


def average_tiles(
    tiles: Tensor,
    origins: Tensor,
    size: Sequence[int],
    x: Tensor | None,
    alpha: float,
    beta: float,
    weights: Sequence[Tensor] | None = None,
) -> Tensor:
    """Sums and counts tiles slice by slice (MultiDiffusion): ``alpha * x + beta * mean``, ``[B,C,F,H,W]``.

    ``tiles`` is ``[B,T,C,f,h,w]``, ``origins`` ``[T, 3]``, ``x`` ``[B,C,F,H,W]``, and ``size`` is ``(F,H,W)``. With
    ``weights``, one tensor per axis of a tile, each element counts as often as the product of its three says.
    """
    b, _, c, f, h, w = tiles.shape
    work = coordinate_dtype(tiles.dtype)
    total = tiles.new_zeros(b, c, *size, dtype=work)  # one per element under torch.func.vmap, as the tiles are
    count = torch.zeros(1, 1, *size, dtype=work, device=tiles.device)
    if weights is not None:
        # In fp64 no product of three numbers of fp32 overflows, nor vanishes.
        count, (w_f, w_h, w_w) = count.double(), (weight.to(tiles.device).double() for weight in weights)
        weight = w_f[:, None, None] * w_h[:, None] * w_w
        for i, j, k in origins.tolist():
            count[:, :, i : i + f, j : j + h, k : k + w] += weight
    for t, (i, j, k) in enumerate(origins.tolist()):
        voxels = (slice(None), slice(None), slice(i, i + f), slice(j, j + h), slice(k, k + w))
        if weights is None:
            total[voxels] += tiles[:, t]
            count[voxels] += 1
        else:
            total[voxels] += tiles[:, t] * (weight / count[voxels]).to(work)
    mean = total * beta if weights is not None else total / count * beta
    return (mean if x is None else mean + alpha * x.to(work)).to(tiles.dtype)


EDGE_SNAP = 2.0**-11
"""Window edges this close to a whole pixel are moved onto it: ``i / resolution`` rounds, but copies must be exact."""


def _snap(edge: Tensor) -> Tensor:
    """Moves edges that are close to a whole pixel onto it. The numpy and Triton implementations repeat this formula."""
    whole = edge.round()
    return torch.where((edge - whole).abs() < EDGE_SNAP, whole, edge)


def area_weights(offset: Tensor, scale: Tensor, n: int, resolution: int) -> Tensor:
    """The area filter of one axis as a matrix ``[B, n, resolution]``; rows sum to 1.

    Output ``i`` is the mean of the signal (constant on each pixel) over a window of ``max(scale / n, 1 / resolution)``
    centered at ``offset + scale * (i + 0.5) / n``. Downsampling is thus antialiased, upsampling is linear
    interpolation, and a box of scale ``n / resolution`` on whole pixels is copied. The part of a window outside the
    video counts as the border pixel.

    ``offset`` and ``scale`` are ``[B]``, fractions of the axis.
    """
    center = token_positions(offset, scale, n) * resolution  # [B, n], in pixels
    half = (scale * resolution / n).clamp(min=1.0)[:, None] / 2  # [B, 1]
    low, high = _snap(center - half)[..., None], _snap(center + half)[..., None]  # [B, n, 1]
    edge = torch.arange(resolution, device=offset.device, dtype=offset.dtype)  # [resolution]
    left = torch.where(edge == 0, -torch.inf, edge)
    right = torch.where(edge == resolution - 1, torch.inf, edge + 1)
    overlap = (torch.minimum(high, right) - torch.maximum(low, left)).clamp(min=0)  # [B, n, resolution]
    return overlap / (high - low)


def sample_patches(video: Tensor, box: Tensor, size: Sequence[int]) -> Tensor:
    """Paper eq. 6, ``downsample(crop(video; box); size)`` with an area filter: ``[B,C,F,H,W] -> [B,C,f,h,w]``.

    A uint8 video gives float32 patches of the same range.
    """
    if video.dtype is torch.uint8:
        video = video.float()
    work = coordinate_dtype(video.dtype)
    box = box.to(work)
    out = video.to(work)
    for axis in range(3):
        matrix = area_weights(box[:, axis], box[:, 3 + axis], size[axis], video.shape[2 + axis])
        out = torch.einsum("bnr,bc...r->bc...n", matrix, out.movedim(2 + axis, -1)).movedim(-1, 2 + axis)
    return out.to(video.dtype)


def modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, branch: Tensor | None, gate: Tensor | None, eps: float
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm of ``y = x + gate * branch`` times ``1 + scale`` plus ``shift``, ``[B, N, D]``; y with a branch."""
    y = x
    if branch is not None:
        y = (x + branch).to(x.dtype) if gate is None else gated_residual(x, branch, gate)
    normal = F.layer_norm(y, y.shape[2:], eps=eps)
    out = torch.addcmul(shift[:, None], normal, 1 + scale[:, None]).to(x.dtype)
    return out if branch is None else (y, out)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """``x + gate * branch``, of ``[B, N, D]`` twice and ``[B, D]``."""
    return torch.addcmul(x, gate[:, None], branch).to(x.dtype)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU by its tanh formula of ``x + bias``, of ``[B, N, D]`` and ``[D]``."""
    return F.gelu(x + bias, approximate="tanh").to(x.dtype)


def group_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    per_clip: bool,
    silu: bool,
    pad: Sequence[int],
    eps: float,
) -> Tensor:
    """Group norm of ``x [B, T, H, W, C]`` per frame or clip, times ``1 + scale`` plus ``shift``, SiLU, repeated edges.

    ``scale`` and ``shift`` are ``[B, 1 or T, C]``, ``pad`` is front and back of T, H and W.
    """
    b, t, *_, c = x.shape
    work = coordinate_dtype(x.dtype)
    rows = x.to(work).reshape(b if per_clip else b * t, -1, c)

    def of_group(means: Tensor) -> Tensor:  # of channels [n, C] -> of their group, [n, 1, C]
        split = means.unflatten(1, (groups, -1))
        return split.mean(2, keepdim=True).expand_as(split).flatten(1)[:, None]

    # Written out: on a CPU PyTorch's variance of channels-last tensors is a difference of squares, which cancels.
    centered = rows - of_group(rows.mean(1))
    inverse = (of_group(centered.square().mean(1)) + eps).rsqrt()
    gain, offset = weight.to(work), bias.to(work)
    if scale is not None and shift is not None:
        factor = 1 + scale[:, :, None, None].to(work)
        gain, offset = gain * factor, torch.addcmul(shift[:, :, None, None].to(work), offset, factor)
    out = torch.addcmul(offset, centered.reshape(x.shape), gain * inverse.reshape(b, -1, 1, 1, c))
    out = (F.silu(out) if silu else out).to(x.dtype)
    if any(pad):
        t0, t1, h0, h1, w0, w1 = pad
        out = F.pad(out.movedim(-1, 1), (w0, w1, h0, h1, t0, t1), mode="replicate").movedim(1, -1)
    return out.contiguous()


def distance_rows(table: Tensor, frames: int) -> Tensor:
    """Rows of ``table [2 R + 1, d]`` with the embeddings of the distances between ``frames`` frames.

    At ``[t, s]`` of ``[T, T]`` the row of ``s - t``, of -R or R where that is farther.
    """
    farthest = table.shape[0] // 2
    frame = torch.arange(frames, device=table.device)
    return (frame - frame[:, None]).clamp(-farthest, farthest) + farthest


def temporal_attention(qkv: Tensor, rel_k: Tensor, rel_v: Tensor) -> Tensor:
    """Shaw et al. 2018, eq. 3 and 4, along the frames at each position: ``[B, T, N, 3 h d] -> [B, T, N, h d]``.

    The tables ``[2 R + 1, d]`` have embeddings of the distances -R to R, which are those of all farther ones.
    """
    frames, width = qkv.shape[1], rel_k.shape[1]
    q, k, v = qkv.unflatten(3, (3, -1, width)).permute(3, 0, 2, 4, 1, 5).unbind(0)  # [B, N, h, T, d] each
    keys, values = (table.to(qkv.dtype)[distance_rows(table, frames)] for table in (rel_k, rel_v))  # [T, T, d] each
    scores = (q @ k.mT + torch.einsum("bnhtd,tsd->bnhts", q, keys)) * width**-0.5
    weights = torch.softmax(scores, dim=-1)
    out = weights @ v + torch.einsum("bnhts,tsd->bnhtd", weights, values)
    return out.permute(0, 3, 1, 2, 4).flatten(3)


def adam_moments(
    exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    """Adam's new moments (Kingma and Ba 2015, Algorithm 1): running means of the gradient and of its square."""
    return beta1 * exp_avg + (1 - beta1) * grad, beta2 * exp_avg_sq + (1 - beta2) * grad * grad


def adam_update(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> Tensor:
    """What AdamW subtracts at the rate 1 (Loshchilov and Hutter 2019, Algorithm 2), and LAMB rescales.

    ``step`` is a tensor of one number, the steps so far with this one.
    """
    mean = exp_avg / (1 - beta1 ** step.double()).to(exp_avg.dtype)
    square = exp_avg_sq / (1 - beta2 ** step.double()).to(exp_avg_sq.dtype)
    return mean / (square.sqrt() + eps) + weight_decay * param
