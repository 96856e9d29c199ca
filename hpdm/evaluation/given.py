"""Real lower levels for videos whose other levels are sampled, so that each level of a model can be judged alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from hpdm.data.clips import VideoDataset
from hpdm.evaluation.levels import Level


class GivenLevels:
    """The lowest levels of real clips, one clip of the right class for each video to sample.

    The clips of a class are taken in the order of the set, evenly spread over it; more than once only if the class has
    fewer clips than videos.

    Args:
        dataset: clips at the run's resolution, one window each.
        levels: the levels to give, from 0 up.
        labels: the class of each video; ``None`` for a model without classes.
        count: number of videos.

    Raises:
        ValueError: a class without clips.
    """

    def __init__(
        self, dataset: VideoDataset, levels: Sequence[Level], labels: Sequence[int] | None, count: int
    ) -> None:
        self.dataset, self.levels = dataset, levels
        self.clips: dict[int, list[int]] = {}  # of each class, by their numbers in the set
        for clip, file in enumerate(dataset.files):
            self.clips.setdefault(0 if labels is None else file.label, []).append(clip)
        self.labels = [0] * count if labels is None else list(labels)
        videos_of, before = Counter(self.labels), Counter[int]()
        self.places = []  # of each video's clip among those of its class
        for label in self.labels:
            if label not in self.clips:
                raise ValueError(f"data: {dataset.root} has no clip of {dataset.class_names[label]}")
            place, clips, videos = before[label], len(self.clips[label]), videos_of[label]
            self.places.append(place * clips // videos if videos <= clips else place % clips)
            before[label] += 1

    def __call__(self, numbers: Sequence[int]) -> list[Tensor]:
        """The given levels of the videos ``numbers``: ``[B, C, F_l, H_l, W_l]`` float32 in [-1, 1] each.

        Raises:
            ValueError: no clip of a class can be read.
        """
        videos = torch.stack([self._clip(number) for number in numbers])  # [B, C, F, H, W]
        return [level.real(videos) for level in self.levels]

    def _clip(self, number: int) -> Tensor:
        """The real clip of a video, uint8 ``[C, F, H, W]``; for one that cannot be used, the next one of its class."""
        clips = self.clips[self.labels[number]]
        for step in range(len(clips)):
            clip = clips[(self.places[number] + step) % len(clips)]
            item = self.dataset[clip]
            # The set replaces what it cannot read by another clip, which may be of another class.
            if item["path"] == self.dataset.files[clip].path:
                return item["video"]
        raise ValueError(
            f"data: {self.dataset.root} has no clip that can be used of class number {self.labels[number]}"
        )
