"""RIN's read with its projection (HPDM Fig. 11): keys and values exist a piece at a time, in both directions.

``out = softmax(q @ K.T * scale) @ V`` with ``[K, V] = tokens @ weight_kv.T``, for ``q, out [B,h,M,d]``,
``tokens [B,N,D]`` and ``weight_kv [2*h*d, D]``. Keys and values are one product away from tokens that the model keeps
anyway, so backward takes them again instead of keeping ``[B, N, 2*h*d]``. Saved beside the inputs are ``out`` and the
log-sum-exp ``[B, h, M]``: the attention is not taken again, as it is by checkpointing.

A piece is as many whole samples as have ``piece_rows`` tokens together, or that many tokens of one sample, whose
results are then weighed by their log-sum-exps. Whatever is summed over pieces is summed in the order of the tokens: the
same bits every run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hpdm_kernels import _backend, reference
from hpdm_kernels._checks import check_tensor
from hpdm_kernels.attention import torch_backend as cross_attention_torch
from hpdm_kernels.attention import triton_backend as cross_attention_triton
from hpdm_kernels.attention.cross import MAX_HEAD_WIDTH, TRITON_DTYPES, check_scale
from hpdm_kernels.attention.triton_backend import new_rows

PIECE_ROWS = 8192
"""Enough rows for a product to run at full speed; at ``h * d = 512`` in fp32 their keys and values take 32 MiB."""


class _Range(NamedTuple):
    """Tokens of a sequence, and where they are when the sequences lie one after another."""

    sequence: int
    tokens: slice
    columns: slice


def _pieces(batch: int, lengths: Sequence[int], rows: int) -> Iterator[tuple[slice, list[_Range]]]:
    """Samples that are done together, and the ranges that their tokens are done in."""
    samples = max(1, rows // sum(lengths))
    ranges, before = [], 0
    for sequence, length in enumerate(lengths):
        step = -(-length // -(-length // rows))  # of about equal size
        for start in range(0, length, step):
            stop = min(start + step, length)
            ranges.append(_Range(sequence, slice(start, stop), slice(before + start, before + stop)))
        before += length
    for start in range(0, batch, samples):
        yield slice(start, min(start + samples, batch)), ranges


def _projected(rows: Tensor, weight: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, h, n, d]`` of ``rows [B, n, D]``, two views of one product."""
    k, v = F.linear(rows, weight).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    return k, v


def _combined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One result of those of several ranges of keys, ``(out, base-2 log-sum-exp)`` each."""
    if len(parts) == 1:
        return parts[0]
    lse = torch.stack([lse for _, lse in parts])
    top = lse.amax(dim=0)
    weights = torch.exp2(lse - top.masked_fill(top == -torch.inf, 0.0))
    total = weights.sum(dim=0)
    out = sum(out * w[..., None] for (out, _), w in zip(parts, weights)) / total[..., None]
    return out.masked_fill((total == 0)[..., None], 0.0), top + torch.log2(total)


def _implementation(backend: str) -> ModuleType:
    return cross_attention_triton if backend == "triton" else cross_attention_torch


def forward(
    q: Tensor,
    tokens: Sequence[Tensor],
    weight: Tensor,
    key_mask: Tensor | None,
    scale: float,
    piece_rows: int,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``out [B,h,M,d]`` and the base-2 log-sum-exp ``[B,h,M]``; what the registered op does."""
    attention = _implementation(backend)
    weight = weight.to(q.dtype)
    out, lse = new_rows(q), q.new_empty(q.shape[:3], dtype=reference.coordinate_dtype(q.dtype))
    for samples, ranges in _pieces(q.shape[0], [t.shape[1] for t in tokens], piece_rows):
        parts = []
        for sequence, piece, columns in ranges:
            mask = None if key_mask is None else key_mask[samples, columns]
            rows = tokens[sequence][samples, piece].to(q.dtype)
            # Without names for keys and values, those of a piece are gone before the next ones are there.
            parts.append(attention.forward(q[samples], *_projected(rows, weight, q.shape[1]), scale, precision, mask))
        out[samples], lse[samples] = _combined(parts)
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    tokens: Sequence[Tensor],
    weight: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    scale: float,
    piece_rows: int,
    precision: str,
    backend: str,
) -> list[Tensor]:
    """Gradients of ``q``, ``weight`` and ``tokens``; what the registered op does."""
    attention = _implementation(backend)
    work, kind = weight.to(q.dtype), reference.coordinate_dtype(q.dtype)
    # Sums over pieces, in fp32 for 16-bit inputs.
    grad_q, grad_weight = torch.zeros_like(new_rows(q), dtype=kind), torch.zeros_like(weight, dtype=kind)
    grad_tokens: dict[int, Tensor] = {}
    for samples, ranges in _pieces(q.shape[0], [t.shape[1] for t in tokens], piece_rows):
        for sequence, piece, columns in ranges:
            rows = tokens[sequence][samples, piece].to(q.dtype)
            k, v = _projected(rows, work, q.shape[1])
            mask = None if key_mask is None else key_mask[samples, columns]
            of_q, of_k, of_v = attention.backward(
                grad[samples], q[samples], k, v, out[samples], lse[samples], scale, precision, mask
            )
            del k, v
            of_kv = torch.cat([t.transpose(1, 2).flatten(2) for t in (of_k, of_v)], dim=-1).flatten(0, 1)
            del of_k, of_v
            grad_q[samples] += of_q
            grad_weight += of_kv.t() @ rows.flatten(0, 1)
            if sequence not in grad_tokens:  # not before keys and values of the first piece are gone
                grad_tokens[sequence] = tokens[sequence].new_empty(tokens[sequence].shape)
            into = grad_tokens[sequence][samples, piece].view(-1, weight.shape[1])
            if into.dtype == of_kv.dtype:
                torch.mm(of_kv, work, out=into)
            else:
                into.copy_(of_kv @ work)
            del of_kv
    return [grad_q.to(q.dtype), grad_weight.to(weight.dtype), *grad_tokens.values()]


@torch.library.custom_op("hpdm::read_tokens_fwd", mutates_args=())
def _read_tokens_fwd(
    q: Tensor,
    tokens: Sequence[Tensor],
    weight: Tensor,
    key_mask: Tensor | None,
    scale: float,
    piece_rows: int,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(q), _backend.unmixed(q):
        return forward(q, tokens, weight, key_mask, scale, piece_rows, precision, backend)


@_read_tokens_fwd.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return new_rows(q), q.new_empty(q.shape[:3], dtype=reference.coordinate_dtype(q.dtype))


@torch.library.custom_op("hpdm::read_tokens_bwd", mutates_args=())
def _read_tokens_bwd(
    grad: Tensor,
    q: Tensor,
    tokens: Sequence[Tensor],
    weight: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    scale: float,
    piece_rows: int,
    precision: str,
    backend: str,
) -> list[Tensor]:
    with torch.cuda.device_of(q), _backend.unmixed(q):
        return backward(grad, q, tokens, weight, out, lse, key_mask, scale, piece_rows, precision, backend)


@_read_tokens_bwd.register_fake
def _(grad: Tensor, q: Tensor, tokens: Sequence[Tensor], weight: Tensor, *rest: Any) -> list[Tensor]:
    return [new_rows(q), weight.new_empty(weight.shape), *(t.new_empty(t.shape) for t in tokens)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, tokens, weight, key_mask, *ctx.rest = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, weight, out, lse, key_mask, *tokens)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    q, weight, out, lse, key_mask, *tokens = ctx.saved_tensors
    of_q, of_weight, *of_tokens = _read_tokens_bwd(grad, q, tokens, weight, out, lse, key_mask, *ctx.rest)
    return of_q, of_tokens, of_weight, None, None, None, None, None


_read_tokens_fwd.register_autograd(_backward, setup_context=_setup_context)


def _products(q_shape: Any, token_shapes: Any, weight_shape: Any) -> tuple[int, int]:
    """FLOPs of the projection, and of one product of the attention."""
    batch, heads, queries, width = q_shape
    keys = sum(shape[1] for shape in token_shapes)
    return 2 * batch * keys * weight_shape[0] * weight_shape[1], 2 * batch * heads * queries * keys * width


# The projection once forward and three times backward, once of it again; the attention as for `cross_attention`.
@register_flop_formula(torch.ops.hpdm.read_tokens_fwd)
def _fwd_flops(q_shape: Any, token_shapes: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    projection, product = _products(q_shape, token_shapes, weight_shape)
    return projection + 2 * product


@register_flop_formula(torch.ops.hpdm.read_tokens_bwd)
def _bwd_flops(grad_shape: Any, q_shape: Any, token_shapes: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    projection, product = _products(q_shape, token_shapes, weight_shape)
    return 3 * projection + 5 * product


def read_tokens(
    q: Tensor,
    tokens: Tensor | Sequence[Tensor],
    weight_kv: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    piece_rows: int = PIECE_ROWS,
    precision: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of ``M`` queries to ``N`` tokens through their projection, whose result is not kept for backward.

    The same as :func:`hpdm_kernels.attention.cross` of ``q`` and the two halves of ``F.linear(tokens, weight_kv)``,
    split into heads, with less memory: of what has a row per token only ``tokens`` is kept, and of keys and values a
    piece exists at a time.

    Args:
        q: ``[B, h, M, d]`` queries; float16, bfloat16, float32, or float64 (``reference`` and ``torch`` alone). Any
            strides; ``d`` is at most 128.
        tokens: ``[B, N, D]``, or several of them, ``[B, N_i, D]``, read as if they were concatenated. Any float dtype;
            rounded to that of ``q`` a piece at a time, so that mixed precision keeps no second copy.
        weight_kv: ``[2 * h * d, D]``, the rows of all heads' keys, then those of the values. Any float dtype.
        scale: factor of the scores, any finite number; default ``1 / sqrt(d)``.
        key_mask: ``[B, N]`` bool, true where a token may be read; see :func:`hpdm_kernels.attention.cross`.
        piece_rows: tokens of a piece, of several samples together where they are shorter than that.
        precision: how the kernels take fp32 products; see :func:`hpdm_kernels.attention.cross`. The projection is
            PyTorch's product, in its own setting.
        backend: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``. ``reference``, the plain formula, keeps all.

    Returns:
        ``[B, h, M, d]`` of ``q``'s dtype. Gradients flow to ``q``, ``tokens`` and ``weight_kv``.

    Raises:
        TypeError: an argument is not a tensor, a dtype is no float, ``key_mask`` is not bool, ``scale`` is no number,
            ``piece_rows`` no int.
        ValueError: wrong rank, sizes or device; no tokens; ``scale`` not finite; ``piece_rows`` below 1; unknown
            ``precision`` or ``backend``.
        RuntimeError: ``backend="triton"`` where the kernels cannot run.

    Source: the read of a RIN block, paper Fig. 11.
    """
    check_tensor("q", q, ("B", "h", "M", "d"))
    batch, heads, _, width = q.shape
    if width > MAX_HEAD_WIDTH:
        raise ValueError(f"q: got head width {width}, expected at most {MAX_HEAD_WIDTH}")
    check_tensor("weight_kv", weight_kv, (2 * heads * width, "D"), like=("q", q), same_dtype=False)
    sequences = [tokens] if isinstance(tokens, Tensor) else list(_check_sequence(tokens))
    for i, sequence in enumerate(sequences):
        name = "tokens" if isinstance(tokens, Tensor) else f"tokens[{i}]"
        check_tensor(name, sequence, (batch, "N", weight_kv.shape[1]), like=("q", q), same_dtype=False)
    if key_mask is not None:
        keys = sum(sequence.shape[1] for sequence in sequences)
        check_tensor("key_mask", key_mask, (batch, keys), dtypes=(torch.bool,), like=("q", q), same_dtype=False)
    if not isinstance(piece_rows, int) or isinstance(piece_rows, bool):
        raise TypeError(f"piece_rows: got {piece_rows!r}, expected an int")
    if piece_rows < 1:
        raise ValueError(f"piece_rows: got {piece_rows}, expected at least 1")
    factor = check_scale(scale, width)
    precision = _backend.resolve_precision(precision)
    chosen = _backend.resolve(backend, "read_tokens", q, TRITON_DTYPES)
    if chosen == "reference":
        k, v = _projected(torch.cat([t.to(q.dtype) for t in sequences], dim=1), weight_kv.to(q.dtype), heads)
        return reference.cross_attention(q, k, v, factor, key_mask)
    precision = precision if q.dtype is torch.float32 else "ieee"
    return _read_tokens_fwd(q, sequences, weight_kv, key_mask, factor, piece_rows, precision, chosen)[0]


def _check_sequence(tokens: object) -> Sequence[Tensor]:
    if not isinstance(tokens, Sequence) or isinstance(tokens, str):
        raise TypeError(f"tokens: got {type(tokens).__name__}, expected a torch.Tensor or a sequence of them")
    if not tokens:
        raise ValueError("tokens: got none, expected at least one tensor [B, N, D]")
    return tokens
