"""RIN's attention: latents read tokens, tokens read latents (HPDM Fig. 11).

``out = softmax(q @ k.T * scale) @ v`` for ``q, out [B,h,M,d]`` and ``k, v [B,h,N,d]``. The forward kernel reads q and
writes out once, and reads k and v once per block of queries (from L2: a head's blocks run side by side); a plain
softmax also writes and reads ``[B,h,M,N]`` several times. Saved beside inputs and output: the log-sum-exp, fp32
``[B,h,M]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hpdm_kernels import _backend, reference
from hpdm_kernels import cross_attention_kernels as kernels
from hpdm_kernels._checks import check_tensor
from hpdm_kernels._triton import INTERPRETED, KernelSpec, triton

MAX_HEAD_WIDTH = 128
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

LOG2E = 1.4426950408889634
COMBINE_ROWS = 16


@dataclass(frozen=True)
class _Tiling:
    """Block sizes of one kernel: queries, keys, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (kernel, products) -> tilings for head widths up to 32, up to 64, and above. Each is the largest found that needs no
# stack and fits the shared memory of sm_80, sm_90 and sm_100 (Triton 3.9). At width 64 those of 16 bits and of one TF32
# pass run HGMMA on sm_90, and two programs share a multiprocessor where registers allow it.
_TILINGS = {
    ("fwd", "16bit"): (_Tiling(128, 64, 8, 3), _Tiling(128, 64, 8, 3), _Tiling(128, 64, 8, 3)),
    ("fwd", "tf32"): (_Tiling(128, 32, 8, 3), _Tiling(128, 64, 8, 3), _Tiling(128, 32, 8, 2)),
    ("fwd", "tf32x3"): (_Tiling(128, 32, 8, 2), _Tiling(64, 32, 8, 2), _Tiling(32, 32, 8, 2)),
    ("fwd", "ieee"): (_Tiling(64, 32, 8, 2), _Tiling(64, 32, 8, 2), _Tiling(32, 32, 8, 2)),
    ("bwd_q", "16bit"): (_Tiling(128, 64, 8, 2), _Tiling(128, 64, 8, 2), _Tiling(64, 64, 8, 2)),
    ("bwd_q", "tf32"): (_Tiling(128, 32, 8, 2), _Tiling(128, 32, 8, 2), _Tiling(64, 32, 8, 2)),
    ("bwd_q", "tf32x3"): (_Tiling(64, 32, 8, 2), _Tiling(32, 64, 8, 2), _Tiling(16, 32, 8, 2)),
    ("bwd_q", "ieee"): (_Tiling(32, 32, 8, 2), _Tiling(64, 32, 8, 2), _Tiling(64, 32, 8, 2)),
    ("bwd_kv", "16bit"): (_Tiling(64, 128, 8, 2), _Tiling(64, 128, 8, 2), _Tiling(64, 64, 8, 2)),
    ("bwd_kv", "tf32"): (_Tiling(32, 64, 4, 2), _Tiling(32, 64, 8, 2), _Tiling(32, 32, 8, 2)),
    ("bwd_kv", "tf32x3"): (_Tiling(32, 16, 4, 2), _Tiling(32, 16, 8, 2), _Tiling(32, 16, 8, 2)),
    ("bwd_kv", "ieee"): (_Tiling(32, 32, 8, 2), _Tiling(32, 32, 8, 2), _Tiling(16, 64, 8, 2)),
}


def _products_of(dtype: torch.dtype, precision: str) -> str:
    """The table's second key."""
    return precision if dtype is torch.float32 else "16bit"


def _tiling(kernel: str, products: str, block_d: int) -> _Tiling:
    """Block sizes of ``kernel`` (``"fwd"``, ``"bwd_q"``, ``"bwd_kv"``); see :data:`_TILINGS`."""
    if INTERPRETED:  # milliseconds per iteration whatever its size: few, large ones
        return _Tiling(128, 128, 1, 1)
    return _shipped_tiling(kernel, products, block_d)


def _shipped_tiling(kernel: str, products: str, block_d: int) -> _Tiling:
    return _TILINGS[kernel, products][(block_d > 32) + (block_d > 64)]


def _grid_split(device: torch.device, programs: int, steps: int) -> tuple[int, int]:
    """Into how many ranges the walk over ``steps`` blocks is cut, and the blocks of one range.

    Two programs per multiprocessor hide each other's waits; a range of fewer than four blocks would spend its time on
    loading the rows it holds. No range is empty.
    """
    # Interpreted, the count is made up so that small tests cut their walks as well.
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    shortest = 1 if INTERPRETED else 4
    splits = max(1, min(2 * processors // programs, steps // shortest))
    per_split = triton.cdiv(steps, splits)
    return triton.cdiv(steps, per_split), per_split


def _strides(*tensors: Tensor) -> list[int]:
    return [n for t in tensors for n in t.stride()[:3]]


def _new_rows(like: Tensor, dtype: torch.dtype | None = None, splits: int | None = None) -> Tensor:
    """An empty ``[B, h, rows, d]`` laid out as ``[B, rows, h, d]``: merging the heads afterwards is a view."""
    batch, heads, rows, width = like.shape
    lead = (batch,) if splits is None else (splits, batch)
    return like.new_empty(*lead, rows, heads, width, dtype=dtype).transpose(-2, -3)


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, precision: str, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``out`` like ``q`` and the log-sum-exp ``[B, h, M]`` in base 2."""
    q, k, v = map(_unit_stride, (q, k, v))
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    block_d = max(16, triton.next_power_of_2(width))
    tile = _tiling("fwd", _products_of(q.dtype, precision), block_d)
    blocks = triton.cdiv(queries, tile.block_m) * batch * heads
    splits, per_split = _grid_split(q.device, blocks, triton.cdiv(keys, tile.block_n))
    out, lse = _new_rows(q), q.new_empty(batch, heads, queries, dtype=torch.float32)
    part, part_lse = out, lse
    if splits > 1:
        part, part_lse = _new_rows(q, torch.float32, splits), lse.new_empty(splits, *lse.shape)
    kernels.cross_attention_fwd_kernel[(blocks * splits,)](
        q, k, v, _mask_bytes(key_mask), part, part_lse,
        *_strides(q, k, v),
        batch, heads, queries, keys, per_split * tile.block_n, scale * LOG2E,
        WIDTH=width, BLOCK_D=block_d, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        EVEN=_even(queries, keys, key_mask, tile), PRECISION=precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if splits > 1:
        block_m = COMBINE_ROWS
        kernels.cross_attention_combine_kernel[(triton.cdiv(queries, block_m) * batch * heads,)](
            part, part_lse, out, lse, batch, heads, queries, splits, WIDTH=width, BLOCK_D=block_d, BLOCK_M=block_m
        )
    return out, lse


def launch_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    precision: str,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k``, ``v``. Those of some of the keys need ``out`` and ``lse`` of all of them."""
    grad, q, k, v, out = map(_unit_stride, (grad, q, k, v, out))
    lse, mask = lse.contiguous(), _mask_bytes(key_mask)
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    block_d = max(16, triton.next_power_of_2(width))
    products = _products_of(q.dtype, precision)
    delta = torch.empty_like(lse)

    tile = _tiling("bwd_q", products, block_d)
    blocks = triton.cdiv(queries, tile.block_m) * batch * heads
    splits, per_split = _grid_split(q.device, blocks, triton.cdiv(keys, tile.block_n))
    part_q = _new_rows(q, torch.float32 if splits > 1 else q.dtype, splits)
    kernels.cross_attention_bwd_q_kernel[(blocks * splits,)](
        grad, q, k, v, mask, out, lse, delta, part_q,
        *_strides(grad, q, k, v, out),
        batch, heads, queries, keys, per_split * tile.block_n, scale, scale * LOG2E,
        WIDTH=width, BLOCK_D=block_d, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        EVEN=_even(queries, keys, key_mask, tile), PRECISION=precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    grad_q = _sum_parts(part_q, q.dtype)

    tile = _tiling("bwd_kv", products, block_d)
    blocks = triton.cdiv(keys, tile.block_n) * batch * heads
    splits, per_split = _grid_split(q.device, blocks, triton.cdiv(queries, tile.block_m))
    part_k, part_v = (_new_rows(k, torch.float32 if splits > 1 else k.dtype, splits) for _ in range(2))
    kernels.cross_attention_bwd_kv_kernel[(blocks * splits,)](
        grad, q, k, v, mask, lse, delta, part_k, part_v,
        *_strides(grad, q, k, v),
        batch, heads, queries, keys, per_split * tile.block_m, scale, scale * LOG2E,
        WIDTH=width, BLOCK_D=block_d, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        EVEN=_even(queries, keys, key_mask, tile), PRECISION=precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return grad_q, _sum_parts(part_k, k.dtype), _sum_parts(part_v, k.dtype)


def _even(queries: int, keys: int, key_mask: Tensor | None, tile: _Tiling) -> bool:
    """Whether every block is whole and every key may be read, so that a kernel without masks will do."""
    return key_mask is None and queries % tile.block_m == 0 and keys % tile.block_n == 0


def _mask_bytes(key_mask: Tensor | None) -> Tensor | None:
    return None if key_mask is None else key_mask.contiguous().view(torch.uint8)


def _sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    if parts.shape[0] == 1:
        return parts[0]
    # A reduction over the leading axis adds in a fixed order; over contiguous memory it keeps the layout.
    return parts.transpose(-2, -3).sum(dim=0).to(dtype).transpose(-2, -3)


@torch.library.custom_op("hpdm::cross_attention_fwd", mutates_args=())
def _cross_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, precision: str, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``out [B,h,M,d]`` and the base-2 log-sum-exp of the scaled scores ``[B,h,M]``."""
    with torch.cuda.device_of(q):
        return launch_forward(q, k, v, scale, precision, key_mask)


@_cross_attention_fwd.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, scale: float, precision: str, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return _new_rows(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("hpdm::cross_attention_bwd", mutates_args=())
def _cross_attention_bwd(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    precision: str,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``."""
    with torch.cuda.device_of(q):
        return launch_backward(grad, q, k, v, out, lse, scale, precision, key_mask)


@_cross_attention_bwd.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    precision: str,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_rows(q), _new_rows(k), _new_rows(k)


def _unit_stride(x: Tensor) -> Tensor:
    """The kernels read rows of adjacent elements; any other stride of the last axis costs a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, ctx.precision, key_mask = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, key_mask)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, key_mask = ctx.saved_tensors
    return (*_cross_attention_bwd(grad, *tensors, ctx.scale, ctx.precision, key_mask), None, None, None)


_cross_attention_fwd.register_autograd(_backward, setup_context=_setup_context)


# Counted as PyTorch counts its own fused attention: two products forward; backward five, the scores recomputed once.
@register_flop_formula(torch.ops.hpdm.cross_attention_fwd)
def _fwd_flops(q_shape: Any, k_shape: Any, *args: Any, **kwargs: Any) -> int:
    batch, heads, queries, width = q_shape
    return 2 * 2 * batch * heads * queries * k_shape[2] * width


@register_flop_formula(torch.ops.hpdm.cross_attention_bwd)
def _bwd_flops(grad_shape: Any, q_shape: Any, k_shape: Any, *args: Any, **kwargs: Any) -> int:
    batch, heads, queries, width = q_shape
    return 5 * 2 * batch * heads * queries * k_shape[2] * width


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    precision: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of ``M`` queries to ``N`` keys, ``softmax(q @ k.T * scale) @ v`` (HPDM Fig. 11; RIN's read and write).

    Args:
        q: ``[B, h, M, d]`` queries; float16, bfloat16, float32, or float64 (``reference`` and ``torch`` alone). Any
            strides: a view into a fused projection is read in place.
        k: ``[B, h, N, d]`` keys, dtype and device of ``q``. ``d`` is at most 128.
        v: ``[B, h, N, d]`` values.
        scale: factor of the scores, any finite number; default ``1 / sqrt(d)``.
        key_mask: ``[B, N]`` bool, true where a key may be read (texts differ in length); ``None``: all may. Hidden keys
            and values get no gradient; they must be finite, since zero times NaN is NaN.
        precision: how the kernels take fp32 products: ``"ieee"``, ``"tf32x3"``, ``"tf32"``; ``None`` follows
            :func:`torch.get_float32_matmul_precision`. ``reference`` and ``torch`` leave it to PyTorch.
        backend: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``[B, h, M, d]`` of ``q``'s dtype. Gradients flow to ``q``, ``k`` and ``v``. A sample that may read no key gives
        zeros and zero gradients.

    Raises:
        TypeError: an argument is not a tensor, its dtype is no float or not ``q``'s, ``key_mask`` is not bool, or
            ``scale`` is no number.
        ValueError: wrong rank, sizes or device; ``scale`` not finite; unknown ``precision`` or ``backend``.
        RuntimeError: ``backend="triton"`` where the kernels cannot run.
    """
    check_tensor("q", q, ("B", "h", "M", "d"))
    batch, heads, _, width = q.shape
    if width > MAX_HEAD_WIDTH:
        raise ValueError(f"q: got head width {width}, expected at most {MAX_HEAD_WIDTH}")
    check_tensor("k", k, (batch, heads, "N", width), like=("q", q))
    check_tensor("v", v, tuple(k.shape), like=("q", q))
    if key_mask is not None:
        check_tensor("key_mask", key_mask, (batch, k.shape[2]), dtypes=(torch.bool,), like=("q", q), same_dtype=False)
    scale = _check_scale(scale, width)
    precision = _backend.resolve_precision(precision)
    chosen = _backend.resolve(backend, "cross_attention", q, TRITON_DTYPES)
    if chosen == "reference":
        return reference.cross_attention(q, k, v, scale, key_mask)
    if chosen == "torch":
        mask = None if key_mask is None else key_mask[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    # The products of 16-bit inputs are exact in fp32: one kernel whatever the setting.
    return _cross_attention_fwd(q, k, v, scale, precision if q.dtype is torch.float32 else "ieee", key_mask)[0]


def _check_scale(scale: object, width: int) -> float:
    if scale is None:
        return width**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: got {scale!r}, expected None or a finite number")
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, expected a finite number")
    return float(scale)


_KERNELS = {
    "fwd": kernels.cross_attention_fwd_kernel,
    "bwd_q": kernels.cross_attention_bwd_q_kernel,
    "bwd_kv": kernels.cross_attention_bwd_kv_kernel,
    "combine": kernels.cross_attention_combine_kernel,
}


def aot_specs() -> list[KernelSpec]:
    """Every kernel at every entry of the table, for blocks that are not whole and for hidden keys; and for whole blocks
    at head width 64, the presets'.
    """
    dtypes = [("fp32", p) for p in ("ieee", "tf32x3", "tf32")] + [("bf16", "ieee"), ("fp16", "ieee")]
    specs = []
    for kernel, (dtype, precision), block_d in product(("fwd", "bwd_q", "bwd_kv"), dtypes, (16, 32, 64, 128)):
        tile = _shipped_tiling(kernel, precision if dtype == "fp32" else "16bit", block_d)
        for even, masked in ((False, False), (False, True), *([(True, False)] if block_d == 64 else [])):
            width = block_d if even else block_d * 3 // 4
            constexprs = {
                "WIDTH": width, "BLOCK_D": block_d, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
                "EVEN": even, "PRECISION": precision,
            }  # fmt: skip
            if not masked:
                constexprs["mask_ptr"] = None
            label = f"{dtype},{precision},d{width}{',mask' * masked}"
            specs.append(_spec(kernel, label, dtype, constexprs, tile.num_warps, tile.num_stages))
    for dtype, block_d in product(("fp32", "bf16", "fp16"), (16, 32, 64, 128)):
        constexprs = {"WIDTH": block_d, "BLOCK_D": block_d, "BLOCK_M": COMBINE_ROWS}
        specs.append(_spec("combine", f"{dtype},d{block_d}", dtype, constexprs, 4, 2))
    return specs


def _spec(
    kernel: str, label: str, dtype: str, constexprs: dict[str, Any], num_warps: int, num_stages: int
) -> KernelSpec:
    fn = _KERNELS[kernel]
    signature, aligned = {}, []
    for name in fn.arg_names:
        if name in constexprs:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            always = {"lse": "fp32", "delta": "fp32", "part": "fp32", "part_lse": "fp32", "mask": "u8"}
            signature[name] = f"*{always.get(name.removesuffix('_ptr'), dtype)}"
            if name != "mask_ptr":
                aligned.append(name)
        elif name.startswith("stride_"):
            signature[name] = "i32"
            aligned.append(name)
        else:
            signature[name] = "fp32" if name.startswith("scale") else "i32"
    return KernelSpec(
        f"cross_attention_{kernel}[{label}]", fn, signature, constexprs, num_warps, num_stages, tuple(aligned)
    )
