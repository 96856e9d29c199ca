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
from hpdm.data.decode import TIMEOUT_S, DecodeError, Decoder, Source, StalledError, VideoInfo, probe, read_clip, verify
from hpdm.data.finding import survey
from hpdm.data.found import EMPTY, Found, VideoFile
from hpdm.data.shards import find_shards
from hpdm.data.suffixes import is_image
from hpdm.data.windows import Window
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
            print("damage that a codec conceals is found with --full only")
        return 1 if unused else 0

    def _examine(self, file: VideoFile) -> _Verdict:
        source: Source = file.source
        step = "not readable"
        try:
            info = probe(source, timeout=self.timeout)
            step = "not decodable"
            if info.damage:  # the frame in the middle may be the damaged one
                decoder, doubt = "pyav", "damage"
            else:
                clip = read_clip(source, [info.frames // 2], decoder=self.decoder, timeout=self.timeout)
                decoder, doubt = clip.decoder, clip.doubt
            step = "damaged"
            if self.full:
                verify(source, timeout=self.timeout)
        except (DecodeError, StalledError, FileNotFoundError, IndexError) as error:
            reason = str(error).removeprefix(os.path.abspath(str(source))).lstrip(": ")
            if isinstance(error, StalledError):
                return _Verdict(f"would end training: {reason}", "stalled", problem="without an answer")
            return _Verdict(f"would be skipped: {reason}", "skipped", problem=step)
        streams = f", stream {info.stream}, one of {info.video_streams} with video" if info.video_streams > 1 else ""
        aspect = f" (pixels {info.pixel_aspect:.4g} times as wide as high)" if info.pixel_aspect != 1 else ""
        reader = f"{decoder}, not decord for {doubt}" if doubt else decoder
        rate = f"{info.fps:g} fps" if info.times is None else f"{info.fps:g} fps on average"
        line = f"{info.frames} frames {info.width}x{info.height}{aspect} {rate} {info.codec}, {reader}{streams}"
        outcome, problem, consequence = self._judge(info, file)
        return _Verdict(line, outcome or f"read with {decoder}", problem, consequence, info, doubt)

    def _judge(self, info: VideoInfo, file: VideoFile) -> tuple[str, str, str]:
        """Outcome, problem and consequence for a file that can be read; all empty where training would use it."""
        window = Window(self.frames, self.stride, self.fps)
        if is_image(file.path):
            window = Window(1, 1, None)  # its one frame fills any window
        if window.fps is not None and not info.fps:
            return "skipped", "without a frame rate", "would be skipped: no frame rate, which --fps needs"
        if self.short != "loop" and not window.starts(info):
            outcome, end = ("skipped", "be skipped") if self.short == "skip" else ("too short", "end training")
            return outcome, "shorter than a window", f"would {end}: {window.too_short(info)}"
        if info.damage:
            return "partly damaged", "damaged", f"windows there would be skipped: {info.damage}"
        if self.captions and not file.caption:
            return "without a caption", "without a caption", "would be refused by training with captions: it has none"
        return "", "", ""


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What was found out about a file."""

    line: str
    outcome: str  # for the first line of the summary
    problem: str = ""  # for the counts of problems; empty where training would use the file
    consequence: str = ""
    info: VideoInfo | None = None
    doubt: str = ""  # why decord did not read it

    def text(self) -> str:
        return f"{self.line}; {self.consequence}" if self.consequence else self.line


@dataclass(slots=True)
class _Tally:
    """Counts over all files."""

    outcomes: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    codecs: Counter[str] = field(default_factory=Counter)
    rates: Counter[str] = field(default_factory=Counter)
    doubts: Counter[str] = field(default_factory=Counter)

    def add(self, verdict: _Verdict) -> None:
        self.outcomes[verdict.outcome] += 1
        if verdict.problem:
            self.problems[verdict.problem] += 1
        if verdict.doubt:
            self.doubts[verdict.doubt] += 1
        if verdict.info is not None:
            self.codecs[verdict.info.codec] += 1
            self.rates[f"{verdict.info.fps:.4g}" if verdict.info.fps else "unknown"] += 1

    def print_summary(self, files: int, classes: int) -> bool:
        """Prints the counts; returns whether there were problems."""
        of_classes = f" of {classes} classes" if classes else ""
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.outcomes.items()))
        print(f"{files} files{of_classes}: {outcomes}")
        counters = {
            "codecs": self.codecs, "frame rates": self.rates, "not read with decord for": self.doubts,
            "problems": self.problems,
        }  # fmt: skip
        for title, counts in counters.items():
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
