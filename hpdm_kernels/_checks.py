"""Validation shared by the ops. Every message names the argument, the value it got and the value it expected.

Boxes are validated in :mod:`hpdm_kernels.boxes`, arguments of a single op in that op's folder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpdm_kernels._transforms import inside_transform, is_mapped

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes that an op accepts unless its documentation says otherwise."""
Triple = tuple[int, int, int]
"""A size or a position on the three axes of a video: frames, height, width."""


def check_tensor(
    name: str,
    value: object,
    shape: Sequence[int | str] | None = None,
    *,
    dtypes: Sequence[torch.dtype] | None = FLOATS,
    like: tuple[str, Tensor] | None = None,
    same_dtype: bool = True,
) -> Tensor:
    """Checks one tensor argument and returns it.

    Args:
        name: the argument's name, for messages.
        value: what the caller passed.
        shape: expected shape; an ``int`` must match, a ``str`` names an axis of any size >= 1; ``None`` for any shape.
        dtypes: allowed dtypes, ``None`` for any.
        like: ``(name, tensor)`` whose device must match.
        same_dtype: also require the dtype of ``like``.

    Raises:
        TypeError: not a tensor, or a dtype that is not allowed or differs from ``like``.
        ValueError: wrong rank, size or device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if dtypes is not None and value.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected one of {', '.join(map(str, dtypes))}")
    if shape is not None:
        fits = value.ndim == len(shape)
        for size, expected in zip(value.shape, shape):
            fits = fits and (size >= 1 if isinstance(expected, str) else size == expected)
        if not fits:
            sizes = ", ".join(map(str, shape))
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected [{sizes}] with every size >= 1")
    if like is not None:
        other_name, other = like
        if value.device != other.device:
            raise ValueError(f"{name}: got device {value.device}, expected {other.device} as for {other_name}")
        if same_dtype and value.dtype != other.dtype:
            raise TypeError(f"{name}: got dtype {value.dtype}, expected {other.dtype} as for {other_name}")
    return value


def check_triple(name: str, value: object, minimum: int = 1) -> Triple:
    """Checks a triple of ints (frames, height, width), each at least ``minimum``; returns it as a tuple.

    Raises:
        TypeError: not a sequence of three ints.
        ValueError: an entry below ``minimum``.
    """
    # Asking whether something is a sequence takes microseconds, unless it is one of these.
    if not isinstance(value, (tuple, list, Sequence)) or isinstance(value, str) or len(value) != 3:
        raise TypeError(f"{name}: got {value!r}, expected three ints (frames, height, width)")
    f, h, w = value
    for n in (f, h, w):
        if not isinstance(n, (int, torch.SymInt)) or isinstance(n, bool):
            raise TypeError(f"{name}: got {value!r}, expected three ints (frames, height, width)")
    if f < minimum or h < minimum or w < minimum:
        raise ValueError(f"{name}: got {tuple(value)}, expected every entry >= {minimum}")
    return (f, h, w)


def check_number(name: str, value: object) -> float:
    """Checks a finite number, or a tensor of one that requires no gradient; returns it as a float.

    While ``torch.compile`` traces, a number may be a symbol, whose value is not looked at.

    Raises:
        TypeError: not a number.
        ValueError: a number that is not finite, a tensor with several elements, or one that requires a gradient.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.requires_grad:
            what = "one that requires a gradient" if value.numel() == 1 else f"shape {tuple(value.shape)}"
            raise ValueError(f"{name}: got a tensor, {what}, expected a number: it is a constant without a gradient")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: got {value!r}, expected a finite number")
    if not torch.compiler.is_compiling() and not math.isfinite(value):
        raise ValueError(f"{name}: got {value}, expected a finite number")
    return float(value)


def values_are_readable(tensor: Tensor) -> bool:
    """Whether a tensor's values can be read cheaply: true for a real CPU tensor, unless it is traced or mapped over.

    Values on CUDA are never checked: reading them would synchronize with the stream and break CUDA graphs.
    """
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not is_mapped(tensor)
    )


def read_values(tensor: Tensor) -> npt.NDArray[Any]:
    """The values of a tensor that :func:`values_are_readable`, of its shape and dtype, as a numpy array.

    numpy has less overhead per operation than PyTorch, which dominates for a few boxes.
    """
    if not inside_transform():
        return tensor.detach().numpy()
    # Inside of a torch.func transform every operation wraps its result, which numpy cannot read.
    return np.array(tensor.tolist(), dtype=str(tensor.dtype).removeprefix("torch.")).reshape(tensor.shape)


def flatten_triples(values: Sequence[Sequence[int]]) -> list[int]:
    """Concatenates triples into a flat list, because the schema of a registered op has no nested lists."""
    return [n for triple in values for n in triple]


def triples(flat: Sequence[int]) -> list[Triple]:
    """The inverse of :func:`flatten_triples`."""
    return [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]
