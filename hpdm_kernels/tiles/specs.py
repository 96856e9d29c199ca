"""The kernels of tiles in every configuration that is compiled ahead of time."""

from __future__ import annotations

import itertools
from typing import Any

from hpdm_kernels._triton import KernelSpec
from hpdm_kernels.tiles import triton_kernels
from hpdm_kernels.tiles.block_sizes import average_blocks, extract_blocks

# Name of the op, a word for the label, and the constexprs ADD, SUMS, FINISH, MEAN, SHARES.
_AVERAGE_USES = (
    ("average_tiles", "sum", (True, False, True, False, False)),
    ("average_tiles", "mean", (True, False, True, True, False)),
    ("average_tiles", "weights", (True, False, True, False, True)),
    ("add_tiles", "", (True, True, False, False, False)),
    ("add_tiles", "weights", (True, True, False, False, True)),
    ("step_tiles", "", (False, True, True, True, False)),
    ("step_tiles", "weights", (False, True, True, False, False)),
)
_EXTRACT_USES = {"plain": (False, False), "mean": (True, False), "weights": (False, True)}
"""A word for the label -> the constexprs MEAN, SHARES."""
_ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_ROWS, _WIDTH = 1024, 512
"""A large frame."""
_TILE_WIDTH = 64
"""Columns of the paper's tiles."""


def aot_specs() -> list[KernelSpec]:
    """Both kernels for every use, dtype and alignment."""
    return _extract_specs() + _average_specs()


def _extract_specs() -> list[KernelSpec]:
    specs = []
    for (name, size), (kind, (mean, shares)), aligned, width in itertools.product(
        _ELEMENT_BYTES.items(), _EXTRACT_USES.items(), (True, False), (_WIDTH, _TILE_WIDTH)
    ):
        pointers = {"video_ptr": f"*{name}", "out_ptr": f"*{name}", "origins_ptr": "*i32", "cover_ptr": "*i64"}
        pointers["shares_ptr"] = "*fp32"
        blocks = extract_blocks(_ROWS, width, 16 // size if aligned else 1)
        wide = "" if width == _WIDTH else f"w{width}"
        options = ",".join(filter(None, (name, kind, "" if aligned else "unaligned", wide)))
        constexprs = {"MEAN": mean, "SHARES": shares} | blocks
        specs.append(_spec(f"extract_tiles[{options}]", triton_kernels.extract_tiles_kernel, pointers, constexprs))
    return specs


def _average_specs() -> list[KernelSpec]:
    specs = []
    for (op, kind, flags), (name, size), has_x, aligned in itertools.product(
        _AVERAGE_USES, _ELEMENT_BYTES.items(), (False, True), (True, False)
    ):
        if op == "add_tiles" and has_x:
            continue
        out = "*fp32" if op == "add_tiles" else f"*{name}"
        pointers = {"tiles_ptr": f"*{name}", "sums_ptr": "*fp32", "x_ptr": f"*{name}", "out_ptr": out}
        pointers |= {"starts_ptr": "*i32", "cover_ptr": "*i64", "shares_ptr": "*fp32"}
        constexprs: dict[str, int] = dict(zip(("ADD", "SUMS", "FINISH", "MEAN", "SHARES", "HAS_X"), (*flags, has_x)))
        vector = 16 // (size if op == "average_tiles" else 4) if aligned else 1  # the sums are fp32
        constexprs |= average_blocks(_ROWS, _WIDTH, vector)
        options = ",".join(filter(None, (name, kind, "x" if has_x else "", "" if aligned else "unaligned")))
        specs.append(_spec(f"{op}[{options}]", triton_kernels.average_tiles_kernel, pointers, constexprs))
    return specs


def _spec(name: str, fn: Any, pointers: dict[str, str], constexprs: dict[str, int]) -> KernelSpec:
    """Pointers are aligned, strides int64, factors fp32, and all other arguments int32."""
    types = pointers | dict.fromkeys(("scale", "alpha", "beta"), "fp32") | dict.fromkeys(constexprs, "constexpr")
    signature = {arg: types.get(arg, "i64" if arg.startswith("stride_") else "i32") for arg in fn.arg_names}
    return KernelSpec(name, fn, signature, constexprs, aligned=tuple(pointers))
