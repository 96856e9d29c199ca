"""Scans kept on disk: found again by another process, and no condition for reading where they cannot be kept."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hpdm.data import decoder_process
from hpdm.data.decode import probe, read_clip
from hpdm.data.decoding import memory
from hpdm.data.decoding.scan import scan
from hpdm.video import write_video


@pytest.fixture
def path(tmp_path, generator):
    noise = torch.randint(0, 256, (3, 12, 32, 48), generator=generator, dtype=torch.uint8)
    write_video(tmp_path / "a.mp4", noise)
    return tmp_path / "a.mp4"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of this test's own, and a decoding process that knows it."""
    monkeypatch.setenv("HPDM_CACHE", str(tmp_path / "cache"))
    process = decoder_process.DecoderProcess()
    monkeypatch.setattr(decoder_process, "process", process)
    yield tmp_path / "cache"
    process.stop()


def test_what_is_kept_is_what_was_found(path, cache):
    found = scan(str(path))
    memory.save("ab" * 32, found)
    assert memory.load("ab" * 32) == found
    assert [p.name for p in cache.rglob("*") if p.is_file()] == [f"{'ab' * 31}.json"], "no temporary file is left"


def test_a_second_process_does_not_decode_the_file_again(path, cache, monkeypatch):
    assert probe(path).codec == "h264"
    (kept,) = cache.rglob("*.json")
    # Whoever finds another codec there has not looked at the file.
    kept.write_text(kept.read_text().replace('"codec":"h264"', '"codec":"as kept"'))
    decoder_process.process.stop()
    assert probe(path).codec == "as kept"
    path.touch()
    assert probe(path).codec == "h264"
    assert len(list(cache.rglob("*.json"))) == 2, "a file of another time is another file"


@pytest.mark.parametrize("content", ["", "[]", "{}", "not JSON", None])
def test_what_is_damaged_is_found_anew(path, cache, content):
    info = probe(path)
    (kept,) = cache.rglob("*.json")
    kept.write_text(kept.read_text().replace('"checksums":[', '"checksums":[1,') if content is None else content)
    decoder_process.process.stop()
    assert probe(path) == info


def test_without_a_place_to_keep_scans_files_are_read_all_the_same(path, cache):
    expected = read_clip(path, range(12)).frames
    decoder_process.process.stop()
    for kept in cache.rglob("*.json"):
        kept.unlink()
    for folder in sorted((p for p in cache.rglob("*") if p.is_dir()), reverse=True):
        folder.rmdir()
    cache.rmdir()
    cache.write_text("a file where the folder should be")
    assert np.array_equal(read_clip(path, range(12)).frames, expected)
    assert cache.read_text() == "a file where the folder should be"


def test_a_user_without_a_home_keeps_nothing(path, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HPDM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    memory.save("ab" * 32, scan(str(path)))
    assert memory.load("ab" * 32) is None
