"""The context kernels in every shipped configuration, for ahead-of-time compilation by :mod:`hpdm_kernels.aot`."""

from __future__ import annotations

import itertools
from typing import Any

from hpdm_kernels._backend import PRECISIONS
from hpdm_kernels._triton import KernelSpec
from hpdm_kernels.context import triton_kernels as kernels
from hpdm_kernels.context.block_sizes import ADD_CONTEXT, CONTRACT, FUSE_CONTEXT, PRODUCT, ROWS, SUMS, ContextTile, Tile
from hpdm_kernels.context.triton_backend import SOURCES_PER_LAUNCH

DTYPES = ("fp32", "bf16", "fp16")

# Types of arguments that are the same in all kernels; other pointers are of the data's dtype, other numbers i32.
_TYPES = {
    "share": "fp32",
    "plan_ptr": "*i32",
    "address_table_ptr": "*i64",
    "box_ptr": "*fp32",
    **{f"source_box_{i}_ptr": "*fp32" for i in range(SOURCES_PER_LAUNCH)},
    **{f"address_{i}": "i64" for i in range(SOURCES_PER_LAUNCH)},
}


def aot_specs() -> list[KernelSpec]:
    """Every kernel, dtype and entry of the tables of block sizes."""
    return [*_table_specs(), *_row_specs(), *_product_specs()]


def _table_specs() -> list[KernelSpec]:
    """The kernel that writes the tables that the other kernels read."""
    specs = []
    for index in ("none", "i32", "i64"):
        types = {"index_ptr": "*fp32" if index == "none" else f"*{index}"}
        constants: dict[str, Any] = {"HAS_INDEX": index != "none"}
        specs.append(_spec("context_geometry", index, "fp32", constants, Tile(0, 0, num_warps=1), types))
    return specs


def _row_specs() -> list[KernelSpec]:
    """Kernels that move and sum rows of tokens, for each dtype."""
    specs = []
    for dtype in DTYPES:
        rows = {"BLOCK_T": ROWS.rows, "BLOCK_D": ROWS.columns}
        specs.append(_spec("context_gather", dtype, dtype, rows, ROWS))
        for flag in (False, True):
            specs.append(_spec("context_scatter", f"{dtype},index={flag}", dtype, {"HAS_INDEX": flag, **rows}, ROWS))
        for aligned, flag in itertools.product((True, False), repeat=2):
            tile = ADD_CONTEXT[4 if dtype == "fp32" else 2, aligned]
            constants = {"ONTO": flag, "HAS_BIAS": flag, "HAS_COORDINATES": flag, "ALIGNED": aligned, **tile.blocks}
            label = f"{dtype},{'onto' if flag else 'alone'},{'aligned' if aligned else 'any'}"
            specs.append(_spec("add_context", label, dtype, constants, tile, aligned=aligned))
        blocks = {"BLOCK_T": SUMS.rows, "BLOCK_D": SUMS.columns}
        specs.append(_spec("coordinate_sums", dtype, dtype, blocks, SUMS, {"out_ptr": "*fp32"}))
        for axis in range(3):
            constants = {"AXIS": axis, "MEAN": axis == 0, "BLOCK_R": CONTRACT.rows, "BLOCK_D": CONTRACT.columns}
            # Width comes first and reads the output's gradient, frames come last and write the footprint's. Between
            # them are fp32 temporaries.
            types = {"grad_ptr": f"*{dtype}" if axis == 2 else "*fp32", "out_ptr": "*fp32" if axis else f"*{dtype}"}
            specs.append(_spec("context_contract", f"{dtype},axis{axis}", dtype, constants, CONTRACT, types))
    return specs


def _product_specs() -> list[KernelSpec]:
    """Kernels with matrix products, for each precision."""
    # The layouts that are launched; each operand has one dimension of stride 1. nt: rows @ weight.T, nn: rows @ weight,
    # tn: rows.T @ rows.
    unit_strides = {
        "nt": ("stride_a_k", "stride_b_k"),
        "nn": ("stride_a_k", "stride_b_n"),
        "tn": ("stride_a_m", "stride_b_n"),
    }
    specs = []
    for precision in PRECISIONS:
        product = PRODUCT[precision]
        blocks = {"BLOCK_M": product.rows, "BLOCK_N": product.columns, "BLOCK_K": product.inner}
        for layout, strides in unit_strides.items():
            constants: dict[str, Any] = {"PRECISION": precision, **dict.fromkeys(strides, 1), **blocks}
            specs.append(_spec("context_matmul", f"{precision},{layout}", "fp32", constants, product))
        tile = FUSE_CONTEXT[precision]
        for flag in (False, True):
            constants = {"HAS_BIAS": flag, "HAS_COORDINATES": flag, "PRECISION": precision, "BLOCK_K": tile.inner}
            label = f"{precision},{'extras' if flag else 'plain'}"
            specs.append(_spec("fuse_context_fwd", label, "fp32", {**constants, **tile.blocks}, tile))
    return specs


def _spec(
    kernel: str,
    label: str,
    dtype: str,
    constexprs: dict[str, Any],
    tile: Tile | ContextTile,
    types: dict[str, str] | None = None,
    aligned: bool = True,
) -> KernelSpec:
    """One kernel. Argument types follow from their names, unless ``types`` lists them.

    ``aligned``: widths and strides are multiples of 16. Pointers always are.
    """
    fn = getattr(kernels, f"_{kernel}_kernel")
    types = {**_TYPES, **(types or {}), **dict.fromkeys(constexprs, "constexpr")}
    signature = {name: types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32") for name in fn.arg_names}
    widths = ("D", *(("M", "N", "K") if kernel == "context_matmul" else ()))
    if kernel != "context_geometry":  # which multiplies by strides, but loads no rows
        widths += tuple(name for name in signature if name.startswith("stride_") and name not in constexprs)
    hints = tuple(name for name, kind in signature.items() if kind.startswith("*") or (aligned and name in widths))
    return KernelSpec(f"{kernel}[{label}]", fn, signature, constexprs, tile.num_warps, tile.num_stages, hints)
