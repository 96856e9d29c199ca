"""Reading videos: every frame is the one that a sequential decode of the file gives, or the file is refused by name.

**Which stream.** The one that the ``ffmpeg`` command takes by itself; the picture on an album's cover is no video.

**Which frames.** Frame ``i`` is the i-th that a decoder puts out which reads the file from its first packet to its
end, whatever its header claims, and is shown upright, turned and mirrored as the file asks. The first sight of a file
is such a decode; it is remembered, on disk too, and every later read is held against it (:mod:`hpdm.data.decoding`).
Windows that touch damage are refused.

**Which decoder.** decord where it is proven to give the same frames, PyAV elsewhere, which decodes from a keyframe
before the window (:mod:`hpdm.data.decoding.with_decord` has the rule).

**Hangs and crashes.** Each process that reads has one that decodes (:mod:`hpdm.data.decoder_process`), started at the
first call. It is killed when nothing is heard of it for the timeout. After a hang in decord PyAV reads the file; after
one in PyAV the read is tried again with more time, since a slow disk is no damage, and in the end
:class:`StalledError` names the file. So it is with a process that is killed from outside. One that crashes again on a
second try has met a damaged file.

**Videos inside other files.** A :class:`Member` is read in place, and gives the same frames as a file of its own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from hpdm.checks import check_choice
from hpdm.data import decoder_process
from hpdm.data.decoder_process import Transform

log = logging.getLogger(__name__)

Decoder = Literal["auto", "decord", "pyav"]
TIMEOUT_S = 30.0
_PATIENCE = (1, 2, 4)  # times the timeout, for each try


class DecodeError(RuntimeError):
    """A file that cannot be read as a video; the message names it."""


class StalledError(RuntimeError):
    """No answer about a file, several times: it may be good, and its disk or the machine is stuck."""


class Member(NamedTuple):
    """A video stored uncompressed inside another file, such as a tar: ``size`` bytes from ``offset`` of ``archive``."""

    archive: str
    name: str  # for messages
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"


Source = str | os.PathLike[str] | Member


@dataclass(frozen=True)
class VideoInfo:
    """What a video file contains."""

    path: str
    frames: int  # that a sequential decode gives, whatever the header claims
    height: int  # of an upright frame, in stored pixels
    width: int
    fps: float  # frames per second, the real mean of the whole file; 0 where nothing tells it
    codec: str
    video_streams: int
    stream: int  # the container's index of the stream that is read
    pixel_aspect: float = 1.0  # width of a pixel over its height, as an upright frame is shown
    times: tuple[float, ...] | None = None  # seconds from the first frame to each; None where they are evenly spaced
    damage: str = ""  # which frames cannot be read; windows that hold them are skipped


class DecodedClip(NamedTuple):
    """Decoded frames, the decoder that gave them, and why it was not decord."""

    frames: np.ndarray  # uint8 RGB [F, H, W, 3]
    decoder: Literal["decord", "pyav"]
    doubt: str = ""  # why decord is not trusted with the file


def probe(path: Source, *, timeout: float = TIMEOUT_S) -> VideoInfo:
    """Describes a video file; at first sight of it, decodes it from end to end.

    Args:
        path: the file, or a member of one.
        timeout: seconds without progress, > 0.

    Raises:
        FileNotFoundError: no such file.
        DecodeError: not a video, or damaged beyond decoding.
        StalledError: no answer within the timeout, nor within a longer one.
    """
    name, reply, _ = _ask(path, {"op": "probe"}, timeout)
    if reply["status"] != "ok":
        raise DecodeError(f"{name}: not a readable video: {reply['error']}")
    times = None if reply["times"] is None else tuple(reply["times"])
    return VideoInfo(path=name, **{k: v for k, v in reply.items() if k != "status"} | {"times": times})


def verify(path: Source, *, timeout: float = TIMEOUT_S) -> None:
    """Decodes a whole file strictly with PyAV, to find damage that a codec would conceal in :func:`read_clip`.

    Args:
        path: the file, or a member of one.
        timeout: seconds without progress, > 0.

    Raises:
        FileNotFoundError: no such file.
        DecodeError: not a video, or a damaged one.
        StalledError: no answer within the timeout, nor within a longer one.
    """
    name, reply, _ = _ask(path, {"op": "verify"}, timeout)
    if reply["status"] != "ok":
        raise DecodeError(f"{name}: damaged: {reply['error']}")


def read_clip(
    path: Source,
    indices: Sequence[int],
    *,
    decoder: Decoder = "auto",
    timeout: float = TIMEOUT_S,
    transform: Transform | None = None,
) -> DecodedClip:
    """Decodes the frames ``indices`` of a video.

    Args:
        path: the file, or a member of one.
        indices: frame numbers from 0, at least one, in any order, with or without repeats.
        decoder: ``"auto"`` takes decord where it is trusted, else PyAV; ``"decord"`` and ``"pyav"`` that one alone.
        timeout: seconds without progress, > 0; doubled twice before a file counts as stalled.
        transform: applied to each frame, uint8 ``[H, W, 3]``, as it arrives, so that a clip is never in memory at its
            stored size. Every frame must give the same shape. The frame's memory is used again for the next one.

    Returns:
        Frames uint8 RGB ``[len(indices), H, W, 3]``, or what ``transform`` makes of them, and the decoder used.

    Raises:
        FileNotFoundError: no such file.
        IndexError: a frame that the video does not have.
        ValueError: no indices, an unknown decoder, a timeout that is not positive.
        DecodeError: not a video, or damaged in these frames.
        StalledError: no answer within the timeout, nor within a longer one.
    """
    check_choice("decoder", decoder, Decoder)
    wanted = [int(i) for i in indices]
    if not wanted:
        raise ValueError("indices: got none, expected at least one frame number")
    numbers = sorted(set(wanted))
    request = {"op": "read", "numbers": numbers, "decoder": decoder}
    name, reply, frames = _ask(path, request, timeout, transform)
    if reply["status"] == "index":
        raise IndexError(f"{name}: {reply['error']}")
    if reply["status"] != "ok":
        raise DecodeError(f"{name}: cannot be decoded: {reply['error']}")
    if frames is None:
        raise RuntimeError(f"{name}: the decoding process sent no frames")
    if wanted != numbers:
        frames = frames[np.searchsorted(numbers, wanted)]
    return DecodedClip(frames, reply["decoder"], reply["doubt"])


_decord_fails: dict[str, str] = {}  # what happened to decord on a file, by the file's name: it is not tried again


def _ask(
    source: Source,
    request: dict[str, Any],
    timeout: float,
    transform: Transform | None = None,
) -> tuple[str, dict[str, Any], np.ndarray | None]:
    """The name of a file for messages, the answer to a request about it, and the frames of it, ``[F, ...]``.

    Raises:
        FileNotFoundError, StalledError, ValueError: as :func:`read_clip`.
    """
    name, place = _locate(source, timeout)
    request = {**request, **place}
    tries = list(_PATIENCE)
    while True:
        failure = _decord_fails.get(name, "")
        if failure and request.get("decoder") == "auto":
            request["decoder"] = "pyav"
        reply, frames = decoder_process.process.call(request, timeout * tries[0], transform)
        if reply["status"] not in ("stalled", "error") or "stage" not in reply:
            if failure and "doubt" in reply:
                reply["doubt"] = failure
            return name, reply, frames
        in_decord = reply["stage"] == "decord"
        if in_decord and request["decoder"] == "auto":
            _decord_fails[name] = f"decord: {reply['error']}"
            log.info("%s: read with PyAV from now on: decord: %s", name, reply["error"])
        elif reply["status"] == "error":
            return name, reply | {"error": f"decord: {reply['error']}" if in_decord else reply["error"]}, frames
        elif len(tries) == 1:
            raise StalledError(f"{name}: {reply['error']}, after {len(_PATIENCE)} tries")
        else:
            log.warning("%s: %s; tried again with more time", name, reply["error"])
            tries.pop(0)


def _locate(source: Source, timeout: float) -> tuple[str, dict[str, Any]]:
    """The name for messages, and the part of a request that tells the worker where the video is."""
    if not timeout > 0:
        raise ValueError(f"timeout: got {timeout}, expected seconds > 0")
    file = source.archive if isinstance(source, Member) else source
    if not Path(file).is_file():
        raise FileNotFoundError(f"path: {file} is not a file")
    # Absolute, since this process may have changed its working directory after the worker was started.
    path = os.path.abspath(file)
    if not isinstance(source, Member):
        return path, {"path": path}
    return f"{path}/{source.name}", {"path": path, "start": source.offset, "end": source.offset + source.size}
