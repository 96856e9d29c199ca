"""Which files are data, by their suffixes: videos, and images, which are videos of one frame.

An animated GIF is a video. Animated WebP files cannot be decoded, and of an animated PNG the first frame is taken.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

VIDEO_SUFFIXES = frozenset(
    (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv")
)
IMAGE_SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".webp"))


def is_image(path: str | os.PathLike[str]) -> bool:
    """Whether a file is an image, by its suffix in any case."""
    return _has_suffix(path, IMAGE_SUFFIXES)


def is_video(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a video, by its suffix in any case."""
    return _has_suffix(path, VIDEO_SUFFIXES)


def listed(suffixes: Iterable[str]) -> str:
    """Suffixes as text, for messages."""
    return " ".join(sorted(suffixes))


def _has_suffix(path: str | os.PathLike[str], suffixes: frozenset[str]) -> bool:
    return os.path.splitext(path)[1].lower() in suffixes
