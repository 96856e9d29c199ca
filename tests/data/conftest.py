"""Decoding processes of a test's own, which may run with parts of them replaced, and workers that are soon missed."""

import sys

import pytest
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from hpdm.data import decode, decoder_process


@pytest.fixture
def worker(monkeypatch):
    """A decoding process of this test's own; what decord could not read before is forgotten."""
    fresh = decoder_process.DecoderProcess()
    monkeypatch.setattr(decoder_process, "process", fresh)
    monkeypatch.setattr(decode, "_decord_fails", {})
    yield fresh
    fresh.stop()


@pytest.fixture
def patch_worker(tmp_path, monkeypatch, worker):
    """Makes decoding processes from now on run ``code``, in which their modules have their names, before they serve."""

    def patch(code):
        worker.stop()
        script = tmp_path / "patched_worker.py"
        script.write_text(
            "import os, signal, sys, time\n"
            "from hpdm.data.decoding import container, scan, server, with_decord, with_pyav\n"
            f"{code}\n"
            "server.main()\n"
        )
        monkeypatch.setattr(decoder_process, "COMMAND", [sys.executable, "-P", str(script)])

    return patch


@pytest.fixture
def quick_checks(monkeypatch):
    """PyTorch looks for workers that are dead after 0.2 s without a batch, instead of 5."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))
