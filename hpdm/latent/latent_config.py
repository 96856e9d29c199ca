"""The config of latent video diffusion: a U-Net and the autoencoder whose latents it samples."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from hpdm.checks import Triple
from hpdm.json_file import checked
from hpdm.latent.config import AutoencoderConfig
from hpdm.latent.unet_config import UNetConfig

LOSSES = ("l2", "l1")


@dataclass(frozen=True)
class LatentConfig:
    """A U-Net on the latents of an autoencoder.

    Raises:
        ValueError: latents of other channels than the autoencoder's, or an unknown loss.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    autoencoder_hash: str = ""
    """Hash of the autoencoder's weights, see :func:`hpdm.latent.latent_model.hash_of_autoencoder`; "" before there are
    any, as in a preset."""
    loss: str = "l2"
    """Error of what the network predicts: "l2" (LVDM eq. 7), or "l1" (the released configs)."""

    def __post_init__(self) -> None:
        if self.unet.channels != self.autoencoder.latent_channels:
            raise ValueError(
                f"autoencoder: got latents of {self.autoencoder.latent_channels} channels, expected "
                f"{self.unet.channels}, which is what the U-Net is for"
            )
        if self.unet.spacing > 1 and self.autoencoder.norm != "frame":
            raise ValueError(
                f"spacing: got {self.unet.spacing} with an autoencoder of norm={self.autoencoder.norm!r}, expected "
                "norm='frame': latents far apart are those of a longer clip than it was trained on"
            )
        if self.loss not in LOSSES:
            raise ValueError(f"loss: got {self.loss!r}, expected one of {LOSSES}")

    @property
    def resolution(self) -> Triple:
        """Frames, height and width of a clip."""
        f, h, w = (n * factor for n, factor in zip(self.unet.latent, self.autoencoder.factors))
        return (f, h, w)

    @property
    def channels(self) -> int:
        """Channels of a pixel."""
        return self.autoencoder.channels

    @property
    def conditioning(self) -> str:
        """Of the U-Net."""
        return self.unet.conditioning

    @property
    def classes(self) -> int:
        """Of the U-Net."""
        return self.unet.classes

    @property
    def text_width(self) -> int:
        """Of the U-Net."""
        return self.unet.text_width

    @property
    def conditioning_dropout(self) -> float:
        """Of the U-Net."""
        return self.unet.conditioning_dropout

    @property
    def known_frames(self) -> bool:
        """Whether some frames of a clip can be given."""
        return self.unet.known != "none"

    @property
    def clip_frames(self) -> int:
        """Frames of a training clip: more than ``resolution[0]`` with latents that are far apart."""
        latents = (self.unet.latent[0] - 1) * self.unet.spacing + 1
        return latents * self.autoencoder.factors[0]

    def with_resolution(self, resolution: Triple) -> LatentConfig:
        """A copy for clips of another size.

        Raises:
            ValueError: a size that is no multiple of the autoencoder's factors, or whose latents the U-Net cannot halve
                as often as it does.
        """
        if any(n % factor for n, factor in zip(resolution, self.autoencoder.factors)):
            raise ValueError(
                f"resolution: got {resolution}, expected multiples of {self.autoencoder.factors}, the pixels per latent"
            )
        f, h, w = (n // factor for n, factor in zip(resolution, self.autoencoder.factors))
        return self.replace_unet(latent=(f, h, w))

    def replace_unet(self, **changes: Any) -> LatentConfig:
        """A copy with some fields of the U-Net changed, validated again."""
        return self.replace(unet=self.unet.replace(**changes))

    def replace(self, **changes: Any) -> LatentConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LatentConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: a field that this version does not know, or a value of another type; the message names it.
        """
        return checked(values, cls, "config")
