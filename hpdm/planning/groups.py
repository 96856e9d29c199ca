"""Groups of operations by their names, for counts of memory traffic: what a step's bytes are moved for."""

from __future__ import annotations

import functools

PRODUCTS, ATTENTION, CONTEXT, NORMS, GELU, COPIES, OPTIMIZER, REST = GROUPS = (
    "products", "attention", "context", "norms and modulation", "GELU", "copies", "optimizer", "rest",
)  # fmt: skip
"""Everything in clipping, the optimizer and the moving averages belongs to the optimizer, whatever its name."""

_BY_PART = (
    (ATTENTION, ("attention", "read_tokens", "softmax")),
    (CONTEXT, ("context", "project_source", "sample_patches")),
    (GELU, ("gelu",)),
    (NORMS, ("norm", "modul", "residual")),
)
"""A group whose operations have one of these texts in their names; the first that fits counts."""
_BY_NAME = (
    (PRODUCTS, {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "linear", "matmul"}),
    (PRODUCTS, {"convolution", "convolution_backward"}),
    # Scale, shift, gate and residual sum, and their gradients, which the last sums over tokens.
    (NORMS, {"mul", "mul_", "add", "add_", "addcmul", "addcmul_", "sum"}),
    (COPIES, {"cat", "stack", "clone", "copy_", "_to_copy", "expand_copy", "repeat", "constant_pad_nd"}),
    (COPIES, {"replication_pad3d", "replication_pad3d_backward"}),
)


@functools.cache
def group_of(name: str) -> str:
    """The group of an operation outside of the optimizer, by its name, such as ``aten::addmm``."""
    short = name.rpartition("::")[2].partition(".")[0]
    for group, parts in _BY_PART:
        if any(part in short for part in parts):
            return group
    return next((group for group, names in _BY_NAME if short in names), REST)
