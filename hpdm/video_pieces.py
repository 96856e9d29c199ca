"""Writes a video while the rest of it is still to come: pieces of equal length, joined without encoding them again.

Every piece is an mp4 that plays by itself, and appears whole. What follows the last whole piece is kept by the caller
(:attr:`VideoPieces.rest`), so that an interrupted video goes on at any frame. The pieces, and so the video, depend on
its frames alone, not on how they arrived or where it was interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpdm.files import atomic_path
from hpdm.video import write_video

PIECE = 64
"""Frames of a piece. Each begins with a frame that is coded by itself."""


class VideoPieces:
    """One video that is written in pieces; at most one piece of it is in memory.

    Args:
        folder: of the pieces; made with the first one if it is not there.
        fps: frames per second.
        done: frames of an interrupted video, of which the whole pieces are in ``folder``.
        rest: those of them that follow the last whole piece, uint8 ``[3, n, H, W]``.

    Raises:
        FileNotFoundError: a piece is missing.
        ValueError: another number of frames than the rest should have.
    """

    def __init__(self, folder: Path, fps: float, done: int = 0, rest: Tensor | None = None) -> None:
        self.folder, self.fps = folder, fps
        self.done = done
        """Frames so far."""
        self.rest = torch.empty(3, 0, 0, 0, dtype=torch.uint8) if rest is None else rest
        """Frames since the last whole piece, uint8 ``[3, n, H, W]``."""
        if self.rest.shape[1] != done % PIECE:
            raise ValueError(f"rest: got {self.rest.shape[1]} frames, expected {done % PIECE} of {done}")
        for number in range(done // PIECE):
            if not self._path(number).is_file():
                first = number * PIECE
                raise FileNotFoundError(
                    f"folder: got no {self._path(number)}, expected frames {first} to {first + PIECE - 1} there"
                )

    @property
    def in_files(self) -> int:
        """Frames in whole pieces: all but the rest."""
        return self.done // PIECE * PIECE

    def add(self, frames: Tensor) -> None:
        """Appends frames, uint8 ``[3, n, H, W]``, and writes the pieces that are whole.

        Raises:
            OSError: a piece cannot be written; those before it stay.
        """
        rest = torch.cat((self.rest, frames), dim=1) if self.rest.shape[1] else frames
        number = self.done // PIECE
        while rest.shape[1] >= PIECE:
            self._write(number, rest[:, :PIECE])
            rest, number = rest[:, PIECE:], number + 1
        self.rest, self.done = rest.clone(), self.done + frames.shape[1]

    def finish(self, path: Path) -> None:
        """Joins all pieces to the mp4 ``path``, atomically; the pieces stay.

        Raises:
            OSError: it cannot be written.
            ValueError: no frames, or a damaged piece.
        """
        if self.done == 0:
            raise ValueError("frames: got none, expected at least one")
        pieces = [(self._path(number), PIECE) for number in range(self.done // PIECE)]
        if self.rest.shape[1]:
            pieces.append((self._path(len(pieces)), self.rest.shape[1]))
            self._write(len(pieces) - 1, self.rest)
        with atomic_path(path) as temporary:
            join(pieces, temporary)

    def _write(self, number: int, frames: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_video(self._path(number), frames, self.fps)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06}.mp4"


def join(pieces: Sequence[tuple[Path, int]], path: Path) -> None:
    """Joins mp4 files of :func:`hpdm.video.write_video` with the same size and frame rate, packet by packet.

    Args:
        pieces: the files, and the number of frames of each.
        path: the mp4 to write; not atomically.

    Raises:
        OSError: the file cannot be written.
        ValueError: a piece has another number of frames, or is no video.
    """
    import av  # deferred: importing hpdm must not need the codecs

    with av.open(str(path), "w", format="mp4") as out:
        stream: Any = None
        frames, first_dts = 0, 0
        for piece, expected in pieces:
            found = 0
            with av.open(str(piece)) as source:
                video = source.streams.video[0]
                for packet in source.demux(video):
                    if packet.pts is None or packet.dts is None or packet.duration is None:
                        continue  # the empty one at the end
                    if stream is None:
                        stream = out.add_stream_from_template(video)
                        stream.time_base, first_dts = video.time_base, packet.dts
                    packet.pts += frames * packet.duration
                    # Evenly spaced: in a piece of one or two frames none waits for a later one, so they have no delay.
                    packet.dts = first_dts + (frames + found) * packet.duration
                    packet.stream = stream
                    out.mux(packet)
                    found += 1
            if found != expected:
                raise ValueError(f"pieces: got {found} frames in {piece}, expected {expected}")
            frames += expected
