"""Holding what the product returns against the truth, and counting."""

from __future__ import annotations

import random
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hpdm.data.decode import DecodeError, Decoder, Source, probe, read_clip
from tests.video.cases import Case

RESULT = "video"
"""The property of a test's report under which it tells what came of its file."""
WINDOW = 8
TIMEOUT_S = 30
CLOCK_S = 0.0011
"""Seconds by which a time may be off: Matroska and ASF count milliseconds."""
BY_NAME = 3
"""Reads of a file for which each decoder is asked by its name: it must give the right frames, too, or refuse."""
EXPLAINED = 20
"""Wrong reads of a file of which it is found out what came instead."""


@dataclass
class Findings:
    """What came of one file."""

    frames: int = 0
    reads: int = 0
    wrong: list[str] = field(default_factory=list)
    """One line for each read, or answer of ``probe``, that is not the truth."""
    refused: list[str] = field(default_factory=list)
    """The reasons of reads that were refused."""

    def faults(self, case: Case) -> list[str]:
        """What of this must not be: wrong frames, and refusals for no reason that the case allows."""
        allowed = case.refusal or case.may_refuse
        bad = [reason for reason in self.refused if not allowed or not re.search(allowed, reason)]
        faults = [*self.wrong, *bad]
        if case.refusal and len(self.refused) < self.reads:
            faults.append(f"{self.reads - len(self.refused)} of {self.reads} reads were not refused")
        return faults


def counts(case: Case, found: Findings) -> dict[str, Any]:
    """What the table at the end of a run says of a file, in types that JSON has."""
    numbers = {"files": 1, "frames": found.frames, "reads": found.reads, "wrong": len(found.wrong)}
    numbers |= {"refused": len(found.refused), "faulty": int(bool(found.faults(case)))}
    kinds = Counter(re.sub(r"\d+", "N", reason) for reason in found.refused)
    reasons = [f"{reason} ({count} reads)" for reason, count in kinds.most_common(2)]
    return {"name": case.name, "kind": case.kind, "reasons": reasons, **numbers}


def requests(name: str, frames: int) -> list[list[int]]:
    """Every frame alone, every window of 8, the whole and a pick with repeats, in an order that jumps about."""
    draw = random.Random(zlib.crc32(name.encode()))
    reads = [[i] for i in range(frames)]
    reads += [list(range(s, min(s + WINDOW, frames))) for s in range(max(1, frames - WINDOW + 1))]
    reads += [list(range(frames)), [draw.randrange(frames) for _ in range(WINDOW)]]
    draw.shuffle(reads)
    return reads


def examine(case: Case, source: Source, truth: Sequence[np.ndarray]) -> Findings:
    """Reads all of a file, and compares it with ``truth``; without a truth, all reads must be refused."""
    if not truth:
        return _examine_refusal(source)
    found = Findings(frames=len(truth))
    _probe(case, source, truth, found)
    reads = requests(case.name, len(truth))
    for numbers in reads:
        _read(case, source, numbers, truth, found)
    for numbers in reads[:BY_NAME]:
        _read(case, source, numbers, truth, found, "pyav")
        _read(case, source, numbers, truth, found, "decord")
    return found


def _examine_refusal(source: Source) -> Findings:
    found = Findings(reads=4)
    for call in (
        lambda: probe(source, timeout=TIMEOUT_S),
        lambda: read_clip(source, [0], timeout=TIMEOUT_S),
        lambda: read_clip(source, range(WINDOW), timeout=TIMEOUT_S),
        lambda: read_clip(source, [0], decoder="pyav", timeout=TIMEOUT_S),
    ):
        try:
            call()
        except DecodeError as error:
            found.refused.append(_reason(error, source, found))
        except IndexError as error:
            found.wrong.append(f"got IndexError: {error}, expected a refusal")
    return found


def _probe(case: Case, source: Source, truth: Sequence[np.ndarray], found: Findings) -> None:
    found.reads += 1
    try:
        info = probe(source, timeout=TIMEOUT_S)
    except DecodeError as error:
        found.refused.append(_reason(error, source, found))
        return
    if info.frames != len(truth):
        found.wrong.append(f"probe: got {info.frames} frames, expected {len(truth)}")
    if (info.height, info.width) != truth[0].shape[:2]:
        found.wrong.append(f"probe: got {info.height}x{info.width}, expected {truth[0].shape[:2]}")
    if case.pixel_aspect is not None and abs(info.pixel_aspect / case.pixel_aspect - 1) > 0.01:
        found.wrong.append(f"probe: got a pixel aspect of {info.pixel_aspect}, expected {case.pixel_aspect}")
    if len(truth) == len(case.seconds) > 1:
        times = info.times or [number / info.fps for number in range(len(truth))]
        late = max(abs(time - second) for time, second in zip(times, case.seconds))
        if len(times) != len(truth) or late > CLOCK_S:
            found.wrong.append(f"probe: got times that are {late:.4f} s off, expected at most {CLOCK_S}")


def _read(
    case: Case,
    source: Source,
    numbers: list[int],
    truth: Sequence[np.ndarray],
    found: Findings,
    decoder: Decoder = "auto",
) -> None:
    found.reads += 1
    try:
        frames = read_clip(source, numbers, decoder=decoder, timeout=TIMEOUT_S).frames
    except DecodeError as error:
        reason = _reason(error, source, found)
        if decoder != "decord":  # which may refuse any file
            found.refused.append(reason)
        return
    except IndexError as error:
        found.wrong.append(f"asked {_short(numbers)} of {decoder}, got IndexError: {error}")
        return
    right = [np.array_equal(frame, truth[i]) or i in case.undefined for frame, i in zip(frames, numbers)]
    if len(frames) != len(numbers) or not all(right):
        got = [nearest(frame, truth) for frame in frames[: WINDOW + 1]] if len(found.wrong) < EXPLAINED else ["others"]
        found.wrong.append(f"asked {_short(numbers)} of {decoder}, got {_short(got)}")


def _reason(error: DecodeError, source: Source, found: Findings) -> str:
    """The reason in a refusal, which must name the file."""
    name = str(source)
    text = str(error)
    if name not in text:
        found.wrong.append(f"a refusal that does not name the file: {text}")
    return text.partition(name)[2].lstrip(": ") or text


def nearest(frame: np.ndarray, truth: Sequence[np.ndarray]) -> str:
    """The number of the frame that an image is, with ``~`` where it is only similar, ``?`` where it is like none."""
    if frame.shape != truth[0].shape:
        return "x".join(map(str, frame.shape))
    few = frame[::4, ::4].astype(int)
    best = int(np.argmin([np.abs(few - other[::4, ::4]).mean() for other in truth]))
    difference = float(np.abs(frame.astype(int) - truth[best]).mean())
    if difference == 0:
        return str(best)
    return f"{best}~{difference:.1f}" if difference < 8 else f"?{best}"


def _short(items: Sequence[object]) -> str:
    return " ".join(map(str, items if len(items) <= WINDOW else [*items[:WINDOW], "..."]))
