"""Videos on disk while they are sampled segment by segment, so that an interrupted command can go on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hpdm.commands import unfinished
from hpdm.long_video import Segment, State
from hpdm.video import to_uint8
from hpdm.video_pieces import VideoPieces

_STATE = "state_"


class LongFiles:
    """The files of a batch of B videos of N frames each.

    After every segment they hold all that the rest depends on: the pieces of video n in the folder ``STEM/00n``, and
    the other things in ``STEM.safetensors``, whose size does not depend on N. The pieces are written first. A command
    that is killed between the two writes the newest piece again.

    Args:
        path: ``STEM.safetensors``. It is read if it is there.
        videos: B.
        frames: N.
        fps: of the files.
        columns: frames of each video that are kept for the contact sheet.

    Raises:
        ValueError: what an interrupted command left is damaged; the message names the file.
    """

    def __init__(self, path: Path, videos: int, frames: int, fps: float, columns: int) -> None:
        self.path, self.frames = path, frames
        # Those that a contact sheet shows of a whole video.
        shown = np.linspace(0, frames - 1, columns).round().astype(int).tolist()
        found = unfinished.read_state(path)
        if found:
            names = ["segments", "frames", *(f"{name}_{n}" for name in ("rest", "shown") for n in range(videos))]
            unfinished.check_names(path, [name for name in found if not name.startswith(_STATE)], names)
        self.segments = int(found["segments"]) if found else 0
        """Segments that are finished."""
        self.state: State = {name.removeprefix(_STATE): t for name, t in found.items() if name.startswith(_STATE)}
        """Of the sampler, after them."""
        self.videos: list[_Video] = []
        for n in range(videos):
            done, rest = (int(found["frames"]), found[f"rest_{n}"]) if found else (0, None)
            try:
                pieces = VideoPieces(self.folder / f"{n:03}", fps, done, rest)
            except (FileNotFoundError, ValueError) as error:
                raise ValueError(unfinished.damaged(path, error)) from None
            self.videos.append(_Video(pieces, shown, found.get(f"shown_{n}")))

    @property
    def folder(self) -> Path:
        """Folder of the pieces."""
        return self.path.with_suffix("")

    def keep(self, segment: Segment) -> None:
        """Writes the next frames.

        Raises:
            OSError: they cannot be written. The message says where those before them are.
        """
        with self._saying_where_they_are():
            for video, frames in zip(self.videos, segment.frames):
                video.add(to_uint8(frames))
            self.segments = segment.number + 1
            unfinished.write_state(self.path, self._contents(segment.state))

    def finish(self, paths: Sequence[Path]) -> None:
        """Writes each video as a whole.

        Raises:
            OSError: they cannot be written. The message says where the pieces are.
            ValueError: a piece is damaged.
        """
        with self._saying_where_they_are():
            for video, path in zip(self.videos, paths):
                try:
                    video.pieces.finish(path)
                except ValueError as error:
                    raise ValueError(unfinished.damaged(self.path, error)) from None

    def sheet(self) -> list[Tensor]:
        """The frames of each video for the contact sheet, uint8 ``[3, columns, H, W]``."""
        return [video.sheet() for video in self.videos]

    def _contents(self, state: State) -> dict[str, Tensor]:
        # Copies, since tensors of a state may share memory, which a file's may not.
        contents = {f"{_STATE}{name}": tensor.to("cpu", copy=True) for name, tensor in state.items()}
        contents["segments"] = torch.tensor(self.segments)
        contents["frames"] = torch.tensor(self.videos[0].pieces.done)
        for n, video in enumerate(self.videos):
            contents |= {f"rest_{n}": video.pieces.rest, f"shown_{n}": video.sheet()}
        return contents

    @contextmanager
    def _saying_where_they_are(self) -> Iterator[None]:
        """Adds to an OSError where the frames so far are."""
        try:
            yield
        except OSError as error:
            frames = min(video.pieces.in_files for video in self.videos)
            where = f"the first {frames} of {self.frames} frames are in {self.folder}, as mp4 files; " if frames else ""
            raise OSError(f"{error}; {where}the same command goes on from where this one stopped") from error


class _Video:
    """One video that is written: its pieces, and its frames for the contact sheet.

    Args:
        pieces: of the frames so far.
        shown: numbers of the frames for the contact sheet, ascending.
        found: those of the frames so far, uint8 ``[3, n, H, W]``; ``None`` for none.
    """

    def __init__(self, pieces: VideoPieces, shown: Sequence[int], found: Tensor | None) -> None:
        self.pieces, self.shown = pieces, shown
        self._found = [] if found is None else list(found.unbind(1))

    def add(self, frames: Tensor) -> None:
        """Appends frames, uint8 ``[3, n, H, W]``."""
        first = self.pieces.done
        self.pieces.add(frames)
        chosen = [n - first for n in self.shown if first <= n < self.pieces.done]
        self._found += [frames[:, n].clone() for n in chosen]  # a view would keep the whole segment in memory

    def sheet(self) -> Tensor:
        """The frames for the contact sheet so far, uint8 ``[3, n, H, W]``; there must be one."""
        return torch.stack(self._found, dim=1)
