"""Names out of files and options that become paths: refused before any work is done."""

import logging
import shutil
from urllib.parse import unquote

import pytest

from hpdm import cli, runs
from hpdm.commands.data import Shard, Synthetic
from hpdm.commands.output_names import check_outputs
from hpdm.commands.sample import SampleOptions, sample
from hpdm.commands.train import train
from hpdm.evaluation.generated import class_of_file
from hpdm.printable import as_file_name
from hpdm.sampling import SamplerOptions
from hpdm.tensor_file import TensorFile
from hpdm.text import EmbeddingInfo, EmbeddingStore
from tests.small import change_config, random_model, save_as_run, small_config, train_options

BAD_NAMES = ["..", "a\0b", "\x1b[31m", "x" * 300, "a\udcff", "", 7]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    model = random_model(small_config(classes=2))
    return save_as_run(model, tmp_path_factory.mktemp("runs") / "run", ["A", "B"], {"stride": 1, "short": "error"})


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_run_with_an_unsafe_class_is_refused_before_its_weights_are_read(run_folder, tmp_path, name, monkeypatch):
    run = shutil.copytree(run_folder, tmp_path / "run")
    change_config(run, lambda config: config.update(classes=["A", name]))
    monkeypatch.setattr(runs, "load_parameters", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(ValueError, match=r"config\.json: class(es\[1\]| 1): got "):
        sample(SampleOptions(run_folder=run, out=tmp_path / "out", device="cpu"))
    assert not (tmp_path / "out").exists()


def test_an_exported_file_with_an_unsafe_class_is_refused(run_folder, tmp_path, monkeypatch):
    run = shutil.copytree(run_folder, tmp_path / "run")
    runs.export(run, tmp_path / "good.safetensors")
    assert runs.load(tmp_path / "good.safetensors").classes == ["A", "B"]
    monkeypatch.setattr(runs, "check_class_name", lambda name, place: "x" * 201)
    runs.export(run, tmp_path / "bad.safetensors")
    monkeypatch.undo()
    monkeypatch.setattr(TensorFile, "read", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(ValueError, match=r"bad\.safetensors: class 0: got class name 'x+\.\.\.' of 201 bytes"):
        runs.load(tmp_path / "bad.safetensors")


def test_classes_that_are_no_list_are_refused(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    change_config(run, lambda config: config.update(classes="AB"))
    with pytest.raises(ValueError, match=r"config\.json: classes: got 'AB', expected a list"):
        runs.load(run)


@pytest.mark.parametrize("name", ["../x.mp4", "a/b.mp4", "/abs.mp4", "..", "", "a\0.mp4", "x" * 224])
def test_outputs_are_children_of_their_folder(tmp_path, name):
    with pytest.raises(ValueError, match=r"^out: got the file name '"):
        check_outputs(tmp_path, ["good.mp4", name])


def test_outputs_are_distinct(tmp_path):
    check_outputs(tmp_path / "new" / "folder", ["a.mp4", "A.mp4", "x" * 223])
    check_outputs(tmp_path, [])
    with pytest.raises(ValueError, match=r"^out: 2 videos would be called 'a\.mp4', expected different names$"):
        check_outputs(tmp_path, ["a.mp4", "b.mp4", "a.mp4"])


def test_an_output_folder_that_is_a_file_is_named(run_folder, clips, tmp_path):
    file = tmp_path / "afile"
    file.touch()
    for out in (file, file / "below"):
        for call in (
            lambda out=out: sample(SampleOptions(run_folder=run_folder, out=out, device="cpu")),
            lambda out=out: train(train_options(clips, out)),
            lambda out=out: Synthetic(out, clips=2).run(),
            lambda out=out: Shard(clips, out).run(),
            lambda out=out: EmbeddingStore.create(out, EmbeddingInfo("x", 8, 8, "fp32")),
        ):
            with pytest.raises(FileExistsError, match=rf"^out: {file} is a file, expected a folder$"):
                call()


def test_training_says_what_it_found(clips, tmp_path, caplog):
    data = shutil.copytree(clips, tmp_path / "set")
    (data / "RedDisc/empty.mp4").touch()
    (data / "GreenSquare/other.flv").touch()
    with caplog.at_level(logging.INFO, "hpdm.data.summary"):
        train(train_options(data, tmp_path / "run", steps=1))
    lines = [record.getMessage() for record in caplog.records if record.name == "hpdm.data.summary"]
    assert lines == [
        f"{data}: 6 clips of 2 classes, 3 of each, in 6 files",
        "left out: files ending in .flv: 1 (GreenSquare/other.flv)",
        "left out: empty files: 1 (RedDisc/empty.mp4)",
    ]


def test_errors_and_logs_of_the_command_line_are_printable(tmp_path, capsys):
    folder = tmp_path / "a\x1b]0;PWNED\x07"
    folder.mkdir()
    (folder / "\x1b[31m").mkdir()
    (folder / "\x1b[31m/a.mp4").write_text("x")
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "inspect", str(folder)])
    errors = capsys.readouterr().err
    assert ended.value.code == 1
    assert "a\\x1b]0;PWNED\\x07: got class name '\\x1b[31m', expected UTF-8 without control characters" in errors
    assert "\x1b" not in errors


CLASS_PATHS = ["playing guitar/bass", "../../home/x", "/abs", "..\\x", ".hidden", "100%", "%2F"]


def test_classes_with_slashes_are_sampled_into_their_folder(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    for first in CLASS_PATHS:
        change_config(run, lambda config, first=first: config.update(classes=[first, "B"]))
        before = set(tmp_path.rglob("*"))
        sampler = SamplerOptions(steps=1, overlap="none")
        paths = sample(
            SampleOptions(
                run_folder=run, out=tmp_path / "out", classes=(first,), count=1, sampler=sampler, device="cpu"
            )
        )
        new = {path for path in set(tmp_path.rglob("*")) - before if path.is_file()}
        assert new <= {*paths, tmp_path / "out" / "contact_sheet.png"}
        assert {path.parent for path in new} == {tmp_path / "out"}
        assert class_of_file(paths[0], ["B", *CLASS_PATHS]) == first


def test_names_of_files_are_different_and_can_be_read_back():
    names = [*CLASS_PATHS, "%", "%%2F", "%/", "a/b", "a%2Fb", "a%252Fb", "\x1b[31m", "a\udcff", "..", ".", ""]
    stems = [as_file_name(name) for name in names]
    assert len(set(stems)) == len(names)
    assert not any(set(stem) & set("/\\\x1b\0") or stem.startswith(".") for stem in stems)
    assert [unquote(stem, errors="surrogatepass") for stem in stems] == names
