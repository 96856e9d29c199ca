"""The random numbers of sampling: streams of their own for each video, level and purpose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Purpose = Literal["sampling", "context", "known", "sparse", "known sparse"]
"""Noise from which a level is sampled, noise of a finished level that is the context of those above, noise of frames
that are known, and both for level 0 with frames that are far apart."""

_SPAWN_KEYS: dict[Purpose, tuple[int, ...]] = {
    "sampling": (), "context": (1,), "known": (2,), "sparse": (3,), "known sparse": (4,)
}  # fmt: skip


def level_generator(seed: int, level: int, purpose: Purpose = "sampling", window: int = 0) -> torch.Generator:
    """A random stream for each level of each window of a video, so that an interrupted call can go on with a later one.

    A video of one window has the stream of window 0, whose name in the sequence is that of the level alone.
    """
    name = (seed, level, window) if window else (seed, level)
    sequence = np.random.SeedSequence(name, spawn_key=_SPAWN_KEYS[purpose])
    (state,) = sequence.generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state) >> 1)


def level_noise(
    seeds: Sequence[int], level: int, shape: Sequence[int], purpose: Purpose = "sampling", window: int = 0
) -> Tensor:
    """Standard normal noise of one level of B videos, ``[B, *shape]`` on the CPU, the first of each stream."""
    generators = [level_generator(seed, level, purpose, window) for seed in seeds]
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])
