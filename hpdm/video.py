"""Writing videos as mp4 files and as contact sheets, atomically."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hpdm.files import atomic_path

if TYPE_CHECKING:
    from PIL.Image import Image

Frames = Tensor | np.ndarray
"""A clip, uint8 RGB, ``[3, F, H, W]`` or ``[F, H, W, 3]``; see :func:`as_frames`."""


def as_frames(name: str, frames: Frames) -> np.ndarray:
    """Returns ``frames`` as a contiguous uint8 array ``[F, H, W, 3]``.

    Args:
        name: the argument's name, for messages.
        frames: uint8, ``[3, F, H, W]`` or ``[F, H, W, 3]``. A shape that fits both is read as ``[3, F, H, W]`` when it
            is a tensor and as ``[F, H, W, 3]`` when it is an array, the conventions of models and of decoders.

    Raises:
        TypeError: neither tensor nor array, or not uint8.
        ValueError: another shape, or an empty axis.
    """
    is_tensor = isinstance(frames, Tensor)
    if not is_tensor and not isinstance(frames, np.ndarray):
        raise TypeError(f"{name}: got {type(frames).__name__}, expected a torch.Tensor or numpy.ndarray")
    array = frames.detach().cpu().numpy() if isinstance(frames, Tensor) else frames
    if array.dtype != np.uint8:
        raise TypeError(f"{name}: got dtype {array.dtype}, expected uint8")
    first, last = (array.ndim == 4 and array.shape[0] == 3), (array.ndim == 4 and array.shape[3] == 3)
    if not (first or last) or 0 in array.shape:
        raise ValueError(f"{name}: got shape {tuple(array.shape)}, expected [3, F, H, W] or [F, H, W, 3], not empty")
    if first and (is_tensor or not last):
        array = array.transpose(1, 2, 3, 0)
    return np.ascontiguousarray(array)


def to_uint8(video: Tensor) -> Tensor:
    """Converts pixels in [-1, 1], any shape, float, to uint8 in 0..255 on the CPU; values outside are clamped."""
    return video.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def write_video(path: str | os.PathLike[str], frames: Frames, fps: float = 16, *, crf: int = 18) -> None:
    """Writes an H.264 mp4 (libx264), atomically.

    Even sizes are stored as ``yuv420p``, which every player reads. An odd height or width has no 4:2:0 form and is
    stored as ``yuv444p``, which some browsers do not play; frames are never padded or cropped.

    Args:
        path: the file to write, ending in ``.mp4``; an existing file is replaced once the new one is complete.
        frames: uint8 RGB, ``[3, F, H, W]`` or ``[F, H, W, 3]`` (see :func:`as_frames`).
        fps: frames per second, > 0.
        crf: x264's constant rate factor, 0 (lossless) to 51; at 18 hardly any loss is visible.

    Raises:
        TypeError, ValueError: frames of another kind, a suffix other than ``.mp4``, fps or crf out of range.
        FileNotFoundError: the folder does not exist.
    """
    import av  # deferred: importing hpdm must not need the codecs

    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"path: got {path.name!r}, expected a name ending in .mp4")
    if not fps > 0:
        raise ValueError(f"fps: got {fps}, expected > 0")
    if not 0 <= crf <= 51:
        raise ValueError(f"crf: got {crf}, expected 0..51")
    array = as_frames("frames", frames)
    height, width = array.shape[1:3]
    even = height % 2 == 0 and width % 2 == 0
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(100_000))
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv420p" if even else "yuv444p"
        # One thread and no macroblock tree, since with more x264's output depends on the number of cores, and with the
        # tree it differs from process to process.
        stream.options = {"crf": str(crf), "threads": "1", "x264-params": "mbtree=0"}
        for image in array:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def contact_sheet(
    videos: Sequence[Frames],
    *,
    columns: int = 8,
    labels: Sequence[str] | None = None,
    margin: int = 2,
    scale: int = 1,
) -> Image:
    """Draws one row per video with ``columns`` evenly spaced frames, including the first and the last.

    Args:
        videos: uint8 clips of the same height and width and of any lengths (see :func:`as_frames`).
        columns: frames per row, >= 1; a shorter clip repeats frames.
        labels: one text per row, drawn above it; ``None`` for no text.
        margin: pixels between frames, >= 0.
        scale: integer factor by which frames are enlarged (nearest neighbor), >= 1.

    Raises:
        TypeError, ValueError: no videos, differing sizes, another number of labels than of videos, a bad number.
    """
    from PIL import Image, ImageDraw

    for name, value, bound in (("columns", columns, 1), ("margin", margin, 0), ("scale", scale, 1)):
        if value < bound:
            raise ValueError(f"{name}: got {value}, expected at least {bound}")
    rows = [as_frames(f"videos[{i}]", video) for i, video in enumerate(videos)]
    if not rows:
        raise ValueError("videos: got none, expected at least one")
    if len({row.shape[1:3] for row in rows}) > 1:
        raise ValueError(f"videos: got sizes {sorted({row.shape[1:3] for row in rows})}, expected one height and width")
    if labels is not None and len(labels) != len(rows):
        raise ValueError(f"labels: got {len(labels)}, expected {len(rows)}, one for each video")
    height, width = (n * scale for n in rows[0].shape[1:3])
    text = 14 if labels is not None else 0
    pitch = height + text + margin
    sheet = Image.new("RGB", (columns * (width + margin) + margin, len(rows) * pitch + margin), (24, 24, 24))
    draw = ImageDraw.Draw(sheet)
    for r, frames in enumerate(rows):
        top = margin + r * pitch
        if labels is not None:
            draw.text((margin + 1, top), labels[r], fill=(230, 230, 230))
        for c, t in enumerate(np.linspace(0, len(frames) - 1, columns).round().astype(int)):
            image = np.repeat(np.repeat(frames[t], scale, axis=0), scale, axis=1)
            sheet.paste(Image.fromarray(image), (margin + c * (width + margin), top + text))
    return sheet


def write_contact_sheet(
    path: str | os.PathLike[str],
    videos: Sequence[Frames],
    *,
    columns: int = 8,
    labels: Sequence[str] | None = None,
    margin: int = 2,
    scale: int = 1,
) -> None:
    """Writes :func:`contact_sheet` to ``path``, a PNG, atomically.

    Raises:
        TypeError, ValueError: as :func:`contact_sheet`, and for a suffix other than ``.png``.
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"path: got {path.name!r}, expected a name ending in .png")
    sheet = contact_sheet(videos, columns=columns, labels=labels, margin=margin, scale=scale)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")
