"""The clean latents that a network predicts: guidance by class or text, known frames, and guidance by these.

LVDM section 3.3. Known frames never enter the prediction that does not know them: it sees all frames noised to the same
time (eq. 8 with a mask of zeros), and is told of no perturbation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hpdm.frames import NOT_TRAINED, Known
from hpdm.latent.objective import predict
from hpdm.latent.unet_config import UNetConfig
from hpdm.process import SCHEDULES, clean_of, mixture
from hpdm.solvers import Solver


class Conditions(NamedTuple):
    """What B clips are of."""

    labels: Tensor | None = None
    """``[B]`` int64."""
    text: Tensor | None = None
    """``[B, S, text_width]``."""
    text_mask: Tensor | None = None
    """``[B, S]`` bool, true where there is text; ``None``: everywhere."""


class KnownLatents(NamedTuple):
    """Known frames of B clips as the network sees them."""

    clean: Tensor
    """``[B, z, T, h, w]``; frames that are not known may hold anything."""
    noised: Tensor
    """The same at the time ``t``."""
    frames: Tensor
    """Which are known, bool ``[T]``, on the device of the others."""
    t: float
    """Their time: how much they are perturbed."""


def perturbed(config: UNetConfig, known: Known, t: float, noise: Tensor) -> KnownLatents:
    """Known latents with noise up to the time ``t`` (conditional latent perturbation).

    Args:
        config: the network's.
        known: its ``video`` holds latents ``[B, z, T, h, w]``.
        t: time on the network's schedule; LVDM samples with step 100 of 1000, ``schedule.time_of_step(100)``.
        noise: standard normal, of the shape and device of the latents.

    Raises:
        ValueError: a network without known frames, no frame that is known, or none that is not.
    """
    if config.known == "none":
        raise ValueError(f"known: got known frames, expected none: {NOT_TRAINED}")
    if known.all or not bool(known.frames.any()):
        raise ValueError(f"known: got {int(known.frames.sum())} of {len(known.frames)} frames, expected some, not all")
    g = float(SCHEDULES[config.schedule].gamma(torch.tensor(t, dtype=torch.float64)))
    return KnownLatents(known.video, mixture(known.video, noise, g), known.frames.to(noise.device), t)


def denoise(
    network: Callable[..., Tensor],
    config: UNetConfig,
    noised: Tensor,
    t: float,
    conditions: Conditions,
    guidance: float = 1.0,
    known: KnownLatents | None = None,
    frame_guidance: float = 0.0,
    sparse: bool = False,
) -> Tensor:
    """Predicts the clean latents of noised ones, ``[B, z, T, h, w]`` both; known frames come out as they are.

    With guidance the network is called once with all that it needs: rows with condition and known frames, those without
    known frames, and those without condition, as far as there are any.

    Args:
        network: a :class:`hpdm.latent.unet.FactorizedUNet`.
        config: the network's.
        noised: ``x~`` of :mod:`hpdm.process`; it is not changed.
        t: diffusion time.
        conditions: labels or texts of the clips.
        guidance: weight of the prediction with condition, ``g y + (1 - g) y'``; 1 is none.
        known: known frames; ``None`` for none.
        frame_guidance: w of ``(1 + w) y - w y'``, where ``y'`` is predicted without known frames (LVDM eq. 9); 0 is
            none.
        sparse: whether the frames are far apart, for a network with a spacing.

    Raises:
        ValueError: guidance without labels and text.
    """
    if guidance != 1.0 and conditions.labels is None and conditions.text is None:
        raise ValueError(f"guidance: got {guidance} without labels or text, expected 1")
    batch, frames = len(noised), noised.shape[2]
    unconditional, unaware = guidance != 1.0, known is not None and frame_guidance != 0.0
    same = torch.full((batch, frames), t, dtype=noised.dtype, device=noised.device)  # times of frames
    shown, frame_t = noised, same
    if known is not None:
        is_known = known.frames[:, None, None]  # [T, 1, 1]
        shown = torch.where(is_known, known.noised, noised)
        frame_t = same.masked_fill(known.frames, known.t)
    inputs = [shown] + [noised] * unaware + [shown] * unconditional
    times = [frame_t] + [same] * unaware + [frame_t] * unconditional
    copies = len(inputs)
    said = predict(
        network,
        torch.cat(inputs),
        same[:, 0].repeat(copies),
        *_rows(config, conditions, copies - unconditional, unconditional),
        None if config.known == "none" else torch.cat(times),
        torch.ones(copies * batch, dtype=torch.bool, device=noised.device) if sparse else None,
    ).chunk(copies)
    guided = torch.lerp(said[-1], said[0], guidance) if unconditional else said[0]
    if unaware:
        guided = guided + frame_guidance * (said[0] - said[1])
    g = float(SCHEDULES[config.schedule].gamma(torch.tensor(t, dtype=torch.float64)))
    y = clean_of(guided, noised, g, config.prediction)
    return y if known is None else torch.where(known.frames[:, None, None], known.clean, y)


@torch.no_grad()
def sample(
    network: Callable[..., Tensor],
    config: UNetConfig,
    solver: Solver,
    noise: Callable[[], Tensor],
    conditions: Conditions,
    guidance: float | Callable[[float], float] = 1.0,
    known: KnownLatents | None = None,
    frame_guidance: float = 0.0,
    called: Callable[[], None] | None = None,
    sparse: bool = False,
) -> Tensor:
    """Samples one clip of latents per row of the noise, ``[B, z, T, h, w]``; known frames come out as they are.

    Args:
        network, config, conditions, known, frame_guidance, sparse: as of :func:`denoise`.
        solver: its noise levels are of the network's schedule (:func:`hpdm.solvers.noise_levels`).
        noise: draws standard normal noise ``[B, z, T, h, w]`` on the network's device.
        guidance: as of :func:`denoise`, or what gives it for a noise level sigma.
        called: called after every network call.
    """
    schedule = SCHEDULES[config.schedule]

    def update(x: Tensor, sigma: float, base: Tensor, alpha: float, beta: float) -> Tensor:
        t = float(schedule.time_of_sigma(torch.tensor(sigma, dtype=torch.float64)))
        noised = x / math.hypot(1.0, sigma)
        weight = guidance(sigma) if callable(guidance) else guidance
        y = denoise(network, config, noised, t, conditions, weight, known, frame_guidance, sparse)
        if called is not None:
            called()
        return alpha * base + beta * y

    y = solver.solve(update, noise)
    return y if known is None else torch.where(known.frames[:, None, None], known.clean, y)


def _rows(config: UNetConfig, conditions: Conditions, conditional: int, unconditional: int) -> Conditions:
    """The conditions of a network call: so many copies of the clips' own, and then so many without."""
    labels, text, mask = conditions
    copies = conditional + unconditional
    if labels is not None:
        none = torch.full_like(labels, config.classes)
        labels = torch.cat([labels] * conditional + [none] * unconditional)
    if text is not None:
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask
        mask = torch.cat([mask] * conditional + [torch.zeros_like(mask)] * unconditional)
        text = text.repeat(copies, 1, 1)
    return Conditions(labels, text, mask)
