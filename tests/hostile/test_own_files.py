"""Files that the library keeps for itself, damaged or forged: statistics, finished parts, cells, logs; full pipes."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from hpdm.commands import unfinished
from hpdm.data.class_names import check_number
from hpdm.evaluation import real_statistics
from hpdm.evaluation.metrics import FeatureStatistics
from hpdm.evaluation.tables import Cells
from hpdm.training.log import JsonlLog
from hpdm.training.plots import read_log
from tests.hostile.corpus import NO_OBJECTS, read_safetensors, write_safetensors
from tests.hostile.runner import run
from tests.hostile.soak import everything

ROOT = Path(__file__).parents[2]
IDENTITY = {"format": 1, "clips": 3}


@pytest.fixture
def statistics(tmp_path):
    features = FeatureStatistics()
    features.update(np.random.default_rng(0).normal(size=(9, 4)))
    path = tmp_path / "real.npz"
    real_statistics._write(path, IDENTITY, real_statistics.RealStatistics(features, 2))
    return path


def test_statistics_survive(statistics):
    stored = real_statistics._read(statistics, IDENTITY)
    assert (stored.left_out, stored.features.count, stored.features.width) == (2, 9, 4)


@pytest.mark.parametrize(
    "change",
    [
        {"identity": np.array("not JSON")},
        {"identity": np.array('{"format": NaN}')},
        {"identity": np.array("[1]")},
        {"count": np.array("x")},
        {"count": np.array(1)},
        {"mean": np.zeros((4, 4))},
        {"mean": np.zeros(3)},
        {"covariance": np.zeros((4, 3))},
        {"covariance": np.zeros(4)},
        {"mean": np.array([None] * 4, object)},  # a pickle
    ],
)
def test_forged_statistics_are_named(statistics, change):
    with np.load(statistics) as file:
        values = dict(file)
    np.savez(statistics, **(values | change), allow_pickle=True)
    with pytest.raises(ValueError, match=rf"^statistics: {statistics} is damaged \(.*\); delete it$"):
        real_statistics._read(statistics, IDENTITY)


def test_damaged_and_compressed_statistics_are_named(statistics):
    good = statistics.read_bytes()
    with np.load(statistics) as file:
        values = dict(file)
    np.savez_compressed(statistics, **(values | {"mean": np.zeros(1 << 20)}))
    with pytest.raises(ValueError, match=r"real\.npz is damaged \(ValueError: compressed\); delete it"):
        real_statistics._read(statistics, IDENTITY)
    for content in (b"", b"x" * 99, good[: len(good) // 2], good[:-1], good.replace(b"mean.npy", b"../x.npy")):
        statistics.write_bytes(content)
        with pytest.raises(ValueError, match=r"^statistics: .*real\.npz is damaged"):
            real_statistics._read(statistics, IDENTITY)
    with zipfile.ZipFile(statistics, "w") as archive:
        archive.writestr("identity.npy", "x")
    with pytest.raises(ValueError, match=r"^statistics: .*real\.npz is damaged"):
        real_statistics._read(statistics, IDENTITY)


@pytest.mark.parametrize("change", ["names", "dtype", "empty", "half", "NaN", "infinite"])
def test_forged_parts_of_an_interrupted_run_are_named(tmp_path, change):
    path = tmp_path / ".unfinished" / "x.safetensors"
    parts = [torch.zeros(1, 3, 2, 4, 4), torch.ones(1, 3, 2, 8, 8)]
    unfinished.write(path, parts)
    assert all(torch.equal(a, b) for a, b in zip(unfinished.read(path), parts, strict=True))
    header, data = read_safetensors(path)
    if change == "names":
        header["7"] = header.pop("0")
    elif change == "dtype":
        header["0"]["dtype"] = "X9"
    content = write_safetensors(header, data)
    if change in ("NaN", "infinite"):
        content = content[:-4] + np.float32(np.nan if change == "NaN" else np.inf).tobytes()
    path.write_bytes({"empty": b"", "half": content[: len(content) // 2]}.get(change, content))
    with pytest.raises(ValueError, match=rf"^out: the finished part of an interrupted run is damaged.*: {path}: "):
        unfinished.read(path)


@pytest.mark.parametrize("name", NO_OBJECTS)
def test_damaged_cells_are_named(tmp_path, name):
    cells = Cells(tmp_path)
    (tmp_path / "cells" / "a.json").write_bytes(NO_OBJECTS[name])
    with pytest.raises(ValueError, match=rf"^{tmp_path}/cells/a\.json: "):
        cells.get("a", {}, dict)


def test_a_log_is_json_and_its_damaged_lines_are_dropped(tmp_path):
    log = JsonlLog(tmp_path / "log.jsonl", 0)
    log.write({"step": 1, "loss": 0.5})
    log.write({"step": 2, "loss": float("nan"), "grad_norm": float("inf")})
    log.close()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None, "grad_norm": None}]
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2]
    for rubbish in ('{"step": 1e999}', '{"step": "x"}', "[" * 10_000, '{"step": ' + "9" * 400 + "}", "\0", "{"):
        with (tmp_path / "log.jsonl").open("a") as file:
            file.write(f"{rubbish}\n")
    JsonlLog(tmp_path / "log.jsonl", 9).close()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_classes_without_clips_are_limited():
    assert len(check_number([str(n) for n in range(10_000)], 1, "here")) == 10_000
    assert len(check_number([str(n) for n in range(20_000)], 20_000, "here")) == 20_000
    with pytest.raises(ValueError, match=r"^here: got 10001 classes for 3 clips, expected at most 10000$"):
        check_number([str(n) for n in range(10_001)], 3, "here")


ENCODER_FILES = [
    (name, content)
    for name in ("config.json", "tokenizer.json", "model.safetensors", "tokenizer_config.json")
    for content in (b'{"model_type": "t5", "d_model": "x"}', b"", b"[]", b"{", b"\xff" * 99)
]


@pytest.mark.parametrize("number", range(len(ENCODER_FILES) if everything() else 3))
def test_a_damaged_text_encoder_is_one_line(tmp_path, number):
    name, content = ENCODER_FILES[number]
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text('{"model_type": "t5"}')
    (encoder / name).write_bytes(content)
    (tmp_path / "prompts.txt").write_text("a disc\n")
    prompts = ["--prompts", tmp_path / "prompts.txt"]
    ended = run(["data", "embed", "--encoder", encoder, *prompts, "--out", tmp_path / "out"], tmp_path)
    assert ended.status == 1
    assert "Traceback" not in ended.errors
    assert ended.error_lines[-1].startswith(f"hpdm: error: encoder: got '{encoder}'")


@pytest.mark.parametrize("sink", ["full", "closed"])
def test_standard_output_that_takes_nothing_is_one_line(clips, sink):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "hpdm", "data", "inspect", clips]
    if sink == "full":
        with open("/dev/full", "w") as out:
            ended = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, env=environment)
        errors, status = ended.stderr, ended.returncode
    else:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        process.stdout.close()
        errors, status = process.stderr.read(), process.wait()
    assert status == 1
    assert [line for line in errors.splitlines() if "rror" in line] == [
        "hpdm: error: [Errno 28] No space left on device" if sink == "full" else "hpdm: error: [Errno 32] Broken pipe"
    ]
    assert "Traceback" not in errors
