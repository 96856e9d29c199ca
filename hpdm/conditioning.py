"""What networks of every system do with classes and texts: checks, and samples that are shown none of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hpdm.checks import check_shape


def check_conditioning(
    config: Any, batch: int, labels: Tensor | None, text: Tensor | None, text_mask: Tensor | None
) -> None:
    """Checks the conditioning of B samples.

    Args:
        config: of a model, see :class:`hpdm.system.Config`.
        batch: B.
        labels: ``[B]``.
        text: ``[B, S, text_width]`` with at least one token.
        text_mask: ``[B, S]`` bool.

    Raises:
        TypeError: a mask that is not bool.
        ValueError: wrong shapes, conditioning of another kind than the config's, or a mask without a text.
    """
    for name, tensor, its_kind in (("labels", labels, "class"), ("text", text, "text")):
        if tensor is not None and config.conditioning != its_kind:
            raise ValueError(f"{name}: got a tensor, expected None for conditioning={config.conditioning!r}")
    if labels is not None:
        check_shape("labels", labels, (batch,))
    if text is not None:
        length = max(1, text.shape[1]) if text.ndim > 1 else 1
        check_shape("text", text, (batch, length, config.text_width))
    if text_mask is not None:
        if text is None:
            raise ValueError("text_mask: got a tensor, expected None where text is None")
        check_shape("text_mask", text_mask, tuple(text.shape[:2]))
        if text_mask.dtype is not torch.bool:
            raise TypeError(f"text_mask: got dtype {text_mask.dtype}, expected torch.bool")


def check_subjects(
    config: Any, videos: int, labels: Tensor | None, text: Tensor | None, weights: Mapping[str, float]
) -> None:
    """Checks what videos are to be sampled of.

    Args:
        config: of the model.
        videos: number of videos.
        labels: their classes, ``[videos]``, ``config.classes`` for none.
        text: their embeddings, ``[videos, S, text_width]``.
        weights: weights of guidance, by the names of the options.

    Raises:
        ValueError: no videos, labels out of range, not one text per video, or guidance without conditioning.
    """
    if videos == 0:
        raise ValueError("seeds: got none, expected at least one")
    for name, weight in weights.items():
        if weight != 1.0 and labels is None and text is None:
            raise ValueError(f"{name}: got {weight} without labels or text, expected 1")
    if labels is not None and (tuple(labels.shape) != (videos,) or labels.min() < 0 or labels.max() > config.classes):
        raise ValueError(f"labels: got {labels.tolist()}, expected {videos} in 0..{config.classes - 1}")
    if text is not None and text.shape[:1] != (videos,):
        raise ValueError(f"text: got shape {tuple(text.shape)}, expected {videos} texts, one for each seed")


def without_padding(tokens: Tensor, mask: Tensor, no_text: Tensor) -> tuple[Tensor, Tensor]:
    """Text tokens with ``no_text`` in place of padding, and which of them may be read: in a sample without text the
    first.

    ``[B, S, D]``, bool ``[B, S]`` and ``[D]`` -> ``[B, S, D]`` and bool ``[B, S]``.
    """
    first = torch.arange(mask.shape[1], device=mask.device) == 0
    visible = mask | (first & ~mask.any(dim=1, keepdim=True))  # [B, S]
    return torch.where(mask[..., None], tokens, no_text), visible


def without_dropped(
    labels: Tensor | None, text: Tensor | None, text_mask: Tensor | None, samples: Tensor, classes: int
) -> tuple[Tensor | None, Tensor | None]:
    """Labels and mask of the text, with those of some samples taken away, for guidance (conditioning dropout).

    Args:
        labels: int64 ``[B]``; ``None`` for none.
        text: ``[B, S, W]``; ``None`` for none.
        text_mask: bool ``[B, S]``; ``None``: everywhere.
        samples: which lose them, bool ``[B]``.
        classes: number of classes, which as a label stands for none.

    Returns:
        int64 ``[B]`` and bool ``[B, S]``, or ``None`` for what was not given.
    """
    if labels is not None:
        labels = labels.masked_fill(samples, classes)
    if text is not None:
        if text_mask is None:
            text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        text_mask = text_mask & ~samples[:, None]
    return labels, text_mask
