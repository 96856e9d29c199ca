"""Decoding processes of a test's own, which may run with parts of them replaced."""

import pytest

from hpdm.data import _decode_worker, decode


@pytest.fixture
def worker(monkeypatch):
    """A decoding process of this test's own; what decord could not read before is forgotten."""
    fresh = decode._Worker()
    monkeypatch.setattr(decode, "_worker", fresh)
    monkeypatch.setattr(decode, "_decord_errors", {})
    yield fresh
    fresh.stop()


@pytest.fixture
def patch_worker(tmp_path, monkeypatch, worker):
    """Makes decoding processes from now on run ``code`` in the worker's module, named ``worker``, before they serve."""

    def patch(code):
        worker.stop()
        script = tmp_path / "patched_worker.py"
        script.write_text(
            "import importlib.util, os, signal, sys, time\n"
            f"spec = importlib.util.spec_from_file_location('worker', {_decode_worker.__file__!r})\n"
            "worker = sys.modules['worker'] = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(worker)\n"
            f"{code}\n"
            "worker.main()\n"
        )
        monkeypatch.setattr(decode._decode_worker, "__file__", str(script))

    return patch
