"""Configs of LVDM's U-Nets, and of a tiny one that trains on a CPU core."""

from __future__ import annotations

from collections.abc import Callable

from hpdm.latent.unet_config import UNetConfig

PUBLISHED_PARAMETERS = {"lvdm_ucf": 418e6}
"""LVDM Table 2, without the autoencoder."""


def lvdm_ucf() -> UNetConfig:
    """LVDM for clips of 16x256x256, as large as the paper says.

    The paper gives the number of parameters alone. This is the network with as many (418.1 M) whose sizes are plain
    ones: two residual blocks on each level and attention on all levels.
    """
    return UNetConfig()


def lvdm_released() -> UNetConfig:
    """The network of the released configs, which is larger (548.9 M): three blocks, no attention on the first level."""
    return UNetConfig(blocks=3, attention=(2, 4, 8))


def lvdm_predict() -> UNetConfig:
    """The released network that predicts frames after known ones: clips of four latent frames, 16 frames apart."""
    return lvdm_released().replace(known="mask")


def lvdm_interpolate() -> UNetConfig:
    """The released network that predicts the three latent frames between two that are known."""
    return lvdm_released().replace(latent=(5, 32, 32), known="mask")


def lvdm_tiny() -> UNetConfig:
    """A network of 0.9 M parameters for the latents of 16x64x64 clips, which learns on a CPU core."""
    return UNetConfig(
        latent=(4, 8, 8), width=32, multipliers=(1, 2), blocks=1, attention=(1, 2), groups=8, norm="frame",
        conditioning="class", classes=6, known="times", schedule="cosine", prediction="v",
    )  # fmt: skip


UNETS: dict[str, Callable[[], UNetConfig]] = {
    f.__name__: f for f in (lvdm_ucf, lvdm_released, lvdm_predict, lvdm_interpolate, lvdm_tiny)
}
