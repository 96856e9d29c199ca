"""The reconstruction losses of an autoencoder, one value per clip each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hpdm.latent.config import AutoencoderConfig
from hpdm.latent.perceptual import perceptual_network
from hpdm.objective import Objective, draw_mirrored, mirror
from hpdm.training.stills import draw_stills, show_frames


class AutoencoderDraws(NamedTuple):
    """What is random in the losses of B clips."""

    stills: Tensor | None
    """For each frame the number of the frame that it shows, int64 ``[B, F]``; ``None`` if no clip becomes a still."""
    mirrored: Tensor | None
    """Clips that are mirrored left to right, bool ``[B]``; ``None`` for none."""
    corner: Tensor | None
    """First frame, row and column of the crop of each clip, int64 ``[B, 3]``; ``None`` for whole clips."""


def draw(
    config: AutoencoderConfig,
    batch: int,
    generator: torch.Generator,
    objective: Objective | None = None,
    images: float = 0.0,
    rows: range | None = None,
) -> AutoencoderDraws:
    """Draws what is random in a batch, or in some of its rows; arguments as of :meth:`hpdm.system.System.draw`."""
    # The order of the draws is part of a run: another one would change its loss curve.
    stills = draw_stills(batch, config.resolution[0], images, generator)
    mirrored = draw_mirrored(batch, generator) if objective is not None and objective.flip else None
    corner = None
    if config.crop is not None:
        room = [n - c + 1 for n, c in zip(config.resolution, config.crop)]
        corner = torch.stack([torch.randint(r, (batch,), generator=generator) for r in room], dim=1)
    drawn = stills, mirrored, corner
    if rows is None:
        return AutoencoderDraws(*drawn)
    return AutoencoderDraws(*(None if t is None else t[rows.start : rows.stop] for t in drawn))


def shown_clips(config: AutoencoderConfig, video: Tensor, draws: AutoencoderDraws) -> Tensor:
    """The clips that the network sees in training: float32 ``[B, C, f, h, w]`` in [-1, 1].

    Args:
        config: the model's.
        video: uint8 ``[B, C, F, H, W]``.
        draws: for these clips, on the same device.
    """
    if draws.stills is not None:
        video = show_frames(video, draws.stills)
    if draws.mirrored is not None:
        video = mirror(video, draws.mirrored)
    if draws.corner is not None and config.crop is not None:
        video = crop(video, draws.corner, config.crop)
    return video.float() / 127.5 - 1


def crop(video: Tensor, corner: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Crops ``[B, C, f, h, w]`` of one size, from clip b at ``corner[b]``; without reading from the device.

    Args:
        video: ``[B, C, F, H, W]``, any dtype.
        corner: int64 ``[B, 3]``: first frame, row and column, on the same device.
        size: frames, height, width of the crops.
    """
    f, h, w = (corner[:, axis, None] + torch.arange(n, device=corner.device) for axis, n in enumerate(size))
    clip = torch.arange(len(video), device=corner.device)[:, None, None, None]
    cropped = video.movedim(1, -1)[clip, f[:, :, None, None], h[:, None, :, None], w[:, None, None, :]]
    return cropped.movedim(-1, 1)


def reconstruction_losses(config: AutoencoderConfig, out: Tensor, x: Tensor) -> dict[str, Tensor]:
    """The weighted losses by name, ``[B]`` each.

    ``pixel``: mean squared error (LVDM eq. 1) or mean absolute error (the released code). ``perceptual``: distance of
    the frames by the network that the user gave. Without one ``edges`` takes its place, which is a substitute and no
    perceptual distance: the mean absolute error of the differences between neighbors along height and width. It too
    punishes blur more than the pixels' error does.

    Args:
        config: which losses.
        out, x: reconstructions and clips, ``[B, C, F, H, W]``.
    """
    axes = (1, 2, 3, 4)
    error = out - x
    losses = {"pixel": (error.square() if config.pixel_loss == "l2" else error.abs()).mean(axes)}
    if config.perceptual_file:
        network = perceptual_network(config.perceptual_file, config.perceptual_sha256, x.device)
        losses["perceptual"] = config.perceptual_weight * network(out, x)
    elif config.edge_weight:
        # The difference of errors is the error of differences.
        edges = error.diff(dim=3).abs().mean(axes) + error.diff(dim=4).abs().mean(axes)
        losses["edges"] = config.edge_weight * edges
    return losses
