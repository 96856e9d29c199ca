"""Validation of the arguments of temporal attention."""

from __future__ import annotations

from torch import Tensor

from hpdm_kernels._checks import check_tensor


def check_inputs(qkv: object, rel_k: object, rel_v: object) -> tuple[Tensor, Tensor, Tensor]:
    """Checks ``qkv [B, T, N, 3 h d]`` and two tables ``[2 R + 1, d]`` of any float dtype.

    Raises:
        TypeError: not a tensor, or no float.
        ValueError: wrong shape or device.
    """
    qkv = check_tensor("qkv", qkv, ("B", "T", "N", "3*h*d"))
    rel_k = check_tensor("rel_k", rel_k, ("2*R+1", "d"), like=("qkv", qkv), same_dtype=False)
    rows, width = rel_k.shape
    if rows % 2 == 0:
        raise ValueError(f"rel_k: got shape {tuple(rel_k.shape)}, expected an odd number of rows, distances -R to R")
    if qkv.shape[3] % (3 * width):
        raise ValueError(
            f"qkv: got shape {tuple(qkv.shape)}, expected a multiple of 3 * {width} channels: queries, keys and values "
            f"of heads as wide as the rows of rel_k"
        )
    rel_v = check_tensor("rel_v", rel_v, (rows, width), like=("qkv", qkv), same_dtype=False)
    return qkv, rel_k, rel_v
