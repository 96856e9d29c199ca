"""Runs before any test module: kernels are interpreted where there is no GPU, allocations are poisoned.

With ``--execute-ptx=80`` or ``90`` kernels are not interpreted, but compiled for that GPU and executed on the CPU,
instruction by instruction (:mod:`hpdm_kernels.aot.execution`). This is for the tests of tests/kernels.

The fixtures here are shared by several folders. What takes seconds to make is made once per process (``pytest -n`` has
one set per worker) and must not be written to: copy it first.
"""

import gc
import os
import sys
from pathlib import Path

import pytest
import torch

# Triton decides at decoration, so this must come before the first import of hpdm_kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Pictures that a test decoded in this process hold swscale's threads. A forked process does not have these threads and
# would wait for them forever if it collected such a picture as garbage, so it must not collect what it inherits.
os.register_at_fork(after_in_child=gc.freeze)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--execute-ptx", type=int, choices=(80, 90), metavar="TARGET",
        help="execute the kernels as compiled for sm_80 or sm_90 on the CPU, instead of interpreting them",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--execute-ptx") is None:
        return
    if "hpdm_kernels" in sys.modules:
        raise pytest.UsageError(
            "--execute-ptx: got tests that import hpdm_kernels early, expected those of tests/kernels"
        )
    os.environ["TRITON_INTERPRET"] = "0"


@pytest.fixture(autouse=True, scope="session")
def _executed_kernels(request):
    """Under ``--execute-ptx`` every launch of every test is executed, and fails if anything is wrong with it."""
    target = request.config.getoption("--execute-ptx")
    if target is None:
        yield
        return
    from hpdm_kernels.aot.execution.launch import executing

    with executing(target):
        yield


@pytest.fixture(autouse=True)
def _ordinary_scheduling():
    """SVT-AV1, as root, gives the thread that encodes real-time priority, which later tests and processes keep."""
    yield
    if sys.platform == "linux" and os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@pytest.fixture(autouse=True, scope="session")
def _scans_of_these_tests(tmp_path_factory):
    """What the decoders remember of files stays out of the user's cache folder."""
    os.environ["HPDM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _poison():
    from hpdm_kernels.testing import poisoned_allocations

    with poisoned_allocations():
        yield


@pytest.fixture
def generator() -> torch.Generator:
    """Random inputs that differ in every run: the seed is drawn, and printed when a test fails."""
    seed = int(os.environ.get("HPDM_TEST_SEED", torch.seed() % 2**31))
    print(f"HPDM_TEST_SEED={seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def small_model():
    """A model of :func:`tests.small.small_config`, none of whose weights is zero."""
    from tests.small import random_model, small_config

    return random_model(small_config())


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """A folder with three mp4 clips of each of two classes, 12 frames of 32x32 pixels, with captions."""
    from hpdm.data.synthetic import render_synthetic

    folder = tmp_path_factory.mktemp("data") / "clips"
    return render_synthetic(folder, clips=3, frames=12, size=(32, 32), classes=["RedDisc", "GreenSquare"])


@pytest.fixture(scope="session")
def saved_run(clips, tmp_path_factory) -> Path:
    """The folder of a finished training run of :func:`tests.small.train_options`."""
    from hpdm.commands.train import train
    from hpdm_kernels.testing import poisoned_allocations
    from tests.small import train_options

    folder = tmp_path_factory.mktemp("saved") / "run"
    with poisoned_allocations():
        train(train_options(clips, folder))
    return folder
