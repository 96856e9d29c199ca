"""The features of long videos, computed once for every clip of 16 frames, while the frames come."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from hpdm import distributed
from hpdm.evaluation.detector import Detector
from hpdm.evaluation.over_time.borders import CLIP
from hpdm.evaluation.over_time.sources import Pieces


class ClipFeatures:
    """Features of consecutive, disjoint clips of videos of one length. Only these are kept of a video.

    Args:
        detector: of features.
        frames: of a video, at least 16; what is left after the last whole clip is not measured.
        batch: clips at a time.
        known: features ``[clips, W]`` of some of this rank's videos, by number; nothing is computed of these.
        finished: called with the number and the features ``[clips, W]`` of each other video, once all are there.
    """

    def __init__(
        self,
        detector: Detector,
        frames: int,
        batch: int,
        known: Mapping[int, np.ndarray] | None = None,
        finished: Callable[[int, np.ndarray], None] | None = None,
    ) -> None:
        self.detector, self.batch, self.clips, self.finished = detector, batch, frames // CLIP, finished
        self.known = dict(known or {})
        self._rest: dict[int, Tensor] = {}  # frames since the last whole clip, by number of the video
        self._waiting: list[tuple[int, Tensor]] = []
        self._begun: dict[int, int] = {}  # clips that were cut, by number of the video
        self._features: dict[int, list[np.ndarray]] = {}  # [W] of every clip in order, by number of the video

    def watch(self, pieces: Pieces) -> Pieces:
        """Yields ``pieces`` of this rank's videos as they are, and computes features of them.

        Raises:
            ValueError: a detector that breaks its contract.
        """
        for number, frames in pieces:
            if number not in self.known:
                self._add(number, frames)
            yield number, frames
        self._detect()

    def _add(self, number: int, frames: Tensor) -> None:
        """Cuts clips from the next frames of a video, uint8 ``[3, n, H, W]``."""
        rest = self._rest.pop(number, frames[:, :0])
        rest = torch.cat([rest, frames], dim=1)
        while rest.shape[1] >= CLIP and self._begun.get(number, 0) < self.clips:
            self._begun[number] = self._begun.get(number, 0) + 1
            self._waiting.append((number, rest[:, :CLIP]))
            rest = rest[:, CLIP:]
            if len(self._waiting) == self.batch:
                self._detect()
        self._rest[number] = rest.clone()

    def _detect(self) -> None:
        """Runs the detector on the clips that wait."""
        if self._waiting:
            rows = self.detector(torch.stack([clip for _, clip in self._waiting])).numpy()
            for (number, _), row in zip(self._waiting, rows):
                of_video = self._features.setdefault(number, [])
                of_video.append(row)
                if len(of_video) == self.clips and self.finished is not None:
                    self.finished(number, np.stack(of_video))
            self._waiting = []

    def result(self) -> np.ndarray:
        """Features of all ranks' videos, float32 ``[N, clips, W]``, by number. A collective.

        Raises:
            ValueError: a video that ended early.
        """
        features = distributed.gather(self.known | {n: np.stack(rows) for n, rows in self._features.items()})
        for number, of_video in enumerate(features):
            if len(of_video) < self.clips:
                raise ValueError(f"frames: got {len(of_video)} clips of video {number}, expected {self.clips}")
        return np.stack(features)
