"""Validation of the arguments that ``cross_attention`` and ``read_tokens`` share."""

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
    if q.shape[-1] > MAX_HEAD_WIDTH:
        raise ValueError(f"q: got head width {q.shape[-1]}, expected at most {MAX_HEAD_WIDTH}")
    return q


def check_key_mask(key_mask: Tensor | None, keys: int, q: Tensor) -> None:
    """Checks ``key_mask``: ``None``, or ``[B, keys]`` bool on the device of ``q``."""
    if key_mask is not None:
        shape = (q.shape[0], keys)
        check_tensor("key_mask", key_mask, shape, dtypes=(torch.bool,), like=("q", q), same_dtype=False)


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
