"""The kernels of the optimizers in every configuration that is compiled ahead of time."""

from __future__ import annotations

from hpdm_kernels._triton import KernelSpec
from hpdm_kernels.optimizer import triton_kernels as kernels
from hpdm_kernels.optimizer.triton_backend import GPU_BLOCK, NUM_WARPS, SUM_BLOCK

_TABLES = {"addresses_ptr": "*i64", "chunks_ptr": "*i32", "sizes_ptr": "*i64", "corrections_ptr": "*fp32"}
_RATES = {"rates_ptr": "*fp32"}
_FLAGS = {"ALIGNED": "constexpr", "BLOCK": "constexpr"}


def _floats(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "fp32")


def _spec(name: str, kernel: object, signature: dict[str, str], aligned: bool) -> KernelSpec:
    pointers = tuple(argument for argument in signature if argument.endswith("_ptr") and argument != "grad_ptr")
    values = {"ALIGNED": aligned, "BLOCK": GPU_BLOCK}
    return KernelSpec(name, kernel, signature | _FLAGS, values, num_warps=NUM_WARPS, aligned=pointers)


def aot_specs() -> list[KernelSpec]:
    """The passes for every dtype of gradients, with tensors at multiples of 16 bytes and anywhere; and the sums."""
    moments = _floats("rate1", "beta2", "rate2", "eps", "weight_decay")
    specs = []
    for aligned in (True, False):
        place = "" if aligned else ",unaligned"
        for dtype in ("fp32", "bf16", "fp16"):
            grad = {"scale_ptr": "*fp32", "apply_ptr": "*u1", "grad_ptr": f"*{dtype}"}
            adamw = _TABLES | _RATES | grad | {"n": "i32", "K": "i32"} | _floats("lr") | moments
            specs.append(_spec(f"adamw[{dtype}{place}]", kernels.adamw_kernel, adamw, aligned))
            lamb = _TABLES | grad | {"sums_ptr": "*fp32", "n": "i32", "grad_row": "i32"} | moments
            specs.append(_spec(f"lamb_moments[{dtype}{place}]", kernels.lamb_moments_kernel, lamb, aligned))
        apply = _TABLES | _RATES | {"apply_ptr": "*u1", "trust_ptr": "*fp32", "n": "i32", "K": "i32"}
        apply |= _floats("lr", "eps", "weight_decay")
        specs.append(_spec(f"lamb_apply[fp32{place}]", kernels.lamb_apply_kernel, apply, aligned))
    signature = {"sums_ptr": "*fp32", "begins_ptr": "*i32", "apply_ptr": "*u1", "out_ptr": "*fp32"}
    signature |= {"n": "i32", "C": "i32", "BLOCK": "constexpr"}
    pointers = tuple(name for name in signature if name.endswith("_ptr"))
    values = {"BLOCK": SUM_BLOCK}
    specs.append(
        KernelSpec(
            "lamb_sums[fp32]", kernels.sum_chunks_kernel, signature, values, num_warps=NUM_WARPS, aligned=pointers
        )
    )
    return specs
