"""The random numbers of sampling: streams of their own for each video, level and purpose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Purpose = Literal["sampling", "context"]
"""Noise from which a level is sampled, or noise of a finished level that is the context of those above."""

_SPAWN_KEYS: dict[Purpose, tuple[int, ...]] = {"sampling": (), "context": (1,)}


def level_generator(seed: int, level: int, purpose: Purpose = "sampling") -> torch.Generator:
    """A random stream for each level of a video, so that an interrupted call can continue with a later level."""
    sequence = np.random.SeedSequence((seed, level), spawn_key=_SPAWN_KEYS[purpose])
    (state,) = sequence.generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state) >> 1)


def level_noise(seeds: Sequence[int], level: int, shape: Sequence[int], purpose: Purpose = "sampling") -> Tensor:
    """Standard normal noise of one level of B videos, ``[B, *shape]`` on the CPU, the first of each stream."""
    return torch.stack([torch.randn(*shape, generator=level_generator(seed, level, purpose)) for seed in seeds])
