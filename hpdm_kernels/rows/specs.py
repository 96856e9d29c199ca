"""The kernels of the ops on rows in every configuration that is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

from hpdm_kernels._triton import KernelSpec
from hpdm_kernels.rows import triton_kernels
from hpdm_kernels.rows.block_sizes import COLUMNS, whole_rows

WIDTHS = (64, 1024, 4096)
"""Widths of rows with a tile of their own each: narrow ones, the presets', the widest."""
DTYPES = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16"}
_DTYPES_OF_ROWS = {name: (pointer, pointer) for name, pointer in DTYPES.items()} | {"fp32+bf16": ("*fp32", "*bf16")}
"""Rows and vectors of one dtype, or as under autocast, where what products give has 16 bits."""


def aot_specs() -> list[KernelSpec]:
    """Every kernel for every dtype and tile; with fp32 rows between 16-bit products as under autocast, too."""
    return [*_norms(), *_columns()]


def _norms() -> Iterator[KernelSpec]:
    forward = [f"{name}_ptr" for name in ("x", "branch", "gate", "shift", "scale", "out", "y", "mean", "rstd")]
    backward = [f"{name}_ptr" for name in (
        "grad", "grad_y", "y", "mean", "rstd", "scale", "branch", "gate", "dx", "dbranch", "sums",
    )]  # fmt: skip
    strides = {
        "fwd": ("x_b", "x_n", "branch_b", "branch_n", "gate_b", "shift_b", "scale_b"),
        "bwd": (
            "grad_b", "grad_n", "grad_y_b", "grad_y_n", "y_b", "y_n", "scale_b", "branch_b", "branch_n", "gate_b",
        ),
    }  # fmt: skip
    exact = {"mean_ptr", "rstd_ptr", "sums_ptr"}
    products = {"branch_ptr", "gate_ptr", "shift_ptr", "scale_ptr", "dbranch_ptr"}
    for label, (rows, between) in _DTYPES_OF_ROWS.items():
        for width in WIDTHS:
            tile = whole_rows(width)
            for direction, kernel, pointers in (
                ("fwd", triton_kernels.modulated_norm_fwd_kernel, forward),
                ("bwd", triton_kernels.modulated_norm_bwd_kernel, backward),
            ):
                signature = {p: "*fp32" if p in exact else between if p in products else rows for p in pointers}
                signature |= {f"stride_{s}": "i64" for s in strides[direction]}
                sizes = ("rows", "width", "blocks") if direction == "fwd" else ("rows", "width", "chunks", "chunk")
                signature |= dict.fromkeys(sizes, "i32")
                flags = ("BRANCH", "GATE") if direction == "fwd" else ("RESIDUAL", "GATE")
                if direction == "fwd":
                    signature["eps"] = "fp32"
                signature |= dict.fromkeys((*flags, "ROWS", "BLOCK_D"), "constexpr")
                aligned = (*pointers, *(f"stride_{s}" for s in strides[direction]), "width")
                for suffix, values in {"": (False, False), ",branch": (True, False), ",gate": (True, True)}.items():
                    yield KernelSpec(
                        f"modulated_norm_{direction}[{label},D={width}{suffix}]", kernel, signature,
                        dict(zip(flags, values)) | tile.blocks, num_warps=tile.num_warps, aligned=aligned,
                    )  # fmt: skip


def _columns() -> Iterator[KernelSpec]:
    for name, pointer in DTYPES.items():
        signatures = {
            "gated_residual_bwd": (
                dict.fromkeys(("grad_ptr", "branch_ptr", "gate_ptr", "dbranch_ptr"), pointer) | {"sums_ptr": "*fp32"},
                ("grad_b", "grad_n", "branch_b", "branch_n", "gate_b"), ("rows", "width", "chunks", "chunk"),
            ),
            "bias_gelu_fwd": (
                dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), pointer), ("x_n",), ("rows", "width"),
            ),
            "bias_gelu_bwd": (
                dict.fromkeys(("grad_ptr", "x_ptr", "bias_ptr", "dx_ptr"), pointer) | {"sums_ptr": "*fp32"},
                ("grad_n", "x_n"), ("rows", "width", "chunk"),
            ),
        }  # fmt: skip
        for kernel, (pointers, strides, sizes) in signatures.items():
            signature = pointers | {f"stride_{s}": "i64" for s in strides} | dict.fromkeys(sizes, "i32")
            signature |= dict.fromkeys(("ROWS", "BLOCK_D"), "constexpr")
            aligned = (*pointers, *(f"stride_{s}" for s in strides), "width")
            yield KernelSpec(
                f"{kernel}[{name}]", getattr(triton_kernels, f"{kernel}_kernel"), signature, dict(COLUMNS.blocks),
                num_warps=COLUMNS.num_warps, aligned=aligned,
            )  # fmt: skip
