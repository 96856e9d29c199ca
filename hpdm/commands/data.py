"""``hpdm data synthetic|inspect|shard|embed``: commands that make, check and pack sets of videos."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from hpdm.checks import at_least
from hpdm.commands.embed import Embed
from hpdm.data.clips import find_clips
from hpdm.data.decode import TIMEOUT_S, DecodeError, Decoder, Source, probe, read_clip, verify
from hpdm.data.layout import Split, find_videos
from hpdm.data.shard_writer import write_shards
from hpdm.data.shards import find_shards, read_shards
from hpdm.data.synthetic import RADIUS, render_synthetic


@dataclass(frozen=True)
class Synthetic:
    """Render a labeled set of clips with known motion, in UCF-101's layout."""

    out: tyro.conf.Positional[Path]
    """Folder to create."""
    clips: int = 40
    """Clips per class."""
    frames: int = 32
    """Frames per clip."""
    size: tuple[int, int] = (64, 64)
    """Height and width in pixels."""
    fps: float = 16
    """Frames per second."""
    seed: int = 0
    """Equal seeds give equal clips."""
    classes: tuple[str, ...] = ()
    """Class names among RedDisc, GreenSquare, BlueTriangle, YellowRing, MagentaCross, CyanDiamond; none for all."""
    radius: tuple[float, float] = RADIUS
    """Smallest and largest half extent of an object, as fractions of the picture's shorter side."""
    overwrite: bool = False
    """Write into a folder that is not empty."""

    def run(self) -> int:
        """Renders the set and returns the exit status."""
        render_synthetic(
            self.out,
            clips=self.clips,
            frames=self.frames,
            size=self.size,
            fps=self.fps,
            seed=self.seed,
            classes=self.classes or None,
            radius=self.radius,
            overwrite=self.overwrite,
        )
        names, files = find_videos(self.out)
        print(f"{self.out}: {len(files)} clips of {len(names)} classes, {self.frames} frames of {self.size} each")
        return 0


@dataclass(frozen=True)
class Inspect:
    """Show what video files contain, which decoder reads them and which would be skipped."""

    path: tyro.conf.Positional[Path]
    """A video, a folder in any layout that training reads, or shards: their folder or a quoted pattern."""
    frames: int = 1
    """Frames of a training window: shorter clips are reported."""
    stride: int = 1
    """Step between the frames of a window."""
    decoder: Decoder = "auto"
    """Which decoder to use."""
    full: bool = False
    """Decode every frame strictly, which finds damage that a codec would conceal."""
    timeout: float = TIMEOUT_S
    """Seconds for one read of one file."""

    def run(self) -> int:
        """Prints a line per file and a summary; the exit status is 1 when a file would be skipped."""
        at_least(self, 1, "frames", "stride")
        names: list[str] = []
        if self.path.is_file() and find_shards(self.path) is None:
            clips: list[tuple[Source, str]] = [(str(self.path), "")]
        else:
            names, files = find_clips(self.path)
            clips = [(file.source, names[file.label] if names else "") for file in files]
        counts: Counter[str] = Counter()
        for source, name in clips:
            line, outcome = self._line(source)
            counts[outcome] += 1
            print(f"{source}  {name + '  ' if name else ''}{line}")
        classes = f" of {len(names)} classes" if names else ""
        print(f"{len(clips)} files{classes}: " + ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())))
        return 1 if counts["skipped"] else 0

    def _line(self, source: Source) -> tuple[str, str]:
        """The line to print for a file, without its name, and the outcome that the summary counts."""
        try:
            info = probe(source, timeout=self.timeout)
            clip = read_clip(source, [info.frames // 2], decoder=self.decoder, timeout=self.timeout)
            if self.full:
                verify(source, timeout=self.timeout)
        except (DecodeError, FileNotFoundError) as error:
            reason = str(error).removeprefix(os.path.abspath(str(source))).lstrip(": ")
            return f"would be skipped: {reason}", "skipped"
        streams = f", stream {info.stream}, one of {info.video_streams} with video" if info.video_streams > 1 else ""
        line = f"{info.frames} frames {info.width}x{info.height} {info.fps:g} fps {info.codec}, {clip.decoder}{streams}"
        span = (self.frames - 1) * self.stride + 1
        if info.frames < span:
            return f"{line}; would be skipped: a window spans {span} frames", "skipped"
        return line, f"read with {clip.decoder}"


@dataclass(frozen=True)
class Shard:
    """Pack a folder of videos into tar shards (webdataset's layout), with labels and captions."""

    src: tyro.conf.Positional[Path]
    """Folder in any layout that training reads."""
    out: tyro.conf.Positional[Path]
    """Folder to create."""
    clips_per_shard: int = 1000
    """Clips per shard; shards of a few hundred MB to a few GB suit most file systems."""
    resize: int | None = None
    """Encode the clips anew for fast reading, with this many pixels on the shorter side; none packs them unchanged."""
    split: Split | None = None
    """Pack only one side of UCF-101's official split."""
    fold: int = 1
    """Which official split, 1 to 3."""

    def run(self) -> int:
        """Packs the shards and reads them back; the exit status is 1 when a clip was left out as damaged."""
        if find_shards(self.src) is not None:
            raise ValueError(f"src: {self.src} holds shards already, expected a folder of videos")
        names, files = find_clips(self.src, split=self.split, fold=self.fold, captions=True)
        shards = write_shards(self.out, self.src, names, files, self.clips_per_shard, self.resize)
        names, packed = read_shards(shards)
        captions = sum(bool(file.caption) for file in packed)
        left_out = len(files) - len(packed)
        print(
            f"{self.out}: {len(shards)} shards, {len(packed)} clips of {len(names)} classes, {captions} with a caption"
            + (f"; {left_out} of {len(files)} clips left out, which cannot be read" if left_out else "")
        )
        return 1 if left_out else 0


DataCommand = (
    Annotated[Synthetic, tyro.conf.subcommand("synthetic")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Shard, tyro.conf.subcommand("shard")]
    | Annotated[Embed, tyro.conf.subcommand("embed")]
)


def run(command: Synthetic | Inspect | Shard | Embed) -> int:
    """The command ``hpdm data``; returns the exit status."""
    return command.run()
