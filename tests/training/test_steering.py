"""Following a run changes nothing in it: validation, sample sheets, means in the log, other logs."""

import json
import shutil
import sys
import types

import pytest
import torch
from torch import nn

import hpdm
from hpdm import runs
from hpdm.commands.train import train
from hpdm.data.clips import VideoDataset
from hpdm.data.synthetic import render_synthetic
from hpdm.evaluation.denoising import evaluate_denoising
from hpdm.patch.presets import SAMPLING
from hpdm.text import EmbeddingInfo, EmbeddingStore
from hpdm.training import samples, speed
from hpdm.training.averaged import averaged_weights
from hpdm.training.ema import EMA, ConstantDecay
from hpdm.training.means import Means
from hpdm.training.speed import Speed, peak_memory, peak_tflops
from tests.small import train_options as options


def rows(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def curve(run):
    names = ("step", "loss", "loss_level_0", "loss_level_2", "grad_norm", "lr")
    return [[row[name] for name in names] for row in rows(run) if "loss" in row]


def held_out_set(folder, *classes):
    return render_synthetic(folder, clips=5, frames=12, size=(32, 32), classes=list(classes), seed=9)


@pytest.fixture(scope="module")
def followed(clips, tmp_path_factory):
    """The run ``saved_run``, followed in every way."""
    folder = tmp_path_factory.mktemp("followed")
    held_out = held_out_set(folder / "held_out", "RedDisc", "GreenSquare")
    follow = {"validate_every": 4, "validation": held_out, "validation_clips": 9, "sample_every": 3, "sample_steps": 2}
    train(options(clips, folder / "run", **follow, snapshot_every=4, save_every=1))
    return folder


def test_a_followed_run_has_the_same_curve_bit_for_bit(saved_run, followed):
    assert curve(followed / "run") == curve(saved_run)
    for weights in ("model", "ema"):
        expected, got = (runs.load(run, weights=weights).model for run in (saved_run, followed / "run"))
        assert all(torch.equal(p, q) for p, q in zip(expected.parameters(), got.parameters()))


def test_validation_is_the_error_of_the_average_on_held_out_clips(followed):
    validated = {row["step"]: row for row in rows(followed / "run") if "validation" in row}
    assert list(validated) == [4, 6]  # every four steps, and at the end
    clips = VideoDataset(followed / "held_out", frames=8, size=32, train=False)
    for step, row in validated.items():
        run = runs.load(followed / "run" / "snapshots" / f"step-{step:08d}.safetensors", kernels="torch")
        result = evaluate_denoising(run, clips, clips=9, bins=4, batch=8, seed=0)
        means = []
        for name, errors in zip(result["losses"], result["error"]):
            assert [row[f"validation_{name}_t{n}"] for n in range(4)] == pytest.approx(errors, rel=1e-6)
            assert row[f"validation_{name}"] == pytest.approx(sum(errors) / 4, rel=1e-6)
            if f"loss_{name}" in rows(followed / "run")[0]:
                means.append(row[f"validation_{name}"])
        assert row["validation"] == pytest.approx(sum(means) / 3, rel=1e-6)
    assert validated[4]["validation"] != validated[6]["validation"]


def test_held_out_clips_must_be_told(clips, tmp_path):
    with pytest.raises(ValueError, match="validation: got no folder and 0 sets of --data with a split"):
        train(options(clips, tmp_path / "run", validate_every=1))
    with pytest.raises(ValueError, match="validate_every: got 0 with clips for a validation"):
        options(clips, tmp_path, validation_split="test")
    with pytest.raises(ValueError, match=r"validation: got classes \[\], expected"):
        train(options(clips, tmp_path / "run", validate_every=1, validation=clips / "RedDisc"))
    assert not (tmp_path / "run").exists()


def test_the_other_side_of_a_split_is_held_out(clips, tmp_path, caplog):
    data = shutil.copytree(clips, tmp_path / "clips")
    for split, keep in (("train", (0, 1)), ("test", (2,))):
        files = [sorted((data / name).glob("*.mp4"))[n] for name in ("RedDisc", "GreenSquare") for n in keep]
        (data / f"{split}list01.txt").write_text("".join(f"{f.parent.name}/{f.name}\n" for f in files))
    train(options(data, tmp_path / "run", split="train", steps=1, validate_every=1))
    assert "validation_level_2_t3" in rows(tmp_path / "run")[-1]
    assert "trained on, too" not in caplog.text
    train(options(data, tmp_path / "same", split="train", steps=1, validate_every=1, validation_split="train"))
    assert "trained on, too" in caplog.text


def test_a_row_is_the_mean_since_the_last_row(clips, saved_run, tmp_path):
    train(options(clips, tmp_path, log_every=4))
    every = curve(saved_run)
    for row, part in zip(rows(tmp_path), (every[:4], every[4:])):
        assert (row["step"], row["steps"], row["lr"]) == (part[-1][0], len(part), part[-1][5])
        for place, name in ((1, "loss"), (2, "loss_level_0"), (3, "loss_level_2"), (4, "grad_norm")):
            assert row[name] == pytest.approx(sum(step[place] for step in part) / len(part), rel=1e-6)
        assert row["grad_norm_max"] == pytest.approx(max(step[4] for step in part), rel=1e-6)
        assert {"memory_gb", "clips_per_s", "data_share"} <= set(row)
        assert 0.05 < row["memory_gb"] < 1000


def test_means_hide_no_bad_step():
    means, applied = Means(), torch.tensor(True)
    with pytest.raises(ValueError, match="got no step"):
        means.read()
    for loss in (1.0, float("nan"), 3.0):
        means.add({"a": torch.tensor(2.0), "b": torch.tensor(loss)}, torch.tensor(loss), applied)
    row = means.read()
    assert (means.steps, row["loss_a"]) == (3, 2.0)
    assert all(row[name] != row[name] for name in ("loss", "loss_b", "grad_norm", "grad_norm_max"))
    means.clear()
    means.add({"a": torch.tensor(5.0)}, torch.tensor(0.5), applied)
    means.add({"a": torch.tensor(float("nan"))}, torch.tensor(float("inf")), ~applied)
    assert means.read(skipped=1) == {"loss": 5.0, "loss_a": 5.0, "grad_norm": 0.5, "grad_norm_max": 0.5}


def test_columns_that_some_steps_lack_are_means_over_the_others():
    means, applied = Means(), torch.tensor(True)
    for b, done in ((None, applied), (3.0, applied), (float("nan"), ~applied), (5.0, applied)):
        others = None if b is None else {"b": torch.tensor(b)}
        means.add({"a": torch.tensor(2.0)}, torch.tensor(1.0), done, others)
    assert means.read(skipped=1) == {"loss": 2.0, "loss_a": 2.0, "grad_norm": 1.0, "grad_norm_max": 1.0, "b": 4.0}
    means.clear()
    means.add({"a": torch.tensor(1.0)}, torch.tensor(1.0), applied)
    assert "b" not in means.read()


def test_the_average_stands_in_for_the_weights_and_gives_them_back(generator):
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)).train()
    ema = EMA(model, ConstantDecay(0.5))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    places = [p.data_ptr() for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]
    averages = {name: t.clone() for name, t in ema.shadow.items()}

    def fail_inside():
        with averaged_weights(model, ema):
            assert not model.training
            assert all(torch.equal(p, averages[name]) for name, p in model.named_parameters())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert model.training
    assert all(torch.equal(p, before) for p, before in zip(model.parameters(), weights))
    assert all(torch.equal(t, averages[name]) for name, t in ema.shadow.items())
    assert places == [p.data_ptr() for p in model.parameters()]


@pytest.fixture
def sheets(monkeypatch):
    """What is drawn: (videos, labels) of each sheet."""
    drawn = []
    monkeypatch.setattr(
        samples, "write_contact_sheet", lambda path, videos, labels, scale: drawn.append((videos, labels))
    )
    return drawn


def test_a_sheet_tells_step_and_class_and_ends_with_a_real_clip(clips, tmp_path, sheets):
    train(options(clips, tmp_path, steps=2, sample_every=2, sample_steps=1))
    ((videos, labels),) = sheets
    assert labels == ["step 2, seed 0, RedDisc", "step 2, seed 1, GreenSquare", "real, RedDisc"]
    data = VideoDataset(clips, frames=8, size=32)
    assert torch.equal(videos[-1], data[[file.label for file in data.files].index(0)]["video"])
    run = runs.load(tmp_path, kernels="torch")
    suggested = SAMPLING["tiny"] | {"steps": 1, "overlap": "none"}
    sampler = hpdm.Sampler(run.model, hpdm.SamplerOptions(**suggested))
    for shown, expected in zip(videos, samples.to_uint8(sampler([0, 1], torch.tensor([0, 1]))[-1])):
        assert (shown.int() - expected.int()).abs().max() <= 1


def test_a_sheet_of_a_run_with_text_shows_captions(clips, tmp_path, sheets):
    captions = sorted({file.caption for file in VideoDataset(clips, frames=8, size=32, captions=True).files})
    store = EmbeddingStore.create(tmp_path / "embeddings", EmbeddingInfo("random", 24, 8, "fp32"))
    store.add([*captions, "a prompt"], [10 * torch.randn(4, 24) for _ in range(len(captions) + 1)])
    text = {"embeddings": tmp_path / "embeddings", "steps": 1, "sample_every": 1, "sample_steps": 1}
    train(options(clips, tmp_path / "run", **text, validate_every=1, validation=clips))
    assert 0 < rows(tmp_path / "run")[-1]["validation"] < 10
    ((_, labels),) = sheets
    assert len(labels) == min(4, len(captions)) + 1
    assert all(any(caption in label for caption in captions) for label in labels)
    assert labels[-1] == labels[0].replace("step 1, seed 0", "real")
    train(options(clips, tmp_path / "other", **text, sample_prompts=("a prompt", captions[0])))
    assert [label.partition(", ")[2] for label in sheets[1][1][:2]] == ["seed 0, a prompt", f"seed 1, {captions[0]}"]
    other = held_out_set(tmp_path / "held_out", "BlueTriangle")
    with pytest.raises(ValueError, match=r"validation: .* lacks .* of the clips' captions"):
        train(options(clips, tmp_path / "third", **text, validate_every=1, validation=other))
    with pytest.raises(ValueError, match=r"sample_prompts: .* has no embedding of 'another'"):
        train(options(clips, tmp_path / "third", **text, sample_prompts=("another",)))
    with pytest.raises(ValueError, match="sample_prompts: got 1, expected none for a model without text"):
        train(options(clips, tmp_path / "third", sample_every=1, sample_prompts=("a prompt",)))


def test_wandb_goes_on_with_a_resumed_run(clips, tmp_path, monkeypatch):
    calls = []

    class FakeRun:
        def define_metric(self, name, **rest):
            calls.append(("metric", name, rest))

        def log(self, row):
            calls.append(("log" if "loss" in row else row["samples"][0], row["step"]))

        def finish(self):
            calls.append(("finish",))

    fake = types.ModuleType("wandb")
    fake.Image = lambda path: ("picture", path)
    fake.init = lambda **given: calls.append(("init", given)) or FakeRun()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        train(options(clips, tmp_path / "run", steps=2, log="wandb", sample_every=2, sample_steps=1))
    begun = [call[1] for call in calls if call[0] == "init"]
    assert begun[0]["id"] == begun[1]["id"] != ""
    assert (begun[0]["resume"], begun[0]["name"], begun[0]["config"]["steps"]) == ("allow", "run", 2)
    assert [call[1] for call in calls if call[0] == "log"] == [1, 2]
    assert [call[1] for call in calls if call[0] == "picture"] == [2]
    assert ("metric", "*", {"step_metric": "step"}) in calls
    assert calls.count(("finish",)) == 2
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'hpdm\[wandb\]'"):
        train(options(clips, tmp_path / "other", log="wandb"))


def test_the_use_of_the_device(monkeypatch):
    cpu = torch.device("cpu")
    assert set(Speed(cpu, lambda: None, None).columns(3.0)) == {"memory_gb"}
    columns = Speed(cpu, lambda: 2e12, 40.0).columns(3.0)
    assert (columns["tflop_per_s"], columns["mfu"]) == (6.0, 0.15)
    assert set(Speed(cpu, lambda: 2e12, None).columns(3.0)) == {"memory_gb", "tflop_per_s"}
    assert peak_tflops(cpu, "fp32") is None
    names = {"NVIDIA H100 80GB HBM3": 67.0, "NVIDIA H100 PCIe": 51.0, "NVIDIA A100-SXM4-80GB": 19.5, "Another": None}
    for name, expected in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_tflops(torch.device("cuda"), "fp32") == expected
    before = peak_memory(cpu)
    held = torch.ones(64 * 2**20)  # 256 MiB, of which each page is written
    assert speed.peak_memory(cpu) >= max(before, held.nbytes)


def test_bad_numbers_are_named(clips, tmp_path):
    for name in ("validate_every", "keep", "snapshot_every", "validation_clips"):
        with pytest.raises(ValueError, match=f"{name}: got -1"):
            options(clips, tmp_path, **{name: -1})
    for name in ("memory_gb", "peak_tflops"):
        with pytest.raises(ValueError, match=f"{name}: got nan, expected a finite number > 0"):
            options(clips, tmp_path, **{name: float("nan")})
    with pytest.raises(ValueError, match="snapshot_precision: got 'fp8', expected one of 'fp32', 'fp16'"):
        options(clips, tmp_path, snapshot_precision="fp8")
    with pytest.raises(ValueError, match="memory_gb: got 3, expected it with --micro-batch auto alone"):
        options(clips, tmp_path, memory_gb=3)
