"""Writing small video files with PyAV: encoded pictures, or packets that were encoded before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from tests.video.pictures import HEIGHT, WIDTH, pictures

RATE = 25
FRAMES = 40


@dataclass(frozen=True)
class Video:
    """What one video stream shows and how it is encoded."""

    codec: str = "libx264"
    frames: int = FRAMES
    size: tuple[int, int] = (HEIGHT, WIDTH)
    """Height and width."""
    pix_fmt: str = "yuv420p"
    options: dict[str, str] = field(default_factory=dict)
    gop: int | None = 12
    b_frames: int | None = None
    tag: str | None = None
    """The four letters that name the codec in the container."""
    times: Sequence[int] | None = None
    """Time stamps in ``time_base``; evenly spaced where ``None``."""
    time_base: Fraction = Fraction(1, RATE)
    rate: Fraction = Fraction(RATE)
    pixel_aspect: Fraction | None = None
    seed: int = 0
    bit_rate: int | None = 1_200_000


def write(
    path: Path,
    *videos: Video,
    format: str | None = None,
    sound: bool = False,
    prepare: Callable[[Any, int], None] | None = None,
    **container_options: str,
) -> None:
    """Encodes ``videos`` as the streams of one file.

    Args:
        path: the file.
        videos: its video streams, in order.
        format: the container, where it is not what the suffix says.
        sound: adds a stream of silence in front of the video.
        prepare: called with every stream and its number before anything is written.
        container_options: options of the muxer.
    """
    with av.open(str(path), "w", format=format, options=container_options) as out:
        audio = (
            out.add_stream("mp2" if path.suffix in (".mpg", ".ts", ".mpeg") else "aac", rate=44100) if sound else None
        )
        streams = [_add_stream(out, video) for video in videos]
        for number, stream in enumerate(streams):
            if prepare:
                prepare(stream, number)
        packets = [_encode(stream, video) for stream, video in zip(streams, videos)]
        if audio is not None:
            packets.append(_silence(audio, max(video.frames for video in videos)))
        mux_by_time(out, packets)


@contextmanager
def encoded_beside(path: Path, suffix: str, video: Video, **options: str) -> Iterator[Path]:
    """A file of ``video`` beside ``path``, out of which ``path`` is made; it is gone afterwards."""
    source = path.with_suffix(f".source.{suffix}")
    write(source, video, **options)
    yield source
    source.unlink()


def _add_stream(out: Any, video: Video) -> Any:
    stream = out.add_stream(video.codec, rate=video.rate, options=dict(video.options))
    context = stream.codec_context
    stream.height, stream.width = video.size
    stream.pix_fmt = video.pix_fmt
    context.thread_count = 1
    context.time_base = video.time_base
    if video.bit_rate is not None:
        context.bit_rate = video.bit_rate
    if video.gop is not None:
        context.gop_size = video.gop
    if video.b_frames is not None:
        context.max_b_frames = video.b_frames
    if video.tag is not None:
        context.codec_tag = video.tag
    if video.pixel_aspect is not None:
        context.sample_aspect_ratio = video.pixel_aspect
    return stream


def _frames(video: Video) -> Iterable[av.VideoFrame]:
    for number, image in enumerate(pictures(video.frames, *video.size, video.seed)):
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        if video.pix_fmt != "rgb24":
            frame = frame.reformat(format=video.pix_fmt)
        frame.time_base = video.time_base
        frame.pts = number if video.times is None else video.times[number]
        yield frame


def _encode(stream: Any, video: Video) -> list[av.Packet]:
    packets = [packet for frame in _frames(video) for packet in stream.encode(frame)]
    return [*packets, *stream.encode(None)]


def _silence(stream: Any, frames: int) -> list[av.Packet]:
    """Packets of silence as long as ``frames`` of video."""
    context, packets = stream.codec_context, []
    size, planar = context.frame_size or 1152, context.format.is_planar
    dtype = np.float32 if context.format.name.startswith("flt") else np.int16
    samples = np.zeros((2, size) if planar else (1, 2 * size), dtype)
    for number in range(frames * 44100 // RATE // size + 1):
        frame = av.AudioFrame.from_ndarray(samples, context.format.name, context.layout.name)
        frame.sample_rate, frame.pts, frame.time_base = 44100, number * size, Fraction(1, 44100)
        packets += stream.encode(frame)
    return [*packets, *stream.encode(None)]


def mux_by_time(out: Any, packets: Sequence[Sequence[av.Packet]]) -> None:
    """Writes the packets of several streams in the order of their decoding times."""
    together = [
        (float((packet.dts if packet.dts is not None else 0) * packet.time_base), number, packet)
        for number, stream in enumerate(packets)
        for packet in stream
    ]
    for _, _, packet in sorted(together, key=lambda item: item[:2]):
        out.mux(packet)


@dataclass(frozen=True)
class Chunk:
    """A packet of an encoded stream."""

    data: bytes
    pts: int | None
    dts: int | None
    key: bool


def encode(video: Video) -> tuple[list[Chunk], Any]:
    """Encodes a video outside of any container: its packets, times in ``video.time_base``, and the encoder."""
    context = av.CodecContext.create(video.codec, "w")
    context.height, context.width = video.size
    context.pix_fmt, context.time_base, context.framerate = video.pix_fmt, video.time_base, video.rate
    context.thread_count = 1
    context.bit_rate = video.bit_rate
    context.gop_size = video.gop or 12
    if video.b_frames is not None:
        context.max_b_frames = video.b_frames
    context.options = dict(video.options)
    packets = [packet for frame in _frames(video) for packet in context.encode(frame)]
    packets += context.encode(None)
    return [Chunk(bytes(p), p.pts, p.dts, p.is_keyframe) for p in packets], context


def write_chunks(
    path: Path, video: Video, chunks: Iterable[Chunk], format: str | None = None, sound: bool = False, **options: str
) -> None:
    """Writes packets, whose times count in ``video.time_base``, as a file of ``video``'s codec, with silence or not."""
    with av.open(str(path), "w", format=format, options=options) as out:
        stream = out.add_stream(video.codec, rate=video.rate, options=dict(video.options))
        stream.height, stream.width = video.size
        stream.pix_fmt = video.pix_fmt
        stream.codec_context.time_base = video.time_base
        if video.tag is not None:
            stream.codec_context.codec_tag = video.tag
        audio = out.add_stream("mp2", rate=44100) if sound else None
        out.start_encoding()
        packets = []
        for chunk in chunks:
            packet = av.Packet(chunk.data)
            packet.stream, packet.time_base = stream, video.time_base
            packet.pts, packet.dts, packet.is_keyframe = chunk.pts, chunk.dts, chunk.key
            packets.append(packet)
        mux_by_time(out, [packets, *([_silence(audio, video.frames)] if sound else [])])


def read_chunks(path: Path) -> tuple[list[Chunk], Fraction]:
    """The packets of a file's first video stream in the order of the file, and the unit of their times."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        chunks = [Chunk(bytes(p), p.pts, p.dts, p.is_keyframe) for p in container.demux(stream) if p.size]
        return chunks, Fraction(stream.time_base)


def remux(
    source: Path,
    path: Path,
    change: Callable[[list[Chunk]], list[Chunk]] = lambda chunks: chunks,
    format: str | None = None,
    **options: str,
) -> None:
    """Copies the first video stream of ``source`` into another file, its packets as ``change`` leaves them."""
    chunks, time_base = read_chunks(source)
    with av.open(str(source)) as container, av.open(str(path), "w", format=format, options=options) as out:
        stream = out.add_stream_from_template(container.streams.video[0])
        stream.time_base = time_base
        for chunk in change(chunks):
            packet = av.Packet(chunk.data)
            packet.stream, packet.time_base = stream, time_base
            packet.pts, packet.dts, packet.is_keyframe = chunk.pts, chunk.dts, chunk.key
            out.mux_one(packet)
