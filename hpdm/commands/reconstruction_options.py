"""The options of ``hpdm evaluate --metrics reconstruction``."""

from __future__ import annotations

from dataclasses import dataclass

from hpdm.checks import at_least


@dataclass(frozen=True)
class ReconstructionOptions:
    """How clips are reconstructed.

    Raises:
        ValueError: a value out of range.
    """

    chunk: int | None = None
    """Reconstruction: latents along time that are coded at once, so that long clips need little memory; PSNR is also
    told of the frames at the borders of such chunks. Default: whole clips."""
    clip_frames: int | None = None
    """Reconstruction: frames of a clip. Default: those of the run."""

    def __post_init__(self) -> None:
        at_least(self, 1, "chunk", "clip_frames")
