"""The fuzzer finds nothing in the ops, and finds what is put there."""

import os

import pytest
import torch

from hpdm_kernels.attention import torch_backend as attention_backend
from hpdm_kernels.context import torch_backend as context_backend
from hpdm_kernels.context.geometry import source_positions
from hpdm_kernels.testing.__main__ import main
from hpdm_kernels.testing.fuzz import OPS, fuzz, try_seed
from hpdm_kernels.testing.wrong import is_clear

SECONDS = {"torch": 2.5, "triton": 1.1, "reference": 0.5}
LONGER = 40 if os.environ.get("HPDM_SOAK") == "all" else 1


def _told(failure):
    print(failure.problem)
    print(failure.replay())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors are on the CPU, where kernels need the interpreter")
@pytest.mark.parametrize("backend", SECONDS)
@pytest.mark.parametrize("op", OPS)
def test_random_configurations(op, backend, generator):
    report = fuzz(op, backend, seed=generator.initial_seed(), seconds=LONGER * SECONDS[backend], on_failure=_told)
    assert report.valid + report.spoiled > 0
    assert not report.failures


def _at_the_border(geometry, k):
    positions = source_positions(geometry, k)
    return positions._replace(start=positions.start.clamp(max=0))


FAULTS = {
    "log-sum-exps in the wrong base": ("read_tokens", attention_backend, "LOG2E", 1.0),
    "hidden keys are read": ("read_tokens", attention_backend, "_additive", lambda mask, dtype: None),
    "footprints begin at the border": ("sample_context", context_backend, "source_positions", _at_the_border),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found_and_replayed(fault, monkeypatch):
    op, module, name, replacement = FAULTS[fault]
    monkeypatch.setattr(module, name, replacement)
    failures = fuzz(op, "torch", configurations=400).failures
    assert failures
    assert f"--op {op} --backend torch --seed {failures[0].seed} --configurations 1" in failures[0].replay()
    assert try_seed(op, "torch", failures[0].seed) == (True, failures[0].problem)
    monkeypatch.undo()
    assert try_seed(op, "torch", failures[0].seed) == (True, None)


def test_what_an_op_swallows_is_found(monkeypatch):
    monkeypatch.setattr("hpdm_kernels.tiles.checks.check_number", lambda name, value: 1.0)
    problems = [f.problem for f in fuzz("average_tiles", "torch", configurations=400).failures]
    assert any(problem.startswith("beta: ") and problem.endswith(": accepted") for problem in problems)


def test_errors_must_name_the_argument():
    assert is_clear(ValueError("box: got shape (1, 2), expected [B, 6]"))
    assert is_clear(ValueError("sources[1]: got shape (1, 2), expected [B, 6]"))
    assert is_clear(ValueError("box: row 3 is [0.0], expected inside"))
    assert not is_clear(RuntimeError("box: got shape (1, 2)"))
    assert not is_clear(ValueError("shapes do not match"))
    assert not is_clear(TypeError("'NoneType' object has no attribute 'shape'"))


def test_command(capsys, monkeypatch):
    assert main(["fuzz", "--op", "extract_tiles", "project_sources", "--configurations", "10", "--seed", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["extract_tiles", "project_sources"]
    assert all(line.endswith(" 0 failed") for line in lines)
    monkeypatch.setattr(attention_backend, "LOG2E", 1.0)
    assert main(["fuzz", "--op", "read_tokens", "--configurations", "400"]) == 1
    assert "python -m hpdm_kernels.testing fuzz --op read_tokens --backend torch --seed" in capsys.readouterr().out
    assert main(["fuzz", "--configurations", "0"]) == 2
    assert "--configurations: got 0" in capsys.readouterr().err
    monkeypatch.setattr("hpdm_kernels._triton.INTERPRETED", False)
    assert main(["fuzz", "--backend", "triton"]) == 2
    assert "set TRITON_INTERPRET=1" in capsys.readouterr().err


def test_limits_are_needed():
    with pytest.raises(ValueError, match="op: got 'x'"):
        fuzz("x", "torch", configurations=1)
    with pytest.raises(ValueError, match="configurations: got no limit"):
        fuzz("extract_tiles", "torch")
