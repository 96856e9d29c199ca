"""Generated clips for evaluation, one at a time: as a sampler makes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from hpdm.sampler import Sampler
from hpdm.video import to_uint8


def sample_clips(
    sampler: Sampler, first_seed: int, labels: Sequence[int] | None, count: int, batch: int
) -> Iterator[Tensor]:
    """Samples ``count`` videos, ``batch`` at a time, and gives them one by one: uint8 ``[3, F, H, W]``.

    Args:
        sampler: the sampler.
        first_seed: seed of the first video; the others count up.
        labels: the class of each video; ``None`` for a model without classes.
        count: number of videos.
        batch: videos sampled at a time. A video depends on its own seed and class alone (up to rounding).
    """
    with tqdm(total=count, unit="video", dynamic_ncols=True) as bar:
        for first in range(0, count, batch):
            seeds = range(first_seed + first, first_seed + min(first + batch, count))
            own = None if labels is None else torch.tensor(list(labels[first : first + len(seeds)]))
            videos = to_uint8(sampler(seeds, own)[-1])
            bar.update(len(seeds))
            yield from videos
