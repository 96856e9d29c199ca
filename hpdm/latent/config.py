"""The config of a video autoencoder: sizes (LVDM section 3.1 and the released code), and how it is trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpdm.checks import Triple, at_least
from hpdm.json_file import checked
from hpdm.latent.discriminator import SMALLEST_SIDE

KERNEL = 4
"""Kernel of the convolutions that change the resolution, on every axis."""
ENCODER_BLOCKS, DECODER_BLOCKS = 1, 2
"""Residual blocks after every such convolution."""
MOST_PIXELS = 2**32
"""Pixels of a clip; more are taken for an error."""
MOST_STAGES = 16
"""Halvings of an axis; more are taken for an error."""
NORMS = ("frame", "clip")
PIXEL_LOSSES = ("l2", "l1")


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes and training of a video autoencoder. Triples are (frames, height, width).

    Raises:
        ValueError: a combination that cannot be built; the message names the field.
    """

    resolution: Triple = (16, 256, 256)
    """Size of a clip, multiples of ``factors``. Videos of any other size can be encoded too."""
    factors: Triple = (4, 8, 8)
    """Pixels per latent along each axis."""
    stem: Triple = (1, 1, 1)
    """Pixels that become channels of one position before the first convolution, and again pixels after the last. It
    saves the work at full resolution, which is most of the work."""
    channels: int = 3
    width: int = 32
    """Channels after the first convolution; every halving doubles them."""
    latent_channels: int = 4
    """Numbers per latent."""
    norm: str = "frame"
    """Positions over which group normalization takes its statistics: those of one "frame", which makes videos of any
    length decode alike in pieces, or of the whole "clip", as published."""
    pixel_loss: str = "l2"
    """"l2" (the paper), or "l1" (the released code)."""
    perceptual_file: str = ""
    """TorchScript file of a perceptual distance, see :mod:`hpdm.latent.perceptual`; "" for the substitute."""
    perceptual_sha256: str = ""
    """Hash of that file, so that a run does not go on with another one."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual distance; of no effect without a file."""
    edge_weight: float = 0.1
    """Weight of the substitute for a perceptual distance, the error of differences between neighboring pixels; of no
    effect with a file."""
    gan_weight: float = 0.0
    """Weight of the loss against a discriminator of single frames, times the adaptive weight, see
    :mod:`hpdm.latent.gan`; 0 for no discriminator."""
    gan_start: int = 50_001
    """The first training step with the discriminator, counted from 1; of no effect without one."""
    crop: Triple | None = None
    """Size of the random crops that training takes from clips, multiples of ``factors``; ``None`` for whole clips."""

    def __post_init__(self) -> None:
        for name in ("resolution", "factors", "stem", *(("crop",) if self.crop is not None else ())):
            object.__setattr__(self, name, _triple(name, getattr(self, name)))
        at_least(self, 1, "channels", "width", "latent_channels", "gan_start")
        at_least(self, 0, "perceptual_weight", "edge_weight")
        if math.prod(self.resolution) > MOST_PIXELS:
            raise ValueError(f"resolution: got {self.resolution}, expected clips of at most {MOST_PIXELS} pixels")
        self._check_factors()
        if self.norm not in NORMS:
            raise ValueError(f"norm: got {self.norm!r}, expected one of {NORMS}")
        if self.pixel_loss not in PIXEL_LOSSES:
            raise ValueError(f"pixel_loss: got {self.pixel_loss!r}, expected one of {PIXEL_LOSSES}")
        if not 0 <= self.gan_weight < math.inf:
            raise ValueError(f"gan_weight: got {self.gan_weight}, expected a finite number, at least 0")
        if self.gan_weight and min(self.training_size[1:]) < SMALLEST_SIDE:
            raise ValueError(
                f"gan_weight: got {self.gan_weight} with frames of {self.training_size[1:]} pixels, expected 0, or "
                f"frames of at least {SMALLEST_SIDE} on each side for the discriminator"
            )
        if bool(self.perceptual_file) != bool(self.perceptual_sha256):
            raise ValueError(
                f"perceptual_sha256: got {self.perceptual_sha256!r} with perceptual_file={self.perceptual_file!r}, "
                "expected both or neither"
            )

    def _check_factors(self) -> None:
        """Checks sizes that must fit each other."""
        if any(f % s or (f // s) & (f // s - 1) for f, s in zip(self.factors, self.stem)):
            raise ValueError(f"factors: got {self.factors}, expected stem = {self.stem} times powers of two")
        if not 1 <= len(self.strides) <= MOST_STAGES:
            raise ValueError(
                f"factors: got {self.factors} with stem = {self.stem}, expected 1 to {MOST_STAGES} halvings of an axis"
            )
        for name in ("resolution", "crop"):
            size = getattr(self, name)
            if size is not None and any(n % f for n, f in zip(size, self.factors)):
                raise ValueError(f"{name}: got {size}, expected multiples of factors = {self.factors}")
        if self.crop is not None and any(c > n for c, n in zip(self.crop, self.resolution)):
            raise ValueError(f"crop: got {self.crop}, expected at most resolution = {self.resolution}")

    @property
    def strides(self) -> tuple[Triple, ...]:
        """Stride of every stage of the encoder: 2 on the axes that still shrink."""
        f, h, w = ((f // s).bit_length() - 1 for f, s in zip(self.factors, self.stem))
        return tuple((1 + (i < f), 1 + (i < h), 1 + (i < w)) for i in range(max(f, h, w)))

    @property
    def latent_grid(self) -> Triple:
        """Latents of a clip per axis."""
        f, h, w = (n // factor for n, factor in zip(self.resolution, self.factors))
        return (f, h, w)

    @property
    def training_size(self) -> Triple:
        """What the network sees of a clip in training."""
        return self.crop or self.resolution

    @property
    def conditioning(self) -> str:
        """Always ``"none"``: labels and texts are of no use to an autoencoder."""
        return "none"

    @property
    def classes(self) -> int:
        """Always 1, as of any model without classes."""
        return 1

    @property
    def text_width(self) -> int:
        """Always 1, as of any model without text."""
        return 1

    @property
    def conditioning_dropout(self) -> float:
        """Always 0: there is no label to drop."""
        return 0.0

    def replace(self, **changes: Any) -> AutoencoderConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AutoencoderConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: a field that this version does not know, or a value of another type; the message names it.
        """
        return checked(values, cls, "config")


def _triple(name: str, value: Sequence[int]) -> Triple:
    if len(value) != 3 or not all(isinstance(n, int) and n >= 1 for n in value):
        raise ValueError(f"{name}: got {tuple(value)}, expected three ints >= 1 (frames, height, width)")
    f, h, w = value
    return (f, h, w)
