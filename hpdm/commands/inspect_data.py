"""``hpdm data inspect``: what video files contain, and which of them training would not use."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from tqdm import tqdm

from hpdm.checks import at_least
from hpdm.data.clips import Short
from hpdm.data.decode import TIMEOUT_S, DecodeError, Decoder, Source, VideoInfo, probe, read_clip, verify
from hpdm.data.finding import survey
from hpdm.data.found import EMPTY, Found, VideoFile
from hpdm.data.shards import find_shards
from hpdm.data.suffixes import is_image
from hpdm.printable import printable

_MOST_RATES = 6


@dataclass(frozen=True)
class Inspect:
    """Show what video files contain, which decoder reads them and which ones training would not use."""

    path: tyro.conf.Positional[Path]
    """A video, a folder in any layout that training reads, or shards: their folder or a quoted pattern."""
    frames: int = 1
    """Frames of a training window: shorter clips are reported."""
    stride: int = 1
    """Step between the frames of a window."""
    fps: float | None = None
    """Frames per second of training, as in `hpdm train --fps`."""
    short: Short = "skip"
    """What training does with a clip that is too short."""
    captions: bool = False
    """Read the captions as well, as training with --embeddings does; clips without one are reported."""
    decoder: Decoder = "auto"
    """Which decoder to use."""
    full: bool = False
    """Decode every frame strictly, which finds damage that a codec would conceal."""
    quiet: bool = False
    """Print only the files that training would not use, and the summary."""
    timeout: float = TIMEOUT_S
    """Seconds for one read of one file."""

    def __post_init__(self) -> None:
        at_least(self, 1, "frames", "stride")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"fps: got {self.fps}, expected > 0")

    def run(self) -> int:
        """Prints a line per file and a summary; the exit status is 1 when training would not use a file."""
        if self.path.is_file() and find_shards(self.path) is None:
            found = Found([], [VideoFile(str(self.path), 0)])
        else:
            found = survey(self.path, captions=self.captions)
        tally = _Tally()
        # Without a terminal there is no bar (disable=None): log files would hold a copy of it per line.
        options = {"unit": "file", "delay": 1, "leave": False, "dynamic_ncols": True, "disable": None}
        for file in tqdm(found.files, desc="inspect", **options):
            verdict = self._examine(file)
            tally.add(verdict)
            if verdict.problem or not self.quiet:
                name = f"  {found.class_names[file.label]}" if found.class_names else ""
                tqdm.write(printable(f"{file.path}{name}  {verdict.text()}"))
        unused = tally.print_summary(len(found.files), len(found.class_names))
        unused |= _print_left_out(self.path, found)
        if not self.full:
            print("damage inside of files, and damage that a codec conceals, is found with --full only")
        return 1 if unused else 0

    def _examine(self, file: VideoFile) -> _Verdict:
        source: Source = file.source
        step = "not readable"
        try:
            info = probe(source, timeout=self.timeout)
            step = "not decodable"
            # The ends as well: a file may be cut off, or lack what decoding its first frames takes.
            numbers = sorted({0, info.frames // 2, info.frames - 1})
            clip = read_clip(source, numbers, decoder=self.decoder, timeout=self.timeout)
            step = "damaged"
            if self.full:
                verify(source, timeout=self.timeout)
        except (DecodeError, FileNotFoundError) as error:
            reason = str(error).removeprefix(os.path.abspath(str(source))).lstrip(": ")
            return _Verdict(f"would be skipped: {reason}", "skipped", problem=step)
        streams = f", stream {info.stream}, one of {info.video_streams} with video" if info.video_streams > 1 else ""
        line = f"{info.frames} frames {info.width}x{info.height} {info.fps:g} fps {info.codec}, {clip.decoder}{streams}"
        outcome, problem, consequence = self._judge(info, file)
        return _Verdict(line, outcome or f"read with {clip.decoder}", problem, consequence, info)

    def _judge(self, info: VideoInfo, file: VideoFile) -> tuple[str, str, str]:
        """Outcome, problem and consequence for a file that can be read; all empty where training would use it."""
        if self.captions and not file.caption:
            return "without a caption", "without a caption", "would be refused by training with captions: it has none"
        if is_image(file.path):
            return "", "", ""
        if self.fps is not None and not info.fps:
            return "skipped", "without a frame rate", "would be skipped: no frame rate, which --fps needs"
        rate = 1.0 if self.fps is None else info.fps / self.fps
        span = math.floor((self.frames - 1) * self.stride * rate + 0.5) + 1
        if info.frames < span and self.short == "skip":
            return "skipped", "shorter than a window", f"would be skipped: a window spans {span} frames"
        if info.frames < span and self.short == "error":
            return "too short", "shorter than a window", f"would end training: a window spans {span} frames"
        return "", "", ""


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What was found out about a file."""

    line: str
    outcome: str  # for the first line of the summary
    problem: str = ""  # for the counts of problems; empty where training would use the file
    consequence: str = ""
    info: VideoInfo | None = None

    def text(self) -> str:
        return f"{self.line}; {self.consequence}" if self.consequence else self.line


@dataclass(slots=True)
class _Tally:
    """Counts over all files."""

    outcomes: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    codecs: Counter[str] = field(default_factory=Counter)
    rates: Counter[str] = field(default_factory=Counter)

    def add(self, verdict: _Verdict) -> None:
        self.outcomes[verdict.outcome] += 1
        if verdict.problem:
            self.problems[verdict.problem] += 1
        if verdict.info is not None:
            self.codecs[verdict.info.codec] += 1
            self.rates[f"{verdict.info.fps:.4g}" if verdict.info.fps else "unknown"] += 1

    def print_summary(self, files: int, classes: int) -> bool:
        """Prints the counts; returns whether there were problems."""
        of_classes = f" of {classes} classes" if classes else ""
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.outcomes.items()))
        print(f"{files} files{of_classes}: {outcomes}")
        for title, counts in (("codecs", self.codecs), ("frame rates", self.rates), ("problems", self.problems)):
            if counts:
                print(f"{title}: {_most_common(counts.most_common())}")
        return bool(self.problems)


def _most_common(counts: Sequence[tuple[str, int]]) -> str:
    shown = ", ".join(f"{printable(name)} ({n})" for name, n in counts[:_MOST_RATES])
    others = sum(n for _, n in counts[_MOST_RATES:])
    return f"{shown}, others ({others})" if others else shown


def _print_left_out(root: Path, found: Found) -> bool:
    """Prints what training leaves out from the start; returns whether there were videos among it."""
    for left_out in found.left_out:
        print(f"left out, {left_out.reason}: {left_out.count}")
        for place in left_out.places:
            print(f"  {printable(place.removeprefix(f'{root}{os.sep}'))}")
        if left_out.count > len(left_out.places):
            print(f"  and {left_out.count - len(left_out.places)} more")
    for note in found.notes:
        print(f"note: {printable(note)}")
    return any(left_out.reason == EMPTY for left_out in found.left_out)
