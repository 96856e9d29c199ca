"""Features of real clips, for FVD and KVD, cached in a file for the next evaluation."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from hpdm import distributed
from hpdm.data.clips import VideoDataset
from hpdm.data.order import ClipKey
from hpdm.evaluation.array_file import read_arrays, write_arrays
from hpdm.evaluation.detector import Detector
from hpdm.evaluation.levels import Level
from hpdm.evaluation.metrics import FeatureStatistics

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the file."""


class RealStatistics(NamedTuple):
    """Features of real clips."""

    features: FeatureStatistics
    left_out: int
    """Clips that were too short or damaged."""
    rows: np.ndarray | None = None
    """The features themselves, float32 ``[N, W]``, where they were asked for."""

    def kept_rows(self) -> np.ndarray:
        """:attr:`rows`; ``ValueError`` if they were not asked for."""
        if self.rows is None:
            raise ValueError("rows: got none, expected statistics with rows=True")
        return self.rows


def real_statistics(
    dataset: VideoDataset,
    detector: Detector,
    *,
    count: int | None,
    batch: int,
    folder: Path | None = None,
    level: Level | None = None,
    draw: int = 0,
    repeat: bool = False,
    rows: bool = False,
) -> RealStatistics:
    """Statistics over random windows of randomly drawn clips. A collective: all ranks return the same.

    Args:
        dataset: with ``train=True`` (random windows, from its seed) and ``short="skip"``.
        detector: gives the features.
        count: number of clips; all good ones, each once, for ``None``, or if there are fewer and no ``repeat``.
        batch: clips at a time.
        folder: caches the statistics for later calls with the same clips, windows and detector.
        level: the level to whose size the clips are brought; ``None`` to take them as they are read.
        draw: >= 0; another one draws other clips and windows.
        repeat: once all clips have come, go on with another window of each until there are ``count``.
        rows: also return the features of every clip, ``4 N W`` bytes.

    Raises:
        ValueError: a damaged file of statistics, or fewer than two good clips.
        DecodeError: no clip is long enough.
    """
    identity = _identity(dataset, detector, count)
    if level is not None:
        identity["level"] = [level.number, list(level.size), list(level.config.resolution)]
    identity |= {name: value for name, value in (("draw", draw), ("repeat", repeat)) if value}
    with_rows = identity | {"rows": True}
    stored = None
    with distributed.raise_on_all_ranks():
        if folder is not None and distributed.is_first():
            # A file with rows serves as one without.
            for known in (with_rows,) if rows else (identity, with_rows):
                if (path := _file_of(folder, known)).is_file():
                    logger.info("features of real clips from %s", path)
                    stored = _read(path, known)
                    break
    stored = distributed.broadcast(stored)
    if stored is None:
        stored = _compute(dataset, detector, count, batch=batch, level=level, draw=draw, repeat=repeat, keep=rows)
        with distributed.raise_on_all_ranks():
            if folder is not None and distributed.is_first():
                known = with_rows if rows else identity
                _write(_file_of(folder, known), known, stored)
    return stored if rows else stored._replace(rows=None)


def _compute(
    dataset: VideoDataset,
    detector: Detector,
    count: int | None,
    *,
    batch: int,
    level: Level | None,
    draw: int,
    repeat: bool,
    keep: bool,
) -> RealStatistics:
    """Takes clips in a random order until ``count`` are good. The ranks share the clips of every round."""
    target = len(dataset) if count is None else count if repeat else min(count, len(dataset))
    features, kept = FeatureStatistics(), list[np.ndarray]()
    turn, left_out, order = 0, 0, _order(dataset, draw, 0)
    with tqdm(
        total=target, desc="real clips", unit="clip", dynamic_ncols=True, disable=not distributed.is_first()
    ) as bar:
        while features.count < target and (order or (repeat and count is not None)):
            if not order:
                turn += 1
                order = _order(dataset, draw, turn)
            # A round: as many clips as are still missing, but no more than a batch for each rank.
            size = min(target - features.count, batch * distributed.world_size(), len(order))
            batches = [order[first : min(first + batch, size)] for first in range(0, size, batch)]
            order = order[size:]
            numbers = distributed.shard(range(len(batches)))
            with distributed.raise_on_all_ranks():
                rows_of = {n: _features_of(dataset, batches[n], detector, level) for n in numbers}
            for keys, rows in zip(batches, distributed.gather(rows_of)):
                left_out += 0 if turn else len(keys) - len(rows)
                if len(rows):
                    features.update(rows)
                    kept += [rows] if keep else []
                    bar.update(len(rows))
    if features.count < 2:
        raise ValueError(
            f"data: {dataset.root} has {features.count} good clip(s) of {dataset.frames} frames, expected >= 2"
        )
    return RealStatistics(features, left_out, np.concatenate(kept) if keep else None)


def _order(dataset: VideoDataset, draw: int, turn: int) -> list[ClipKey]:
    """All clips in random order; every draw, and every turn of one, has another order and other windows."""
    # The first turn of the first draw is that of earlier versions: zeros at the end do not change a seed.
    order = np.random.default_rng([dataset.seed, 0, draw, turn]).permutation(len(dataset))
    return [ClipKey(int(clip), (turn << 16) + draw) for clip in order]


def _features_of(dataset: VideoDataset, keys: Sequence[ClipKey], detector: Detector, level: Level | None) -> np.ndarray:
    """Features of the good clips among ``keys``, float32 ``[n, W]``.

    The dataset replaces a clip that is too short or damaged by another one. The replacement is dropped here, since it
    has its own place in the order.
    """
    items = [dataset[key] for key in keys]
    clips = [item["video"] for item, key in zip(items, keys) if item["path"] == dataset.files[key.clip].path]
    if not clips:
        return np.zeros((0, 0), np.float32)
    return detector(torch.stack(clips if level is None else [level.real_pixels(clip) for clip in clips])).numpy()


def _identity(dataset: VideoDataset, detector: Detector, count: int | None) -> dict[str, Any]:
    """Everything that the statistics depend on. Clips are identified by folder, name and size in bytes."""
    files = hashlib.sha256()
    for file in dataset.files:
        size = Path(file.source).stat().st_size if isinstance(file.source, str) else file.source.size
        name = Path(file.path)
        files.update(f"{name.parent.name}/{name.name} {size}\n".encode())
    return {
        "format": FORMAT,
        "clips": len(dataset),
        "files": files.hexdigest(),
        "frames": dataset.frames,
        "size": list(dataset.size),
        "stride": dataset.stride,
        "fps": dataset.fps,
        "seed": dataset.seed,
        "count": count,
        "detector": detector.sha256,
    }


def _file_of(folder: Path, identity: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return folder / f"real-{digest[:16]}.npz"


def _write(path: Path, identity: dict[str, Any], statistics: RealStatistics) -> None:
    features = statistics.features
    arrays: dict[str, Any] = {
        "count": features.count,
        "left_out": statistics.left_out,
        "mean": features.mean,
        "covariance": features.covariance(unbiased=False),
    }
    if statistics.rows is not None:
        arrays["rows"] = statistics.rows
    write_arrays(path, identity, arrays)


def _read(path: Path, identity: dict[str, Any]) -> RealStatistics:
    try:
        identity_in_file, file = read_arrays(path)
        features = FeatureStatistics.of(int(file["count"]), file["mean"], file["covariance"])
        left_out = int(file["left_out"])
        shapes = (features.mean.shape, file["covariance"].shape)
        if shapes != ((features.width,), (features.width, features.width)) or features.count < 2:
            raise ValueError(f"shapes {shapes} of {features.count} clips")
        rows = _read_rows(file["rows"], features) if identity.get("rows") else None
    except Exception as error:  # numpy raises errors of many types for damaged files
        raise ValueError(f"statistics: {path} is damaged ({type(error).__name__}: {error}); delete it") from None
    if identity_in_file != identity:
        raise ValueError(f"statistics: {path} is of other clips or another detector; delete it")
    return RealStatistics(features, left_out, rows)


def _read_rows(rows: np.ndarray, features: FeatureStatistics) -> np.ndarray:
    """The rows of a file whose statistics are ``features``; ``ValueError`` if they are none of so many clips."""
    if rows.dtype != np.float32 or rows.shape != (features.count, features.width) or not np.isfinite(rows).all():
        raise ValueError(f"rows {rows.dtype} {rows.shape} of {features.count} clips")
    return rows
