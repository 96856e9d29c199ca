"""Known frames: some frames of a clip are given, and the others are predicted to go with them.

Every frame of tokens has a diffusion time of its own. Where it differs from the time of the clip, the network is told
(:class:`FrameTimes`), and may copy from known frames (:class:`FrameCopies`); where no frame differs, nothing changes.
There are two uses:

- A frame is *known*: its time is a small one, so it is shown almost clean. It is not trained. Its little noise stands
  for the errors that known frames have when they were sampled themselves: conditional latent perturbation of Latent
  Video Diffusion Models (He et al. 2022, section 3.3).
- The times of the frames rise from the first, or the first that is not known, to the last: a *rolling* clip (Ruhe et
  al. 2024), which moves on by one frame as the first one is finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hpdm.objective import Objective
from hpdm.process import DATA_STD, gamma, noised_std
from hpdm.sinusoids import NOISE_FREQUENCIES, noise_frequencies

NOT_TRAINED = "the model was trained without known frames; train it on with --init and --known-frames"
"""For messages about a model that should know frames."""

EXACTLY_CLEAN = 0.25
"""Share of the clips with known frames whose known frames have no noise at all."""


SIMILAR = (1 / 32, 1 / 16, 1 / 8, 1 / 4)
"""Distances of pixels in [-1, 1] at which two tokens count as similar, more or less: about 4 to 32 levels of 255."""


class FrameTimes(nn.Module):
    """Tells tokens the diffusion time of their own frame where it differs from that of the clip, and what is known.

    A frame gets the embedding of its time; the other frames get the pixels of the nearest known one at their own place,
    as image-to-video models do with their image (Blattmann et al. 2023), so that what stands still need not go through
    the whole network.

    Both maps start as zero: a model that gets them behaves as before until it is trained.

    Args:
        width: of the tokens, D.
        pixels: numbers of a token, P.
    """

    def __init__(self, width: int, pixels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(NOISE_FREQUENCIES, width)
        self.nearest = nn.Linear(pixels, width, bias=False)
        self.initialize()

    def initialize(self) -> None:
        """Sets both maps to zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, t: Tensor, frame_t: Tensor, pixels: Tensor) -> Tensor:
        """Tells B patches of one level; all tensors are floating point.

        Args:
            tokens: ``[B, N, D]``, frame after frame.
            t: times of the patches, ``[B]``.
            frame_t: times of their frames, ``[B, F]``.
            pixels: what the tokens are made of, ``[B, F, N / F, P]``.

        Returns:
            ``[B, N, D]``.
        """
        told = self.linear(noise_frequencies(frame_t).to(self.linear.weight.dtype))  # [B, F, D]
        told = told * (frame_t != t[:, None])[..., None]
        index, sees = seen_frames(t, frame_t)
        shown = self.nearest(_frames_at(pixels, index)) * sees[..., None, None]  # [B, F, N / F, D]
        return (tokens.unflatten(1, (frame_t.shape[1], -1)) + (told[:, :, None] + shown)).flatten(1, 2)


class FrameCopies(nn.Module):
    """Lets what stands still be copied from the nearest known frame: a share of the predicted clean video is taken from
    there, at the same place.

    The network's ``v`` becomes ``v - a (y' - y^)``, where ``y^`` is the clean frame that v means and ``y'`` the nearest
    known frame. So ``y^`` becomes ``y^ + a sqrt(1-g) (y' - y^)``: frames are left alone that show nearly everything
    themselves. The share ``a`` of every number is a linear map of its token, and of how similar the token's part of
    ``y^`` is to that of ``y'`` already.

    Masks of what to copy are as old as video prediction (Finn et al. 2016). Without them the small error of a still
    background in one window is what the next window goes on from, and they add up.

    The map starts as zero, so a model that gets it behaves as before until it is trained.

    Args:
        width: of the tokens, D.
        pixels: numbers of a token, P.
    """

    def __init__(self, width: int, pixels: int) -> None:
        super().__init__()
        self.share = nn.Linear(width + len(SIMILAR), pixels)
        self.initialize()

    def initialize(self) -> None:
        """Sets the map to zero: nothing is copied."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, v: Tensor, tokens: Tensor, x: Tensor, t: Tensor, frame_t: Tensor, signal: float) -> Tensor:
        """Corrects v of B patches of one level, of which N tokens make F frames; all tensors are floating point.

        Args:
            v: as the network predicts it, ``[B, F, N / F, P]``.
            tokens: what v was made of, ``[B, F, N / F, D]``.
            x: the network's input, ``[B, F, N / F, P]``.
            t: times of the patches, ``[B]``.
            frame_t: times of their frames, ``[B, F]``.
            signal: scale b of the level's signal.

        Returns:
            ``[B, F, N / F, P]``.
        """
        index, sees = seen_frames(t, frame_t)
        g, std = gamma(frame_t)[..., None, None], noised_std(frame_t, signal)[..., None, None]  # [B, F, 1, 1]
        noised = x * std
        predicted = g.sqrt() * noised - (1 - g).sqrt() * v
        # Of a known frame with noise the best linear guess, pixel by pixel.
        known = noised * g.sqrt() * (signal * DATA_STD / std) ** 2
        missing = _frames_at(known, index) - predicted
        distance = missing.detach().square().mean(dim=-1, keepdim=True).sqrt() / signal  # [B, F, N / F, 1]
        similar = torch.cat([(-(distance / scale).square()).exp() for scale in SIMILAR], dim=-1).to(tokens.dtype)
        share = self.share(torch.cat((tokens, similar), dim=-1))
        return v - share * missing * sees[..., None, None]


def seen_frames(t: Tensor, frame_t: Tensor) -> tuple[Tensor, Tensor]:
    """Which known frame every frame is shown, and which frames are shown one, int64 and bool ``[B, F]``.

    Known are the frames whose time differs from that of the patch, ``t [B]``; where several times differ, as in a
    rolling clip, the cleanest of them. Known frames are shown none.
    """
    differs = frame_t != t[:, None]  # [B, F]
    known = differs & (frame_t == torch.where(differs, frame_t, torch.inf).amin(dim=1, keepdim=True))
    index, exists = nearest_known(known)
    return index, exists & ~known


def _frames_at(values: Tensor, index: Tensor) -> Tensor:
    """Frames ``index [B, F]`` of ``[B, F, ...]``."""
    return values.gather(1, index.reshape(*index.shape, *(1,) * (values.ndim - 2)).expand_as(values))


def nearest_known(known: Tensor) -> tuple[Tensor, Tensor]:
    """For each frame the number of the nearest known one, of two the earlier, and whether there is one.

    ``known`` bool ``[B, F]`` -> int64 and bool, ``[B, F]`` both.
    """
    frame = torch.arange(known.shape[1], device=known.device)
    distance = (frame[:, None] - frame).abs() + torch.where(known, 0, 2 * known.shape[1])[:, None]  # [B, F, F]
    return distance.argmin(dim=2), known.any(dim=1, keepdim=True).expand_as(known)


class FrameDraws(NamedTuple):
    """Times of the clips' frames, for B clips on n levels with F frames of tokens each."""

    t: Tensor
    """Times of the clips, ``[B, n]``: as given, but for rolling clips the time of the last frame."""
    frame_t: Tensor
    """Times of the frames, ``[B, n, F]``; that of the clip for frames that are predicted as ever."""
    predicted: Tensor
    """Frames whose error is trained, those that are not known: bool ``[B, n, F]``."""


def draw_frames(
    t: Tensor, frames: int, objective: Objective, generator: torch.Generator, finished: Tensor, *,
    rolling_levels: int = 1, spacing: int = 1,
) -> FrameDraws:  # fmt: skip
    """Draws which frames are known, on each level on its own, since samplers know others on each level.

    Known are, with the shares of ``objective``: the first frames, any number of them but all; the last frames, and any
    number of the first ones, perhaps none; or nothing. Rolling clips know any number of the first frames, but not the
    last two.

    Args:
        t: times of the clips, ``[B, n]``.
        frames: frames of tokens F, at least 2.
        objective: gives the shares, and the largest time of known frames.
        generator: CPU generator.
        finished: clips on levels that are shown finished, bool ``[B, n]``: no frame of theirs is known or rolling.
        spacing: if above 1, half of the clips on the lowest level that would know their last frames know every
            ``spacing``-th frame in their place, from the first one on.
        rolling_levels: the lowest so many levels can be rolling; the others know the first frames in its place.
    """
    kind, first, last, before, noise, clean, phase, apart = torch.rand(8, *t.shape, generator=generator)  # [B, n] each
    shares = (objective.known_first, objective.known_ends, objective.rolling)
    bounds = [sum(shares[: n + 1]) for n in range(3)]
    rolls = (kind >= bounds[1]) & (kind < bounds[2]) & ~finished
    rolls[:, rolling_levels:] = False
    knows_ends = (kind >= bounds[0]) & (kind < bounds[1])
    knows_first = (kind < bounds[2]) & ~knows_ends & ~rolls
    frame = torch.arange(frames)
    last_known = 1 + _below(last, frames - 1)  # 1 .. F - 1
    first_known = torch.where(knows_first, 1 + _below(first, frames - 1), _below(before, frames - last_known))
    first_known = torch.where(rolls, _below(first, frames - 1), first_known)  # 0 .. F - 2
    known = frame < first_known[..., None]  # [B, n, F]
    known |= knows_ends[..., None] & (frame >= frames - last_known[..., None])
    if spacing > 1:
        every = knows_ends & (apart < 0.5)
        every[:, 1:] = False
        known = torch.where(every[..., None], frame % spacing == 0, known)
    known &= ((knows_first | knows_ends | rolls) & ~finished)[..., None]
    known_t = noise * objective.known_t_max * (clean >= EXACTLY_CLEAN)  # [B, n]
    rising = frames - first_known[..., None]
    ramp = (frame - first_known[..., None] + phase[..., None]) / rising  # [B, n, F]
    t = torch.where(rolls, ramp[..., -1], t)
    frame_t = torch.where(rolls[..., None], ramp, t[..., None])
    return FrameDraws(t, torch.where(known, known_t[..., None], frame_t), ~known)


@dataclass(frozen=True)
class Known:
    """Frames of one part of B videos that are given to a sampler; it keeps them as they are."""

    video: Tensor
    """``[B, C, F, h, w]`` in [-1, 1]; frames that are not known may hold anything."""
    frames: Tensor
    """Which are known, bool ``[F]`` on the CPU."""

    @property
    def all(self) -> bool:
        """Whether all frames are known, so that there is nothing to sample."""
        return bool(self.frames.all())

    @classmethod
    def ends(cls, first: Tensor | None, last: Tensor | None, size: Sequence[int]) -> Known:
        """The first frames, the last ones, or both: ``[B, C, n, h, w]`` each, of parts of ``size`` (F, h, w)."""
        given = [part for part in (first, last) if part is not None]
        video = given[0].new_zeros(*given[0].shape[:2], *size)
        frames = torch.zeros(size[0], dtype=torch.bool)
        if first is not None:
            video[:, :, : first.shape[2]] = first
            frames[: first.shape[2]] = True
        if last is not None:
            video[:, :, size[0] - last.shape[2] :] = last
            frames[size[0] - last.shape[2] :] = True
        return cls(video, frames)


def _below(share: Tensor, bound: int | Tensor) -> Tensor:
    """Integers in 0 .. bound - 1 from uniform numbers in [0, 1)."""
    return torch.minimum((share * bound).long(), torch.as_tensor(bound - 1))


def of_pixels(frames: Tensor, per_token: int) -> Tensor:
    """A value per frame of tokens as one per frame of pixels, ``[..., F] -> [..., 1, F * per_token]``.

    The axis of size 1 stands where videos have their channels.
    """
    return frames.repeat_interleave(per_token, dim=-1)[..., None, :]


def mean_over_predicted(error: Tensor, predicted: Tensor) -> Tensor:
    """The mean error of the frames that are predicted, at least one: ``[..., f]``, bool ``[..., f]`` -> ``[...]``."""
    return (error * predicted).sum(dim=-1) / predicted.sum(dim=-1)
