"""The kernels of patch extraction in every configuration that is compiled ahead of time."""

from __future__ import annotations

from hpdm_kernels import reference
from hpdm_kernels._triton import KernelSpec
from hpdm_kernels.patches import triton_kernels
from hpdm_kernels.patches.triton_backend import GPU_BLOCK


def aot_specs() -> list[KernelSpec]:
    """Both kernels for every dtype, except the backward for uint8, which has no gradient."""
    sizes = dict.fromkeys(("C", "F", "H", "W", "out_f", "out_h", "out_w", "n_blocks_h", "n_blocks_w"), "i32")
    constexprs = dict.fromkeys(("SNAP", "BLOCK_H", "BLOCK_W"), "constexpr")
    values = {"SNAP": reference.EDGE_SNAP, "BLOCK_H": GPU_BLOCK[0], "BLOCK_W": GPU_BLOCK[1]}
    specs = []
    for name, source, result in (("fp32", "*fp32", "*fp32"), ("bf16", "*bf16", "*bf16"), ("fp16", "*fp16", "*fp16"),
                                 ("uint8", "*u8", "*fp32")):  # fmt: skip
        kernels = [("fwd", triton_kernels.sample_patches_fwd_kernel, "video", "out")]
        if name != "uint8":
            kernels.append(("bwd", triton_kernels.sample_patches_bwd_kernel, "grad", "dvideo"))
        for direction, kernel, read, written in kernels:
            signature = {f"{read}_ptr": source, "box_ptr": "*fp32", f"{written}_ptr": result}
            signature |= {f"stride_{read}_{a}": "i64" for a in "bcfhw"} | sizes | constexprs
            aligned = (f"{read}_ptr", "box_ptr", f"{written}_ptr")
            specs.append(KernelSpec(f"sample_patches_{direction}[{name}]", kernel, signature, values, aligned=aligned))
    return specs
