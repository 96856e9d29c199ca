"""A disk that is full, at every place where a command writes: one line, exit status 1, and nothing half-written.

The calls that make, flush and rename files fail one after another, by an audit hook and patched functions in the
command's process; what libraries in C and Rust write meets a small file system that really is full.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from hpdm import runs, systems
from hpdm.commands import unfinished
from hpdm.evaluation import real_statistics
from hpdm.evaluation.metrics import FeatureStatistics
from hpdm.evaluation.tables import Section, write_table
from hpdm.patch.system import PatchDiffusion
from hpdm.runs import RunConfig
from hpdm.text import EmbeddingInfo, EmbeddingStore
from hpdm.video import write_contact_sheet, write_video
from tests.disks import small_disk
from tests.hostile.runner import CRASHED, run, tree
from tests.hostile.soak import everything, seed
from tests.small import random_model, save_as_run, small_config

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def without_plan() -> None:
    """Leaves out the prediction of time and memory, which takes seconds and writes nothing."""
    PatchDiffusion.plan_line = lambda *_, **__: "no plan"


def fail_at(number: int, folder: str, counter: str) -> None:
    """Makes the ``number``-th call that writes into ``folder`` fail, and all later ones; counts them in a file."""
    without_plan()
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        descriptor = os.open(counter, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, b".")
        os.close(descriptor)
        if number and calls >= number:
            raise OSError(FULL.errno, FULL.strerror)

    def inside(path: object) -> bool:
        return isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(folder)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if inside(path) and isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                count()
        elif event in ("os.mkdir", "os.rename") and inside(arguments[0]):
            count()

    real = os.fsync

    def fsync(descriptor: int) -> None:
        count()
        real(descriptor)

    os.fsync = fsync
    sys.addaudithook(hook)


@pytest.fixture(scope="module")
def good(clips, tmp_path_factory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("good")
    about = {"stride": 1, "short": "error", "ema": [0.05]}
    model = random_model(small_config(classes=2).with_pyramid((2, 8, 8), (4, 16, 16)))
    save_as_run(model, root / "run", ["RedDisc", "GreenSquare"], about)
    runs.export(root / "run", root / "good.safetensors")
    one_level = {"conditioning": "none", "levels": 1, "levels_per_block": (1,), "known_frames": True}
    save_as_run(random_model(small_config(patch=(4, 8, 8), tokenizer=(1, 2, 2), **one_level)), root / "long", [], about)
    (root / "clips").symlink_to(clips)
    return root


TRAIN = (
    "--steps", "2", "--batch", "2", "--save-every", "1", "--log-every", "1", "--workers", "0", "--device", "cpu",
    "--patch", "2", "8", "8", "--resolution", "4", "16", "16", "--sample-every", "2", "--sample-steps", "1",
)  # fmt: skip
COMMANDS = {
    "export": lambda good, out: ["export", "--run", good / "run", "--out", out / "x.safetensors"],
    "sample": lambda good, out: [
        "sample", "--run", good / "run", "--out", out / "videos", "--count", "2", "--batch", "1", "--steps", "1",
        "--overlap", "none", "--device", "cpu",
    ],
    "sample long": lambda good, out: [
        "sample", "--run", good / "long", "--out", out / "videos", "--count", "2", "--batch", "1", "--steps", "1",
        "--frames", "70", "--known", "1", "--device", "cpu",
    ],
    "shard": lambda good, out: ["data", "shard", good / "clips", out / "shards", "--clips-per-shard", "4"],
    "shard anew": lambda good, out: ["data", "shard", good / "clips", out / "shards", "--resize", "16"],
    "synthetic": lambda good, out: [
        "data", "synthetic", out / "set", "--clips", "2", "--frames", "4", "--size", "16", "16",
    ],
    "evaluate": lambda good, out: [
        "evaluate", "--run", good / "run", "--data", good / "clips", "--clips", "2", "--bins", "1", "--json",
        out / "result.json", "--device", "cpu",
    ],
    "plan": lambda good, out: ["plan", "--preset", "tiny", "--json", out / "plan.json"],
    "train": lambda good, out: ["train", "--data", good / "clips", "--out", out / "run", *TRAIN],
}  # fmt: skip


def contents(folder: Path) -> dict[str, str]:
    """The hashes of all files below a folder, by name."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in tree(folder)}


@pytest.mark.parametrize("name", [name for name in COMMANDS if everything() or name != "plan"])
def test_a_disk_that_is_full_from_any_call_on(name, good, tmp_path):
    def attempt(number: int, label: str):
        folder = tmp_path / label
        (folder / "out").mkdir(parents=True)
        setup = partial(fail_at, number, str(folder / "out"), str(folder / "calls"))
        ended = run(COMMANDS[name](good, folder / "out"), folder, setup)
        return folder, ended

    folder, ended = attempt(0, "whole")
    assert (ended.status, ended.error_lines) == (0, [])
    whole, calls = contents(folder / "out"), (folder / "calls").stat().st_size
    assert calls >= 2
    numbers = range(1, calls + 1)
    if not everything():
        numbers = sorted({1, calls, 1 + random.Random(seed()).randrange(calls)})
    print(f"HPDM_SOAK_SEED={seed()}")
    for number in numbers:
        folder, ended = attempt(number, str(number))
        print(number, ended)
        assert "Traceback" not in ended.errors
        if ended.status == 0:  # what could not be written was the index beside a shard, which saves time and no more
            assert contents(folder / "out") == whole
            assert "the index is not saved" in ended.errors
            continue
        assert ended.status == 1
        (line,) = ended.error_lines
        assert line.startswith("hpdm: error: ")
        assert "No space left on device" in line
        left = contents(folder / "out")
        assert not [path for path in left if "/." in f"/{path}" and not path.startswith("videos/.unfinished/")], left
        if name == "train":
            check_run(folder / "out" / "run")
        else:
            assert {path for path in left if not path.startswith("videos/.unfinished/")} <= set(whole)
            changing = {"result.json", "plan.json"}  # hold times
            assert all(whole[path] == left[path] for path in left.keys() & whole.keys() if path not in changing)


def check_run(run_folder: Path) -> None:
    """The checkpoints that are listed can be read."""
    from hpdm.training.checkpoint import list_checkpoints

    for checkpoint in list_checkpoints(run_folder):
        runs.load(checkpoint)


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of its own, of which a part is taken by a file ``fill``."""
    with small_disk(tmp_path / "disk", 64) as place:
        yield place


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("plan", "evaluate")])
def test_a_disk_without_room(name, good, disk, tmp_path):
    ended = run(COMMANDS[name](good, disk), tmp_path / "work", without_plan)
    assert ended.status == 0
    whole = contents(disk)
    needed = sum((disk / path).stat().st_size for path in whole)
    for path in sorted(disk.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    for share in [n / 40 for n in range(39)] if everything() else (0.6,):
        room = -(-int(share * needed) // 4096) * 4096
        (disk / "fill").write_bytes(bytes((64 << 20) - room))
        ended = run(COMMANDS[name](good, disk), tmp_path / "work", without_plan)
        print(share, room, ended)
        assert ended.status in ((0, 1) if share > 0.9 else (1,))
        if ended.status == 1:
            assert ended.status != CRASHED
            (line,) = ended.error_lines
            assert line.startswith("hpdm: error: ")
            assert "No space left on device" in line
        left = contents(disk)
        assert not [path for path in left if "/." in f"/{path}" and not path.startswith("videos/.unfinished/")], left
        if name == "train" and (disk / "run").exists():
            check_run(disk / "run")
        for path in sorted(disk.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


WRITERS: dict[str, Callable[[Path], object]] = {
    "embeddings": lambda folder: EmbeddingStore.create(folder, INFO).add(["a"], [torch.zeros(2, 8)]),
    "statistics": lambda folder: real_statistics._write(folder / "real.npz", {"format": 1}, statistics()),
    "unfinished": lambda folder: unfinished.write(folder / ".unfinished" / "x.safetensors", [torch.zeros(1, 3)]),
    "table": lambda folder: write_table(folder, "title", [Section("t", ("n",), {"row": (1.0,)})], {}),
    "sheet": lambda folder: write_contact_sheet(folder / "a.png", [np.zeros((2, 8, 8, 3), np.uint8)]),
    "video": lambda folder: write_video(folder / "a.mp4", np.zeros((2, 16, 16, 3), np.uint8)),
    "config": lambda folder: runs.save_run_config(folder, ABOUT),
}
INFO = EmbeddingInfo("t5", 8, 16, "fp32")
ABOUT = RunConfig(systems.get("patch"), small_config(), [], {})


def statistics() -> real_statistics.RealStatistics:
    features = FeatureStatistics()
    features.update(np.eye(3))
    return real_statistics.RealStatistics(features, 0)


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_written_is_whole_or_absent(name, tmp_path, monkeypatch):
    """At every call that makes, flushes or renames a file or a folder."""
    real = {call: getattr(os, call) for call in ("mkdir", "open", "fsync", "replace")}
    calls, limit = 0, 0

    def counted(call: str) -> Callable[..., object]:
        def one(*arguments: object, **options: object) -> object:
            nonlocal calls
            flags = arguments[1] if call == "open" else os.O_CREAT
            if isinstance(flags, int) and flags & os.O_CREAT:
                calls += 1
                if limit and calls >= limit:
                    raise OSError(FULL.errno, FULL.strerror)
            return real[call](*arguments, **options)

        return one

    def attempt(number: int) -> Path:
        nonlocal calls, limit
        folder = tmp_path / str(number)
        folder.mkdir()
        calls, limit = 0, number
        try:
            WRITERS[name](folder)
        finally:
            limit = 0
        return folder

    for call in real:
        monkeypatch.setattr(os, call, counted(call))
    whole = set(tree(attempt(0)))
    made = calls
    assert made >= 4
    for number in range(1, made + 1):
        with pytest.raises(OSError, match="No space left on device") as error:
            attempt(number)
        assert error.value.errno == errno.ENOSPC
        left = tree(tmp_path / str(number))
        assert left < whole, (number, left)
