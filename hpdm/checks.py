"""Argument checks whose errors name the argument or field, and a type for (frames, height, width)."""

from __future__ import annotations

from typing import Any, get_args

from torch import Tensor

Triple = tuple[int, int, int]
"""A size or a count along (frames, height, width)."""


def check_choice(name: str, value: str, kind: Any) -> Any:
    """Returns ``value`` if it is one of the strings of the ``Literal`` type ``kind``.

    Raises:
        ValueError: it is another string; the message names ``name``.
    """
    if value not in get_args(kind):
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, get_args(kind)))}")
    return value


def at_least(options: object, bound: float, *names: str) -> None:
    """Checks that the named fields of ``options`` are ``bound`` or more; ``None`` passes.

    Raises:
        ValueError: a field is below the bound; the message names the first one.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < bound:
            raise ValueError(f"{name}: got {value}, expected at least {bound}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Checks the shape of a tensor.

    Raises:
        ValueError: it has another shape; the message names ``name``.
    """
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {shape}")
