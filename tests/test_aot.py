"""Every kernel compiles for every supported GPU, without spills and within its shared memory."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hpdm_kernels import aot

pytestmark = pytest.mark.skipif(not aot._triton.AVAILABLE, reason="triton is not installed")


def run_aot(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one interprets the kernels, and an interpreted kernel cannot be compiled."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "hpdm_kernels.aot", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("target", aot.SHARED_MEMORY_LIMITS)
def test_every_kernel_compiles_without_spills(target: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    done = run_aot("--target", target, "--jobs", "1", "--json", str(file))
    assert done.returncode in (0, 1), done.stderr
    results = json.loads(file.read_text())
    expected = {spec.name for spec in aot.collect(aot.op_modules())}
    assert {r["kernel"] for r in results if r["target"] == target} == expected
    for r in results:
        assert r["problem"] == "", f"{r['kernel']} on {target}: {r['problem']}"
        assert r["stack"] == 0
        assert r["shared"] <= aot.SHARED_MEMORY_LIMITS[target]
        assert 0 < r["registers"] <= 255
    assert done.returncode == 0


def test_ops_are_found() -> None:
    found = aot.op_modules()
    for op in ("cross_attention", "context", "tiles", "patches"):
        assert any(module.startswith(f"hpdm_kernels.{op}") for module in found), f"no module of {op} has aot_specs()"


BAD_KERNELS = """
    import triton
    import triton.language as tl
    from hpdm_kernels._triton import KernelSpec

    @triton.jit
    def _product_kernel(a_ptr, b_ptr, out_ptr, steps, N: tl.constexpr, K: tl.constexpr):
        rows, inner = tl.arange(0, N), tl.arange(0, K)
        total = tl.zeros((N, N), tl.float32)
        for step in range(steps):
            a = tl.load(a_ptr + step * N * K + rows[:, None] * K + inner[None, :])
            b = tl.load(b_ptr + step * N * K + inner[:, None] * N + rows[None, :])
            total += tl.dot(a, b, input_precision="tf32")
        tl.store(out_ptr + rows[:, None] * N + rows[None, :], total)

    @triton.jit
    def _broken_kernel(out_ptr):
        tl.store(out_ptr, undefined_name)

    def spec(name, n, k, warps, stages):
        signature = {"a_ptr": "*fp32", "b_ptr": "*fp32", "out_ptr": "*fp32", "steps": "i32"}
        signature |= {"N": "constexpr", "K": "constexpr"}
        aligned = ("a_ptr", "b_ptr", "out_ptr")
        return KernelSpec(name, _product_kernel, signature, {"N": n, "K": k}, warps, stages, aligned)

    def aot_specs():
        return [
            spec("good", 32, 32, 4, 2),
            spec("spilling", 128, 32, 1, 2),
            spec("oversized", 128, 128, 8, 4),
            KernelSpec("broken", _broken_kernel, {"out_ptr": "*fp32"}),
        ]
"""


def test_bad_kernels_are_reported(tmp_path: Path) -> None:
    (tmp_path / "bad_kernels.py").write_text(textwrap.dedent(BAD_KERNELS))
    file = tmp_path / "results.json"
    arguments = ("--module", "bad_kernels", "--target", "sm_80", "--jobs", "1", "--json", str(file))
    done = run_aot(*arguments, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    problems = {r["kernel"]: r["problem"] for r in json.loads(file.read_text())}
    assert problems["good"] == ""
    assert "bytes of stack" in problems["spilling"]
    assert "bytes of shared memory, at most 166912" in problems["oversized"]
    assert "undefined_name" in problems["broken"] or "Error" in problems["broken"]
    assert "FAILED" in done.stdout
    assert run_aot(*arguments, "--filter", "good", PYTHONPATH=str(tmp_path)).returncode == 0


def test_interpreted_process_is_refused() -> None:
    done = run_aot(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


def test_filter_without_match_is_an_error() -> None:
    done = run_aot("--filter", "no such kernel")
    assert done.returncode == 2
    assert "no such kernel" in done.stderr


def test_loads_are_counted() -> None:
    ptx = """
        ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        @%p1 ld.global.L1::evict_last.b32 { %r5 }, [ %rd2 ];
        cp.async.cg.shared.global [ %r6 + 0 ], [ %rd3 + 0 ], 0x10, %r7;
        ld.shared.v4.b32 { %r8, %r9, %r10, %r11 }, [ %r12 ];
    """
    assert aot.count_loads(ptx) == (2, 3)
