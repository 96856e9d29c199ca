"""A training that goes on and on: its memory does not grow, nor do its open files and processes."""

import signal
import time
from pathlib import Path

import numpy as np

from hpdm.training.checkpoint import list_checkpoints
from tests.reliability.soak import times


def session(leader: int) -> dict[int, tuple[int, int]]:
    """Memory in bytes (each process's own and its part of what they share) and open files of a session's processes."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) != leader or fields[0] == "Z":
                continue
            rollup = dict(line.split(":") for line in (folder / "smaps_rollup").read_text().splitlines()[1:])
            found[int(folder.name)] = (1024 * int(rollup["Pss"].split()[0]), len(list((folder / "fd").iterdir())))
        except (OSError, ValueError, KeyError):
            continue  # it has ended meanwhile
    return found


def text_of(run: Path) -> str:
    """The log."""
    return (run / "log.jsonl").read_text() if (run / "log.jsonl").exists() else ""


def steps_of(run: Path) -> int:
    """The step of the last row of the log."""
    return int(text_of(run).rpartition('"step": ')[2].split(",")[0])


def test_memory_files_and_processes_do_not_grow(commands, training, tmp_path):
    """With a process that reads clips, and a validation and checkpoints on the way."""
    run, seconds = tmp_path / "run", times(20, 600)
    words = [*training, "--out", run, "--steps", 10**6, "--workers", 1, "--log-every", 10, "--save-every", 100]
    words += ["--validate-every", 100, "--validation", training[2], "--validation-clips", 4]
    process = commands.start(*words)
    end = time.monotonic() + 240
    # The first rows are not of the ordinary course: a process predicts the work of a step meanwhile.
    while "tflop_per_s" not in text_of(run) and process.status() is None and time.monotonic() < end:
        time.sleep(0.2)
    rows = []  # step, memory, files, processes
    first, end = steps_of(run), time.monotonic() + seconds
    enough, patience = times(60, 5100), times(120, 3600)  # on a busy machine
    while time.monotonic() < end or (steps_of(run) < first + enough and time.monotonic() < end + patience):
        assert process.status() is None, process.output()
        found = session(process.pid)
        rows.append((steps_of(run), sum(m for m, _ in found.values()), max(n for _, n in found.values()), len(found)))
        time.sleep(0.5)
    process.send(signal.SIGTERM)
    assert process.wait(20) == 143, process.output()
    step, memory, files, processes = np.array(rows, float).T
    assert step[-1] - step[0] > times(50, 5000), process.output()
    settled = step >= step[0] + (step[-1] - step[0]) / 5
    slope = np.polyfit(step[settled], memory[settled], 1)[0] * 10_000 / 2**20
    print(f"{slope:+.2f} MB per 10,000 steps over {step[-1] - step[0]:.0f} steps, {memory[-1] / 2**20:.0f} MB")
    # The short form has too few steps for a slope, which one checkpoint more or less decides.
    third = len(memory) // 3
    growth = (np.median(memory[-third:]) - np.median(memory[:third])) / 2**20
    assert slope < 1 if times(0, 1) else growth < 6, f"{slope:.2f} MB per 10,000 steps, {growth:.2f} MB"
    assert len(set(processes)) == 1, sorted(set(processes))
    # A checkpoint or a row that is just being written has its file open, so single readings differ.
    assert abs(np.median(files[-third:]) - np.median(files[:third])) <= 1, files
    assert len(list_checkpoints(run)) == 2
