"""How many variants of a kernel Triton compiles: sizes of tensors make none.

A variant costs a second of compiling in the first step that needs it. Triton makes one for every integer argument that
is 1 or a multiple of 16, unless the kernel says that the argument is not to be specialized.
"""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from hpdm_kernels import _triton

pytestmark = pytest.mark.skipif(not _triton.AVAILABLE, reason="triton is not installed")

# Launches are recorded instead of made, with the key by which Triton tells variants apart. In a process of its own:
# this one interprets the kernels, which have no keys.
SWEEP = """
    import collections, functools, itertools, json, types
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime import jit
    from hpdm_kernels.attention import packed, triton_backend

    keys = collections.defaultdict(set)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    @functools.cache
    def binder(kernel):
        return jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    def run(self, *args, grid, warmup, **options):
        keys[self.__name__].add(str(binder(self)(*args, **options)[1:]))
    jit.JITFunction.run = run
    gpu = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232_448)
    torch.cuda.get_device_properties = lambda device: gpu
    triton_backend._grid_split.__globals__["INTERPRETED"] = False

    for batch, heads, queries, n in itertools.product((1, 2), (1, 3, 16), (1, 100, 128), (1, 77, 1024)):
        q, k, v = (torch.empty(batch, rows, heads, 64).transpose(1, 2) for rows in (queries, n, n))
        for mask in (None, torch.ones(batch, n, dtype=torch.bool)):
            out, lse = triton_backend.forward(q, k, v, 0.125, "tf32", mask)
            triton_backend.backward(out, q, k, v, out, lse, 0.125, "tf32", mask)
            packed.backward(out, q, torch.stack([k, v]).permute(1, 3, 0, 2, 4), out, lse, 0.125, "tf32", mask)
    print(json.dumps({name: len(found) for name, found in keys.items()}))
"""
SPECIALIZE_ALL = """
from triton.runtime import jit
plain = jit.JITFunction.__init__
jit.JITFunction.__init__ = lambda self, fn, **options: plain(self, fn, **options | {"do_not_specialize": None})
"""


def variants(before: str = "") -> dict[str, int]:
    """Kernel to number of variants over a sweep of batches, heads, queries and keys; ``before`` is run first."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = before + textwrap.dedent(SWEEP)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


def test_sizes_make_no_variants_of_the_attention():
    """Only what a kernel's code depends on: whole blocks, partial blocks, a mask."""
    assert variants() == {
        "cross_attention_fwd_kernel": 3,
        "cross_attention_combine_kernel": 1,
        "cross_attention_bwd_q_kernel": 3,
        "cross_attention_bwd_kv_kernel": 3,
    }


def test_the_count_sees_variants():
    """With Triton's default the same sweep makes many."""
    counts = variants(SPECIALIZE_ALL)
    assert min(counts.values()) > 5
    assert sum(counts.values()) > 50
