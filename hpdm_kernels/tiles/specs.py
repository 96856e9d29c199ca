"""The kernels of tiles in every configuration that is compiled ahead of time."""

from __future__ import annotations

import itertools
from typing import Any

from hpdm_kernels._triton import KernelSpec
from hpdm_kernels.tiles import triton_kernels
from hpdm_kernels.tiles.triton_backend import gpu_block

# Name of the op, a word for the label, and the constexprs ADD, SUMS, FINISH, MEAN.
_AVERAGE_USES = (
    ("average_tiles", "sum", (True, False, True, False)),
    ("average_tiles", "mean", (True, False, True, True)),
    ("add_tiles", "", (True, True, False, False)),
    ("step_tiles", "", (False, True, True, True)),
)
_ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def aot_specs() -> list[KernelSpec]:
    """Both kernels for every use, dtype and alignment."""
    return _extract_specs() + _average_specs()


def _extract_specs() -> list[KernelSpec]:
    specs = []
    for (name, size), mean, aligned in itertools.product(_ELEMENT_BYTES.items(), (False, True), (True, False)):
        pointers = {"video_ptr": f"*{name}", "out_ptr": f"*{name}", "origins_ptr": "*i32", "cover_ptr": "*i32"}
        blocks = _blocks(16 // size if aligned else 1)
        label = f"extract_tiles[{name},{'mean' if mean else 'plain'}{'' if aligned else ',unaligned'}]"
        specs.append(_spec(label, triton_kernels.extract_tiles_kernel, pointers, {"MEAN": mean} | blocks))
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
        pointers |= {"starts_ptr": "*i32", "cover_ptr": "*i32"}
        constexprs: dict[str, int] = dict(zip(("ADD", "SUMS", "FINISH", "MEAN", "HAS_X"), (*flags, has_x)))
        constexprs |= _blocks(16 // size if aligned else 1)
        options = ",".join(filter(None, (name, kind, "x" if has_x else "", "" if aligned else "unaligned")))
        specs.append(_spec(f"{op}[{options}]", triton_kernels.average_tiles_kernel, pointers, constexprs))
    return specs


def _spec(name: str, fn: Any, pointers: dict[str, str], constexprs: dict[str, int]) -> KernelSpec:
    """Pointers are aligned, strides int64, factors fp32, and all other arguments int32."""
    types = pointers | dict.fromkeys(("scale", "alpha", "beta"), "fp32") | dict.fromkeys(constexprs, "constexpr")
    signature = {arg: types.get(arg, "i64" if arg.startswith("stride_") else "i32") for arg in fn.arg_names}
    return KernelSpec(name, fn, signature, constexprs, aligned=tuple(pointers))


def _blocks(vector: int) -> dict[str, int]:
    """Block sizes for a large frame, and ``VECTOR``."""
    block_h, block_w = gpu_block(vector)
    return {"VECTOR": vector, "BLOCK_H": block_h, "BLOCK_W": block_w // vector}
