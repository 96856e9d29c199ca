"""What is known of kernels that other versions of Triton compile than the one of docs/kernels.md."""

from hpdm_kernels.aot.result import Result

OTHERS = ("3.6.0", "3.7.1")
"""The versions that PyTorch's own wheels bring: torch 2.11 and 2.13."""

# Version -> kernels' names without what is in brackets -> bytes of stack that some of their configurations use at most,
# on any target. The block sizes are chosen for none with Triton 3.9; other compilers need a few registers more.
STACK = {
    "3.6.0": {
        "cross_attention_fwd": 48, "cross_attention_bwd_q": 16, "cross_attention_bwd_kv": 8, "sample_patches_fwd": 8,
        "context_matmul": 8,
    },
    "3.7.1": {
        "cross_attention_fwd": 48, "cross_attention_bwd_q": 8, "cross_attention_bwd_kv": 8, "sample_patches_bwd": 8,
        "add_tiles": 8, "average_tiles": 8,
    },
}  # fmt: skip

NO_FENCE = "wgmma reads what was written without fence.proxy.async"
"""What Triton 3.6 does in 16-bit attention on sm_90: no fence between copies to shared memory and the products of them.

PTX asks for one. On an H100 results were right and the same in every run.
"""


def problem(result: Result, version: str) -> str:
    """What is wrong with a compiled kernel beyond the stack that is known of ``version``."""
    stack = f"{result.stack} bytes of stack"
    known = 0 < result.stack <= STACK.get(version, {}).get(result.kernel.split("[")[0], 0)
    return "" if known and result.problem == stack else result.problem
