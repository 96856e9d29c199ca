"""How visible the tile borders of sampled videos are, measured while other scores read the videos."""

from __future__ import annotations

import numpy as np

from hpdm import distributed
from hpdm.evaluation.generated import Clips
from hpdm.sampling import Sampler


class SeamScore:
    """Seam energies of a sampler's videos, see :meth:`hpdm.sampling.Sampler.seams`.

    Args:
        sampler: that samples the videos.
        place: of the sampler's last part among those that are measured; ``None`` if it is not among them.
    """

    def __init__(self, sampler: Sampler, place: int | None) -> None:
        self.sampler, self.place = sampler, place
        self.energies: dict[int, dict[str, float]] = {}  # by number of the video

    def watch(self, clips: Clips) -> Clips:
        """Yields ``clips`` as they are, and measures them."""
        for number, videos in clips:
            if self.place is not None:
                self.energies[number] = self.sampler.seams(videos[self.place].float() / 127.5 - 1)
            yield number, videos

    def result(self) -> dict[str, float]:
        """The mean over all videos by axis; 1 where borders are invisible; empty without tiles. A collective."""
        energies = distributed.gather(self.energies)
        axes = energies[0] if energies else {}
        return {axis: float(np.mean([of_video[axis] for of_video in energies])) for axis in axes}
