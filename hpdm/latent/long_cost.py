"""The cost of long videos of latent diffusion, predicted: rows of the network, decoding, and memory at any length."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hpdm.latent.autoencoder import VideoAutoencoder
from hpdm.latent.config import AutoencoderConfig
from hpdm.latent.latent_config import LatentConfig
from hpdm.latent.latent_cost import decoding_flops, rows_per_clip, unet_flops
from hpdm.latent.long_windows import hierarchy_of, windows_of
from hpdm.latent.objective import example_inputs
from hpdm.latent.reach import decoder_reach
from hpdm.latent.stream_decoder import Span, spans
from hpdm.latent.unet import FactorizedUNet
from hpdm.latent.unet_config import UNetConfig
from hpdm.long_video import LongOptions
from hpdm.planning.ledger import Ledger, fake_fp32
from hpdm.sampling import SamplerOptions
from hpdm.solvers import HELD

FP32 = 4


@dataclass(frozen=True)
class LongPlan:
    """The predicted cost of one long video; the keys of :meth:`hpdm.system.System.long_plan`."""

    frames: int
    windows: int
    known: int
    """Latents that a window knows of the one before."""
    first: list[dict[str, Any]]
    """Work until the first window is finished: sparse latents, latents, and what is decoded by then."""
    next: list[dict[str, Any]]
    """The mean work of each window after it; none if there is one alone."""
    memory_bytes: int
    """Memory on the device, for videos of any length."""
    patches: int
    """Clips of latents that go through the network, guidance counted twice."""
    flops: int
    """FLOPs of products, convolutions and attention."""

    def as_json(self) -> dict[str, Any]:
        """All numbers as JSON values."""
        return asdict(self)


def long_plan(
    config: LatentConfig, options: SamplerOptions, long: LongOptions, frames: int, videos: int = 1
) -> LongPlan:
    """Predicts the cost of sampling one video of ``frames`` frames, and the memory of ``videos`` at a time.

    Raises:
        ValueError: as :func:`hpdm.latent.long_windows.windows_of`.
    """
    windows = windows_of(config, long)
    count = windows.count(frames)
    free = sum(rows_per_clip(options, config))
    knowing = free + (len(rows_per_clip(options, config)) if options.frame_guidance else 0)
    sparse, first_sparse = 0, 0
    if long.scheme == "hierarchical":
        hierarchy = hierarchy_of(config, long)
        sparse = free + (hierarchy.predictions(windows.latents(frames)) - 1) * knowing
        first_sparse = free + (next(hierarchy.steps(1)).predictions[-1]) * knowing
    first_rows = knowing if sparse else free
    rows = first_rows + (count - 1) * knowing
    decoded = (Counter(span.last - span.first for span in part) for part in _decoded(config, long, frames))
    first = _rows(config, first_sparse, first_rows, next(decoded))
    rest = sum(decoded, Counter[int]())
    others = count - 1
    following = _rows(config, (sparse - first_sparse) / others, knowing, rest, others) if others else []
    flops = (sparse + rows) * unet_flops(config.unet) + sum(row["flops"] for row in first if row["level"] == "decode")
    flops += _decoding(config, rest)
    memory = _memory(config, options, long, videos)
    return LongPlan(frames, count, windows.known, first, following, memory, sparse + rows, flops)


def long_plan_line(
    config: LatentConfig, options: SamplerOptions, long: LongOptions, frames: int, videos: int, at_a_time: int
) -> str:
    """One line to print before sampling: windows, network calls, FLOPs, expected memory."""
    plan = long_plan(config, options, long, frames, at_a_time)
    return (
        f"{videos} video(s) of {frames} frames in {plan.windows} window(s), {long.scheme}, {plan.known} known "
        f"latent(s), {options.steps} steps of {options.solver}, {videos * plan.patches} clips through the network, "
        f"{videos * plan.flops / 1e12:.3g} TFLOP with decoding; about {plan.memory_bytes / 1e9:.2f} GB whatever the "
        "length"
    )


def _rows(
    config: LatentConfig, sparse: float, rows: int, decoded: Counter[int], windows: int = 1
) -> list[dict[str, Any]]:
    """The rows of a plan for one window; what is ``decoded`` is that of so many."""
    unet = unet_flops(config.unet)

    def row(level: str, patches: int, flops: float) -> dict[str, Any]:
        return {"level": level, "tiles": 1, "features": 0, "patches": patches, "flops": round(flops)}

    return [
        *([row("sparse", round(sparse), sparse * unet)] if sparse else []),
        row("latent", rows, rows * unet),
        row("decode", 0, _decoding(config, decoded) / windows),
    ]


def _decoding(config: LatentConfig, decoded: Counter[int]) -> int:
    """FLOPs of decoding: the number of latents that are decoded at once, and how often."""
    height, width = config.unet.latent[1:]
    return sum(n * decoding_flops(config.autoencoder, (length, height, width)) for length, n in decoded.items())


def _decoded(config: LatentConfig, long: LongOptions, frames: int) -> Iterator[list[Span]]:
    """What is decoded after each part of a video."""
    windows = windows_of(config, long)
    count, done, there, finished = windows.count(frames), 0, 0, 0
    for number, new in _parts(config, long, frames):
        there, finished = there + new, number + 1
        of_part = list(spans(config.autoencoder, done, there, finished == count and not windows.ahead))
        done = of_part[-1].stop if of_part else done
        yield of_part


def _parts(config: LatentConfig, long: LongOptions, frames: int) -> Iterator[tuple[int, int]]:
    """The number of the last window of each part of a video, and how many latents are new in it."""
    windows = windows_of(config, long)
    if long.scheme == "hierarchical":
        for step in hierarchy_of(config, long).steps(windows.latents(frames)):
            yield step.windows[-1], len(step.windows) * windows.stride + (step.windows.start == 0)
    else:
        for window in windows.until(frames):
            yield window.number, windows.window - window.known


def _memory(config: LatentConfig, options: SamplerOptions, long: LongOptions, videos: int) -> int:
    """Bytes at the peak, which is that of a network call or of decoding, whichever is larger."""
    copies = max(rows_per_clip(options, config)) + (options.frame_guidance != 0)
    clips = videos
    if long.scheme == "hierarchical":
        hierarchy = hierarchy_of(config, long)
        clips *= len(next(hierarchy.steps(hierarchy.sparse(1) * hierarchy.spacing)).windows)
    at_once = min(clips, max(1, options.tile_batch // copies))
    weights, network = _network(config.unet, at_once * copies)
    # After so many parts all that follow are alike.
    windows, reach = windows_of(config, long), decoder_reach(config.autoencoder)
    enough = reach.past + 2 * reach.future + windows.window
    parts = list(itertools.islice(_decoded(config, long, windows.whole * (enough if windows.ahead else 1)), enough))
    longest = max(span.last - span.first for part in parts for span in part)
    new = max(sum(span.stop - span.start for span in part) for part in parts) * windows.scale
    autoencoder, decoding = _decoder(config.autoencoder, longest, *config.unet.latent[1:])
    clip = config.unet.channels * math.prod(config.unet.latent) * FP32
    solving = (HELD[options.level_solver(0).method] + copies) * at_once * clip
    finished = 2 * clips * clip + videos * clip // windows.window * (longest + windows.window)
    # The frames of the part before are still in the hands of who gets them.
    pixels = 2 * videos * config.channels * new * math.prod(config.resolution[1:]) * FP32
    return weights + autoencoder + finished + max(network + solving + pixels // 2, decoding + pixels)


@functools.cache
def _network(config: UNetConfig, rows: int) -> tuple[int, int]:
    """Bytes of the weights, and of all else at the peak of a call."""
    with fake_fp32(), torch.no_grad():
        unet = FactorizedUNet(config)
        inputs = example_inputs(config, rows)
        with Ledger() as ledger:
            ledger.label(unet.parameters(), "weights")
            unet(**inputs)
        return _apart(ledger)


@functools.cache
def _decoder(config: AutoencoderConfig, frames: int, height: int, width: int) -> tuple[int, int]:
    """Bytes of the weights, and of all else at the peak of decoding so many latents."""
    with fake_fp32(), torch.no_grad():
        model = VideoAutoencoder(config)
        latents = torch.zeros(1, config.latent_channels, frames, height, width)
        with Ledger() as ledger:
            ledger.label(model.parameters(), "weights")
            model.decode_unnormalized(latents)
        return _apart(ledger)


def _apart(ledger: Ledger) -> tuple[int, int]:
    """Bytes of the weights at the peak, and of the others."""
    at_peak = ledger.at_peak()
    weights = at_peak.pop("weights", 0)
    return weights, sum(at_peak.values())
