"""The config of the U-Net of latent video diffusion: sizes (LVDM section 3.2 and the released code) and its process."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, get_args

from hpdm.checks import Triple, at_least
from hpdm.json_file import checked
from hpdm.process import SCHEDULES, Prediction

CONDITIONINGS = ("none", "class", "text")
KNOWN = ("none", "mask", "times")
NORMS = ("frame", "clip")
MOST_LEVELS = 16
"""Levels of the U-Net; more are taken for an error."""
MOST_BLOCKS = 1024
"""Residual blocks on the way down; more are taken for an error."""
MOST_LATENTS = 2**32
"""Numbers of a clip of latents; more are taken for an error."""


@dataclass(frozen=True)
class UNetConfig:
    """Sizes and variants of a factorized space-time U-Net on latents. Triples are (frames, height, width).

    Raises:
        ValueError: a combination that cannot be built; the message names the field.
    """

    latent: Triple = (4, 32, 32)
    """Latents of a clip per axis. The network takes other sizes too; relative positions of frames that are farther
    apart than in such a clip count as the farthest ones."""
    channels: int = 4
    """Numbers per latent z."""
    width: int = 256
    """Channels on the first level."""
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    """Channels on each level, in multiples of ``width``. Each level has half the height and width of the one before."""
    blocks: int = 2
    """Residual blocks on each level; one more on the way up."""
    attention: tuple[int, ...] = (1, 2, 4, 8)
    """Factors by which height and width are smaller on the levels that have attention."""
    heads: int = 4
    """Of every attention."""
    groups: int = 32
    """Of every group normalization."""
    norm: str = "clip"
    """Positions over which the normalization of residual blocks and of the output takes its statistics: those of the
    whole "clip", as published, or of one "frame". Then frames are related by attention alone."""
    conditioning: str = "none"
    """"none", "class" (labels) or "text" (text embeddings)."""
    classes: int = 101
    text_width: int = 1024
    """Width of the text encoder's embeddings."""
    conditioning_dropout: float = 0.1
    """Probability that a training sample has no label or text, for guidance."""
    known: str = "none"
    """How the network is told which frames are known: not at all; by a "mask" and one noise level of all known frames
    (LVDM section 3.3); or by "times", one for each frame (:mod:`hpdm.frames`)."""
    spacing: int = 1
    """Latent frames from one to the next in clips of frames that are far apart, which the network then knows besides
    its own clips (LVDM section 3.4); a divisor of ``latent[0] - 1``. 1 for none."""
    schedule: str = "linear"
    """Noise schedule, one of :data:`hpdm.process.SCHEDULES`."""
    prediction: Prediction = "eps"
    """What the network predicts: "eps" (LVDM eq. 7) or "v"."""

    def __post_init__(self) -> None:
        for name in ("latent", "multipliers", "attention"):
            value = tuple(getattr(self, name))
            if not all(type(n) is int and n >= 1 for n in value):
                raise ValueError(f"{name}: got {value}, expected ints >= 1")
            object.__setattr__(self, name, value)
        at_least(self, 1, "channels", "width", "blocks", "heads", "groups", "classes", "text_width")
        self._check_sizes()
        for name, choices in (
            ("norm", NORMS), ("conditioning", CONDITIONINGS), ("known", KNOWN), ("schedule", tuple(SCHEDULES)),
            ("prediction", get_args(Prediction)),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {choices}")
        if not 0 <= self.conditioning_dropout <= 1:
            raise ValueError(f"conditioning_dropout: got {self.conditioning_dropout}, expected a probability")
        if self.known != "none" and self.latent[0] < 2:
            raise ValueError(
                f"known: got {self.known!r} for clips of {self.latent[0]} latent frame, expected at least 2: a known "
                "one and one to predict"
            )
        if self.spacing < 1 or (self.spacing > 1 and (self.latent[0] - 1) % self.spacing):
            raise ValueError(f"spacing: got {self.spacing}, expected 1 or a divisor of {self.latent[0] - 1}")
        if self.spacing > 1 and self.known == "none":
            raise ValueError(f"known: got 'none' with spacing={self.spacing}, expected 'mask' or 'times'")

    def _check_sizes(self) -> None:
        """Checks sizes that must fit each other, and what would take all of the memory."""
        if len(self.latent) != 3:
            raise ValueError(f"latent: got {self.latent}, expected three ints (frames, height, width)")
        levels = len(self.multipliers)
        if not 1 <= levels <= MOST_LEVELS or levels * self.blocks > MOST_BLOCKS:
            raise ValueError(
                f"multipliers: got {levels} levels of {self.blocks} blocks, expected 1 to {MOST_LEVELS} levels and at "
                f"most {MOST_BLOCKS} blocks"
            )
        if math.prod(self.latent) * self.channels > MOST_LATENTS:
            raise ValueError(f"latent: got {self.latent}, expected clips of at most {MOST_LATENTS} numbers")
        if any(n % self.smallest for n in self.latent[1:]):
            raise ValueError(
                f"latent: got {self.latent}, expected a height and width that are multiples of {self.smallest}, for "
                f"{levels} levels"
            )
        if not set(self.attention) <= set(self.factors):
            raise ValueError(f"attention: got {self.attention}, expected some of {self.factors}")
        for width in self.widths:
            if width % self.groups or width % self.heads:
                raise ValueError(
                    f"width: got a level of {width} channels, expected a multiple of groups = {self.groups} and of "
                    f"heads = {self.heads}"
                )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level."""
        return tuple(self.width * n for n in self.multipliers)

    @property
    def factors(self) -> tuple[int, ...]:
        """Factors by which height and width are smaller on every level."""
        return tuple(2**level for level in range(len(self.multipliers)))

    @property
    def smallest(self) -> int:
        """The factor of the last level: heights and widths of latents are multiples of it."""
        return self.factors[-1]

    @property
    def farthest(self) -> int:
        """The largest distance of two frames of a clip, beyond which relative positions are the same."""
        return self.latent[0] - 1

    @property
    def vector_width(self) -> int:
        """Width of the vector that conditions the residual blocks."""
        return 4 * self.width

    def replace(self, **changes: Any) -> UNetConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> UNetConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: a field that this version does not know, or a value of another type; the message names it.
        """
        return checked(values, cls, "config")
