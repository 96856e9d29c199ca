"""Validation shared by the ops. Every message names the argument, what was got and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
        shape: expected shape; an ``int`` must match, a ``str`` (a letter of the design) is any size >= 1.
        dtypes: allowed dtypes, ``None`` for any.
        like: ``(name, tensor)`` whose device (and dtype, unless ``same_dtype=False``) must match.

    Raises:
        TypeError: not a tensor, or a dtype that is not allowed or differs from ``like``.
        ValueError: wrong rank, size or device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if dtypes is not None and value.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected one of {', '.join(map(str, dtypes))}")
    if shape is not None:
        fits = value.ndim == len(shape) and all(
            got >= 1 if isinstance(want, str) else got == want for got, want in zip(value.shape, shape)
        )
        if not fits:
            want = ", ".join(map(str, shape))
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected [{want}] with every size >= 1")
    if like is not None:
        other_name, other = like
        if value.device != other.device:
            raise ValueError(f"{name}: got device {value.device}, expected {other.device} as for {other_name}")
        if same_dtype and value.dtype != other.dtype:
            raise TypeError(f"{name}: got dtype {value.dtype}, expected {other.dtype} as for {other_name}")
    return value


def check_triple(name: str, value: object, minimum: int = 1) -> tuple[int, int, int]:
    """Checks a triple of ints (frames, height, width), each at least ``minimum``; returns it as a tuple.

    Raises:
        TypeError: not a sequence of three ints.
        ValueError: an entry below ``minimum``.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 3:
        raise TypeError(f"{name}: got {value!r}, expected three ints (frames, height, width)")
    if not all(isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) for n in value):
        raise TypeError(f"{name}: got {value!r}, expected three ints (frames, height, width)")
    if any(n < minimum for n in value):
        raise ValueError(f"{name}: got {tuple(value)}, expected every entry >= {minimum}")
    return (value[0], value[1], value[2])


def values_are_readable(tensor: Tensor) -> bool:
    """Whether checking values costs nothing: a real CPU tensor, outside of tracing.

    On CUDA a look at values would stop the stream and break CUDA graphs, so values are not checked there.
    """
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, torch.nn.Parameter)
    )


def check_boxes(name: str, boxes: object, rows: int | str, like: tuple[str, Tensor]) -> Tensor:
    """Checks boxes ``[rows, 6]`` float32, fractions of the video: offset >= 0, scale > 0, offset + scale <= 1.

    Raises:
        TypeError, ValueError: as :func:`check_tensor`; ``ValueError`` too for a box outside the video (CPU only).
    """
    boxes = check_tensor(name, boxes, (rows, 6), dtypes=(torch.float32,), like=like, same_dtype=False)
    if values_are_readable(boxes):
        # In numpy, whose small operations cost a quarter of PyTorch's: this was a fifth of cutting one patch.
        values = boxes.detach().numpy()
        offset, scale = values[:, :3], values[:, 3:]
        good = (scale > 0) & (offset >= -BOX_SLACK) & (offset + scale <= 1 + BOX_SLACK)
        if not good.all():
            row = int((~good.all(axis=1)).nonzero()[0][0])
            raise ValueError(
                f"{name}: row {row} is {boxes[row].tolist()}, expected (offset, scale) inside the whole video: "
                "offset >= 0, scale > 0, offset + scale <= 1 on every axis"
            )
    return boxes


# Boxes are built in fp32 by adding fractions, so their edges may overshoot by a few ulps.
BOX_SLACK = 1e-5
