"""``hpdm sample``: files, interrupted runs, overlap compared, several processes."""

import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import hpdm.sample as command
from hpdm import HPDM, presets
from hpdm.checkpoint import save_checkpoint, save_run_config
from hpdm.optim import EMA, make_optimizer
from hpdm.sample import SampleOptions, sample
from hpdm.sampler import Sampler


@pytest.fixture
def run_folder(tmp_path):
    torch.manual_seed(0)
    config = presets.tiny().replace(
        patch=(2, 8, 8), width=16, latents=4, latent_width=16, head_width=16, conditioning_width=16
    )
    model = HPDM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    names = [f"Class{i}" for i in range(config.classes)]
    save_run_config(tmp_path / "run", config, names, {"stride": 1, "short": "error"})
    save_checkpoint(tmp_path / "run", 1, model, EMA(model, 0.9), make_optimizer(model, "adamw", 1e-3, 0.0))
    return tmp_path / "run"


def options(run_folder, out, **changes):
    return SampleOptions(
        run_folder=run_folder, out=run_folder.parent / out, **{"count": 2, "steps": 2, "overlap": "hw"} | changes
    )


def frames(path):
    with Image.open(path / "contact_sheet.png") as sheet:
        return sheet.convert("RGB").tobytes()


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on_with_the_level_it_was_at(run_folder, monkeypatch, capsys):
    sample(options(run_folder, "whole", batch=1))
    real, calls = Sampler.__call__, []

    def fails_in_the_second_videos_last_level(self, seeds, labels=None, *, progress, finished, on_level):
        def spy(level, video):
            on_level(level, video)
            calls.append((seeds[0], level))
            if calls[-1] == (1, 1):
                raise Interrupted

        return real(self, seeds, labels, progress=progress, finished=finished, on_level=spy)

    monkeypatch.setattr(Sampler, "__call__", fails_in_the_second_videos_last_level)
    with pytest.raises(Interrupted):
        sample(options(run_folder, "again", batch=1))
    again = run_folder.parent / "again"
    assert sorted(len(load_file(p)) for p in (again / command.UNFINISHED).iterdir()) == [2, 3]
    del calls[:]
    # Another size of the network's batches is no other video, another number of steps is.
    capsys.readouterr()
    sample(options(run_folder, "again", batch=1, tile_batch=32))
    assert calls == [(1, 2)]
    assert capsys.readouterr().out.count("finished level(s)") == 2
    assert not (again / command.UNFINISHED).exists()
    difference = max(abs(a - b) for a, b in zip(frames(again), frames(run_folder.parent / "whole"), strict=True))
    assert difference <= 1


def test_what_was_kept_of_other_options_is_not_used(run_folder, monkeypatch):
    real = Sampler.__call__

    def interrupted(self, seeds, labels=None, *, progress, finished, on_level):
        def once(level, video):
            on_level(level, video)
            raise Interrupted

        return real(self, seeds, labels, progress=progress, finished=finished, on_level=once)

    monkeypatch.setattr(Sampler, "__call__", interrupted)
    with pytest.raises(Interrupted):
        sample(options(run_folder, "out"))
    monkeypatch.setattr(Sampler, "__call__", real)
    sample(options(run_folder, "out", steps=3))
    sample(options(run_folder, "fresh", steps=3))
    assert frames(run_folder.parent / "out") == frames(run_folder.parent / "fresh")


def test_a_damaged_file_of_an_interrupted_run_is_named(run_folder, monkeypatch):
    path = run_folder.parent / "broken.safetensors"
    path.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"broken.safetensors of an interrupted run is damaged .* delete it"):
        command._read_levels(path)


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
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "hpdm",
         *map(str, arguments), "--overlap", "hw", "--tile-batch", "8"],
        check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert sorted(p.name for p in (run_folder.parent / "two").iterdir()) == sorted(
        p.name for p in (run_folder.parent / "one").iterdir()
    )
    assert frames(run_folder.parent / "two") == frames(run_folder.parent / "one")
