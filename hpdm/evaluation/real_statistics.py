"""Statistics of the features of real clips, for FVD, cached in a file for the next evaluation."""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from hpdm import distributed
from hpdm.data.clips import VideoDataset
from hpdm.evaluation.detector import Detector
from hpdm.evaluation.levels import Level
from hpdm.evaluation.metrics import FeatureStatistics
from hpdm.files import atomic_path
from hpdm.json_file import parse_json

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the file."""


class RealStatistics(NamedTuple):
    """Features of real clips."""

    features: FeatureStatistics
    left_out: int
    """Clips that were too short or damaged."""


def real_statistics(
    dataset: VideoDataset,
    detector: Detector,
    *,
    count: int | None,
    batch: int,
    folder: Path | None = None,
    level: Level | None = None,
) -> RealStatistics:
    """Statistics over random windows of randomly drawn clips, each clip once. A collective: all ranks return the same.

    Args:
        dataset: with ``train=True`` (random windows, from its seed) and ``short="skip"``.
        detector: gives the features.
        count: number of clips; all good ones for ``None``, or if there are fewer.
        batch: clips at a time.
        folder: caches the statistics for later calls with the same clips, windows and detector.
        level: the level to whose size the clips are brought; ``None`` to take them as they are read.

    Raises:
        ValueError: a damaged file of statistics, or fewer than two good clips.
        DecodeError: no clip is long enough.
    """
    identity = _identity(dataset, detector, count)
    if level is not None:
        identity["level"] = [level.number, list(level.size), list(level.config.resolution)]
    path = None if folder is None else _file_of(folder, identity)
    stored = None
    with distributed.raise_on_all_ranks():
        if path is not None and distributed.is_first() and path.is_file():
            logger.info("features of real clips from %s", path)
            stored = _read(path, identity)
    stored = distributed.broadcast(stored)
    if stored is not None:
        return stored
    statistics = _compute(dataset, detector, count, batch, level)
    with distributed.raise_on_all_ranks():
        if path is not None and distributed.is_first():
            _write(path, identity, statistics)
    return statistics


def _compute(
    dataset: VideoDataset, detector: Detector, count: int | None, batch: int, level: Level | None
) -> RealStatistics:
    """Takes clips in a random order until ``count`` are good. The ranks share the clips of every round."""
    target = len(dataset) if count is None else min(count, len(dataset))
    features = FeatureStatistics()
    order = np.random.default_rng([dataset.seed, 0]).permutation(len(dataset)).tolist()
    with tqdm(
        total=target, desc="real clips", unit="clip", dynamic_ncols=True, disable=not distributed.is_first()
    ) as bar:
        while order and features.count < target:
            # A round: as many clips as are still missing, but no more than a batch for each rank.
            size = min(target - features.count, batch * distributed.world_size())
            batches = [order[first : min(first + batch, size)] for first in range(0, size, batch)]
            order = order[size:]
            numbers = distributed.shard(range(len(batches)))
            with distributed.raise_on_all_ranks():
                rows_of = {n: _features_of(dataset, batches[n], detector, level) for n in numbers}
            for rows in distributed.gather(rows_of):
                if len(rows):
                    features.update(rows)
                    bar.update(len(rows))
    if features.count < 2:
        raise ValueError(
            f"data: {dataset.root} has {features.count} good clip(s) of {dataset.frames} frames, expected >= 2"
        )
    return RealStatistics(features, left_out=len(dataset) - len(order) - features.count)


def _features_of(dataset: VideoDataset, indices: Sequence[int], detector: Detector, level: Level | None) -> np.ndarray:
    """Features of the good clips among ``indices``, ``[n, W]``.

    The dataset replaces a clip that is too short or damaged by another one. The replacement is dropped here, since it
    has its own place in the order.
    """
    items = [dataset[index] for index in indices]
    clips = [item["video"] for item, index in zip(items, indices) if item["path"] == dataset.files[index].path]
    if not clips:
        return np.zeros((0, 0))
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
    path.parent.mkdir(parents=True, exist_ok=True)
    features = statistics.features
    with atomic_path(path) as temporary:
        np.savez(
            temporary,
            identity=np.array(json.dumps(identity)),
            count=features.count,
            left_out=statistics.left_out,
            mean=features.mean,
            covariance=features.covariance(unbiased=False),
        )


def _read(path: Path, identity: dict[str, Any]) -> RealStatistics:
    try:
        # It is written uncompressed. A compressed one could ask for any amount of memory.
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                raise ValueError("compressed")
        with np.load(path, allow_pickle=False) as file:
            identity_in_file = parse_json(str(file["identity"]), dict[str, Any], "identity")
            features = FeatureStatistics.of(int(file["count"]), file["mean"], file["covariance"])
            left_out = int(file["left_out"])
            shapes = (features.mean.shape, file["covariance"].shape)
            if shapes != ((features.width,), (features.width, features.width)) or features.count < 2:
                raise ValueError(f"shapes {shapes} of {features.count} clips")
    except Exception as error:  # numpy raises errors of many types for damaged files
        raise ValueError(f"statistics: {path} is damaged ({type(error).__name__}: {error}); delete it") from None
    if identity_in_file != identity:
        raise ValueError(f"statistics: {path} is of other clips or another detector; delete it")
    return RealStatistics(features, left_out)
