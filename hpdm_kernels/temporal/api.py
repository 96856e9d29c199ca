"""Attention along time with relative positions (LVDM section 3.2; Shaw et al. 2018, eq. 3 and 4).

    score[t, s] = d^-1/2 q_t . (k_s + rel_k[s - t])
    out_t = sum_s softmax_s(score[t]) (v_s + rel_v[s - t])

A sequence is what the frames of a clip have at one position. There are many of them, and each is short. The projection
``qkv [B, T, N, 3 h d]`` holds its rows far apart, and attention made for long sequences takes copies of all three parts
in another order and one of the result. Here each number of the projection is read once and each of the result written
once: a program holds the frames of a few positions. With fp32 that is 16 T d bytes for 8 T^2 d operations per position
and head, so up to 16 frames a GPU waits for memory, not for products, which need no matrix units.

Backward the kernels compute the weights again from the projection: nothing is saved besides the inputs. ``"torch"``
saves the weights, T numbers for every d of the queries. Gradients of the two tables are sums over all positions: every
program adds its own, and a second step adds the programs' sums, always in the same order. There are no atomics, so
every run gives the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpdm_kernels import _transforms, reference
from hpdm_kernels._backend import autocast_off, resolve
from hpdm_kernels._checks import values_are_readable
from hpdm_kernels.temporal.block_sizes import obstacle
from hpdm_kernels.temporal.checks import check_inputs
from hpdm_kernels.temporal.ops import temporal_attention_fwd

LEAST = 1 << 15
"""Queries of one sample's head, times their width, below which ``"torch"`` takes the formula on the CPU: it works on
one head of one sample at a time, and its calls cost more than its fewer copies save."""


def temporal_attention(qkv: Tensor, rel_k: Tensor, rel_v: Tensor, *, backend: str = "auto") -> Tensor:
    """Attention of the frames at each position to each other, with an embedding of their distance per key and value.

    Args:
        qkv: queries, keys and values ``[B, T, N, 3 h d]`` of T frames with N positions each, fp16, bf16, fp32 or fp64:
            all heads' queries, then all keys, then all values, as a projection writes them. Any strides. Of a clip
            ``[B, T, H, W, 3 h d]`` pass ``qkv.flatten(2, 3)``.
        rel_k: embeddings ``[2 R + 1, d]`` of the distances -R to R from the query's frame to the key's, added to keys;
            all heads have the same. Distances beyond R count as R. Any of the four dtypes.
        rel_v: the same for values, ``[2 R + 1, d]``.
        backend: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``. A kernel holds all frames of a head in
            registers: T times d, both rounded up to powers of two, is at most 4,096. ``"auto"`` takes ``"torch"`` for
            more.

    Returns:
        ``[B, T, N, h d]`` of ``qkv``'s dtype. All three tensors get gradients of their dtypes. A NaN or infinity in
        ``qkv`` stays within its position and head, one in a table reaches all frames with the distance and more.

    Raises:
        TypeError: an argument is not a tensor, or its dtype is no float.
        ValueError: wrong shape or device; a table with an even number of rows; unknown backend.
        RuntimeError: ``backend="triton"`` cannot run here, or not with so many frames and channels.
        NotImplementedError: ``torch.func`` or forward mode differentiates the op on another backend than ``reference``.

    Source: the temporal attention of LVDM's U-Net, section 3.2; Shaw et al. 2018, eq. 3 and 4.
    """
    qkv, rel_k, rel_v = check_inputs(qkv, rel_k, rel_v)
    chosen = resolve(backend, "temporal_attention", qkv, obstacle=obstacle(qkv.shape[1], rel_k.shape[1]))
    _transforms.refuse("temporal_attention", chosen, (qkv, rel_k, rel_v))
    few = math.prod(qkv.shape[1:3]) * rel_k.shape[1] < LEAST
    # The formula rounds every step to 16 bits, where the op computes in fp32.
    if chosen == "torch" and few and values_are_readable(qkv) and qkv.dtype in (torch.float32, torch.float64):
        chosen = "reference"
    if chosen == "reference":
        with autocast_off(qkv):
            return reference.temporal_attention(qkv, rel_k, rel_v)
    return temporal_attention_fwd(qkv, rel_k, rel_v, chosen)[0]
