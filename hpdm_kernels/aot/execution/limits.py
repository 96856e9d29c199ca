"""How much memory traffic a configuration may have beyond the ideal, and why some have more."""

from __future__ import annotations

import re

from hpdm_kernels.aot.execution.coverage import Executed

SECTORS, WAVEFRONTS = 1.10, 1.25
"""Most sectors and wavefronts for each that would do."""

# Letter -> (configurations, reason), the first that matches a configuration.
REASONS: dict[str, tuple[str, str]] = {
    "a": (
        r"cross_attention_(fwd|bwd_q|bwd_kv)\[.*,d(12|24)\b",
        "heads of 12 and 24 elements: a row is shorter than what the threads of a warp load, several warps of a block "
        "load the same rows, and rows of 16 bits are loaded an element at a time. Presets have heads of 64",
    ),
    "b": (
        r"(cross_attention_(fwd|bwd_q|bwd_kv)|context_matmul|fuse_context_fwd)\[(fp32,)?ieee\b",
        "full fp32 products run without matrix units: in the layout that Triton gives their operands the threads of a "
        "warp read two to eight rows of a block at once. A tenth of these loads is left out by the assembler",
    ),
    "c": (
        r"(attention_fwd\[fp32,tf32x3,|attention_bwd_kv\[fp32,tf32,d96|context_matmul\[tf32(x3)?,(nn|tn)).* on sm_90",
        "Hopper takes operands of fp32 products only with the summed axis contiguous, so blocks are turned on the way "
        "to shared memory, 4 bytes at a time. In attention of one pass they are turned in registers up to width 64",
    ),
    "d": (
        r"(cross_attention_combine|context_contract)\[|modulated_norm_(fwd|bwd)\[fp32\+bf16"
        r"|(extract|average)_tiles\[(bf16|fp16),weights|group_|temporal_attention_bwd\[(bf16|fp16)",
        "numbers of fp32 and of 16 bits share a layout: a thread loads 32 bytes of fp32 in two requests; or "
        "a warp loads the few numbers that several rows share",
    ),
    "e": (
        r"(,any\]|unaligned|index=True)",
        "rows that are no multiple of 32 bytes, or begin between two: their first and last sectors are shared by two "
        "requests",
    ),
    "f": (
        r"sample_patches",
        "pixels of a patch lie apart in the video; what a request leaves the next one finds in the L1 cache",
    ),
    "g": (r"context_geometry", "one warp per sample and source writes a table of 16 numbers"),
    "h": (
        r"cross_attention_fwd\[fp32,tf32,d48,mask\] on sm_90",
        "the mask is read in the order of the keys that are turned, where neighbors are a quarter of a block apart",
    ),
}


def is_above(result: Executed) -> bool:
    """Whether a configuration has more traffic than the limits allow."""
    return result.sectors > SECTORS or result.wavefronts > WAVEFRONTS


def reason(result: Executed) -> str:
    """The letter of the reason why a configuration is above the limits; empty if there is none."""
    name = f"{result.kernel} on {result.target}"
    return next((letter for letter, (pattern, _) in REASONS.items() if re.search(pattern, name)), "")
