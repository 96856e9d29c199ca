"""Damage at random: what reads strangers' files reads them or names them in one line, whatever is in them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpdm import runs
from hpdm.data.captions import add_captions
from hpdm.data.found import VideoFile
from hpdm.data.shard_index import scan
from hpdm.data.tar_members import TarDamageError, read_members
from hpdm.patch.config import HPDMConfig
from hpdm.tensor_file import TensorFile
from hpdm.training.checkpoint import read_state
from tests.hostile.soak import EXAMPLES
from tests.small import random_model, save_as_run, small_config
from tests.tar_files import pack

# Where to damage a file, as a share of its length, and what to put there.
EDITS = st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=8), st.integers(0, 8)), min_size=1, max_size=4)


def damaged(data: bytes, edits: list[tuple[float, bytes, int]]) -> bytes:
    """The data with some pieces of it replaced by others."""
    for share, new, removed in edits:
        place = int(share * len(data))
        data = data[:place] + new + data[place + removed :]
    return data


def read_or_named(read: Callable[[], Any], path: Path) -> None:
    """Reads a file, or finds a ValueError or OSError of one line that names it; any other error is the test's."""
    try:
        read()
    except (ValueError, OSError) as error:
        words = str(error)
    else:
        return
    assert str(path) in words
    assert "\n" not in words.replace(str(path), "")
    assert len(words) < 2000


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    training = {"stride": 1, "short": "error", "ema": [0.05]}
    root = tmp_path_factory.mktemp("damage")
    folder = save_as_run(random_model(small_config(classes=2)), root / "run", ["a", "b"], training)
    runs.export(folder, root / "exported.safetensors")
    return folder


@EXAMPLES
@given(edits=EDITS)
def test_a_config(run_folder, tmp_path, edits):
    path = tmp_path / "config.json"
    path.write_bytes(damaged((run_folder / "config.json").read_bytes(), edits))
    read_or_named(lambda: runs.load_run_config(tmp_path), tmp_path)


@EXAMPLES
@given(edits=EDITS)
def test_a_state(run_folder, tmp_path, edits):
    checkpoint = tmp_path / "step-00000001"
    if not checkpoint.exists():
        shutil.copytree(run_folder / "checkpoints" / "step-00000001", checkpoint)
    good = (run_folder / "checkpoints" / "step-00000001" / "state.json").read_bytes()
    (checkpoint / "state.json").write_bytes(damaged(good, edits))
    read_or_named(lambda: read_state(checkpoint), checkpoint)


@EXAMPLES
@given(edits=EDITS)
def test_a_tensor_file(run_folder, tmp_path, edits):
    good = (run_folder.parent / "exported.safetensors").read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    path = tmp_path / "x.safetensors"
    path.write_bytes(damaged(good[:header], edits) + good[header:])

    def read() -> None:
        with TensorFile(path) as file:
            for name in file.shapes:
                file.read(name)

    read_or_named(read, path)


@EXAMPLES
@given(
    edits=st.dictionaries(
        st.sampled_from(sorted(small_config().to_dict())),
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4)
        | st.lists(st.integers(-3, 2**40) | st.text(max_size=2), max_size=4),
        min_size=1, max_size=3,
    )
)  # fmt: skip
def test_the_values_of_a_config(edits):
    try:
        config = HPDMConfig.from_dict(json.loads(json.dumps(small_config().to_dict() | edits)))
    except ValueError as error:
        words = str(error)
    else:
        assert HPDMConfig.from_dict(config.to_dict()) == config
        return
    assert len(words) < 500
    assert "\n" not in words


@EXAMPLES
@given(edits=EDITS)
def test_a_tar(tmp_path, edits):
    texts = (("a.json", '{"label": 1}'), ("a.txt", "caption"))
    good = pack(tmp_path / "good.tar", ("a.mp4", b"video"), *texts, ("b.mp4", b"x"))
    path = tmp_path / "s.tar"
    path.write_bytes(damaged(good.read_bytes()[:6144], edits))
    read_or_named(lambda: scan(path), path)
    with path.open("rb") as file:
        try:
            members = list(read_members(file))
        except TarDamageError:
            return
    size = path.stat().st_size
    assert all(0 <= member.offset <= member.offset + member.size <= size for member in members)


@EXAMPLES
@given(edits=EDITS)
def test_captions(tmp_path, edits):
    good = b'{"file": "a.mp4", "caption": "a disc"}\n{"file": "b.mp4", "caption": "a \\u00e9"}\n'
    (tmp_path / "captions.jsonl").write_bytes(damaged(good, edits))
    files = [VideoFile(str(tmp_path / name), 0) for name in ("a.mp4", "b.mp4")]
    read_or_named(lambda: add_captions(tmp_path, files), tmp_path / "captions.jsonl")
