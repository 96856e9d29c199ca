"""Files that are not what was written: flipped bits, swapped, zeroed, cut and planted files are noticed, every one."""

import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hpdm import runs
from hpdm.commands.train import train
from hpdm.integrity import DamagedError
from hpdm.training.checkpoint import list_checkpoints, read_state, verify
from tests.reliability.soak import generator, times
from tests.small import train_options as options


@pytest.fixture
def run(saved_run, tmp_path):
    return shutil.copytree(saved_run, tmp_path / "run")


def everything(run: Path) -> dict:
    """All that is read of a run's newest checkpoint and of its config."""
    checkpoint = list_checkpoints(run)[-1]
    config = runs.load_run_config(run)
    values = {"config": (config.config, config.classes, config.training), "state": verify(checkpoint)}
    for path in checkpoint.glob("*/*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                values[f"{path.parent.name}/{name}"] = file.get_tensor(name).numpy().tobytes()
    return values


def test_a_flipped_bit_anywhere_is_noticed(run):
    """In tensors, headers, state and config: refused, or (white space in JSON) without any effect."""
    random, good = generator("bits"), everything(run)
    checkpoint = list_checkpoints(run)[-1]
    files = [*checkpoint.glob("*/*.safetensors"), checkpoint / "state.json", run / "config.json"]
    refused = 0
    goal = times(80, 1000)
    for _ in range(goal):
        path = random.choice(files)
        contents = path.read_bytes()
        first = 0
        if path.suffix == ".safetensors":
            header = 8 + struct.unpack("<Q", contents[:8])[0]
            first, last = random.choice([(0, 8), (8, header), (header, len(contents))])
        else:
            last = len(contents)
        damaged = bytearray(contents)
        bit = random.randrange(8 * first, 8 * last)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert everything(run) == good, f"bit {bit} of {path}"
        except ValueError:
            refused += 1
        path.write_bytes(contents)
    assert everything(run) == good
    assert refused > 0.9 * goal


def replace_a_page(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    middle = len(contents) // 2
    contents[middle : middle + 512] = bytes(512)
    path.write_bytes(contents)


def swap_for_the_average(path: Path) -> None:
    other = path.parent.parent / "ema" / path.name
    assert other.stat().st_size == path.stat().st_size
    shutil.copy(other, path)


def swap_for_the_step_before(path: Path) -> None:
    checkpoints = sorted(path.parents[2].iterdir())
    shutil.copy(checkpoints[0] / "model" / path.name, path)


def plant(path: Path) -> None:
    shutil.copy(path, path.with_name("zzz.safetensors"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage", [replace_a_page, swap_for_the_average, swap_for_the_step_before, plant, cut, Path.unlink]
)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(clips, run, saved_run, caplog, damage):
    first, newest = list_checkpoints(run)
    (file,) = (newest / "model").iterdir()
    damage(file)
    with pytest.raises((DamagedError, FileNotFoundError), match="step-00000006"):
        runs.load(newest, weights="model")
    assert runs.load(run, weights="model").step == 3
    assert "taking step-00000003" in caplog.text
    train(options(clips, run))
    assert "it is now damaged-step-00000006, and the run goes on from step-00000003" in caplog.text
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "damaged-step-00000006", "step-00000003", "step-00000006",
    ]  # fmt: skip
    for p, q in zip(runs.load(run).model.parameters(), runs.load(saved_run).model.parameters()):
        assert torch.equal(p, q)
    assert first.exists()


def test_a_run_without_a_good_checkpoint_says_so(clips, run):
    for checkpoint in list_checkpoints(run):
        (checkpoint / "state.json").write_text('{"format": 3}')
    with pytest.raises(DamagedError, match=r"no checkpoint of .*run is usable: .*step-00000006.*step-00000003"):
        train(options(clips, run))
    assert len(list_checkpoints(run)) == 2
    with pytest.raises(DamagedError, match=r"state\.json"):
        runs.load(run)


def test_the_step_of_a_checkpoint_is_that_of_its_folder(run):
    newest = list_checkpoints(run)[-1]
    moved = newest.with_name("step-00000009")
    newest.rename(moved)
    with pytest.raises(DamagedError, match="step: got 6, expected 9 as the folder says"):
        read_state(moved)


def test_a_flipped_bit_in_an_exported_file_is_noticed(run, tmp_path):
    random, path = generator("exported"), tmp_path / "weights.safetensors"
    runs.export(run, path)
    good, contents = runs.load(path), path.read_bytes()
    for _ in range(times(30, 300)):
        bit = random.randrange(8 * len(contents))
        damaged = bytearray(contents)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            loaded = runs.load(path)
        except ValueError as error:
            assert path.name in str(error)  # noqa: PT017
        else:
            assert loaded[1:] == good[1:], f"bit {bit}"
            assert all(torch.equal(p, q) for p, q in zip(loaded.model.parameters(), good.model.parameters()))
