"""Temporary folders: nobody guesses or plants them, killed processes leave none for long, living ones keep theirs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hpdm import files
from hpdm.files import atomic_folder, atomic_path, write_json, write_text
from hpdm.video import write_video

ROOT = Path(__file__).parents[2]
HOLD = """
import signal, sys, time
from hpdm.files import atomic_path
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job of a shell ignores
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print(temporary, flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(files, "_cleaned", set())


def holder(path):
    """A process that writes ``path`` and does not finish, and its temporary path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True, env=environment)
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_leaves_is_deleted_and_a_living_one_keeps_its_own(tmp_path):
    dead, dead_path = holder(tmp_path / "a.mp4")
    alive, alive_path = holder(tmp_path / "a.mp4")
    try:
        assert dead_path != alive_path
        assert {dead_path.name, alive_path.name} == {"a.mp4"}
        dead.kill()
        dead.wait()
        assert dead_path.read_text() == alive_path.read_text() == "half"
        write_text(tmp_path / "other.txt", "x")
        assert sorted(os.listdir(tmp_path)) == sorted([alive_path.parent.name, "other.txt"])
        assert alive_path.read_text() == "half"
    finally:
        alive.send_signal(signal.SIGINT)
        alive.wait(60)
    assert os.listdir(tmp_path) == ["other.txt"]  # it was interrupted, and deleted its own


def test_a_folder_without_a_lock_is_left_alone_while_it_is_new(tmp_path):
    folder = tmp_path / f".a.{'0' * 16}.tmp"
    folder.mkdir()
    write_text(tmp_path / "x", "x")
    assert folder.is_dir()
    files._cleaned.clear()
    os.utime(folder, (time.time() - 100,) * 2)
    write_text(tmp_path / "x", "x")
    assert not folder.exists()


def test_what_only_looks_like_a_leftover_stays(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ".lock").touch()
    (tmp_path / f".a.{'0' * 16}.tmp").symlink_to(tmp_path / "elsewhere")
    (tmp_path / f".b.{'0' * 16}.tmp").write_text("a file")
    (tmp_path / ".c.tmp").mkdir()
    before = sorted(os.listdir(tmp_path))
    write_text(tmp_path / "x", "x")
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "x"])
    assert (tmp_path / "elsewhere" / ".lock").exists()


def test_a_planted_link_is_replaced_and_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a.json", ".a.json.tmp", "b.txt", ".b.txt.tmp", "c.mp4"):
        (out / name).symlink_to(victim)
    write_json(out / "a.json", {"a": 1})
    write_text(out / "b.txt", "text")
    write_video(out / "c.mp4", np.zeros((2, 16, 16, 3), np.uint8))
    assert victim.read_text() == "precious"
    assert not any((out / name).is_symlink() for name in ("a.json", "b.txt", "c.mp4"))


def test_only_the_owner_can_write_into_a_temporary_folder(tmp_path):
    with atomic_path(tmp_path / "a") as temporary:
        assert temporary.parent.stat().st_mode & 0o777 == 0o700
        temporary.write_text("x")
    before = os.umask(0)
    os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~before
    with atomic_folder(tmp_path / "b") as folder:
        (folder / "x").write_text("x")
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o777 & ~before


def test_names_as_long_as_file_systems_take_them(tmp_path):
    name = "é" * 125 + ".json"
    write_json(tmp_path / name, {})
    assert os.listdir(tmp_path) == [name]
