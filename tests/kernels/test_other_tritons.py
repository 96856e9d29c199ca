"""`make test-triton`: every kernel, compiled and executed with the versions of Triton that PyTorch's wheels bring.

They lie in folders of their own, one per version, and the library runs with each in processes of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpdm_kernels.aot import table as aot_table
from hpdm_kernels.aot.collect import collect, op_modules
from hpdm_kernels.aot.result import TARGETS, Result
from tests.kernels.other_tritons import NO_FENCE, OTHERS, problem

ROOT = Path(__file__).parents[2]
FOLDER = os.environ.get("HPDM_TRITONS", "")
pytestmark = [pytest.mark.skipif(not FOLDER, reason="make test-triton"), pytest.mark.slow]
versions = pytest.mark.parametrize("version", OTHERS)


def run(version: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs a module of this project with that Triton."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    env["PYTHONPATH"] = str(Path(FOLDER).resolve() / version)
    shown = subprocess.run(
        [sys.executable, "-c", "import triton; print(triton.__version__)"], env=env, capture_output=True, text=True
    )
    assert shown.stdout.strip() == version, shown.stderr
    return subprocess.run([sys.executable, "-m", *command], env=env, cwd=ROOT, capture_output=True, text=True)


@versions
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_and_keeps_its_matrix_unit(version, target, tmp_path):
    file = tmp_path / "results.json"
    done = run(version, "hpdm_kernels.aot", "--target", target, "--jobs", "1", "--json", str(file))
    assert done.returncode in (0, 1), done.stderr
    results = [Result(**r) for r in json.loads(file.read_text())]
    assert {r.kernel for r in results} >= {spec.name for spec in collect(op_modules()) if not spec.targets}
    assert {f"{r.kernel}: {problem(r, version)}" for r in results if problem(r, version)} == set()
    table = aot_table.read((ROOT / "docs" / "kernels.md").read_text(encoding="utf-8"))
    lost = aot_table.lost_instructions(table, results)
    # Some loops load ahead into registers with these versions, instead of by asynchronous copies.
    assert [line for line in lost if "async copies" not in line] == []
    assert all("fp32,tf32," in line for line in lost)


@versions
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_every_configuration_is_executed(version, target, tmp_path):
    file = tmp_path / "results.json"
    done = run(version, "hpdm_kernels.aot.execution", "--target", target, "--json", str(file))
    assert done.returncode in (0, 1), done.stderr
    out = json.loads(file.read_text())
    assert (out["failed"], out["missing"]) == (0, []), done.stdout
    without_fence = {r["kernel"] for r in out["executed"] if r["findings"]}
    if (version, target) == ("3.6.0", "sm_90"):
        assert all(text.startswith(NO_FENCE) for r in out["executed"] for text in r["findings"])
        assert all("bf16" in name or "fp16" in name for name in without_fence)
    else:
        assert without_fence == set()
    assert bool(out["faulty"]) == bool(without_fence)
