"""RIN's attention: latents read tokens, and tokens read latents (paper Fig. 11).

    out = softmax(q @ k.T * scale) @ v          q, out [B, h, M, d],  k, v [B, h, N, d]

The forward kernel reads ``q`` and writes ``out`` once. It reads ``k`` and ``v`` once per block of queries, mostly from
the L2 cache, because the blocks of a head run at the same time. A plain softmax also writes and reads the scores
``[B, h, M, N]`` several times. Besides inputs and output, the log-sum-exp is saved for backward, fp32 ``[B, h, M]``.

:func:`packed_attention` takes keys and values, or queries, too, as parts of one tensor, and gives it one gradient; see
:mod:`hpdm_kernels.attention.packed`. :func:`read_tokens` also computes the projection of tokens to keys and values
inside the op; see :mod:`hpdm_kernels.attention.read`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hpdm_kernels import _backend, _transforms, reference
from hpdm_kernels._checks import check_tensor
from hpdm_kernels.attention import ops, torch_backend
from hpdm_kernels.attention.checks import (
    check_key_mask,
    check_packed,
    check_piece_rows,
    check_queries,
    check_scale,
    check_tokens,
)
from hpdm_kernels.attention.layout import unpack
from hpdm_kernels.attention.read import PIECE_ROWS


def _kernel_precision(q: Tensor, precision: str) -> str:
    """``precision`` for fp32 inputs, else ``"ieee"``: products of 16-bit inputs are exact in fp32 in every setting."""
    return precision if q.dtype is torch.float32 else "ieee"


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    precision: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of ``M`` queries to ``N`` keys: ``softmax(q @ k.T * scale) @ v``.

    Args:
        q: ``[B, h, M, d]`` queries; float16, bfloat16, float32, or float64 (``reference`` and ``torch`` only). Any
            strides: a view into a fused projection is read in place.
        k: ``[B, h, N, d]`` keys, dtype and device of ``q``. ``d`` is at most 256.
        v: ``[B, h, N, d]`` values.
        scale: factor of the scores, any finite number; default ``1 / sqrt(d)``.
        key_mask: ``[B, N]`` bool, true where a key may be read, for texts of different lengths; ``None`` hides no key.
            Hidden keys and values get no gradient; they must be finite, since zero times NaN is NaN.
        precision: how the kernels compute fp32 products: ``"ieee"``, ``"tf32x3"``, ``"tf32"``; ``None`` follows
            :func:`torch.get_float32_matmul_precision`. ``reference`` and ``torch`` always follow PyTorch's setting.
            For ``d`` above 128 the backward computes the products of ``"tf32x3"`` in ``"ieee"``.
        backend: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``[B, h, M, d]`` of ``q``'s dtype. Gradients flow to ``q``, ``k`` and ``v``. A sample whose keys are all hidden
        gives zeros and zero gradients. A query whose scores are all -inf without a mask gives zeros too, but NaN with
        ``reference``. A NaN or infinity stays within its sample and head: in ``q`` it reaches its query's row, in ``k``
        and ``v`` all rows.

    Raises:
        TypeError: an argument is not a tensor, its dtype is no float or not ``q``'s, ``key_mask`` is not bool, or
            ``scale`` is no number.
        ValueError: wrong rank, sizes or device; ``scale`` not finite; unknown ``precision`` or ``backend``.
        RuntimeError: ``backend="triton"`` where the kernels cannot run.
        NotImplementedError: ``torch.func`` or forward mode differentiates the op, and its backend cannot.

    Source: the read and the write of a RIN block, paper Fig. 11.
    """
    check_queries(q)
    batch, heads, _, width = q.shape
    check_tensor("k", k, (batch, heads, "N", width), like=("q", q))
    check_tensor("v", v, tuple(k.shape), like=("q", q))
    check_key_mask(key_mask, k.shape[2], q)
    factor = check_scale(scale, width)
    precision = _backend.resolve_precision(precision)
    chosen = _backend.resolve(backend, "cross_attention", q)
    if chosen == "reference":
        with _backend.autocast_off(q):
            return reference.cross_attention(q, k, v, factor, key_mask)
    if chosen == "torch":
        with _backend.autocast_off(q):
            return torch_backend.attention(q, k, v, factor, key_mask)
    _transforms.refuse("cross_attention", chosen, (q, k, v))
    return ops.cross_attention_fwd(q, k, v, factor, _kernel_precision(q, precision), key_mask)[0]


def packed_attention(
    q: Tensor | None,
    packed: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    precision: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """:func:`hpdm_kernels.cross_attention` of queries, keys and values that are parts of one projection.

    The same values and gradients, but ``triton`` writes the gradients of the parts beside each other, so that the
    gradient of the projection needs no copy. The other backends take the parts.

    Args:
        q: ``[B, h, M, d]`` queries as for :func:`hpdm_kernels.cross_attention`, or ``None`` for self-attention:
            ``packed`` then has the queries, too.
        packed: with ``q``, keys and values ``[B, N, 2, h, d]``, of its dtype and device; without, queries, keys and
            values ``[B, M, 3, h, d]``, ``d`` at most 256. Any strides. A projection ``[B, N, 2 * h * d]`` in which all
            heads' keys come before the values is ``projection.unflatten(-1, (2, h, d))``.
        scale: factor of the scores, any finite number; default ``1 / sqrt(d)``.
        key_mask: ``[B, N]`` bool, true where a key may be read; see :func:`hpdm_kernels.cross_attention`.
        precision: how the kernels compute fp32 products; see :func:`hpdm_kernels.cross_attention`.
        backend: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``[B, h, M, d]`` of ``packed``'s dtype. Gradients flow to ``q`` and ``packed``.

    Raises:
        TypeError: an argument is not a tensor, its dtype is no float or not ``q``'s, ``key_mask`` is not bool, or
            ``scale`` is no number.
        ValueError: wrong rank, sizes or device; ``scale`` not finite; unknown ``precision`` or ``backend``.
        RuntimeError: ``backend="triton"`` where the kernels cannot run.
        NotImplementedError: ``torch.func`` or forward mode differentiates the op, and its backend cannot.

    Source: the read, the write and the layers of a RIN block, paper Fig. 11.
    """
    check_packed(q, packed)
    check_key_mask(key_mask, packed.shape[1], packed, "packed")
    factor = check_scale(scale, packed.shape[-1])
    precision = _backend.resolve_precision(precision)
    chosen = _backend.resolve(backend, "packed_attention", packed)
    if chosen != "triton":
        parts = unpack(q, packed)
        return cross_attention(*parts, scale=factor, key_mask=key_mask, precision=precision, backend=chosen)
    _transforms.refuse("packed_attention", chosen, (q, packed))
    return ops.packed_attention_fwd(q, packed, factor, _kernel_precision(packed, precision), key_mask)[0]


KEPT_BYTES = 2**28
"""Most bytes of keys and values that :func:`read_tokens` saves for the backward pass unless told otherwise."""


def read_tokens(
    q: Tensor,
    tokens: Tensor | Sequence[Tensor],
    weight_kv: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    recompute: bool | None = None,
    piece_rows: int = PIECE_ROWS,
    precision: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of ``M`` queries to ``N`` tokens, including the projection of the tokens to keys and values.

    The same as :func:`hpdm_kernels.cross_attention` of ``q`` and the two halves of ``F.linear(tokens, weight_kv)``,
    split into heads, but with less memory where that matters: with ``recompute`` only ``tokens`` are saved for the
    backward pass, and keys and values exist for one chunk of tokens at a time.

    Args:
        q: ``[B, h, M, d]`` queries; float16, bfloat16, float32, or float64 (``reference`` and ``torch`` only). Any
            strides; ``d`` is at most 256.
        tokens: ``[B, N, D]``, or several tensors ``[B, N_i, D]``, read as if they were concatenated. Any float dtype;
            cast to the dtype of ``q`` one chunk at a time, so that mixed precision needs no second copy of all tokens.
        weight_kv: ``[2 * h * d, D]``, the rows of all heads' keys, then those of the values. Any float dtype.
        scale: factor of the scores, any finite number; default ``1 / sqrt(d)``.
        key_mask: ``[B, N]`` bool, true where a token may be read; see :func:`hpdm_kernels.cross_attention`.
        recompute: compute keys and values again in the backward pass, which is a fifth more work, instead of saving
            them; ``None``: where they take more than 256 MiB.
        piece_rows: with ``recompute``, the largest number of tokens per chunk. Samples with few tokens share a chunk.
        precision: how the kernels compute fp32 products; see :func:`hpdm_kernels.cross_attention`. The projection is
            a PyTorch product and follows PyTorch's setting.
        backend: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``. ``reference`` is the plain formula, which
            saves keys and values.

    Returns:
        ``[B, h, M, d]`` of ``q``'s dtype. Gradients flow to ``q``, ``tokens`` and ``weight_kv``.

    Raises:
        TypeError: an argument is not a tensor, a dtype is no float, ``key_mask`` is not bool, ``scale`` is no number,
            ``piece_rows`` no int.
        ValueError: wrong rank, sizes or device; no tokens; ``scale`` not finite; ``piece_rows`` below 1; unknown
            ``precision`` or ``backend``.
        RuntimeError: ``backend="triton"`` where the kernels cannot run.
        NotImplementedError: ``torch.func`` or forward mode differentiates the op on another backend than ``reference``.

    Source: the read of a RIN block, paper Fig. 11.
    """
    check_queries(q)
    _, heads, _, width = q.shape
    check_tensor("weight_kv", weight_kv, (2 * heads * width, "D"), like=("q", q), same_dtype=False)
    sequences = check_tokens(tokens, weight_kv.shape[1], q)
    check_key_mask(key_mask, sum(sequence.shape[1] for sequence in sequences), q)
    check_piece_rows(piece_rows)
    if recompute is None:
        rows = q.shape[0] * sum(sequence.shape[1] for sequence in sequences)
        recompute = rows * weight_kv.shape[0] * q.element_size() > KEPT_BYTES
    elif not isinstance(recompute, bool):
        raise TypeError(f"recompute: got {recompute!r}, expected True, False or None")
    factor = check_scale(scale, width)
    precision = _backend.resolve_precision(precision)
    chosen = _backend.resolve(backend, "read_tokens", q)
    if chosen == "reference":
        with _backend.autocast_off(q):
            packed = _keys_and_values(q, sequences, weight_kv)
            return reference.cross_attention(*unpack(q, packed), factor, key_mask)
    _transforms.refuse("read_tokens", chosen, (q, *sequences, weight_kv))
    if not recompute:
        with _backend.autocast_off(q):
            packed = _keys_and_values(q, sequences, weight_kv)
        return packed_attention(q, packed, scale=factor, key_mask=key_mask, precision=precision, backend=chosen)
    precision = _kernel_precision(q, precision)
    return ops.read_tokens_fwd(q, sequences, weight_kv, key_mask, factor, piece_rows, precision, chosen)[0]


def _keys_and_values(q: Tensor, sequences: Sequence[Tensor], weight_kv: Tensor) -> Tensor:
    """Keys and values ``[B, N, 2, h, d]`` of all tokens, in the dtype of ``q``."""
    parts = [sequence.to(q.dtype) for sequence in sequences]
    rows = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)  # [B, N, D]
    return F.linear(rows, weight_kv.to(q.dtype)).unflatten(-1, (2, *q.shape[1::2]))
