"""Spoils one argument of a valid call: the op must refuse it with an error that begins with the argument's name."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from hpdm_kernels.testing.case import Arguments
from hpdm_kernels.testing.draw import Draw

_NAMED = re.compile(r"^([a-z_]+)(\[\d+\])?: got |^([a-z_]+)(\[\d+\])?: (row|column|no tile|\d+ tiles)")

OPTIONAL = ("source_index", "bias", "x", "key_mask", "branch", "gate", "least_norms")
"""Tensors that some ops do without."""


def is_clear(error: Exception) -> bool:
    """Whether an error is a ``TypeError`` or ``ValueError`` that begins with an argument's name and says what it is."""
    return isinstance(error, (TypeError, ValueError)) and bool(_NAMED.match(str(error)))


def spoil(draw: Draw, arguments: Arguments) -> tuple[Arguments, str]:
    """A copy of ``arguments`` with one made wrong, and a description of it."""
    name = draw.choose(
        sorted(
            name for name, value in arguments.items() if value is not None and name not in ("precision", "recompute")
        )
    )
    value = arguments[name]
    if draw.chance(0.05):
        return arguments | {"backend": "cuda"}, "backend: unknown"
    if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
        i = draw.random.randrange(len(value))
        what, entry = _spoil_tensor(draw, name, value[i])
        if what == "wider" and len(value) == 1:  # nothing else fixes the width of a single source
            what, entry = "one axis less", value[i][0]
        bad: Any = (*value[:i], entry, *value[i + 1 :])
        if draw.chance(0.2):
            what, bad = draw.choose((("a single tensor", value[0]), ("none", ()), ("a number", 3)))
            if name == "tokens" and what == "a single tensor":
                what, bad = "none", ()
        return arguments | {name: bad}, f"{name}: {what}"
    if isinstance(value, Tensor):
        what, bad = _spoil_tensor(draw, name, value)
        # These may be all that has data, so that nothing else fixes the device, and of packed heads the width.
        alone = {"tiles": arguments.get("x"), "packed": arguments.get("q")}.get(name, value) is None
        if alone and (what == "another device" or (what == "wider" and name == "packed")):
            what, bad = "empty", value[..., :0]
    elif name == "pad":
        what, bad = draw.choose(
            (
                ("a number", 1), ("a string", "111"), ("two pairs", value[:2]), ("numbers", (1, 1, 1)),
                ("a negative number", ((0, -1), *value[1:])), ("a float", ((0, 1.5), *value[1:])),
                ("three sides", (*value[:2], (0, 0, 0))),
            )
        )  # fmt: skip
    elif isinstance(value, (tuple, list)) and isinstance(value[0], (tuple, list)):
        i = draw.random.randrange(len(value))
        what, entry = _spoil_triple(draw, value[i])
        bad = [*value[:i], entry, *value[i + 1 :]]
    elif isinstance(value, (tuple, list)):
        what, bad = _spoil_triple(draw, value)
    else:
        what, bad = draw.choose(
            (("nan", float("nan")), ("infinity", float("inf")), ("a string", "1"), ("a bool", True), ("a list", [1.0]))
        )
    return arguments | {name: bad}, f"{name}: {what}"


def _spoil_tensor(draw: Draw, name: str, value: Tensor) -> tuple[str, Any]:
    options: list[tuple[str, Any]] = [
        ("None", None) if name not in OPTIONAL else ("a list", [1.0]),
        ("a number", 1.0),
        ("numpy", value.detach().float().numpy()),
        ("complex", value.to(torch.complex64)),
        ("one axis less", value[0]),
        ("one axis more", value[None]),
        ("empty", value[..., :0]),
        ("wider", torch.cat([value, value[..., :1], value[..., :1], value[..., :1], value[..., :1]], dim=-1)),
    ]
    if value.is_floating_point():
        options.append(("integers", value.detach().to(torch.int16)))
    else:
        options.append(("half precision", value.to(torch.float16)) if value.dtype is not torch.uint8 else options[0])
    if name == "video":  # nothing else fixes its width, nor its device where it is the first
        options = [option for option in options if option[0] != "wider"]
    else:
        options.append(("another device", value.to("meta")) if name not in ("origins",) else options[0])
    if "box" in name:
        options += [(f"{x} in a box", _with_entry(draw, value, x)) for x in (torch.nan, torch.inf, -0.3, 7.0)]
    if name == "source_index":
        options += [("a row beyond the source", value + 1000), ("a negative row", value - 1000)]
    if name == "origins":
        options += [("outside", value + 1000), ("negative", value - 1000)]
    return draw.choose(options)


def _with_entry(draw: Draw, value: Tensor, entry: float) -> Tensor:
    """A copy of boxes with one number exchanged."""
    bad = value.clone(memory_format=torch.contiguous_format)
    bad[draw.random.randrange(len(bad)), draw.random.randrange(6)] = entry
    return bad


def _spoil_triple(draw: Draw, value: Any) -> tuple[str, Any]:
    return draw.choose(
        (
            ("two sizes", tuple(value)[:2]),
            ("four sizes", (*value, 1)),
            ("a size of zero", (0, *value[1:])),
            ("a negative size", (*value[:2], -1)),
            ("a float", (*value[:2], 1.5)),
            ("a number", 4),
            ("a string", "222"),
            ("None in it", (None, *value[1:])),
        )
    )
