"""The video autoencoder as a :class:`~hpdm.system.System`: how the shared parts of the library use it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hpdm.checks import Triple
from hpdm.latent import coding
from hpdm.latent.autoencoder import VideoAutoencoder
from hpdm.latent.config import AutoencoderConfig
from hpdm.latent.gan import Discriminating
from hpdm.latent.losses import AutoencoderDraws, draw, reconstruction_losses, shown_clips
from hpdm.latent.perceptual import checked_file
from hpdm.latent.presets import PRESETS, PUBLISHED_PARAMETERS, RECIPES
from hpdm.latent.statistics import measure_latents
from hpdm.long_video import LongOptions
from hpdm.objective import Context, Objective
from hpdm.opponent import Opponent
from hpdm.psnr import psnr
from hpdm.sampling import Sampler, SamplerOptions
from hpdm.system import Architecture, System


class Autoencoding(System):
    """The video autoencoder of latent video diffusion (LVDM)."""

    name = "autoencoder"
    generates = False
    presets = PRESETS
    recipes = RECIPES
    published_parameters = PUBLISHED_PARAMETERS
    objective_settings = ("flip", "draws")
    parameter_parts = (("encoder", "encoder."), ("decoder", "decoder."), ("maps of the latents", ""))

    def config_from_dict(self, values: dict[str, Any]) -> AutoencoderConfig:
        return AutoencoderConfig.from_dict(values)

    def build(self, config: AutoencoderConfig, kernels: str = "auto", recompute: str = "none") -> VideoAutoencoder:
        return VideoAutoencoder(config, kernels, recompute)

    def configure(self, config: AutoencoderConfig, changes: Architecture) -> AutoencoderConfig:
        """``config`` with another clip size, normalization, crop or loss.

        Raises:
            FileNotFoundError: no file of a perceptual distance.
            ValueError: a change that an autoencoder does not have, or a value that does not fit.
        """
        changes.check_only(
            "resolution", "norm", "crop", "loss", "perceptual", "perceptual_weight", "edge_weight", "gan_weight",
            "gan_start",
        )  # fmt: skip
        values: dict[str, Any] = {
            "resolution": changes.resolution, "norm": changes.norm, "crop": changes.crop, "pixel_loss": changes.loss,
            "edge_weight": changes.edge_weight, "perceptual_weight": changes.perceptual_weight,
            "gan_weight": changes.gan_weight, "gan_start": changes.gan_start,
        }  # fmt: skip
        if changes.gan_start is not None and not (changes.gan_weight or config.gan_weight):
            raise ValueError(f"gan_start: got {changes.gan_start} without gan_weight, expected a weight with it")
        if changes.perceptual is None and changes.perceptual_weight is not None:
            raise ValueError(
                f"perceptual_weight: got {changes.perceptual_weight} without perceptual, expected its file with it"
            )
        if changes.perceptual is not None:
            if changes.edge_weight is not None:
                raise ValueError(
                    f"edge_weight: got {changes.edge_weight} with perceptual, expected none: it weights a substitute"
                )
            path = changes.perceptual.absolute()
            values |= {"perceptual_file": str(path), "perceptual_sha256": checked_file(path)}
        return config.replace(**{name: value for name, value in values.items() if value is not None})

    def condition(self, config: AutoencoderConfig, classes: int, text_width: int | None) -> AutoencoderConfig:
        """``config`` as it is: classes do not matter."""
        if text_width is not None:
            raise ValueError("embeddings: got some, expected none: an autoencoder is not conditioned on text")
        return config

    def draw(
        self,
        config: AutoencoderConfig,
        batch: int,
        generator: torch.Generator,
        *,
        times: tuple[float, float] = (0.0, 1.0),
        objective: Objective | None = None,
        dropout: float = 0.0,
        images: float = 0.0,
        rows: range | None = None,
    ) -> AutoencoderDraws:
        """Stills, mirrored clips and crops; there are no times, and nothing that is dropped."""
        return draw(config, batch, generator, objective, images, rows)

    def losses(
        self,
        model: VideoAutoencoder,
        batch: Mapping[str, Tensor],
        draws: AutoencoderDraws,
        network: Callable[..., Any] | None = None,
    ) -> dict[str, Tensor]:
        """``pixel``, and ``perceptual`` or its substitute ``edges``; see :mod:`hpdm.latent.losses`."""
        x = shown_clips(model.config, batch["video"], draws)
        return reconstruction_losses(model.config, (network or model)(x=x), x)

    def errors(
        self,
        model: VideoAutoencoder,
        batch: Mapping[str, Tensor],
        generator: torch.Generator,
        *,
        times: tuple[float, float] = (0.0, 1.0),
        context: Context = "clean",
        context_noise: float = 0.0,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The losses of whole clips, and ``psnr`` in dB; nothing is random, and there are no times and contexts."""
        x = batch["video"].float() / 127.5 - 1
        out = model(x)
        error = (out.clamp(-1, 1) - x).square().mean((1, 2, 3, 4))
        return reconstruction_losses(model.config, out, x) | {"psnr": psnr(error)}, {}

    def opponent(self, config: AutoencoderConfig) -> Opponent | None:
        """A discriminator of frames, if the config has a weight for it."""
        return Discriminating(config) if config.gan_weight else None

    def is_measured(self, model: VideoAutoencoder) -> bool:
        return model.is_measured

    def measure(self, model: VideoAutoencoder, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Measures mean and standard deviation of the latents."""
        measure_latents(model, (batch["video"] for batch in batches))

    def reconstruct(
        self,
        model: VideoAutoencoder,
        video: Tensor,
        chunk: int | None = None,
        tile: tuple[int, int] | None = None,
        overlap: int | None = None,
    ) -> Tensor:
        return coding.reconstruct(model, video, chunk, tile=tile, overlap=overlap)

    def compression(self, config: AutoencoderConfig) -> Triple:
        return config.factors

    def example_inputs(self, config: AutoencoderConfig, batch: int) -> dict[str, Tensor]:
        return {"x": torch.zeros(batch, config.channels, *config.training_size)}

    def sampler(self, model: VideoAutoencoder, options: SamplerOptions) -> Sampler:
        raise ValueError("run: got one of an autoencoder, which encodes and decodes videos, expected one that samples")

    def sampling_plan(self, config: AutoencoderConfig, options: SamplerOptions) -> list[dict[str, Any]]:
        """Nothing: an autoencoder does not sample."""
        return []

    def long_plan(
        self, config: AutoencoderConfig, options: SamplerOptions, long: LongOptions, frames: int
    ) -> dict[str, Any]:
        raise ValueError(f"frames: got {frames}, expected none: an autoencoder does not sample videos")
