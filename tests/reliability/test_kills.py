"""Processes that are killed, at calls that change files and at random moments: nothing is lost or half written."""

import hashlib
import shutil
import signal
import time

import pytest

from hpdm import runs
from hpdm.training.checkpoint import list_checkpoints
from tests.reliability.commands import SMALL
from tests.reliability.kill_points import count_calls, points_of
from tests.reliability.run_files import check_checkpoints, curve, leftovers
from tests.reliability.soak import generator, times


def test_a_training_killed_at_any_call_of_a_save_goes_on(commands, training, trained, tmp_path):
    """From the second save on, where an old checkpoint is deleted; then the same command ends with the same curve."""
    start, run = tmp_path / "start", tmp_path / "run"
    shutil.copytree(trained, start)
    for path in list_checkpoints(start)[2:]:
        shutil.rmtree(path)

    def save(point, report, until=6):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(start, run)
        before = (count_calls, (run, point, "step-00000006", report))
        return commands.run(*training, "--out", run, "--steps", until, before=before)

    calls = points_of(save, tmp_path)
    assert any("os.rename" in call for call in calls)
    assert len(calls) > 20
    random = generator("save")
    for point in sorted(random.sample(range(len(calls)), times(3, len(calls)))):
        killed = save(point, "", 8)
        assert killed.status() == -signal.SIGKILL, killed.output()
        check_checkpoints(run, trained, at_least=4)
        again = commands.run(*training, "--out", run, "--steps", 8)
        assert again.status() == 0, f"{calls[point]}: {again.output()}"
        assert curve(run) == curve(trained), calls[point]
        assert leftovers(run) == [], calls[point]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_of_which_one_is_killed_while_saving_go_on(commands, training, tmp_path, parallel):
    words = [*training, "--parallel", parallel, "--timeout", 20]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert [p.wait(120) for p in commands.start_ranks(2, *words, "--out", whole, "--steps", 6, "--keep", 0)] == [0, 0]
    random = generator("ranks")
    for _ in range(times(1, 40)):
        victim = random.randrange(2) if parallel == "fsdp" else 0
        point = random.randrange(12 if victim == 0 else 2)
        shutil.rmtree(run, ignore_errors=True)
        hooks = [None, None]
        hooks[victim] = (count_calls, (run, point, "step-00000004"))
        ranks = commands.start_ranks(2, *words, "--out", run, "--steps", 6, before=hooks)
        began = time.monotonic()
        assert ranks[victim].wait(60) == -signal.SIGKILL, ranks[victim].output()
        assert ranks[1 - victim].wait(20) == 1, f"after {time.monotonic() - began:.0f} s: {ranks[1 - victim].output()}"
        check_checkpoints(run, whole, at_least=2)
        ranks = commands.start_ranks(2, *words, "--out", run, "--steps", 6)
        assert [rank.wait(60) for rank in ranks] == [0, 0], ranks[0].output()
        assert curve(run) == curve(whole)
        assert leftovers(run) == []


def test_a_training_killed_at_random_moments_ends_with_the_same_curve(commands, training, trained, tmp_path):
    random, kills, lives = generator("random"), 0, 0
    goal = times(6, 500)
    while kills < goal:
        run, newest = tmp_path / f"run{lives}", 0
        lives += 1
        while kills < goal:
            process = commands.start(*training, "--out", run, "--steps", 8)
            if process.wait(random.uniform(0.05, 2.5)) is not None:
                break
            process.send(signal.SIGKILL)
            process.wait(10)
            kills += 1
            if list_checkpoints(run):
                check_checkpoints(run, trained, at_least=newest)
                newest = int(list_checkpoints(run)[-1].name[5:])
            assert newest == 0 or list_checkpoints(run)
        process = commands.run(*training, "--out", run, "--steps", 8)
        assert process.status() == 0, process.output()
        assert curve(run) == curve(trained)
        assert leftovers(run) == []
        shutil.rmtree(run)


@pytest.mark.parametrize("length", [(), ("--frames", 6)], ids=["clip", "frames"])
def test_a_sampling_killed_at_any_call_gives_the_same_videos(commands, trained, tmp_path, length):
    def sample(point, report, out="killed", **options):
        words = ["sample", "--run", trained, "--out", tmp_path / out, "--count", 1, "--steps", 2, *SMALL, *length]
        return commands.run(*words, before=(count_calls, (tmp_path / out, point, "", report)), **options)

    assert sample(-1, "", "whole").status() == 0
    expected = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "whole").iterdir()}

    def killed(point, report):
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        return sample(point, report)

    calls = points_of(killed, tmp_path)
    random = generator("sample")
    for point in sorted(random.sample(range(len(calls)), times(2, len(calls)))):
        process = killed(point, "")
        assert process.status() == -signal.SIGKILL, process.output()
        for path in (tmp_path / "killed").glob("[!.]*"):
            assert hashlib.sha256(path.read_bytes()).hexdigest() == expected[path.name], calls[point]
        again = sample(-1, "")
        assert again.status() == 0, again.output()
        got = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (tmp_path / "killed").iterdir()
            if not path.name.startswith(".")
        }
        assert got == expected, calls[point]
        # What was killed before it had locked its temporary folder is not told from one that begins just now.
        left = tmp_path / "killed" / ".unfinished"
        assert not left.exists() or not any(any(folder.iterdir()) for folder in left.iterdir()), calls[point]


def test_an_export_killed_at_any_call_leaves_the_old_file_or_the_new_one(commands, trained, tmp_path):
    out = tmp_path / "out" / "weights.safetensors"

    def export(point, report):
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        old = list_checkpoints(trained)[0]
        assert commands.run("export", "--run", old, "--out", out).status() == 0
        return commands.run(
            "export", "--run", trained, "--out", out, before=(count_calls, (out.parent, point, "", report))
        )

    calls = points_of(export, tmp_path)
    for point in range(len(calls)):
        assert export(point, "").status() == -signal.SIGKILL
        renamed = any("os.rename" in call for call in calls[:point])
        assert runs.load(out).step == (8 if renamed else 2), calls[point]
        assert commands.run("export", "--run", trained, "--out", out).status() == 0
        # What was killed before it had locked its temporary folder is not told from one that begins just now.
        assert all(list((out.parent / name).iterdir()) == [] for name in leftovers(out.parent)), calls[point]
    assert runs.load(out).step == 8


def test_packing_killed_at_any_call_is_complete_or_starts_again(commands, clips, tmp_path):
    def pack(point, report, out="killed"):
        words = ["data", "shard", clips, tmp_path / out]
        return commands.run(*words, before=(count_calls, (tmp_path / out, point, "", report)))

    def killed(point, report):
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        return pack(point, report)

    def contents(folder):
        return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".tar"}

    whole = pack(-1, "", "whole")
    assert whole.status() == 0, whole.output()
    calls = points_of(killed, tmp_path)
    random = generator("shard")
    for point in sorted(random.sample(range(len(calls)), min(len(calls), times(3, 10**6)))):
        process = killed(point, "")
        assert process.status() == -signal.SIGKILL, process.output()
        if (tmp_path / "killed").exists():  # killed after the renaming: it is complete
            assert contents(tmp_path / "killed") == contents(tmp_path / "whole"), calls[point]
            continue
        again = pack(-1, "")
        assert again.status() == 0, f"{calls[point]}: {again.output()}"
        assert contents(tmp_path / "killed") == contents(tmp_path / "whole"), calls[point]
