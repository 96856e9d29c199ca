"""``hpdm table``: Tables 3 and 4 at a small size, with a small detector and without one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro

from hpdm import cli
from hpdm.commands import table_ablations, table_of_run
from hpdm.commands.evaluate import evaluate
from hpdm.commands.evaluate_options import EvaluateOptions
from hpdm.commands.sample import OVERLAPS
from hpdm.commands.table import TableCommand
from hpdm.commands.table_ablations import SETUPS, TABLE_3, AblationTable
from hpdm.commands.table_overlap import OverlapTable
from hpdm.data.synthetic import render_synthetic
from hpdm.evaluation.tables import Cells, Section, sections_of, write_table
from hpdm.sampling import SamplerOptions
from hpdm.system import Architecture
from tests.evaluation.test_levels import Features
from tests.small import random_model, save_as_run, small_config

CLASSES = ["RedDisc", "GreenSquare"]
SIZES = ("--patch", 2, 8, 8, "--resolution", 8, 32, 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("tables")
    render_synthetic(root / "set", clips=4, frames=10, size=(32, 32), classes=CLASSES)
    save_as_run(random_model(small_config(classes=2)), root / "run", CLASSES, {"stride": 1, "short": "skip"})
    torch.jit.script(Features().eval()).save(str(root / "i3d.pt"))
    return root


def parse(*words):
    config = (tyro.conf.OmitSubcommandPrefixes,)
    return tyro.cli(TableCommand, args=[str(word) for word in words], config=config)


def overlap(folder, out, *more):
    return parse(
        "overlap", "--run", folder / "run", "--data", folder / "set", "--split", "train", "--out", out, "--steps", 2,
        "--samples", 3, "--frames", 4, "--device", "cpu", *more,
    )  # fmt: skip


def ablations(folder, out, *more):
    return parse(
        "ablations", "--data", folder / "set", "--split", "train", "--out", out, *SIZES, "--steps", 2, "--batch", 2,
        "--log-every", 1, "--workers", 0, "--kernels", "torch", "--clips", 2, "--device", "cpu", *more,
    )  # fmt: skip


def test_table_4_has_what_eight_evaluations_find(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "table"
    command = overlap(folder, out, "--metrics", "fvd", "kvd", "motion", "--detector", folder / "i3d.pt")
    calls, real = [], table_of_run.evaluate_run

    def interrupted(options, loaded):
        if options.sampler.overlap == "hw":
            raise KeyboardInterrupt
        calls.append(options.sampler.overlap)
        return real(options, loaded)

    monkeypatch.setattr(table_of_run, "evaluate_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.run()
    assert calls == ["none", "w", "h"]
    assert sorted(path.name for path in out.iterdir()) == ["cells"]  # no table before all rows are there
    monkeypatch.setattr(table_of_run, "evaluate_run", lambda o, r: calls.append(o.sampler.overlap) or real(o, r))
    assert command.run() == 0
    assert calls == list(OVERLAPS)

    table = json.loads((out / "table.json").read_text())
    fvd, kvd, motion, seams, published = table["sections"]
    assert (fvd["title"], fvd["columns"]) == ("FVD, 3 videos", ["4x16x16", "8x32x32"])
    assert kvd["title"] == "KVD, 3 videos"
    assert list(fvd["rows"]) == list(OVERLAPS) == list(published["rows"])
    assert motion["columns"][4:6] == ["motion right, 8x32x32", "shape overlap, 8x32x32"]
    assert list(motion["rows"]) == [*OVERLAPS, "real clips"]
    assert published["rows"]["fh"] == [360.46, 436.81]
    assert len({tuple(row) for row in fvd["rows"].values()}) == 8
    one = replace(command.evaluate, sampler=replace(command.evaluate.sampler, overlap="fw"), level=(1, 2))
    found = evaluate(one)["levels"]
    for name, section in (("fvd", fvd), ("kvd", kvd)):
        assert section["rows"]["fw"] == [level["distribution"][name]["value"] for level in found]
    assert motion["rows"]["fw"][5] == found[1]["motion"]["generated"]["shape_overlap"]
    # Tiles of two frames that overlap by one leave no frame without a border.
    energies = dict(zip(seams["columns"], seams["rows"]["fw"]))
    assert energies == {"f": None} | found[1]["distribution"]["seams"]
    text = (out / "table.md").read_text()
    assert "| fhw | 381.85 | 467.37 |" in text
    assert text.count("\n| fhw |") == 5
    assert text in capsys.readouterr().out

    before = (out / "table.md").read_text()
    assert command.run() == 0  # all is there
    assert (calls, (out / "table.md").read_text()) == (list(OVERLAPS), before)
    other = overlap(folder, out, "--metrics", "fvd", "kvd", "motion", "--detector", folder / "i3d.pt", "--guidance", 2)
    with pytest.raises(ValueError, match=r"none.json was computed with other settings \(sampler: .*guidance"):
        other.run()


def test_the_ladder_has_what_evaluations_with_given_levels_find(folder, tmp_path):
    command = parse(
        "ladder", "--run", folder / "run", "--data", folder / "set", "--split", "test", "--out", tmp_path, "--steps", 2,
        "--samples", 2, "--metrics", "motion", "--device", "cpu",
    )  # fmt: skip
    assert command.run() == 0
    table = json.loads((tmp_path / "table.json").read_text())
    motion = table["sections"][0]
    sizes = ["2x8x8", "4x16x16", "8x32x32"]
    assert motion["columns"][1::4] == [f"shape overlap, {size}" for size in sizes]
    overlaps = {name: row[1::4] for name, row in motion["rows"].items()}
    assert [overlaps[f"{given} given"][:given] for given in range(3)] == [[], [None], [None, None]]
    for given in range(3):
        one = replace(command.evaluate, given_levels=given, level=tuple(range(given, 3)))
        found = [level["motion"]["generated"]["shape_overlap"] for level in evaluate(one)["levels"]]
        assert overlaps[f"{given} given"][given:] == pytest.approx(found, rel=1e-6)
    assert overlaps["real clips"][2] > 0.8
    for changes in ({"given_levels": 1}, {"level": (1,)}):
        with pytest.raises(ValueError, match="expected none: the table has all"):
            replace(command, evaluate=replace(command.evaluate, **changes))


def test_table_3_trains_and_measures_five_models(folder, tmp_path, monkeypatch):
    out = tmp_path / "table"
    command = ablations(folder, out)
    trained, real = [], table_ablations.train

    def interrupted(options):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(options)
        return real(options)

    monkeypatch.setattr(table_ablations, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.run()
    assert not (out / "table.json").exists()
    measured, measure = [], table_ablations.evaluate_run
    monkeypatch.setattr(table_ablations, "train", real)
    monkeypatch.setattr(
        table_ablations, "evaluate_run", lambda o, r: measured.append(o.run_folder.name) or measure(o, r)
    )
    assert command.run() == 0
    assert measured == list(TABLE_3)[2:]

    models = {name: json.loads((out / "runs" / name / "config.json").read_text())["model"] for name in TABLE_3}
    different = {
        name: {key: value for key, value in model.items() if value != models["default"][key]}
        for name, model in models.items()
    }
    assert different == {
        "shallow": {"fusion": "shallow"}, "detached": {"detach_context": True}, "default": {},
        "no-adaptive": {"levels_per_block": [3] * 6}, "no-coordinates": {"coordinates": False},
    }  # fmt: skip
    error, speed, published = json.loads((out / "table.json").read_text())["sections"]
    assert list(error["rows"]) == [SETUPS[name].title for name in TABLE_3] == list(speed["rows"])
    assert (error["title"], error["columns"]) == ("error of v, 2 clips", ["level 0", "level 1", "level 2"])
    assert all(row[0] > 0 for row in speed["rows"].values())
    assert published["rows"]["no coordinates"] == [305.3, 400.7, 389.5, 4.47]
    run = out / "runs" / "detached"
    alone = evaluate(EvaluateOptions(run, folder / "set", split="test", clips=2, kernels="torch", device="cpu"))
    assert error["rows"]["context detached"] == pytest.approx([sum(row) / len(row) for row in alone["error"]])
    with pytest.raises(ValueError, match=r"default.json was computed with other settings \(clips: 2 -> 1"):
        ablations(folder, out, "--setups", "default", "--clips", 1).run()
    with pytest.raises(ValueError, match="holds a run"):
        ablations(folder, out, "--batch", 4).run()


def test_ablations_of_appendix_d_and_metrics_of_videos(folder, tmp_path):
    more = ("--setups", "shared", "--metrics", "fvd", "--detector", folder / "i3d.pt", "--samples", 2)
    command = ablations(folder, tmp_path, *more, "--sampler.steps", 2, "--frames", 4)
    assert command.run() == 0
    table = json.loads((tmp_path / "table.json").read_text())
    fvd, seams, speed = table["sections"]
    assert min(seams["rows"]["shared blocks (D.4)"]) > 0
    assert fvd["columns"] == ["2x8x8", "4x16x16", "8x32x32"]
    assert list(fvd["rows"]) == ["shared blocks (D.4)"] == list(speed["rows"])
    assert (table["settings"]["sampler"]["overlap"], table["settings"]["split"]) == ("hw", "train")
    training = table["settings"]["training"]
    assert (training["boxes"], training["clean_context"], training["optimizer"]) == ("uniform", 0.25, "muon")
    assert json.loads((tmp_path / "runs" / "shared" / "config.json").read_text())["model"]["share_blocks"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"metrics": ("denoising",)}, "metrics: got denoising, expected some of motion, fvd, kvd and is"),
        ({"sampler": SamplerOptions(overlap="hw")}, "overlap: got hw, expected none: the table has all"),
        ({"generated": Path("x")}, "generated: got x, expected none for a table"),
        ({"json": Path("x.json")}, "json: got x.json, expected none for a table"),
    ],
)
def test_what_does_not_fit_table_4_is_named(folder, tmp_path, changes, match):
    command = overlap(folder, tmp_path / "out", "--metrics", "motion")
    with pytest.raises(ValueError, match=match):
        replace(command, evaluate=replace(command.evaluate, **changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"fusion": "shallow"}, "fusion: got shallow, expected deep: the table has a row for it"),
        ({"setups": ("default", "default")}, r"setups: got \['default', 'default'\], expected some different"),
        ({"setups": ("deep",)}, "setups: got 'deep', expected one of 'shallow'"),
        ({"metrics": ("fvd",)}, "detector: got none, expected a TorchScript file for fvd"),
        ({"data": (Path("a"), Path("b"))}, "measured_data: got none with 2 sets"),
    ],
)
def test_what_does_not_fit_table_3_is_named(folder, tmp_path, changes, match):
    command = ablations(folder, tmp_path / "out")
    if "fusion" in changes:
        changes = {"train": replace(command.train, architecture=Architecture(**changes))}
    if "data" in changes:
        changes = {"train": replace(command.train, **changes)}
    with pytest.raises(ValueError, match=match):
        replace(command, **changes)


@pytest.mark.parametrize(
    ("more", "error", "match"),
    [
        (("--metrics", "fvd", "--detector", "no.pt"), FileNotFoundError, "no.pt does not exist"),
        (("--metrics", "fvd", "--detector", "i3d.pt", "--frames", 9), ValueError, "frames: got 9, expected at most 8"),
        (("--metrics", "motion", "--preset", "hpdm_t2v"), ValueError, "embeddings: got none, expected a folder"),
        (("--measured-data", "set/RedDisc"), ValueError, "data: got classes"),
    ],
)
def test_what_cannot_be_measured_is_told_before_the_training(folder, tmp_path, monkeypatch, more, error, match):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(table_ablations, "train", lambda _: pytest.fail("trained"))
    with pytest.raises(error, match=match):
        ablations(folder, tmp_path / "out", "--setups", "default", "shared", *more).run()


def test_the_command_line_knows_both(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["table", "overlap", "--run", "nowhere", "--data", str(folder / "set"), "--out", str(tmp_path),
                  "--metrics", "motion"])  # fmt: skip
    assert ended.value.code == 1
    assert "nowhere has no config.json" in capsys.readouterr().err
    assert {type(overlap(folder, tmp_path, "--metrics", "motion")), type(ablations(folder, tmp_path))} == {
        OverlapTable, AblationTable,
    }  # fmt: skip


def test_a_damaged_cell_and_half_a_table(tmp_path, monkeypatch):
    cells = Cells(tmp_path)
    assert cells.get("a", {"x": (1, 2)}, lambda: {"value": (3.0,)}) == {"value": [3.0]}
    assert Cells(tmp_path).get("a", {"x": [1, 2]}, lambda: pytest.fail("computed again")) == {"value": [3.0]}
    with pytest.raises(ValueError, match=r"other settings \(x: \[1, 2\] -> 3\)"):
        cells.get("a", {"x": 3}, dict)
    (tmp_path / "cells" / "a.json").write_text('{"settings": ')
    with pytest.raises(ValueError, match=r"a\.json: not JSON"):
        cells.get("a", {"x": [1, 2]}, dict)
    section = Section("t", ("n",), {"row": (None,), "other": (12345.6,), "small": (0.00012346,)})
    text = write_table(tmp_path, "title", [section], {})
    assert text == "# title\n\n**t**\n\n| | n |\n|---|---:|\n| row | - |\n| other | 12345.60 |\n| small | 0.0001235 |\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells", "table.json", "table.md"]


def test_an_error_without_patches_has_no_mean():
    result = {"clips": 3, "losses": ["level_0", "level_1_border"], "error": [[1.0, 3.0], [2.0, None]]}
    (section,) = sections_of({"a": result})
    assert (section.columns, section.rows) == (("level 0", "level 1 border"), {"a": [2.0, None]})
