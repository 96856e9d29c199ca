"""``hpdm data synthetic|inspect|shard|embed|encode``: commands that make, check, pack and encode sets of videos."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from hpdm.commands.embed import Embed
from hpdm.commands.encode import Encode
from hpdm.commands.inspect_data import Inspect
from hpdm.data.finding import survey
from hpdm.data.layout import Split, find_videos
from hpdm.data.shard_writer import write_shards
from hpdm.data.shards import find_shards, read_shards
from hpdm.data.summary import log_summary
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
        found = survey(self.src, split=self.split, fold=self.fold, captions=True)
        log_summary(self.src, found)
        shards = write_shards(self.out, self.src, found.class_names, found.files, self.clips_per_shard, self.resize)
        packed = read_shards(shards)
        captions = sum(bool(file.caption) for file in packed.files)
        left_out = len(found.files) - len(packed.files)
        print(
            f"{self.out}: {len(shards)} shards, {len(packed.files)} clips of {len(packed.class_names)} classes, "
            f"{captions} with a caption"
            + (f"; {left_out} of {len(found.files)} clips left out, which cannot be read" if left_out else "")
        )
        return 1 if left_out else 0


DataCommand = (
    Annotated[Synthetic, tyro.conf.subcommand("synthetic")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Shard, tyro.conf.subcommand("shard")]
    | Annotated[Embed, tyro.conf.subcommand("embed")]
    | Annotated[Encode, tyro.conf.subcommand("encode")]
)


def run(command: Synthetic | Inspect | Shard | Embed | Encode) -> int:
    """The command ``hpdm data``; returns the exit status."""
    return command.run()
