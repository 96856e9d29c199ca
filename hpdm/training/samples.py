"""Contact sheets of samples during training: the same seeds each time, labeled, with a real clip below them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpdm import distributed
from hpdm.data.mixture import Mixture
from hpdm.sampling import SamplerOptions
from hpdm.system import System
from hpdm.text import EmbeddingStore, collate_text
from hpdm.video import to_uint8, write_contact_sheet

GRID_VIDEOS = 8
"""Largest number of samples on a sheet."""
SHEET_WIDTH = 128
"""Narrower videos are enlarged."""


class SampleGrid:
    """Samples of a run, one per class, or per caption, or some without either.

    Args:
        system: kind of the model.
        config: the model's.
        clips: the training clips; they give the names of classes, captions and the real clip.
        embeddings: of the captions, for a model with text.
        prompts: captions to sample, all in ``embeddings``; captions of clips spread evenly over the set if empty.
        steps: sampling steps on level 0.
        preset: of the run; it may suggest how to sample otherwise.

    Raises:
        ValueError: prompts for a model without text, or prompts that the embeddings lack.
    """

    def __init__(
        self,
        system: System,
        config: Any,
        clips: Mixture,
        embeddings: EmbeddingStore | None,
        prompts: Sequence[str],
        steps: int,
        preset: str,
    ) -> None:
        self.system, self.clips, self.embeddings = system, clips, embeddings
        self.kind = config.conditioning
        if prompts and (self.kind != "text" or embeddings is None):
            raise ValueError(f"sample_prompts: got {len(prompts)}, expected none for a model without text")
        if embeddings is not None:
            lacking = embeddings.missing(prompts)
            if lacking:
                raise ValueError(
                    f"sample_prompts: {embeddings.folder} has no embedding of {lacking[0]!r}, expected captions that "
                    "`hpdm data embed` has seen"
                )
        suggested = {**system.sampler_defaults(config, preset), "steps": steps, "overlap": "none"}
        self.options = replace(SamplerOptions(), **suggested)
        self.names: list[str] = []
        """What each sample shows: class names or captions; empty without conditioning."""
        if self.kind == "text":
            self.names = list(prompts) or _captions(clips, GRID_VIDEOS // 2)
        elif self.kind == "class":
            self.names = clips.class_names[:GRID_VIDEOS]
        self._real: tuple[Tensor, str] | None = None

    def write(self, model: nn.Module, step: int, path: Path) -> None:
        """Samples and writes the sheet, a PNG. A collective: the ranks share the tiles.

        Args:
            model: with all weights whole, in eval mode.
            step: for the labels.
            path: the file, whose folder is made if it is missing.
        """
        count = len(self.names) or GRID_VIDEOS // 2
        with torch.no_grad():
            videos = self.system.sampler(model, self.options)(range(count), *self._conditioning(count))[-1]
        with distributed.raise_on_all_ranks():
            if distributed.is_first():
                rows = list(to_uint8(videos))
                labels = [f"step {step}, seed {seed}{_after_comma(self.names, seed)}" for seed in range(count)]
                real, name = self._real_clip()
                path.parent.mkdir(parents=True, exist_ok=True)
                scale = max(1, SHEET_WIDTH // real.shape[-1])
                labels.append(f"real{_after_comma([name], 0)}")
                write_contact_sheet(path, [*rows, real], labels=labels, scale=scale)

    def _conditioning(self, count: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Labels, texts and their mask for the sampler."""
        if self.kind == "class":
            return torch.arange(count), None, None
        if self.kind == "text" and self.embeddings is not None:
            return None, *collate_text([self.embeddings[caption] for caption in self.names])
        return None, None, None

    def _real_clip(self) -> tuple[Tensor, str]:
        """A clip of the first class or caption on the sheet, uint8 ``[3, F, H, W]``, and its class or caption."""
        if self._real is None:
            files = self.clips.files
            number = 0
            if self.kind == "class":
                number = next((n for n, file in enumerate(files) if file.label == 0), 0)
            elif self.kind == "text":
                number = next((n for n, file in enumerate(files) if file.caption == self.names[0]), 0)
            item = self.clips.with_video(number)
            name = self.clips.class_names[item["label"]] if self.kind == "class" else item["caption"]
            self._real = item["video"], name
        return self._real


def _captions(clips: Mixture, count: int) -> list[str]:
    """Different captions of clips spread evenly over the set."""
    captions = list(dict.fromkeys(file.caption for file in clips.files))
    count = min(count, len(captions))
    return [captions[i * len(captions) // count] for i in range(count)]


def _after_comma(names: Sequence[str], number: int) -> str:
    return f", {names[number]}" if number < len(names) and names[number] else ""
