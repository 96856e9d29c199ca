"""Runs and options for tests of ``hpdm sample`` with videos of any length, and what its files hold."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from hpdm.commands.given import GivenOptions
from hpdm.commands.sample import SampleOptions, sample
from hpdm.data.decode import probe, read_clip
from hpdm.long_video import LongOptions
from hpdm.sampling import SamplerOptions
from tests.small import random_model, save_as_run, small_config

TWO_LEVELS = {"patch": (8, 8, 8), "levels": 2, "levels_per_block": (1, 2)}
"""Changes to :func:`long_run` that make its clips 16 frames of 16x16, in two levels."""
FAST = ("--steps", "2", "--solver", "ddim", "--overlap", "none", "--device", "cpu")
"""Words of the command line for what :func:`options` chooses."""


def long_run(folder: Path, training: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A run without classes, trained with known frames: three levels of 4x8x8, so clips of 16 frames of 32x32."""
    shape = {"patch": (4, 8, 8), "tokenizer": (1, 2, 2), "known_frames": True, "conditioning": "none"}
    model = random_model(small_config(**shape | changes), "auto", scale=0.05)
    return save_as_run(model, folder, [], {"stride": 1, "short": "loop"} | (training or {}))


def options(run: Path, out: Path, **values: Any) -> SampleOptions:
    """Options of the command; those of given frames, of windows and of the sampler are told apart by their names."""
    values = {"count": 1, "steps": 2, "solver": "ddim", "overlap": "none", "device": "cpu"} | values

    def taken(kind: type) -> dict[str, Any]:
        return {field.name: values.pop(field.name) for field in fields(kind) if field.name in values}

    given, long = GivenOptions(**taken(GivenOptions)), LongOptions(**taken(LongOptions))
    sampler = SamplerOptions(**taken(SamplerOptions))
    return SampleOptions(run, out, given=given, long=long, sampler=sampler, **values)


def sampled(run: Path, out: Path, **values: Any) -> np.ndarray:
    """Runs the command; returns the frames of its only video, uint8 ``[F, H, W, 3]``."""
    (path,) = sample(options(run, out, **values))
    return frames_of(path)


def frames_of(path: Path) -> np.ndarray:
    """All frames of a video, uint8 ``[F, H, W, 3]``."""
    return read_clip(path, range(probe(path).frames)).frames


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files in a folder and below, by name."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of the brightness of two videos, ``[F, H, W, 3]`` in 0..255, in dB: mp4 files halve the resolution of colors."""
    error = (a.astype(float) - b.astype(float)) @ (0.299, 0.587, 0.114)
    return float(10 * np.log10(255**2 / max((error**2).mean(), 1e-9)))
