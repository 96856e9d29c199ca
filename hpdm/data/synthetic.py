"""A labeled set of synthetic clips with known motion, rendered with numpy, in UCF-101's layout.

A clip shows one large textured object that moves in a straight line and bounces off the walls, over a dim, smooth
background. The class is the object's shape and color. The texture has a period of 1/16 of the picture, so that it is
clear at 64 x 64, faint at 32 x 32 and gone at 16 x 16: each level of a pyramid adds detail.
"""

from __future__ import annotations

import colorsys
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hpdm.data.captions import CAPTIONS_FILE
from hpdm.data.layout import SPLIT_FOLDER
from hpdm.files import atomic_folder, check_not_a_file, make_folder, write_text
from hpdm.video import write_video

RADIUS = (0.36, 0.40)
"""Smallest and largest half extent of an object, as fractions of the picture's shorter side."""
_GROUP_CLIPS = 4  # clips of a group; as in UCF-101, a group lies in train or in test as a whole


class Clip(NamedTuple):
    """A rendered clip. Positions are in pixels, x to the right, y down, (0, 0) at the picture's upper left corner."""

    frames: np.ndarray  # uint8 [F, H, W, 3]
    position: np.ndarray  # float64 [F, 2], the object's center (x, y)
    velocity: np.ndarray  # float64 [F, 2], pixels per frame; a component changes its sign at a wall
    radius: float  # half of the object's extent


# Shapes of half extent 1: the signed distance of the point (x, y) to the outline, negative inside; y points down.
def _disc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 1


def _box(x: np.ndarray, y: np.ndarray, half_x: float, half_y: float) -> np.ndarray:
    dx, dy = np.abs(x) - half_x, np.abs(y) - half_y
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _box(x, y, 0.9, 0.9)


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Apex (0, -1), base from (-1, 0.85) to (1, 0.85): the nearest of three half planes.
    side = math.hypot(1.85, 1.0)
    return np.maximum(y - 0.85, (np.abs(x) * 1.85 - (y + 1)) / side)


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.72) - 0.28


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(_box(x, y, 1.0, 0.36), _box(x, y, 0.36, 1.0))


def _diamond(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (np.abs(x) + np.abs(y) - 1) / math.sqrt(2)


# Textures: a value in [-1, 1] from the phases (u, v) along x and y, in radians, 2 pi per period.
def _vertical_stripes(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sin(u)


def _horizontal_stripes(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sin(v)


def _checks(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sin(u) * np.sin(v)


def _slanted_stripes(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sin(u + v)


_Field = Callable[[np.ndarray, np.ndarray], np.ndarray]

_TEXTURE_WORDS: dict[_Field, str] = {
    _vertical_stripes: "upright stripes",
    _horizontal_stripes: "level stripes",
    _checks: "checks",
    _slanted_stripes: "slanted stripes",
}

CLASSES: dict[str, tuple[_Field, _Field, tuple[int, int, int]]] = {
    "RedDisc": (_disc, _vertical_stripes, (235, 64, 52)),
    "GreenSquare": (_square, _checks, (64, 200, 72)),
    "BlueTriangle": (_triangle, _horizontal_stripes, (66, 110, 245)),
    "YellowRing": (_ring, _slanted_stripes, (240, 205, 50)),
    "MagentaCross": (_cross, _checks, (225, 70, 205)),
    "CyanDiamond": (_diamond, _slanted_stripes, (60, 205, 220)),
}
"""Shape, texture and RGB color of each class."""


def bounce(start: float, velocity: float, low: float, high: float, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Straight motion along one axis between two walls, at any number of frames after the start.

    Args:
        start: position at frame 0, between ``low`` and ``high``.
        velocity: in pixels per frame at frame 0.
        low, high: positions at which the motion is reflected.
        steps: numbers of frames.

    Returns:
        Positions and velocities, shaped as ``steps``.
    """
    span = high - low
    distance = (start - low + velocity * steps) % (2 * span)  # along a path from low to high and back again
    returning = distance >= span
    return low + np.where(returning, 2 * span - distance, distance), np.where(returning, -velocity, velocity)


# Directions in steps of an eighth of a turn, from the right; y points down, so they follow each other clockwise.
_HEADINGS = (
    "to the right",
    "down and to the right",
    "down",
    "down and to the left",
    "to the left",
    "up and to the left",
    "up",
    "up and to the right",
)


def describe_clip(class_name: str, clip: Clip, *, rng: np.random.Generator) -> str:
    """A caption with color, shape and the direction of motion at the start, sometimes with texture and a bounce.

    Args:
        class_name: the class of ``clip``, a key of :data:`CLASSES`.
        clip: the rendered clip.
        rng: chooses among wordings, all of which are true of the clip.
    """

    def pick(*wordings: str) -> str:
        return wordings[rng.integers(len(wordings))]

    color, shape = re.findall("[A-Z][a-z]+", class_name)
    x, y = clip.velocity[0]
    heading = _HEADINGS[round(math.atan2(y, x) / (math.pi / 4)) % 8]
    texture = pick("", f" with {_TEXTURE_WORDS[CLASSES[class_name][1]]}")
    verb = pick("moving", "drifting", "gliding", "travelling")
    bounces = bool((clip.velocity != clip.velocity[0]).any())
    ending = pick("", ", then bouncing off a wall") if bounces else ""
    return f"{pick('a', 'a video of a')} {color.lower()} {shape.lower()}{texture} {verb} {heading}{ending}"


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A dim color of any hue whose brightness falls off along a random direction, float64 ``[H, W, 3]`` in 0..255."""
    hue, angle = rng.random(), rng.random() * 2 * math.pi
    color = np.array(colorsys.hsv_to_rgb(hue, 0.45, 0.28)) * 255
    y, x = np.mgrid[0:height, 0:width]
    slope = math.cos(angle) * ((x + 0.5) / width - 0.5) + math.sin(angle) * ((y + 0.5) / height - 0.5)
    return color * (1 + 0.5 * slope[..., None])


def render_clip(
    class_name: str,
    *,
    frames: int = 32,
    size: tuple[int, int] = (64, 64),
    radius: tuple[float, float] = RADIUS,
    rng: np.random.Generator,
) -> Clip:
    """Renders one clip.

    Args:
        class_name: a key of :data:`CLASSES`.
        frames: number of frames, >= 1.
        size: (height, width) in pixels, each >= 8.
        radius: smallest and largest half extent of the object, as fractions of the picture's shorter side, above 0 and
            at most 0.45.
        rng: draws size, direction, speed, start, background and the texture's phases.

    Raises:
        ValueError: an unknown class, or a number below its minimum.
    """
    if class_name not in CLASSES:
        raise ValueError(f"class_name: got {class_name!r}, expected one of {', '.join(CLASSES)}")
    _check_numbers(frames, size, radius)
    shape, texture, rgb = CLASSES[class_name]
    height, width = size
    unit = min(height, width)
    half = unit * rng.uniform(*radius)
    angle = rng.uniform(0, 2 * math.pi)
    speed = unit * rng.uniform(0.010, 0.022)  # 0.6 to 1.4 pixels a frame at 64 x 64
    steps = np.arange(frames)
    axes = [
        bounce(rng.uniform(half, extent - half), speed * part, half, extent - half, steps)
        for extent, part in ((width, math.cos(angle)), (height, math.sin(angle)))
    ]
    position, velocity = (np.stack([axes[0][i], axes[1][i]], axis=1) for i in range(2))
    background = _background(rng, height, width)
    period, phase = unit / 16, rng.uniform(0, 2 * math.pi, size=2)

    y, x = (grid + 0.5 for grid in np.mgrid[0:height, 0:width])  # pixel centers, [H, W]
    dx = x - position[:, 0, None, None]  # [F, H, W]
    dy = y - position[:, 1, None, None]
    # The distance is in pixels: the object covers a pixel fully, partly or not at all within one pixel of the outline.
    coverage = np.clip(0.5 - shape(dx / half, dy / half) * half, 0, 1)
    pattern = texture(dx * (2 * math.pi / period) + phase[0], dy * (2 * math.pi / period) + phase[1])
    paint = np.array(rgb) * (0.8 + 0.2 * np.tanh(2 * pattern))[..., None]  # [F, H, W, 3]
    image = background + coverage[..., None] * (paint - background)
    return Clip(np.clip(image.round(), 0, 255).astype(np.uint8), position, velocity, half)


def render_synthetic(
    out: str | os.PathLike[str],
    *,
    clips: int = 40,
    frames: int = 32,
    size: tuple[int, int] = (64, 64),
    fps: float = 16,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    radius: tuple[float, float] = RADIUS,
    crf: int = 12,
    overwrite: bool = False,
) -> Path:
    """Writes a labeled set of clips in UCF-101's layout, as a whole or not at all, and returns its folder.

    The folder gets ``Class/v_Class_g01_c01.mp4``, the split files ``ucfTrainTestlist/{classInd,trainlist01,
    testlist01}.txt`` in the official format, ``captions.jsonl`` (see :func:`describe_clip`) and ``metadata.jsonl``: per
    clip its file, class, label, split, frame rate, radius, and the object's position and velocity per frame in pixels.
    Groups of up to four clips lie in one split as a whole, about a quarter of them in test. A clip and its caption
    depend on (seed, class, number) alone: more clips or fewer classes change none.

    Args:
        out: folder to create; it must be empty unless ``overwrite``.
        clips: clips per class, >= 2.
        frames, size, fps, crf: length, (height, width), frame rate and x264 quality of every clip.
        seed: >= 0.
        classes: names among :data:`CLASSES`, all by default; labels follow their order.
        radius: as for :func:`render_clip`.
        overwrite: write into a folder that is not empty.

    Raises:
        ValueError: a number below its minimum, unknown or repeated classes.
        FileExistsError: ``out`` is not empty and ``overwrite`` is off.
    """
    names = list(CLASSES) if classes is None else list(classes)
    _check_set(names, clips, seed)
    _check_numbers(frames, size, radius)
    out = Path(out)
    check_not_a_file("out", out)
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"out: {out} is not empty; choose another folder or pass overwrite")
    render = partial(_render_set, names=names, clips=clips, frames=frames, size=size, fps=fps, seed=seed, radius=radius)
    make_folder("out", out.absolute().parent)
    if out.exists() and any(out.iterdir()):
        render(out, crf=crf)
    else:
        with atomic_folder(out) as temporary:
            render(temporary, crf=crf)
    return out


def _render_set(
    out: Path,
    names: Sequence[str],
    *,
    clips: int,
    frames: int,
    size: tuple[int, int],
    fps: float,
    seed: int,
    radius: tuple[float, float],
    crf: int,
) -> None:
    """Writes the files of a set into a folder; arguments as :func:`render_synthetic`, checked."""
    (out / SPLIT_FOLDER).mkdir(exist_ok=True)
    group_size = min(_GROUP_CLIPS, max(1, clips // 4))
    test_groups = max(1, round(math.ceil(clips / group_size) / 4))
    records: list[dict[str, Any]] = []
    captions: list[dict[str, str]] = []
    for label, name in enumerate(names):
        (out / name).mkdir(exist_ok=True)
        for number in range(clips):
            group, member = divmod(number, group_size)
            file = f"{name}/v_{name}_g{group + 1:02d}_c{member + 1:02d}.mp4"
            entropy = [seed, list(CLASSES).index(name), number]
            clip = render_clip(name, frames=frames, size=size, radius=radius, rng=np.random.default_rng(entropy))
            write_video(out / file, clip.frames, fps, crf=crf)
            split = "test" if group < test_groups else "train"
            records.append({"file": file, "class": name, "label": label, "split": split, "fps": fps, **_motion(clip)})
            # Drawn from a generator of its own, so that the clip's pixels do not depend on the caption's draws.
            caption = describe_clip(name, clip, rng=np.random.default_rng([*entropy, 1]))
            captions.append({"file": file, "caption": caption})
    _write_lists(out, names, records, captions)


def _check_set(names: Sequence[str], clips: int, seed: int) -> None:
    """Raises ValueError for a set that :func:`render_synthetic` cannot make."""
    if not names or len(set(names)) < len(names) or not set(names) <= set(CLASSES):
        raise ValueError(f"classes: got {names}, expected one or more different of {', '.join(CLASSES)}")
    if clips < 2:
        raise ValueError(f"clips: got {clips}, expected >= 2, so that train and test both have one")
    if seed < 0:
        raise ValueError(f"seed: got {seed}, expected >= 0")


def _motion(clip: Clip) -> dict[str, Any]:
    """The clip's part of its line in ``metadata.jsonl``."""
    return {
        "radius": round(clip.radius, 4),
        "position": clip.position.round(4).tolist(),
        "velocity": clip.velocity.round(4).tolist(),
    }


def _write_lists(
    out: Path, names: Sequence[str], records: Sequence[dict[str, Any]], captions: Sequence[dict[str, str]]
) -> None:
    """Writes the split files, ``metadata.jsonl`` and ``captions.jsonl`` of a set."""
    lists = {
        f"{SPLIT_FOLDER}/classInd.txt": [f"{label + 1} {name}" for label, name in enumerate(names)],
        f"{SPLIT_FOLDER}/trainlist01.txt": [f"{r['file']} {r['label'] + 1}" for r in records if r["split"] == "train"],
        f"{SPLIT_FOLDER}/testlist01.txt": [r["file"] for r in records if r["split"] == "test"],
        "metadata.jsonl": [json.dumps(record) for record in records],
        CAPTIONS_FILE: [json.dumps(caption) for caption in captions],
    }
    for file, lines in lists.items():
        write_text(out / file, "\n".join(lines) + "\n")


def _check_numbers(frames: int, size: tuple[int, int], radius: tuple[float, float]) -> None:
    """Raises ValueError for a number that :func:`render_clip` cannot use."""
    if frames < 1:
        raise ValueError(f"frames: got {frames}, expected >= 1")
    if len(size) != 2 or min(size) < 8:
        raise ValueError(f"size: got {size}, expected (height, width), each >= 8")
    if len(radius) != 2 or not 0 < radius[0] <= radius[1] <= 0.45:
        raise ValueError(f"radius: got {radius}, expected (smallest, largest), above 0 and at most 0.45")
