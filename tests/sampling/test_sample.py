"""``hpdm sample``: files, interrupted runs, overlap compared, several processes."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import hpdm.commands.sample as command
from hpdm import presets
from hpdm.commands import unfinished
from hpdm.commands.sample import SampleOptions, sample
from hpdm.commands.subjects import stem_of
from hpdm.patch.sampler import Sampler
from hpdm.sampling import SamplerOptions
from hpdm.text import EmbeddingInfo, EmbeddingStore
from hpdm.video import write_video
from tests.small import random_model, save_as_run, small_config


def save_run(folder, names, **changes):
    model = random_model(small_config(**changes), "auto", scale=0.05)
    return save_as_run(model, folder, names, {"stride": 1, "short": "error"})


@pytest.fixture
def run_folder(tmp_path):
    return save_run(tmp_path / "run", [f"Class{i}" for i in range(presets.tiny().classes)])


PROMPTS = ("A red disc, moving up!", "a ring")


@pytest.fixture
def text_run(tmp_path):
    """A run with text, and beside it embeddings of two prompts and of the empty one."""
    store = EmbeddingStore.create(tmp_path / "embeddings", EmbeddingInfo("tiny", 8, 32, "fp32"))
    store.add([*PROMPTS, ""], [torch.randn(n, 8) * 20 for n in (5, 3, 0)])
    return save_run(tmp_path / "run", [], conditioning="text", text_width=8, levels=2, levels_per_block=(1, 2))


SAMPLER_FIELDS = {field.name for field in dataclasses.fields(SamplerOptions)}


def make_options(run_folder, out, **values):
    """Options of the command; those of the sampler are told apart by their names."""
    sampler = SamplerOptions(**{name: value for name, value in values.items() if name in SAMPLER_FIELDS})
    command = {name: value for name, value in values.items() if name not in SAMPLER_FIELDS}
    return SampleOptions(run_folder=run_folder, out=run_folder.parent / out, sampler=sampler, **command)


def prompted(run_folder, out, *prompts, **changes):
    defaults = {"prompts": prompts, "embeddings": run_folder.parent / "embeddings", "steps": 2, "overlap": "none"}
    return make_options(run_folder, out, **defaults | changes)


def options(run_folder, out, **changes):
    return make_options(run_folder, out, **{"count": 2, "steps": 2, "overlap": "hw", "later_solver": "ddim"} | changes)


def frames(path):
    with Image.open(path / "contact_sheet.png") as sheet:
        return sheet.convert("RGB").tobytes()


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on_with_the_level_it_was_at(run_folder, monkeypatch, capsys):
    sample(options(run_folder, "whole", batch=1))
    real, calls = Sampler.parts, []

    def fails_in_the_second_videos_last_level(self, seeds, labels=None, *, progress, finished):
        levels = real(self, seeds, labels, progress=progress, finished=finished)
        for level, video in enumerate(levels, start=len(finished)):
            yield video
            calls.append((seeds[0], level))
            if calls[-1] == (1, 1):
                raise Interrupted

    monkeypatch.setattr(Sampler, "parts", fails_in_the_second_videos_last_level)
    with pytest.raises(Interrupted):
        sample(options(run_folder, "again", batch=1))
    again = run_folder.parent / "again"
    assert sorted(len(load_file(p)) for p in (again / unfinished.FOLDER).iterdir()) == [2, 3]
    del calls[:]
    # Another size of the network's batches is no other video, another number of steps is.
    capsys.readouterr()
    sample(options(run_folder, "again", batch=1, tile_batch=32))
    assert calls == [(1, 2)]
    assert capsys.readouterr().out.count("finished level(s)") == 2
    assert not (again / unfinished.FOLDER).exists()
    difference = max(abs(a - b) for a, b in zip(frames(again), frames(run_folder.parent / "whole"), strict=True))
    assert difference <= 1


def test_what_was_kept_of_other_options_is_not_used(run_folder, monkeypatch):
    real = Sampler.parts

    def interrupted(self, seeds, labels=None, *, progress, finished):
        yield next(real(self, seeds, labels, progress=progress, finished=finished))
        raise Interrupted

    monkeypatch.setattr(Sampler, "parts", interrupted)
    with pytest.raises(Interrupted):
        sample(options(run_folder, "out"))
    monkeypatch.setattr(Sampler, "parts", real)
    sample(options(run_folder, "out", steps=3))
    sample(options(run_folder, "fresh", steps=3))
    assert frames(run_folder.parent / "out") == frames(run_folder.parent / "fresh")


def test_a_context_noise_that_the_run_has_not_seen_is_named(tmp_path, caplog):
    def sampled(name, **training):
        model = random_model(small_config(conditioning="none", levels=2, levels_per_block=(1, 2)))
        folder = save_as_run(model, tmp_path / name, [], {"stride": 1, "short": "error"} | training)
        for noise in (0.0, 0.1):
            caplog.clear()
            sample(make_options(folder, f"{name}-{noise}", count=1, steps=2, overlap="none", context_noise=noise))
            yield [record.getMessage() for record in caplog.records if record.name == "hpdm.commands.common"]

    without, (warning,) = sampled("old")
    assert without == []
    assert warning.startswith("context_noise: got 0.1 for a run with clean_context 0")
    assert list(sampled("trained", clean_context=0.5)) == [[], []]


def test_videos_of_prompts(text_run):
    paths = sample(prompted(text_run, "out", *PROMPTS))
    assert [p.name for p in paths] == ["a-red-disc-moving-up_seed0.mp4", "a-ring_seed1.mp4"]
    made = frames(text_run.parent / "out")
    # One video per call is the same video, another text or seed is not.
    sample(prompted(text_run, "one", *PROMPTS, batch=1))
    assert max(abs(a - b) for a, b in zip(made, frames(text_run.parent / "one"), strict=True)) <= 1
    sample(prompted(text_run, "text", PROMPTS[0], "", count=2))
    assert (text_run.parent / "text" / "no-text_seed1.mp4").exists()
    assert different_pixels(made, frames(text_run.parent / "text")) > 0.01
    (text_run.parent / "prompts.txt").write_text("\n".join(PROMPTS))
    from_file = sample(prompted(text_run, "file", prompts_file=text_run.parent / "prompts.txt", count=3, guidance=2.0))
    assert [p.name for p in from_file] == [paths[0].name, paths[1].name, "a-red-disc-moving-up_seed2.mp4"]


def different_pixels(a, b):
    return sum(x != y for x, y in zip(a, b, strict=True)) / len(a)


def test_what_was_kept_of_other_prompts_is_not_used(text_run, monkeypatch):
    real = Sampler.parts

    def interrupted(self, seeds, **options):
        yield next(real(self, seeds, **options))
        raise Interrupted

    for prompt in PROMPTS:
        monkeypatch.setattr(Sampler, "parts", interrupted)
        with pytest.raises(Interrupted):
            sample(prompted(text_run, "out", prompt))
        monkeypatch.setattr(Sampler, "parts", real)
    assert len(list((text_run.parent / "out" / unfinished.FOLDER).iterdir())) == 2


def test_prompts_that_do_not_fit_are_named(text_run):
    with pytest.raises(
        ValueError, match=r"^caption: 'a wolf' is not in .*; run `hpdm data embed` with --data or --prompts first$"
    ):
        sample(prompted(text_run, "out", "a wolf"))
    EmbeddingStore.create(text_run.parent / "wide", EmbeddingInfo("tiny", 9, 32, "fp32"))
    with pytest.raises(ValueError, match=r"has width 9 \(tiny\), expected config.text_width = 8"):
        sample(prompted(text_run, "out", *PROMPTS, embeddings=text_run.parent / "wide"))
    for changes, message in (
        ({"embeddings": None}, "got prompts with neither, expected"),
        ({"encoder": "t5"}, "got prompts with encoder and embeddings, expected"),
        ({"prompts": ()}, "got no prompts with embeddings, expected"),
    ):
        with pytest.raises(ValueError, match=rf"^prompts: {message} prompts with one of --encoder and --embeddings$"):
            prompted(text_run, "out", **{"prompts": PROMPTS} | changes)
    with pytest.raises(
        ValueError, match=r"^prompts: got none, expected --prompts or --prompts-file for a run with text"
    ):
        sample(options(text_run, "out"))
    labeled = save_run(text_run.parent / "labeled", ["A"], classes=1)
    with pytest.raises(ValueError, match=r"^prompts: got 2, expected none for a run with conditioning='class'$"):
        sample(prompted(labeled, "out", *PROMPTS))


def test_real_clips_of_the_prompts_go_above(text_run):
    videos = text_run.parent / "videos"
    videos.mkdir()
    for name, caption in (("a", "a ring"), ("b", "something"), ("c", f" {PROMPTS[0]} ")):
        write_video(videos / f"{name}.mp4", torch.full((3, 8, 32, 32), ord(name), dtype=torch.uint8))
        (videos / f"{name}.txt").write_text(caption)
    sample(prompted(text_run, "out", *PROMPTS, real=videos))
    with Image.open(text_run.parent / "out" / "contact_sheet.png") as sheet:
        rows = [sheet.getpixel((70, 16 + row * (128 + 14 + 2) + 60)) for row in (0, 2)]
    assert [max(abs(value - ord(name)) for value in row) <= 2 for row, name in zip(rows, "ca")] == [True, True]
    with pytest.raises(ValueError, match=r"^real: .* has no clip of ''$"):
        sample(prompted(text_run, "out", "", real=videos))


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [
        ("A red disc, moving up!", "a-red-disc-moving-up"),
        ("", "no-text"),
        ("../../etc", "etc"),
        ("été à la 红色", "été-à-la-红色"),
        ("word " * 20, "-".join(["word"] * 9)),
        ("x" * 100, "x" * 48),
    ],
)
def test_files_are_named_by_their_prompts(prompt, stem):
    assert stem_of(prompt) == stem


def test_a_damaged_file_of_an_interrupted_run_is_named(run_folder, monkeypatch):
    path = run_folder.parent / "broken.safetensors"
    path.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"interrupted run is damaged, delete it: .*broken.safetensors: damaged"):
        unfinished.read(path)


def test_the_eight_strategies_side_by_side(run_folder, capsys):
    paths = sample(options(run_folder, "overlaps", count=1, compare_overlap=True, overlap="none"))
    assert [p.stem.split("overlap_")[1] for p in paths] == list(command.OVERLAPS)
    table = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in table if line.split()[0] in command.OVERLAPS}
    assert list(rows) == list(command.OVERLAPS)
    # Patches of two frames that overlap by one have borders everywhere: nothing to compare with on that axis.
    assert all(float(value) > 0 for row in rows.values() for value in row[1:])
    with Image.open(run_folder.parent / "overlaps" / "contact_sheet.png") as sheet:
        assert sheet.height > 8 * 128


def test_processes_write_one_set_of_files(run_folder):
    sample(options(run_folder, "one", tile_batch=8))
    arguments = ["sample", "--run", run_folder, "--out", run_folder.parent / "two", "--count", 2, "--steps", 2]
    arguments += ["--later-solver", "ddim"]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "hpdm",
         *map(str, arguments), "--overlap", "hw", "--tile-batch", "8"],
        check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert sorted(p.name for p in (run_folder.parent / "two").iterdir()) == sorted(
        p.name for p in (run_folder.parent / "one").iterdir()
    )
    assert frames(run_folder.parent / "two") == frames(run_folder.parent / "one")
