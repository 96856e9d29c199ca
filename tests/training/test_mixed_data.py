"""Runs on several sets, on images, and on sets with short clips: the options, the curve, resumption, what is told."""

import json
import logging
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import hpdm.training.trainer as training
from hpdm import distributed, runs
from hpdm.commands.train import prepare, train
from hpdm.data.clips import ShortClipError
from hpdm.data.layout import VideoFile
from hpdm.text import EmbeddingInfo, EmbeddingStore
from hpdm.training import short_clips
from hpdm.training.batches import collate
from hpdm.training.options import TrainOptions, train_options
from hpdm.video import write_video
from tests.processes import run_ranks
from tests.small import change_config, stop_after_checkpoint
from tests.small import train_options as options

CLASSES = ["RedDisc", "GreenSquare"]


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def stored(out):
    return json.loads((out / "config.json").read_text())["training"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images in the class folders of the clips, with captions; their index gives the classes' order."""
    root = tmp_path_factory.mktemp("mixed") / "images"
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for number in range(2):
            path = root / name / f"{number}.png"
            Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
            path.with_suffix(".txt").write_text(f"noise {name} {number}")
    (root / "classInd.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(CLASSES, 1)))
    return root


def test_videos_and_images_train_together_and_resume_bit_for_bit(clips, images, tmp_path, monkeypatch):
    mixed = {"data": [clips, f"{images}:0.5"], "batch": 3}
    train(options(clips, tmp_path / "whole", **mixed))
    assert stored(tmp_path / "whole")["data"] == [str(clips), f"{images}:0.5"]
    assert stored(tmp_path / "whole")["data_weights"] == [1.0, 0.5]
    stop_after_checkpoint(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(options(clips, tmp_path / "parts", **mixed))
    monkeypatch.undo()
    train(options(clips, tmp_path / "parts", **mixed | {"workers": 2}))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 6


def test_the_log_tells_the_share_of_each_set(clips, images, saved_run, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "hpdm"):
        train(options(clips, tmp_path, data=[clips, f"{images}:0.25"], steps=1))
        assert f"{clips}: gives 80 % of all clips" in caplog.text
        assert f"{images}: gives 20 % of all clips" in caplog.text
        assert f"{images}: 4 clips of 2 classes, 2 of each" in caplog.text
        caplog.clear()
        train(options(clips, shutil.copytree(saved_run, tmp_path / "one")))
    assert "of all clips" not in caplog.text


def test_a_batch_of_a_mixed_run_holds_stills_in_their_share(clips, images, tmp_path):
    job = prepare(options(clips, tmp_path, data=[clips, f"{images}:0.5"], batch=6))
    trainer = training.Trainer(job, torch.device("cpu"))
    batch = collate([job.dataset[key] for key in next(iter(trainer.batches))])
    still = (batch["video"] == batch["video"][:, :, :1]).flatten(1).all(dim=1)
    assert [path.endswith(".png") for path in batch["paths"]] == still.tolist()
    assert still.sum() == 2
    assert set(batch["labels"].tolist()) == {0, 1}


def test_one_set_in_a_list_is_the_run_of_that_set(clips, saved_run, tmp_path):
    train(options(clips, tmp_path / "listed", data=[f"{clips}:0.25"]))
    assert losses(tmp_path / "listed") == losses(saved_run)
    assert stored(saved_run)["data"] == str(clips)


def test_other_weights_are_another_run(clips, images, saved_run, tmp_path):
    """The folders may move, since they give the same clips; weights give others."""
    run = shutil.copytree(saved_run, tmp_path / "run")
    with pytest.raises(ValueError, match=r"other options \(data_weights: \[1.0\] -> \[1.0, 0.5\]\)"):
        train(options(clips, run, data=[clips, f"{images}:0.5"]))
    change_config(run, lambda config: config["training"].pop("data_weights"))  # as in runs of earlier versions
    with pytest.raises(ValueError, match="data_weights"):
        train(options(clips, run, data=[clips, images]))
    train(options(shutil.copytree(clips, tmp_path / "moved"), run))


def test_sets_without_the_split_are_used_whole(clips, images, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "hpdm"):
        job = prepare(options(clips, tmp_path, data=[clips, images], split="train"))
    assert [len(part) for part in job.dataset.sets] == [4, 4]
    assert f"{images}: used whole, as no trainlist01.txt names clips of it" in caplog.text
    # Lists beside a folder that name no clip of it belong to another folder beside it.
    beside = tmp_path / "beside"
    shutil.copytree(clips, beside / "videos", ignore=shutil.ignore_patterns("ucf*"))
    shutil.copytree(clips / "ucfTrainTestlist", beside / "ucfTrainTestlist")
    shutil.copytree(images, beside / "images")
    job = prepare(options(clips, tmp_path, data=[beside / "videos", beside / "images"], split="test"))
    assert [len(part) for part in job.dataset.sets] == [2, 4]
    with pytest.raises(FileNotFoundError, match=r"^split: no trainlist01\.txt names clips of .*images, .*images$"):
        prepare(options(clips, tmp_path, data=[images, images], split="train"))


def test_sets_of_other_classes_train_by_their_captions_alone(clips, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (32, 32), (200, 0, 0)).save(flat / "a.png")
    (flat / "a.txt").write_text("a red picture")
    both = [clips, f"{flat}:0.5"]
    with pytest.raises(ValueError, match=r"^data: got no classes from .*flat and 2 from .*; a class model needs"):
        prepare(options(clips, tmp_path / "run", data=both))
    store = EmbeddingStore.create(tmp_path / "embeddings", EmbeddingInfo("random", 24, 8, "fp32"))
    texts = sorted({json.loads(line)["caption"] for line in (clips / "captions.jsonl").read_text().splitlines()})
    store.add(texts, [torch.randn(2, 24) for _ in texts])
    with pytest.raises(ValueError, match=r"'a red picture'; run `hpdm data embed --data .*flat` first"):
        prepare(options(clips, tmp_path / "run", data=both, embeddings=tmp_path / "embeddings"))
    store.add(["a red picture"], [torch.randn(1, 24)])
    train(options(clips, tmp_path / "run", data=both, embeddings=tmp_path / "embeddings", steps=2))
    assert runs.load(tmp_path / "run").config.conditioning == "text"


def test_no_data_are_named():
    with pytest.raises(ValueError, match=r"^data: got none, expected --data with"):
        train_options(data=(), out="x")
    with pytest.raises(TypeError, match=r"^data: got 'clips', expected a tuple of folders"):
        TrainOptions(data="clips", out="x")


# ---- short clips ----


@pytest.fixture
def some_short(tmp_path):
    """Four clips, two of which have fewer than eight frames."""
    root = tmp_path / "some_short"
    root.mkdir()
    for number, frames in enumerate([10, 5, 9, 6]):
        video = torch.full((3, frames, 32, 32), 50 * number, dtype=torch.uint8)
        write_video(root / f"{number}.mp4", video)
    return root


def told(caplog):
    return [record.getMessage() for record in caplog.records if "left out so far" in record.getMessage()]


@pytest.mark.parametrize("workers", [0, 2])
def test_short_clips_are_left_out_and_counted(some_short, tmp_path, caplog, workers):
    with caplog.at_level(logging.INFO, "hpdm"):
        train(options(some_short, tmp_path / "run", workers=workers, batch=4, steps=3))
    assert told(caplog)[-1] == (
        f"2 of 4 clips have been left out so far, as shorter than a window; the first is {some_short / '1.mp4'} "
        "(5 frames)"
    )
    assert stored(tmp_path / "run")["short"] == "skip"


class Counted:
    """Nine clips, of which those in ``found`` are short."""

    def __init__(self, found):
        self.files, self.found = [VideoFile(f"{number}.mp4", 0) for number in range(9)], found

    def short_clips(self):
        return dict(self.found)

    def __len__(self):
        return 9


def test_the_count_is_told_when_it_changes_and_once_a_minute(caplog, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(short_clips.time, "monotonic", lambda: now[0])
    clips = Counted({})
    count = short_clips.ShortClips(clips)
    with caplog.at_level(logging.INFO, "hpdm"):
        count.report()
        assert not told(caplog)
        clips.found = {4: 3}
        count.report()
        count.report()
        clips.found = {4: 3, 2: 5}
        now[0] += 59
        count.report()
        assert [line[:11] for line in told(caplog)] == ["1 of 9 clip"]
        now[0] += 2
        count.report()
        clips.found = {4: 3, 2: 5, 7: 1}
        count.report()
        count.report(last=True)
        now[0] += 100
        count.report(last=True)
    assert [line.partition(" clips")[0] for line in told(caplog)] == ["1 of 9", "2 of 9", "3 of 9"]
    assert "the first is 2.mp4 (5 frames)" in told(caplog)[-1]


def count_on_two_ranks():
    """What each of two ranks does: rank 0 found clips 4 and 5, rank 1 clips 4 and 6."""
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    with distributed.process_group(torch.device("cpu")):
        short_clips.ShortClips(Counted({4: 3, 5 + distributed.rank(): 2})).report()


def test_ranks_count_together():
    first, second = run_ranks(count_on_two_ranks, 2)
    assert first.startswith("3 of 9 clips")
    assert not second


def test_a_run_keeps_what_it_does_with_short_clips(clips, saved_run, tmp_path):
    """Not given, the option is the run's: runs of earlier versions stopped at a short clip by default."""
    run = shutil.copytree(saved_run, tmp_path / "run")
    for then in ("error", "skip", "loop"):
        change_config(run, lambda config, then=then: config["training"].update(short=then))
        train(options(clips, run))
        assert stored(run)["short"] == then
    with pytest.raises(ValueError, match="short: loop -> skip"):
        train(options(clips, run, short="skip"))
    change_config(run, lambda config: config["training"].update(short="error"))
    train(options(clips, run, short="skip"))
    assert stored(run)["short"] == "skip", "a run that stopped at a short clip may go on without it"


def test_a_run_that_stopped_at_a_short_clip_goes_on_without_it(some_short, tmp_path):
    """Up to there both would have read the same."""
    run = {"batch": 1, "save_every": 1, "steps": 4}
    with pytest.raises(ShortClipError, match=r"got \d frames, expected >= 8"):
        train(options(some_short, tmp_path / "run", short="error", **run, seed=3))
    train(options(some_short, tmp_path / "run", short="skip", **run, seed=3))
    train(options(some_short, tmp_path / "whole", **run, seed=3))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
