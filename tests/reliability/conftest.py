"""Commands in processes that may be killed, and the arguments of a training that takes a second."""

from pathlib import Path

import pytest

from tests.reliability.commands import Commands


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    with Commands(tmp_path_factory.mktemp("commands")) as running:
        yield running


@pytest.fixture(scope="session")
def training(clips) -> list:
    """The command line of a training without ``--out`` and ``--steps``, saved every two steps."""
    return [
        "train", "--data", clips, "--patch", 2, 8, 8, "--resolution", 8, 32, 32, "--batch", 4, "--micro-batch", 2,
        "--warmup", 2, "--optimizer", "adamw", "--lr", 1e-3, "--log-every", 1, "--save-every", 2, "--workers", 0,
        "--device", "cpu", "--kernels", "torch",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(commands, training, tmp_path_factory) -> Path:
    """A run of eight steps that nothing disturbed, with all its checkpoints."""
    out = tmp_path_factory.mktemp("trained") / "run"
    process = commands.run(*training, "--out", out, "--steps", 8, "--keep", 0)
    assert process.status() == 0, process.output()
    return out
