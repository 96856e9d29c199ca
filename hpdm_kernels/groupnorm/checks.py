"""Validation of what group normalization takes besides tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def _is_int(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def check_groups(groups: int, channels: int) -> int:
    """Checks the number of groups, a divisor of ``channels``.

    Raises:
        TypeError: not an int.
        ValueError: no divisor.
    """
    if not _is_int(groups):
        raise TypeError(f"groups: got {groups!r}, expected an int")
    if groups < 1 or channels % groups:
        raise ValueError(f"groups: got {groups}, expected a divisor of the {channels} channels")
    return groups


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises ``ValueError`` unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_pad(pad: Sequence[Sequence[int]] | None) -> list[int]:
    """Checks how often edges are repeated; returns front and back of T, H, W, six numbers.

    Raises:
        TypeError: not three pairs of ints.
        ValueError: a negative number.
    """
    if pad is None:
        return [0] * 6
    pairs = list(pad) if isinstance(pad, (tuple, list)) else []
    if len(pairs) != 3 or any(not isinstance(pair, (tuple, list)) or len(pair) != 2 for pair in pairs):
        raise TypeError(f"pad: got {pad!r}, expected three pairs of ints, front and back of T, H and W")
    sides = [side for pair in pairs for side in pair]
    if not all(map(_is_int, sides)):
        raise TypeError(f"pad: got {pad!r}, expected three pairs of ints, front and back of T, H and W")
    if min(sides) < 0:
        raise ValueError(f"pad: got {pad!r}, expected numbers >= 0")
    return sides
