"""Which backend runs, what is said when it cannot, and what importing the package costs."""

import logging
import re
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

from hpdm_kernels import _backend, _triton

FLOATS = (torch.float32, torch.bfloat16)
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_portable_backends_are_taken_as_asked(backend: str) -> None:
    assert _backend.resolve(backend, "op", torch.zeros(1, dtype=torch.float64), FLOATS) == backend


@pytest.mark.parametrize("backend", ["cuda", "", "Triton", None])
def test_unknown_backend(backend) -> None:
    with pytest.raises(ValueError, match=r"^backend: got .*expected one of 'auto', 'reference', 'torch', 'triton'"):
        _backend.resolve(backend, "op", torch.zeros(1), FLOATS)


@cpu_only
def test_auto_on_the_cpu_is_torch_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    _backend._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="hpdm_kernels"):
        for _ in range(3):
            assert _backend.resolve("auto", "some_op", torch.zeros(1), FLOATS) == "torch"
    assert [r.message for r in caplog.records] == [
        "some_op: backend='auto' chose 'torch': the tensors are not on a CUDA device"
    ]


@cpu_only
def test_triton_takes_fp32_under_the_interpreter() -> None:
    assert _triton.INTERPRETED
    assert _backend.resolve("triton", "op", torch.zeros(1), FLOATS) == "triton"


@cpu_only
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_triton_refuses_what_the_interpreter_gets_wrong(dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match=r"op: backend='triton' cannot run: .*right for float32"):
        _backend.resolve("triton", "op", torch.zeros(1, dtype=dtype), FLOATS)


@cpu_only
def test_triton_needs_the_interpreter_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        _backend.resolve("triton", "op", torch.zeros(1), FLOATS)


def test_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "AVAILABLE", False)
    monkeypatch.setattr(_triton, "IMPORT_ERROR", "No module named 'triton'")
    with pytest.raises(RuntimeError, match="triton is not importable"):
        _backend.resolve("triton", "op", torch.zeros(1), FLOATS)
    assert _backend.resolve("auto", "op", torch.zeros(1), FLOATS) == "torch"


class OnCuda(NamedTuple):
    """What :func:`resolve` looks at of a tensor, on a GPU that need not be present."""

    device = torch.device("cuda", 0)
    dtype: torch.dtype = torch.float32


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (6, 1), (8, 0), (8, 9), (9, 0), (12, 0)])
def test_gpus_that_are_too_old_are_refused(capability, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {"cuda:0": capability}[str(device)])
    if capability >= (8, 0):
        assert _backend.resolve("auto", "op", OnCuda()) == _backend.resolve("triton", "op", OnCuda()) == "triton"
        return
    reason = f"needs compute capability 8.0 or newer, got {capability[0]}.{capability[1]}"
    with pytest.raises(RuntimeError, match=rf"^op: backend='triton' cannot run: {re.escape(reason)}$"):
        _backend.resolve("triton", "op", OnCuda())
    assert _backend.resolve("auto", "op", OnCuda()) == "torch"


def test_the_capability_is_a_constant_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))

    def f(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if _backend._capability(x.device) < _backend.LEAST_CAPABILITY else x - 1

    x = torch.zeros(3)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="eager")(x), x + 1)


def test_other_devices_have_no_kernels() -> None:
    with pytest.raises(RuntimeError, match="no kernels for meta devices"):
        _backend.resolve("triton", "op", torch.zeros(1, device="meta"), FLOATS)
    assert _backend.resolve("auto", "op", torch.zeros(1, device="meta"), FLOATS) == "torch"


@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32"])
def test_precision_is_taken_as_asked(precision: str) -> None:
    assert _backend.resolve_precision(precision) == precision


@pytest.mark.parametrize(("setting", "precision"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_precision_follows_pytorch(setting: str, precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        assert _backend.resolve_precision(None) == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_unknown_precision() -> None:
    with pytest.raises(ValueError, match=r"^precision: got 'fp8'"):
        _backend.resolve_precision("fp8")


def test_resolving_does_not_break_graphs() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if _backend.resolve("auto", "compiled_op", x, FLOATS) == "torch" else x - 1

    x = torch.zeros(3)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="eager")(x), f(x))


def test_importing_the_package_does_not_import_the_compiler() -> None:
    """Dynamo and its imports take longer to load than this package, and only ``torch.compile`` needs them."""
    code = "import sys, torch, hpdm_kernels, hpdm_kernels.modules; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch._dynamo", "torch._inductor", "sympy"} & set(run.stdout.split())


def test_constants_are_marked_as_pytorch_marks_them() -> None:
    ours, theirs = _backend._constant_when_compiling(lambda: 0), torch.compiler.assume_constant_result(lambda: 0)
    assert vars(ours) == vars(theirs) != {}


def test_portable_ops_run_in_pytorch_whatever_the_backend() -> None:
    @_backend.custom_op("test_backend_double")
    def double(x: torch.Tensor, backend: str) -> torch.Tensor:
        assert backend == "torch"
        return 2 * x

    portable = _backend.PORTABLE.pop(torch.ops.hpdm.test_backend_double)
    assert double(torch.ones(2), "torch").tolist() == [2, 2]
    assert portable(torch.ones(2), "triton").tolist() == [2, 2]
    assert portable(torch.ones(2), backend="triton").tolist() == [2, 2]
