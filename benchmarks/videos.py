"""Videos that the benchmark of reading makes: moving texture, with the number of each frame drawn into it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BITS = 10  # of the number that a frame shows, as black and white blocks along its upper edge
SWAY = 64  # pixels by which the texture moves to each side


@dataclass(frozen=True)
class Kind:
    """A kind of file."""

    name: str
    height: int
    width: int
    frames: int
    codec: str
    options: tuple[tuple[str, str], ...]
    suffix: str
    tag: str | None = None

    def __str__(self) -> str:
        return self.name


def _h264(name: str, height: int, width: int, frames: int, **options: str) -> Kind:
    options = {"preset": "veryfast", "crf": "23", "g": "60"} | options
    return Kind(name, height, width, frames, "libx264", tuple(options.items()), ".mp4")


# As the clips of UCF-101: XviD in AVI, two B-frames between others, one keyframe at the start of the shot. The others
# are short, since they are made and read in every run.
_XVID = (("bf", "2"), ("g", "300"), ("qscale", "4"), ("flags", "+qscale"))
XVID = Kind("XviD 240x320", 240, 320, 190, "mpeg4", _XVID, ".avi", "XVID")
H264_720 = _h264("H.264 720p", 720, 1280, 160)
H264_1080 = _h264("H.264 1080p", 1080, 1920, 120)
H264_2160 = _h264("H.264 2160p", 2160, 3840, 72, preset="ultrafast", g="24")
KINDS = (XVID, H264_720, H264_1080, H264_2160)


def write(kind: Kind, folder: Path) -> Path:
    """Makes the video of a kind in a folder, at 25 frames per second, and returns its path."""
    import av

    path = folder / f"{kind.name.replace(' ', '-')}{kind.suffix}"
    with av.open(str(path), "w") as out:
        stream = out.add_stream(kind.codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = kind.height, kind.width, "yuv420p"
        stream.options = dict(kind.options)
        if kind.tag:
            stream.codec_context.codec_tag = kind.tag
        for image in pictures(kind.height, kind.width, kind.frames):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode(None))
    return path


def pictures(height: int, width: int, frames: int) -> Iterator[np.ndarray]:
    """Frames as uint8 ``[height, width, 3]``: texture that sways, and a patch of it that moves faster."""
    texture = _texture(height + 2 * SWAY, width + 2 * SWAY)
    side = height // 5
    for number in range(frames):
        top, left = round(SWAY * (1 + np.sin(number / 20))), round(SWAY * (1 + np.cos(number / 13)))
        frame = texture[top : top + height, left : left + width].copy()
        down, right = round((height - side) * _swing(number / 9)), round((width - side) * _swing(number / 17))
        frame[down : down + side, right : right + side] = texture[number : number + side, -side:]
        for bit in range(BITS):
            block = slice(bit * width // BITS, (bit + 1) * width // BITS)
            frame[: height // 8, block] = 235 if number >> bit & 1 else 20
        yield frame


def number_shown(frame: np.ndarray) -> int:
    """The number that is drawn into a decoded frame, uint8 ``[H, W, 3]``."""
    height, width = frame.shape[:2]
    middles = [(2 * bit + 1) * width // (2 * BITS) for bit in range(BITS)]
    return sum(int(frame[height // 16, middle].mean() > 127) << bit for bit, middle in enumerate(middles))


def _swing(phase: float) -> float:
    return 0.5 + 0.5 * float(np.sin(phase))


def _texture(height: int, width: int) -> np.ndarray:
    """Smooth noise of several scales, uint8 ``[height, width, 3]``."""
    from PIL import Image

    rng = np.random.default_rng(0)
    total = np.zeros((height, width, 3), np.float32)
    for cell in (64, 16, 4):
        noise = rng.integers(0, 256, (height // cell + 2, width // cell + 2, 3), dtype=np.uint8)
        total += np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    return (total / 3).clip(0, 255).astype(np.uint8)
