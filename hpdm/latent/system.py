"""Latent video diffusion as a :class:`~hpdm.system.System`: how the shared parts of the library use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpdm.checks import Triple
from hpdm.latent import coding, latent_cost, long_cost
from hpdm.latent.latent_config import LatentConfig
from hpdm.latent.latent_model import LVDM
from hpdm.latent.latent_presets import LATENT_PRESETS, LATENT_RECIPES, LATENT_SAMPLING
from hpdm.latent.long_sampler import LatentLongSampler
from hpdm.latent.objective import Draws, clip_of, draw, example_inputs, latent_error
from hpdm.latent.sampler import LatentSampler
from hpdm.latent.unet_presets import PUBLISHED_PARAMETERS
from hpdm.long_video import LongOptions
from hpdm.objective import Context, Objective, mirror, on_device
from hpdm.sampling import SamplerOptions
from hpdm.system import Architecture, System
from hpdm.training.stills import show_frames

NOTHING_KNOWN = Objective(known_first=0.0, known_ends=0.0, rolling=0.0, sparse=0.0)


class LatentVideoDiffusion(System):
    """Diffusion of the latents of a video autoencoder (LVDM)."""

    name = "latent"
    presets = LATENT_PRESETS
    recipes = LATENT_RECIPES
    published_parameters = PUBLISHED_PARAMETERS
    needs_autoencoder = True
    added = ("unet.known_mask.", "unet.known_times.", "unet.sparse")
    objective_settings = (
        "times", "low_discrepancy", "weighting", "flip", "known_first", "known_ends", "rolling", "known_t_max",
        "sparse", "draws",
    )  # fmt: skip
    parameter_parts = (
        ("temporal attention", ".temporal."),
        ("spatial attention", ".spatial."),
        ("text attention", ".text."),
        ("residual blocks", ".residual."),
        ("resampling", ".resample."),
        ("conditioning, first and last convolution", ""),
    )

    def config_from_dict(self, values: dict[str, Any]) -> LatentConfig:
        return LatentConfig.from_dict(values)

    def build(self, config: LatentConfig, kernels: str = "auto", recompute: str = "none") -> LVDM:
        return LVDM(config, kernels, recompute)

    def configure(self, config: LatentConfig, changes: Architecture) -> LatentConfig:
        """``config`` for clips of another size, with known frames, frames far apart, another loss, or another share
        without conditioning.

        Raises:
            ValueError: a change that latent diffusion does not have, or a value that does not fit.
        """
        changes.check_only("resolution", "dropout", "known_frames", "spacing", "loss")
        if changes.resolution is not None:
            config = config.with_resolution(changes.resolution)
        unet = config.unet
        if changes.dropout is not None:
            unet = unet.replace(conditioning_dropout=changes.dropout)
        if changes.known_frames and unet.known == "none":
            unet = unet.replace(known="times")
        unet = unet.replace(spacing=changes.spacing)
        return config.replace(unet=unet, loss=changes.loss or config.loss)

    def condition(self, config: LatentConfig, classes: int, text_width: int | None) -> LatentConfig:
        return config.replace(unet=super().condition(config.unet, classes, text_width))

    def with_autoencoder(self, config: LatentConfig, autoencoder: Any, weights: str) -> LatentConfig:
        """``config`` on the latents of a given autoencoder; clips keep their size.

        Raises:
            ValueError: latents of other channels than the U-Net's, or pixels per latent that do not divide a clip.
        """
        resolution = config.resolution
        config = config.replace(autoencoder=autoencoder, autoencoder_hash=weights)
        return config.with_resolution(resolution)

    def autoencoder_of(self, config: LatentConfig) -> tuple[Any, str]:
        return config.autoencoder, config.autoencoder_hash

    def set_autoencoder(self, model: LVDM, autoencoder: nn.Module) -> None:
        model.set_autoencoder(autoencoder)

    def draw(
        self,
        config: LatentConfig,
        batch: int,
        generator: torch.Generator,
        *,
        times: tuple[float, float] = (0.0, 1.0),
        objective: Objective | None = None,
        dropout: float = 0.0,
        images: float = 0.0,
        rows: range | None = None,
    ) -> Draws:
        return draw(
            config.unet, batch, generator, frames=config.clip_frames, times=times, objective=objective,
            dropout=dropout, images=images, rows=rows,
        )  # fmt: skip

    def losses(
        self,
        model: LVDM,
        batch: Mapping[str, Tensor],
        draws: Draws,
        network: Callable[..., Any] | None = None,
    ) -> dict[str, Tensor]:
        """``latent``: the error of what the network predicts of a clip's latents, which are those of a longer clip
        where some of them are far apart.

        In place of ``video`` a batch may have ``latents [B, z, T, h, w]``, see :mod:`hpdm.data.latent_clips`.

        Raises:
            ValueError: latents with draws that change pixels.
        """
        unet = model.config.unet
        latents = clip_of(unet, self._latents(model, batch, draws), draws)
        error = latent_error(
            network or model, unet, latents, draws, batch.get("labels"), batch.get("text"), batch.get("text_mask"),
            "l1" if model.config.loss == "l1" else "l2",
        )  # fmt: skip
        return {"latent": error}

    def _latents(self, model: LVDM, batch: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """The latents of a batch as the draws want them, ``[B, z, T, h, w]`` float."""
        if "latents" in batch:
            if draws.stills is not None or draws.mirrored is not None:
                raise ValueError("draws: got stills or mirrored clips with latents, expected none: they change pixels")
            return batch["latents"].float()
        video = batch["video"]
        if draws.stills is not None:
            video = show_frames(video, draws.stills)
        if draws.mirrored is not None:
            video = mirror(video, draws.mirrored)
        return coding.encode(model.autoencoder, video, chunk=None)

    def errors(
        self,
        model: LVDM,
        batch: Mapping[str, Tensor],
        generator: torch.Generator,
        *,
        times: tuple[float, float] = (0.0, 1.0),
        context: Context = "clean",
        context_noise: float = 0.0,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The losses with nothing known; there are no levels, so contexts mean nothing, and no parts."""
        shown = batch["latents"] if "latents" in batch else batch["video"]
        draws = self.draw(model.config, len(shown), generator, times=times, objective=NOTHING_KNOWN)
        draws = draws._replace(start=None)  # these clips are no longer than the model's
        return self.losses(model, batch, on_device(draws, shown.device)), {}

    def error_name(self, config: LatentConfig) -> str:
        kind = "squared" if config.loss == "l2" else "absolute"
        return f"mean {kind} error of {config.unet.prediction} of the latents"

    def reconstruct(
        self,
        model: LVDM,
        video: Tensor,
        chunk: int | None = None,
        tile: tuple[int, int] | None = None,
        overlap: int | None = None,
    ) -> Tensor:
        return coding.reconstruct(model.autoencoder, video, chunk, tile=tile, overlap=overlap)

    def compression(self, config: LatentConfig) -> Triple:
        return config.autoencoder.factors

    def sampler(self, model: LVDM, options: SamplerOptions) -> LatentSampler:
        return LatentSampler(model, options)

    def long_sampler(self, model: LVDM, options: SamplerOptions, long: LongOptions) -> LatentLongSampler:
        return LatentLongSampler(model, options, long)

    def clip_frames(self, config: LatentConfig) -> int:
        return config.clip_frames

    def sampler_defaults(self, config: LatentConfig, preset: str | None = None) -> Mapping[str, Any]:
        """The preset's; and no tiles."""
        return {"overlap": "none", **LATENT_SAMPLING.get(preset or "", {})}

    def sharded_modules(self, model: LVDM) -> Sequence[tuple[nn.Module, bool]]:
        return model.unet.sharded_modules()

    def compiled_modules(self, model: LVDM) -> Sequence[nn.Module]:
        return model.unet.compiled_modules()

    def example_inputs(self, config: LatentConfig, batch: int) -> dict[str, Tensor]:
        return example_inputs(config.unet, batch)

    def sampling_plan(self, config: LatentConfig, options: SamplerOptions) -> list[dict[str, Any]]:
        """Two rows: sampling latents, and decoding them."""
        return latent_cost.sampling_plan(config, options)

    def long_plan(
        self, config: LatentConfig, options: SamplerOptions, long: LongOptions, frames: int
    ) -> dict[str, Any]:
        return long_cost.long_plan(config, options, long, frames).as_json()

    def long_plan_line(
        self, model: LVDM, options: SamplerOptions, long: LongOptions, frames: int, videos: int,
        at_a_time: int, world_size: int = 1,
    ) -> str:  # fmt: skip
        return long_cost.long_plan_line(model.config, options, long, frames, videos, at_a_time)

    def plan_line(self, model: LVDM, options: SamplerOptions, videos: int, at_a_time: int, world_size: int = 1) -> str:
        return latent_cost.plan_line(model.config, options, videos, at_a_time)
