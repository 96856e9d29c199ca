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
    tile: tuple[int, int] | None = None
    """Reconstruction: height and width in latents of tiles that are coded one by one and blended, for frames that do
    not fit in memory. Default: whole frames."""
    tile_overlap: int | None = None
    """Reconstruction: overlap of tiles in latents. Default: a quarter of the tile's shorter side."""
    clip_frames: int | None = None
    """Reconstruction: frames of a clip. Default: those of the run."""

    def __post_init__(self) -> None:
        at_least(self, 1, "chunk", "clip_frames")
        if self.tile is not None and min(self.tile) < 1:
            raise ValueError(f"tile: got {self.tile}, expected at least 1 latent on both axes")
        if self.tile_overlap is not None and (self.tile is None or not 0 <= self.tile_overlap < min(self.tile)):
            raise ValueError(f"tile_overlap: got {self.tile_overlap}, expected 0 or more and less than the tile")
