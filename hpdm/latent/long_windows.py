"""The windows of long videos of latent diffusion, and how many of them a video takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from hpdm.latent.hierarchy import Hierarchy
from hpdm.latent.latent_config import LatentConfig
from hpdm.latent.reach import decoder_reach
from hpdm.long_video import LongOptions
from hpdm.windows import Window, Windows


@dataclass(frozen=True)
class LatentWindows(Windows):
    """Windows of latents, of which some more are sampled than a video has: those on which its last frames depend.

    So frames are the same whatever comes after the last one that is asked for.
    """

    ahead: int = 0
    """Latents after its own on which a decoded frame depends; 0 where a video ends with its last window."""

    def count(self, frames: int) -> int:
        return super().count(self.latents(frames) * self.scale)

    def latents(self, frames: int) -> int:
        """Latents that a video of so many frames takes, with those ahead."""
        return math.ceil(frames / self.scale) + self.ahead

    def up_to(self, frames: int) -> Iterator[Window]:
        return replace(self, ahead=0).up_to(frames) if self.ahead else super().up_to(frames)

    def borders(self, frames: int) -> list[int]:
        return [border for border in super().borders(frames) if border < frames]


def windows_of(config: LatentConfig, long: LongOptions) -> LatentWindows:
    """The windows of consecutive latents. Those of the scheme "hierarchical" share one latent.

    Raises:
        ValueError: more known latents than a window has, or a model without the scheme.
    """
    frames = config.unet.latent[0]
    if frames == 1:
        raise ValueError("frames: got a model of clips of one latent, expected at least two")
    if long.scheme not in ("autoregressive", "hierarchical"):
        raise ValueError(
            f"scheme: got {long.scheme!r}, expected 'autoregressive' or 'hierarchical': latent diffusion has no other"
        )
    goes_on = config.known_frames and config.autoencoder.norm == "frame"
    ahead = decoder_reach(config.autoencoder).future if goes_on else 0
    known = 1 if long.scheme == "hierarchical" else long.known or frames // 2
    windows = LatentWindows(frames, known, config.autoencoder.factors[0], ahead)
    if long.scheme == "hierarchical":
        hierarchy_of(config, long)
    return windows


def hierarchy_of(config: LatentConfig, long: LongOptions) -> Hierarchy:
    """The sizes of the scheme "hierarchical"; ``long.known`` is that of predictions.

    Raises:
        ValueError: more known latents than a prediction has, or a network that was not trained for it.
    """
    frames, spacing = config.unet.latent[0], config.unet.spacing
    if spacing == 1:
        raise ValueError("scheme: got 'hierarchical' for a model that was trained without --spacing, expected another")
    return Hierarchy(frames, long.known or frames // 2, spacing, (frames - 1) // spacing)
