"""Validation of the arguments of the attention ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpdm_kernels._checks import check_number, check_tensor

MAX_HEAD_WIDTH = 256
"""The widest heads that the kernels have block sizes for. The limit is the same on every backend."""


def check_queries(q: Tensor) -> Tensor:
    """Checks queries ``[B, h, M, d]``, ``d`` at most :data:`MAX_HEAD_WIDTH`."""
    check_tensor("q", q, ("B", "h", "M", "d"))
    _check_head_width("q", q)
    return q


def _check_head_width(name: str, x: Tensor) -> None:
    if x.shape[-1] > MAX_HEAD_WIDTH:
        raise ValueError(f"{name}: got head width {x.shape[-1]}, expected at most {MAX_HEAD_WIDTH}")


def check_packed(q: Tensor | None, packed: Tensor) -> None:
    """Checks keys and values ``[B, N, 2, h, d]`` for ``q [B, h, M, d]``, or without it ``[B, M, 3, h, d]``."""
    if q is None:
        check_tensor("packed", packed, ("B", "M", 3, "h", "d"))
        _check_head_width("packed", packed)
    else:
        batch, heads, _, width = check_queries(q).shape
        check_tensor("packed", packed, (batch, "N", 2, heads, width), like=("q", q))


def check_key_mask(key_mask: Tensor | None, keys: int, like: Tensor, name: str = "q") -> None:
    """Checks ``key_mask``: ``None``, or ``[B, keys]`` bool, on the device of ``like``, which is called ``name``."""
    if key_mask is not None:
        shape = (like.shape[0], keys)
        check_tensor("key_mask", key_mask, shape, dtypes=(torch.bool,), like=(name, like), same_dtype=False)


def check_scale(scale: object, width: int) -> float:
    """Checks and returns the factor of the scores: a finite number; ``None`` gives ``1 / sqrt(width)``."""
    if scale is None:
        return width**-0.5
    return check_number("scale", scale)


def check_tokens(tokens: object, width: int, q: Tensor) -> list[Tensor]:
    """Checks one tensor ``[B, N, width]`` or a sequence of them; returns them as a list."""
    if isinstance(tokens, Tensor):
        return [check_tensor("tokens", tokens, (q.shape[0], "N", width), like=("q", q), same_dtype=False)]
    if not isinstance(tokens, Sequence) or isinstance(tokens, str):
        raise TypeError(f"tokens: got {type(tokens).__name__}, expected a torch.Tensor or a sequence of them")
    if not tokens:
        raise ValueError("tokens: got none, expected at least one tensor [B, N, D]")
    return [
        check_tensor(f"tokens[{i}]", sequence, (q.shape[0], "N", width), like=("q", q), same_dtype=False)
        for i, sequence in enumerate(tokens)
    ]


def check_piece_rows(piece_rows: object) -> int:
    """Checks the number of tokens that are projected at a time: an int of at least 1."""
    if not isinstance(piece_rows, int) or isinstance(piece_rows, bool):
        raise TypeError(f"piece_rows: got {piece_rows!r}, expected an int")
    if piece_rows < 1:
        raise ValueError(f"piece_rows: got {piece_rows}, expected at least 1")
    return piece_rows
