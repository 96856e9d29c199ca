"""Contact sheets of an autoencoder during training: clips and, below each, its reconstruction."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from hpdm import distributed
from hpdm.data.mixture import Mixture
from hpdm.system import System
from hpdm.training.samples import SHEET_WIDTH
from hpdm.video import to_uint8, write_contact_sheet

SHEET_CLIPS = 4
"""Largest number of clips on a sheet."""


class ReconstructionSheet:
    """The same clips each time, spread evenly over the training clips.

    Args:
        system: kind of the model, which has an autoencoder.
        clips: the training clips.
    """

    def __init__(self, system: System, clips: Mixture) -> None:
        self.system = system
        count = min(SHEET_CLIPS, len(clips))
        self.videos = torch.stack([clips[i * len(clips) // count]["video"] for i in range(count)])

    def write(self, model: nn.Module, step: int, path: Path) -> None:
        """Reconstructs on rank 0 and writes the sheet, a PNG. A collective.

        Args:
            model: whole, in eval mode.
            step: for the labels.
            path: the file, whose folder is made if it is missing.
        """
        with distributed.raise_on_all_ranks():
            if distributed.is_first():
                device = next(model.parameters()).device
                rows, labels = [], []
                for number, video in enumerate(self.videos):
                    out = self.system.reconstruct(model, video[None].to(device))[0]
                    rows += [video, to_uint8(out)]
                    labels += [f"clip {number}", f"step {step}, clip {number}, reconstruction"]
                path.parent.mkdir(parents=True, exist_ok=True)
                scale = max(1, SHEET_WIDTH // self.videos.shape[-1])
                write_contact_sheet(path, rows, labels=labels, scale=scale)
