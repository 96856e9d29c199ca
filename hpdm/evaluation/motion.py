"""Scores of generated clips of the synthetic set, next to real ones: do objects move, look and bounce as rendered?

No detector is involved: :mod:`hpdm.evaluation.synthetic_score` measures every clip by the formula that renders the set.
Which speeds and sizes are right is read from the set's ``metadata.jsonl``. Real clips are measured in the same way, so
that the table also shows the error of the measurement itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import numpy as np
from torch import Tensor

from hpdm import distributed
from hpdm.data.clips import VideoDataset
from hpdm.data.decode import probe
from hpdm.data.synthetic import CLASSES
from hpdm.evaluation.levels import Level
from hpdm.evaluation.synthetic_score import SHOWS_TEXTURE, ClipScore, score_clip
from hpdm.json_file import Range, read_json_lines

METADATA = "metadata.jsonl"
_Pixels = Annotated[float, Range(-1e6, 1e6)]
_PerFrame = Annotated[list[tuple[_Pixels, _Pixels]], Range(1, 10**6)]


class _Record(TypedDict):
    """A line of the metadata, which says more."""

    file: str
    radius: _Pixels
    position: _PerFrame
    velocity: _PerFrame


class SyntheticSet(NamedTuple):
    """What ``metadata.jsonl`` says about a set. Pixels are those of the clips as read, unless stated otherwise."""

    records: dict[str, dict[str, Any]]  # by "Class/clip", without suffix
    scale: float  # pixels as read per pixel of the file
    fps: float  # of the files
    unit: int  # the shorter side of the clips as read
    speed: tuple[float, float]  # slowest and fastest, pixels per frame of the file
    radius: tuple[float, float]  # smallest and largest, pixels


def read_synthetic_set(dataset: VideoDataset) -> SyntheticSet:
    """Reads the metadata of a set that ``hpdm data synthetic`` rendered.

    Raises:
        ValueError: no such metadata, classes of another set, or clips that are cropped (walls would be elsewhere).
    """
    path = dataset.root / METADATA
    if not path.is_file():
        raise ValueError(
            f"data: {dataset.root} has no {METADATA}, expected a set that `hpdm data synthetic` rendered: only there "
            "the right motion is known"
        )
    unknown = [name for name in dataset.class_names if name not in CLASSES]
    if unknown:
        raise ValueError(f"data: got class {unknown[0]!r}, expected some of {', '.join(CLASSES)}")
    try:
        rows = [row for _, row in read_json_lines(path, _Record)]
    except ValueError as error:
        raise ValueError(f"data: damaged metadata: {error}") from None
    if not rows:
        raise ValueError(f"data: {path} is empty, expected a line per clip")
    records = {Path(row["file"]).with_suffix("").as_posix(): row for row in rows}
    speeds = [float(np.hypot(*row["velocity"][0])) for row in rows]
    radii = [row["radius"] for row in rows]
    info = probe(dataset.files[0].source, timeout=dataset.timeout)
    height, width = dataset.size
    if height * info.width != width * info.height:
        raise ValueError(
            f"data: clips of {info.height}x{info.width} pixels are cropped to {height}x{width}, expected the same shape"
        )
    scale = height / info.height
    speed, radius = ((scale * min(values), scale * max(values)) for values in (speeds, radii))
    return SyntheticSet(records, scale, info.fps, min(height, width), speed, radius)


class MotionScore:
    """Scores of generated clips, which are added one by one, and of real ones.

    Args:
        dataset: the synthetic set at the run's resolution; its windows are the real clips.
        names: the class that each generated clip should show, by its number.
        real: number of real clips, spread evenly over the set; all of the set if it has fewer.
        level: the level of the generated clips, to whose size real ones are brought; ``None`` for clips as read.

    Raises:
        ValueError: see :func:`read_synthetic_set`; or a level of another shape.
    """

    def __init__(self, dataset: VideoDataset, names: Sequence[str], *, real: int, level: Level | None = None) -> None:
        self.dataset, self.names, self.level = dataset, names, level
        about = read_synthetic_set(dataset)
        steps = dataset.offsets(about.fps)
        self.about = about if level is None else _scaled(about, level)
        self.steps = steps if level is None else level.average(steps)
        self.count = min(real, len(dataset))
        self.scores: dict[int, ClipScore] = {}

    def add(self, number: int, video: Tensor) -> None:
        """Adds a clip of this rank: its number among the clips of all ranks, and uint8 ``[3, F, H, W]``."""
        self.scores[number] = score_clip(video.permute(1, 2, 3, 0).numpy(), self.names[number], self.steps)

    def result(self) -> dict[str, Any]:
        """The summaries of all clips. A collective: all ranks return the same.

        Returns:
            ``real`` and ``generated`` (:func:`summarize`), ``position_error``: median and 95 % quantile of the distance
            in pixels between measured and true positions of the real clips, and ``clips``: every generated clip's
            score.
        """
        numbers = distributed.shard(range(self.count))
        real = {n: self._score_real(n * len(self.dataset) // self.count) for n in numbers}
        real_scores, real_names, errors = zip(*distributed.gather(real))
        scores = distributed.gather(self.scores)
        error = np.concatenate(errors)
        error = error[np.isfinite(error)]
        clips = [
            {"asked": name} | {key: value for key, value in asdict(score).items() if key != "position"}
            for score, name in zip(scores, self.names)
        ]
        return {
            "real": summarize(real_scores, real_names, self.about),
            "generated": summarize(scores, self.names, self.about),
            "position_error": {"median": float(np.median(error)), "quantile_95": float(np.quantile(error, 0.95))},
            "clips": clips,
        }

    def _score_real(self, index: int) -> tuple[ClipScore, str, np.ndarray]:
        """Score and class of a clip of the set, and the errors ``[F]`` of its measured positions in pixels."""
        item, dataset, level = self.dataset[index], self.dataset, self.level
        name = dataset.class_names[item["label"]]
        video = item["video"] if level is None else level.real_pixels(item["video"])
        score = score_clip(video.permute(1, 2, 3, 0).numpy(), name, self.steps)
        path = Path(item["path"])
        record = self.about.records.get(f"{path.parent.name}/{path.stem}")
        if record is None:
            raise ValueError(f"data: {METADATA} of {dataset.root} has no line for {path.parent.name}/{path.name}")
        frames = item["start"] + dataset.offsets(self.about.fps)
        true = np.array(record["position"])[frames % len(record["position"])] * self.about.scale  # [F, 2]
        return score, name, np.hypot(*(score.position - (true if level is None else level.average(true))).T)


def _scaled(about: SyntheticSet, level: Level) -> SyntheticSet:
    """``about`` in pixels of a level."""
    (_, height, width), (_, full_height, full_width) = level.size, level.config.resolution
    if height * full_width != width * full_height:
        raise ValueError(
            f"level: level {level.number} of {height}x{width} has another shape than {full_height}x{full_width}, "
            "expected the same for motion"
        )
    factor = height / full_height
    speed, radius = ((factor * low, factor * high) for low, high in (about.speed, about.radius))
    return about._replace(scale=factor * about.scale, unit=min(height, width), speed=speed, radius=radius)


def summarize(scores: Sequence[ClipScore], asked: Sequence[str], about: SyntheticSet) -> dict[str, Any]:
    """Summarizes the scores of many clips. Shares are fractions of the clips, 0..1.

    ``texture`` is ``None`` for clips too small to show it.

    The tolerances of speed and radius are just above the largest errors of the measurement on rendered clips; motion
    counts as right within one pixel at 64 x 64.

    Args:
        scores: of the clips.
        asked: the class that each clip should show, with which it is compared.
        about: the set.
    """
    unit = about.unit / 64
    residual, speed, radius = (np.array([getattr(s, n) for s in scores]) for n in ("residual", "speed", "radius"))
    share_with_object = np.array([s.found for s in scores])
    steady = (share_with_object == 1) & (residual <= unit)
    speed_right = _within(speed, about.speed, 0.1 * unit)
    radius_right = _within(radius, about.radius, 0.5 * unit)
    shape_right = np.array([s.shape == name for s, name in zip(scores, asked)])
    color_right = np.array([s.color == name for s, name in zip(scores, asked)])
    return {
        "clips": len(scores),
        "object_found": float(share_with_object.mean()),
        "motion_residual": float(np.median(residual)),
        "motion_right": float((steady & speed_right).mean()),
        "speed": float(np.median(speed)),
        "speed_right": float(speed_right.mean()),
        "radius": float(np.median(radius)),
        "radius_right": float(radius_right.mean()),
        "shape_overlap": float(np.mean([s.overlap for s in scores])),
        "shape_right": float(shape_right.mean()),
        "color_error": float(np.mean([s.color_error for s in scores])),
        "color_right": float(color_right.mean()),
        "texture": None if about.unit < SHOWS_TEXTURE else float(np.mean([s.texture for s in scores])),
        "all_right": float((steady & speed_right & radius_right & shape_right & color_right).mean()),
    }


def _within(values: np.ndarray, span: tuple[float, float], tolerance: float) -> np.ndarray:
    return (values >= span[0] - tolerance) & (values <= span[1] + tolerance)


_MEANING = {
    "clips": "",
    "object_found": "share of frames with an object",
    "motion_residual": "pixels from the best straight, bouncing motion, root mean square over frames, median of clips",
    "motion_right": "share of clips with an object throughout, within a pixel of such a motion, as fast as the set",
    "speed": "pixels per frame of the file, median",
    "speed_right": "share of clips as fast as some clip of the set",
    "radius": "pixels, median",
    "radius_right": "share of clips with an object as large as in some clip of the set",
    "shape_overlap": "intersection over union with the asked class's shape, mean",
    "shape_right": "share of clips whose object resembles the asked class's shape most",
    "color_error": "levels of 255 from the asked class's color, mean",
    "color_right": "share of clips whose object's color is nearest to the asked class's",
    "texture": "amplitude of the asked class's texture, 1 as rendered, mean",
    "all_right": "share of clips with motion, radius, shape and color right, whatever the texture",
}


def motion_table(result: dict[str, Any]) -> str:
    """A row per number: its value on real and on generated clips, and its meaning."""
    lines = [f"{'':<16}{'real':>9}{'generated':>11}"]
    for key, meaning in _MEANING.items():
        cells = [result[side][key] for side in ("real", "generated")]
        text = ["-" if value is None else f"{value:d}" if key == "clips" else f"{value:.3f}" for value in cells]
        lines.append(f"{key.replace('_', ' '):<16}{text[0]:>9}{text[1]:>11}   {meaning}".rstrip())
    error = result["position_error"]
    lines.append(
        f"positions in real clips are found to {error['median']:.2f} pixels in the median, {error['quantile_95']:.2f} "
        "in 95 % of the frames"
    )
    return "\n".join(lines)
