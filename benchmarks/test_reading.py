"""Reading random windows of videos: time, processor time, peak memory, and whether the frames are the right ones.

Each reader runs in a process of its own with one thread, opens the file for every window, and reads the same windows in
turns with the others. Which frames it gives is checked first: each frame shows its number. A reader that gives other
frames is timed all the same, and its row says how many windows are wrong; ours may give none.

"PyAV, decoding alone" turns no frame into RGB: no reader that decodes from the last keyframe can take less time.
"first sight" is what ours needs once for a file, to decode it from end to end.

decord2 and decord have one module name. To measure decord2, install it alone in a folder (``pip install --target DIR
--no-deps decord2``) and pass ``--decord2 DIR``.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from benchmarks import videos
from benchmarks.readers import Reader, Sample
from hpdm.data.reencode import reencode

WINDOWS = (16, 64)
CHECKED_FRAMES = 4  # of a window that is checked first
MIN_ROUNDS, MAX_ROUNDS = 2, 50
SIDE = 256


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The file of a kind, made when it is asked for."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = videos.write(kind, tmp_path_factory.mktemp("reading"))
        return made[kind]

    return make


@pytest.fixture
def reader(tmp_path):
    """Starts readers and ends them after the test."""
    started = []

    def start(maker, packages=None, **options):
        started.append(Reader(maker, options, tmp_path / "scans", packages))
        return started[-1]

    yield start
    for one in started:
        one.close()


def contenders(kind, decord2):
    """Name, maker, options and folder of packages of each reader."""
    return {
        "decord": ("decord", {}, None),
        "decord2": ("decord", {}, decord2),
        "torchcodec": ("torchcodec", {}, None),
        "PyAV": ("pyav", {}, None),
        "PyAV, decoding alone": ("pyav", {"convert": False}, None),
        "hpdm": ("hpdm", {"decoder": "auto"}, None),
        # In the others it is what "auto" takes.
        **({"hpdm pyav": ("hpdm", {"decoder": "pyav"}, None)} if kind == videos.H264_720 else {}),
    }


def random_windows(rng, frames, length):
    """Windows of ``length`` consecutive frame numbers, without end."""
    while True:
        start = int(rng.integers(frames - length + 1))
        yield list(range(start, start + length))


def checked_windows(kind):
    """Number of windows that are checked; few of large frames, which take long."""
    return 10 if kind.height <= 720 else 4


def wrong_windows(reader, path, kind):
    """How many of the checked windows show other frames than those asked for; ``None`` where nothing is shown."""
    windows = random_windows(np.random.default_rng(1), kind.frames, CHECKED_FRAMES)
    shown = [(window, reader.shown(path, window)) for window, _ in zip(windows, range(checked_windows(kind)))]
    return None if shown[0][1] is None else sum(window != numbers for window, numbers in shown)


def time_in_turns(readers, path, frames, length, seconds):
    """Samples of each reader for the same random windows."""
    samples: dict[str, list[Sample]] = {name: [] for name in readers}
    windows = random_windows(np.random.default_rng(2), frames, length)
    for window, number in zip(windows, range(MAX_ROUNDS)):
        spent = sum(sample.seconds for of_one in samples.values() for sample in of_one)
        if number >= MIN_ROUNDS and spent >= seconds:
            break
        for name, one in readers.items():
            samples[name].append(one.sample(path, window))
    return samples


def add_row(record, group, shape, name, samples, memory, **fields):
    """Adds the row of a reader, and returns it."""
    extra = fields.pop("extra", {})
    row = record(
        group, shape, name, "fwd", [sample.seconds for sample in samples], peak_extra_bytes=memory.reader, **fields
    )
    row.extra["clips_per_s"] = 1 / row.median_s
    row.extra["cpu_ms_per_clip"] = 1e3 * float(np.median([sample.cpu_seconds for sample in samples]))
    row.extra["decoder_bytes"] = memory.decoder or None
    row.extra |= extra
    return row


def set_speedups(rows, base):
    """Speed-ups against the row of the name ``base``, if there is one."""
    reference = next((row for row in rows if row.contender == base and row.median_s), None)
    for row in rows:
        if reference is not None and row.median_s:
            row.reference = row is reference
            row.speedup_vs_reference = reference.median_s / row.median_s


@pytest.mark.parametrize("kind", videos.KINDS, ids=str)
def test_windows(record, files, reader, request, tmp_path, kind):
    seconds, path = request.config.getoption("--seconds"), files(kind)
    readers, notes, missing = {}, {}, {}
    for name, (maker, options, packages) in contenders(kind, request.config.getoption("--decord2")).items():
        if name == "decord2" and packages is None:
            missing[name] = "not asked for: --decord2 DIR"
            continue
        try:
            readers[name] = reader(maker, packages, **options)
        except (ImportError, OSError) as error:
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        notes[name] = {}
        if name == "hpdm":
            readers[name].sample(path, [0])  # starts its decoding process
            copy = shutil.copy(path, tmp_path)
            notes[name]["first_sight_cpu_ms"] = 1e3 * readers[name].sample(copy, [0]).cpu_seconds
        wrong = wrong_windows(readers[name], path, kind)
        assert not (wrong and name.startswith("hpdm")), f"{name}: {wrong} windows show other frames"
        notes[name]["wrong_windows"] = None if wrong is None else f"{wrong} of {checked_windows(kind)}"
    for length in WINDOWS if seconds else ():
        shape = f"{kind}, windows of {length}"
        samples = time_in_turns(readers, path, kind.frames, length, seconds)
        rows = [
            add_row(record, "reading", shape, name, samples[name], one.memory(), extra=notes[name])
            for name, one in readers.items()
        ]
        for name, error in missing.items():
            record("reading", shape, name, "fwd", [], error=error)
        set_speedups(rows, "decord")


@pytest.mark.parametrize("kind", [videos.XVID, videos.H264_1080], ids=str)
def test_encoded_anew(record, files, reader, request, tmp_path, kind):
    """Windows at a model's size from a video as it is, and from what ``hpdm data shard --resize`` makes of it."""
    seconds, path, anew = request.config.getoption("--seconds"), files(kind), tmp_path / "anew.mp4"
    reencode(path, anew, SIDE)
    auto, pyav = (reader("hpdm", decoder=decoder, side=SIDE) for decoder in ("auto", "pyav"))
    cases = {
        "hpdm, original": (auto, path),
        "hpdm, shard --resize": (auto, anew),
        "hpdm pyav, shard --resize": (pyav, anew),  # decord reads it by itself, and PyAV takes less time
    }
    for length in WINDOWS if seconds else ():
        rows = []
        for name, (one, file) in cases.items():
            one.sample(file, [0])
            samples = time_in_turns({name: one}, file, kind.frames, length, seconds / 2)[name]
            shape, extra = f"{kind}, windows of {length} at {SIDE}x{SIDE}", {"file_bytes": file.stat().st_size}
            rows.append(add_row(record, "reading, encoded anew", shape, name, samples, one.memory(), extra=extra))
        set_speedups(rows, "hpdm, original")


@pytest.mark.parametrize("kind", [videos.H264_1080, videos.H264_2160], ids=str)
def test_memory(record, files, reader, request, kind):
    """Peak memory of a process that loads data, and of its decoding process, with windows of 64 frames."""
    frames, cache = 64, 2**26
    one = reader("dataset", side=SIDE, frames=frames, cache_bytes=cache)
    path = files(kind)
    samples = [one.sample(path, [epoch]) for epoch in range(2)]
    memory = one.memory()
    if request.config.getoption("--seconds"):
        add_row(
            record, "memory of reading", f"{kind}, {frames} frames at {SIDE}x{SIDE}", "hpdm", samples, memory,
            extra={"cache_bytes": cache},
        )  # fmt: skip
    stored = kind.frames * kind.height * kind.width * 3
    assert memory.reader + memory.decoder < stored, "a clip is never in memory at its stored size"
