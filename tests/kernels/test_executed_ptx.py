"""The compiled kernels do on the CPU, instruction by instruction, what they should: the PTX of sm_80 and sm_90.

`make test` executes a few configurations of each op family and tries a sample of the mutations; `make test-ptx`
executes every shipped configuration, and runs the tests of the ops on compiled kernels instead of interpreted ones.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hpdm_kernels import _triton
from hpdm_kernels.aot.collect import collect, op_modules
from hpdm_kernels.aot.execution.__main__ import main

ROOT = Path(__file__).parents[2]
FEW = (
    "cross_attention[bf16,ieee,d48,mask]", "fuse_context[bf16,D=144", "sample_patches[uint8]", "average_tiles[fp16,x]",
    "extract_tiles[fp32,unaligned]", "adamw_step[bf16]", "lamb_step[fp32",
)  # fmt: skip
EVERYTHING = os.environ.get("HPDM_PTX") == "all"
everything = pytest.mark.skipif(not EVERYTHING, reason="make test-ptx")
pytestmark = [
    pytest.mark.skipif(not _triton.AVAILABLE, reason="triton is not installed"), pytest.mark.slow,
]  # fmt: skip


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one interprets the kernels, and an interpreted kernel cannot be compiled."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    return subprocess.run([sys.executable, "-m", *command], env=env, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(EVERYTHING, reason="all are executed")
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_some_configurations_are_executed(target, tmp_path):
    file = tmp_path / "results.json"
    done = run("hpdm_kernels.aot.execution", "--target", target, "--json", str(file), "--filter", *FEW)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(file.read_text())["executed"]
    assert len(results) >= 15
    assert {r["op"] for r in results} == {"attention", "context", "optimizer", "patches", "tiles"}
    assert all(r["instructions"] > 10 for r in results)
    # bf16 products run on the matrix unit; each of the two operands has at least 70 rows of 48 columns.
    flops = {r["kernel"].split("[")[0]: r["flops"] for r in results}
    assert flops["cross_attention_fwd"] >= 2 * 2 * (2 * 70 * 100 * 48)


@everything
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_every_configuration_is_executed(target, tmp_path):
    file = tmp_path / "results.json"
    done = run("hpdm_kernels.aot.execution", "--target", target, "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    out = json.loads(file.read_text())
    assert out["missing"] == []
    assert {r["kernel"] for r in out["executed"]} == {spec.name for spec in collect(op_modules())}


@pytest.mark.parametrize(("target", "part"), [(80, "products or pixels"), (90, "long_attention")])
def test_mutations_are_noticed(target, part):
    """Faults in compiled kernels are found: a sample here, all of them with HPDM_PTX=all."""
    selection = [] if EVERYTHING else ["-k", part]
    done = run("pytest", f"--execute-ptx={target}", "tests/kernels/test_ptx_mutations.py", "-p", "no:xdist", *selection)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@everything
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize(
    "file", ["cross_attention", "read_tokens", "context", "patches", "tiles", "tile_accumulator", "optimizer"]
)
def test_tests_of_the_ops_pass_on_compiled_kernels(target, file):
    done = run("pytest", f"--execute-ptx={target}", f"tests/kernels/test_{file}.py", "-p", "no:xdist")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_lists_every_configuration():
    """Of both targets; what was executed there is of the code of that day, and `make test-ptx` executes today's."""
    page = (ROOT / "docs" / "executed.md").read_text(encoding="utf-8")
    specs = [spec for spec in collect(op_modules()) if not spec.targets or {"sm_80", "sm_90"} & set(spec.targets)]
    assert set(re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)) == {spec.name for spec in specs}


def test_interpreted_process_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "hpdm_kernels.aot.execution"], env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "3/2"], "--part"), (["--filter", "no such case"], "no such case"),
        (["--save", "x.md", "--target", "sm_80"], "--save"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
