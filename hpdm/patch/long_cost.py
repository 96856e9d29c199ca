"""The cost of sampling videos of any length, predicted: work per window, and memory, which does not grow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hpdm.long_video import LongOptions
from hpdm.patch.config import HPDMConfig
from hpdm.patch.finished_levels import keeps_features
from hpdm.patch.long_sampler import windows_of
from hpdm.patch.model import HPDM
from hpdm.patch.sampling_cost import (
    FP32,
    duration,
    feature_flops,
    patch_flops,
    prediction_copies,
    sampling_memory,
    sampling_plan,
    seconds_per_patch,
)
from hpdm.patch.section import Section, level_section, needed_features
from hpdm.patch.tile_network import feature_copies
from hpdm.patch.tiling import find_ancestors, level_tiling
from hpdm.sampling import SamplerOptions
from hpdm.solvers import HELD


@dataclass(frozen=True)
class WindowPlan:
    """The predicted work of one level of one window, which knows frames of the one before."""

    level: int
    tiles: int
    """Tiles that show a new frame."""
    features: int
    """Tiles whose features are computed for the levels above."""
    patches: int
    """Patches that go through the network, with all copies for guidance and those for features."""
    flops: int
    """FLOPs of matrix products and attention."""


@dataclass(frozen=True)
class LongPlan:
    """The predicted cost of one long video."""

    frames: int
    windows: int
    known: int
    """Frames of level 0 that a window knows of the one before."""
    first: list[WindowPlan]
    """The first window, level by level."""
    next: list[WindowPlan]
    """Each window after it; none if there is one alone. Of schemes that sample level 0 otherwise, the mean."""
    memory_bytes: int
    """Memory on the device, for videos of any length."""

    @property
    def patches(self) -> int:
        """Patches of the whole video."""
        return sum(p.patches for p in self.first) + (self.windows - 1) * sum(p.patches for p in self.next)

    @property
    def flops(self) -> int:
        """FLOPs of the whole video."""
        return sum(p.flops for p in self.first) + (self.windows - 1) * sum(p.flops for p in self.next)

    def as_json(self) -> dict[str, Any]:
        """All numbers as JSON values."""
        return asdict(self) | {"patches": self.patches, "flops": self.flops}


def long_plan(config: HPDMConfig, options: SamplerOptions, long: LongOptions, frames: int, videos: int = 1) -> LongPlan:
    """Predicts the cost of sampling one video of ``frames`` frames, and the memory of ``videos`` at a time.

    Raises:
        ValueError: as :func:`hpdm.patch.long_sampler.windows_of`.
    """
    windows = windows_of(config, long)
    first = [
        _window_plan(
            config, options, p.level, p.tiles, p.tiles if p.level < config.levels - 1 else 0,
            p.tiles * sum(prediction_copies(config, options, p.level)),
        )
        for p in sampling_plan(config, options)
    ]  # fmt: skip
    if windows.count(frames) == 1:
        memory = sampling_memory(config, options, videos).device_bytes
        return LongPlan(frames, 1, windows.known, first, [], memory)
    sections = _sections(config, options, windows.known)
    tilings = [level_tiling(config, options, level) for level in range(config.levels)]
    needed = needed_features(find_ancestors(tilings), sections)
    following = []
    for level, section in enumerate(sections):
        tiles = len(section.tiles)
        rows = sum(prediction_copies(config, options, level))
        denoised = tiles * rows if level else _denoised_of_level_0(config, options, long)
        following.append(_window_plan(config, options, level, tiles, len(needed[level]), denoised))
    memory = _memory(config, options, sections, needed, videos)
    return LongPlan(frames, windows.count(frames), windows.known, first, following, memory)


def _sections(config: HPDMConfig, options: SamplerOptions, known: int) -> list[Section]:
    """What is sampled of each level where the first ``known`` frames of level 0 are known."""
    return [
        level_section(
            config, options, level_tiling(config, options, level), level,
            torch.arange(config.level_resolution(level)[0]) < known * config.ratio[0] ** level,
        )
        for level in range(config.levels)
    ]  # fmt: skip


def _window_plan(
    config: HPDMConfig, options: SamplerOptions, level: int, tiles: int, features: int, denoised: int
) -> WindowPlan:
    """The work of a level in which so many patches are denoised."""
    kept = features * feature_copies(options) if keeps_features(config, options) else 0
    flops = denoised * patch_flops(config, level) + (kept * feature_flops(config, level) if kept else 0)
    return WindowPlan(level, tiles, features, denoised + kept, flops)


def _denoised_of_level_0(config: HPDMConfig, options: SamplerOptions, long: LongOptions) -> int:
    """Patches of level 0 that are denoised in a window after the first, on average."""
    rows = prediction_copies(config, options, 0)
    guided = sum(rows) + len(rows) * (options.frame_guidance > 0)  # a row more for guidance by known frames
    if long.scheme == "joint":  # the same for each of a group's windows; the first group knows nothing
        return guided
    if long.scheme == "rolling":
        rising = config.grid[0] - windows_of(config, long).known // config.tokenizer[0]
        return rising * max(1, round(options.level_steps(0) / rising)) * max(rows)
    if long.scheme == "hierarchical":
        new = config.patch[0] - max(1, config.patch[0] // 2)  # sparse frames that a window of these adds
        return guided + round(sum(rows) * (config.patch[0] - 1) / config.spacing / new)
    return guided + (max(rows) if config.memory and long.remember else 0)


def _memory(
    config: HPDMConfig, options: SamplerOptions, sections: Sequence[Section], needed: Sequence[Tensor], videos: int
) -> int:
    """Bytes at the peak, of the first window or of a later one.

    A later window solves only its section of the last level and keeps only the features that this needs. In addition
    there are the videos of the window before, and those that hold its known frames.
    """
    first = sampling_memory(config, options, videos)
    level = [videos * config.channels * math.prod(config.level_resolution(n)) * FP32 for n in range(config.levels)]
    solved = HELD[options.level_solver(config.levels - 1).method] * level[-1]
    if options.consistency and config.levels > 1:
        solved += level[-2]
    share = len(sections[-1].frames) / config.resolution[0]
    plans = sampling_plan(config, options)
    kept = sum(plan.cache_bytes for plan in plans)
    needs = sum(plan.cache_bytes * len(tiles) / plan.tiles for plan, tiles in zip(plans, needed))
    features = first.features * needs / kept if kept and options.cache == "gpu" else first.features
    later = first.device_bytes - first.features + features - solved * (1 - share) + 2 * sum(level)
    return max(first.device_bytes, round(later))


def long_plan_line(
    model: HPDM, options: SamplerOptions, long: LongOptions, frames: int, videos: int, at_a_time: int, processes: int
) -> str:
    """One line to print before sampling: windows, patches, FLOPs, expected memory and time."""
    plan = long_plan(model.config, options, long, frames, at_a_time)
    seconds = seconds_per_patch(model) * videos * plan.flops / patch_flops(model.config, 0) / processes
    steps = "/".join(str(options.level_steps(level)) for level in range(model.config.levels))
    return (
        f"{videos} video(s) of {frames} frames in {plan.windows} window(s), {long.scheme}, {plan.known} known frame(s) "
        f"of level 0, steps {steps}, {videos * plan.patches} patches, {videos * plan.flops / 1e12:.3g} TFLOP; about "
        f"{plan.memory_bytes / 1e9:.2f} GB whatever the length, about {duration(seconds)}"
    )
