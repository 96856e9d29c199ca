"""Readers of windows of videos, each measured in a process of its own: times, processor time and peak memory.

What a reader needs is imported in its process alone, so that its memory is not that of the others.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.videos import number_shown

Read = Callable[[str, Sequence[int]], np.ndarray | None]
"""Reads the frames of given numbers of a file, uint8 ``[F, H, W, 3]``; ``None`` from one that only decodes."""


class Sample(NamedTuple):
    """The cost of reading one window."""

    seconds: float
    cpu_seconds: float  # of the reading and the decoding process together


class Memory(NamedTuple):
    """Peak memory in bytes."""

    reader: int  # beyond what its process held after its imports
    decoder: int  # all of the decoding process, 0 where the reader has none


# --- readers ---


def hpdm(decoder: str, side: int | None = None) -> Read:
    """Ours; with ``side``, frames are resized to that many rows and columns as they arrive, as for training."""
    import torch

    from hpdm.data.decode import probe, read_clip
    from hpdm.data.resize import resize_and_crop

    def resized(frame: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(resize_and_crop(torch.from_numpy(frame)[None], (side, side))[0])

    def read(path: str, numbers: Sequence[int]) -> np.ndarray:
        probe(path)  # as a data set does before it draws a window
        return read_clip(path, numbers, decoder=decoder, transform=None if side is None else resized).frames

    return read


def dataset(side: int, frames: int, cache_bytes: int) -> Read:
    """A data set of one file: windows of ``frames`` frames, resized, with a cache."""
    from hpdm.data.clips import VideoDataset
    from hpdm.data.order import ClipKey

    sets: dict[str, VideoDataset] = {}

    def read(path: str, numbers: Sequence[int]) -> np.ndarray:
        if path not in sets:
            sets[path] = VideoDataset(Path(path).parent, frames=frames, size=side, cache_bytes=cache_bytes)
        return sets[path][ClipKey(0, numbers[0])]["video"].numpy()

    return read


def decord() -> Read:
    """Decord, or decord2, which has the same module name, as most projects use it: opened for every clip."""
    import decord

    def read(path: str, numbers: Sequence[int]) -> np.ndarray:
        return decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1).get_batch(numbers).asnumpy()

    return read


def torchcodec() -> Read:
    """Torchcodec with its defaults, which look through all packets first, and one thread."""
    from torchcodec.decoders import VideoDecoder

    def read(path: str, numbers: Sequence[int]) -> np.ndarray:
        decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
        return decoder.get_frames_at(list(numbers)).data.numpy()

    return read


def pyav(convert: bool = True) -> Read:
    """PyAV: seeks to the time of the first frame and decodes to the last, without any check; or decodes alone."""
    import av

    def read(path: str, numbers: Sequence[int]) -> np.ndarray | None:
        frames = []
        with av.open(path) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            ticks = 1 / (stream.average_rate * stream.time_base)  # between two frames
            first = stream.start_time or 0
            container.seek(first + round(numbers[0] * ticks), stream=stream)
            for frame in container.decode(stream):
                number = round((frame.pts - first) / ticks)
                if number >= numbers[0]:
                    frames.append(frame.to_ndarray(format="rgb24") if convert else None)
                if number >= numbers[-1]:
                    break
        return np.stack(frames) if convert else None

    return read


MAKERS: dict[str, Callable[..., Read]] = {
    "hpdm": hpdm, "dataset": dataset, "decord": decord, "torchcodec": torchcodec, "pyav": pyav,
}  # fmt: skip


# --- what runs in a reader's process ---

_read: Read
_held = 0  # bytes after the imports


def _start(maker: str, options: dict[str, object], packages: str | None) -> None:
    """Prepares this process for one reader, with a folder of packages that come first."""
    global _read, _held
    if packages is not None:
        sys.path.insert(0, packages)
    _read = MAKERS[maker](**options)
    _held = _status("self", "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here


def _sample(path: str, numbers: Sequence[int]) -> Sample:
    cpu, begin = _cpu_seconds(), time.perf_counter()
    _read(path, numbers)
    return Sample(time.perf_counter() - begin, _cpu_seconds() - cpu)


def _shown(path: str, numbers: Sequence[int]) -> list[int] | None:
    frames = _read(path, numbers)
    return None if frames is None else [number_shown(frame) for frame in frames]


def _memory() -> Memory:
    decoder = _decoder()
    return Memory(_status("self", "VmHWM") - _held, 0 if decoder is None else _status(decoder, "VmHWM"))


def _decoder() -> int | None:
    """The number of the decoding process, if this one has any."""
    module = sys.modules.get("hpdm.data.decoder_process")
    process = None if module is None else module.process.process
    return None if process is None else process.pid


def _cpu_seconds() -> float:
    decoder = _decoder()
    # The clock of another process's processor time, as clock_getcpuclockid(3) makes it.
    other = 0.0 if decoder is None else time.clock_gettime((~decoder << 3) | 2)
    return time.process_time() + other


def _status(process: int | str, field: str) -> int:
    """Bytes that a field of a process's status says."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


# --- the other side ---


class Reader:
    """A reader in a process of its own; close it after use.

    Args:
        maker: one of ``MAKERS``.
        options: its arguments.
        scans: folder where ours keeps what it knows of files.
        packages: a folder of packages that its process finds first.

    Raises:
        ImportError, OSError: what the reader needs cannot be imported.
    """

    def __init__(self, maker: str, options: dict[str, object], scans: Path, packages: str | None = None) -> None:
        before, os.environ["HPDM_CACHE"] = os.environ.get("HPDM_CACHE"), str(scans)
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        try:
            self.pool.submit(_start, maker, options, packages).result()
        except BaseException:
            self.close()
            raise
        finally:
            del os.environ["HPDM_CACHE"]
            if before is not None:
                os.environ["HPDM_CACHE"] = before

    def sample(self, path: Path, numbers: Sequence[int]) -> Sample:
        """Reads a window and says what it cost."""
        return self.pool.submit(_sample, str(path), numbers).result()

    def shown(self, path: Path, numbers: Sequence[int]) -> list[int] | None:
        """The numbers that are drawn into the frames of a window, ``None`` for a reader that only decodes."""
        return self.pool.submit(_shown, str(path), numbers).result()

    def memory(self) -> Memory:
        """The peak so far."""
        return self.pool.submit(_memory).result()

    def close(self) -> None:
        """Ends the process."""
        self.pool.shutdown()
