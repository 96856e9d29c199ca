"""The cases of all files of checks as pytest tests: ``pytest benchmarks/gpu`` on a machine with a CUDA device."""

import pytest
import torch

from benchmarks.gpu.cases import FILES, cases_of, run

CASES = [pytest.param(case, id=name.removeprefix("benchmarks/gpu/")) for file in FILES for name, case in cases_of(file)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_case(case, device, record_property):
    result = run(case, device)
    for name in {"error_of_budget", "repeats"} & result.keys():
        record_property(name, result[name])
    if result["outcome"] == "skipped":
        pytest.skip(result["message"])
    assert result["outcome"] == "passed", result["message"]
