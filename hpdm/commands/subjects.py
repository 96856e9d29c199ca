"""The class or prompt of each video that ``hpdm sample`` writes, and the sampler's arguments for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpdm.printable import as_file_name
from hpdm.text import EmbeddingStore, TextEncoder, collate_text

STEM_LENGTH = 48
"""Most characters of a prompt in a file's name. File systems limit names in bytes, and a character has up to four."""


@dataclass(frozen=True)
class Subject:
    """The class or the prompt of one video."""

    caption: str
    """Name of the class, the prompt, or "video" without either."""
    stem: str
    """The caption in a form for file names."""
    label: int | None = None
    """Number of the class; ``None`` for a prompt or a model without classes."""
    text: Tensor | None = None
    """Embedding of the prompt, ``[S, W]``."""


def subjects_of_classes(classes: Sequence[str], names: Sequence[str], count: int) -> list[Subject]:
    """The subjects of ``count`` videos, by class.

    Args:
        classes: names or numbers of classes, taken in turn; all classes in turn if empty.
        names: the run's classes; empty for a run without classes, whose videos all have the caption "video".
        count: number of videos.

    Raises:
        ValueError: a class that the run does not have.
    """
    numbers = []
    for name in classes:
        if name in names:
            numbers.append(names.index(name))
        elif name.isdecimal() and int(name) < len(names):
            numbers.append(int(name))
        else:
            raise ValueError(
                f"classes: got {name!r}, expected one of {', '.join(names) or 'none (the run has no classes)'}"
            )
    numbers = numbers or list(range(len(names)))
    if not numbers:
        return [Subject("video", "video")] * count
    chosen = [numbers[i % len(numbers)] for i in range(count)]
    return [Subject(names[n], as_file_name(names[n]), label=n) for n in chosen]


def subjects_of_prompts(prompts: Sequence[str], texts: Sequence[Tensor], count: int) -> list[Subject]:
    """The subjects of ``count`` videos: the prompts in turn, with their embeddings."""
    subjects = [Subject(prompt, stem_of(prompt), text=text) for prompt, text in zip(prompts, texts)]
    return [subjects[i % len(subjects)] for i in range(count)]


def embed_prompts(
    prompts: Sequence[str], width: int, encoder: str | None, embeddings: Path | None, device: torch.device
) -> list[Tensor]:
    """Embeddings of the prompts, each ``[S_i, width]`` on the CPU, from an encoder or from a store.

    Raises:
        ImportError, OSError, ValueError: as :class:`~hpdm.text.TextEncoder` and
            :class:`~hpdm.text.EmbeddingStore`; embeddings of another width;
            neither encoder nor store.
    """
    if encoder is not None:
        loaded = TextEncoder(encoder, device=device)
        if loaded.info.width != width:
            raise ValueError(f"encoder: {encoder} has width {loaded.info.width}, expected config.text_width = {width}")
        return loaded(prompts)
    if embeddings is not None:
        store = EmbeddingStore(embeddings, width)
        return [store[prompt] for prompt in prompts]
    raise ValueError("prompts: got neither encoder nor embeddings, expected one of them")


def conditions(subjects: Sequence[Subject]) -> dict[str, Any]:
    """Arguments for :class:`hpdm.patch.sampler.Sampler`, for one video of each subject."""
    labels = [subject.label for subject in subjects if subject.label is not None]
    texts = [subject.text for subject in subjects if subject.text is not None]
    if texts:
        return dict(zip(("text", "text_mask"), collate_text(texts)))
    return {"labels": torch.tensor(labels)} if labels else {}


def stem_of(prompt: str) -> str:
    """The words of a prompt for a file's name, cut after a whole word: ``"A red disc!" -> "a-red-disc"``."""
    stem = "-".join(re.findall(r"\w+", prompt.lower()))
    if len(stem) > STEM_LENGTH:
        stem = stem[: STEM_LENGTH + 1].rpartition("-")[0] or stem[:STEM_LENGTH]
    return stem or "no-text"
