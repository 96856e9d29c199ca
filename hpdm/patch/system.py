"""Patch diffusion as a :class:`~hpdm.system.System`: how the shared parts of the library use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpdm.checks import Triple
from hpdm.long_video import LongOptions
from hpdm.objective import Context, Objective
from hpdm.patch import long_cost, sampling_cost
from hpdm.patch.base_model import ADDED, start_from_base
from hpdm.patch.config import HPDMConfig
from hpdm.patch.draws import Draws, draw
from hpdm.patch.long_sampler import LongSampler
from hpdm.patch.model import HPDM
from hpdm.patch.objective import denoising_error, evaluation_error, example_inputs, predict
from hpdm.patch.presets import PRESETS, PUBLISHED_PARAMETERS, RECIPES, SAMPLING
from hpdm.patch.real_levels import level_of_video
from hpdm.patch.sampler import Sampler
from hpdm.sampling import SamplerOptions
from hpdm.system import Architecture, System


class PatchDiffusion(System):
    """Hierarchical patch diffusion (HPDM)."""

    name = "patch"
    presets = PRESETS
    recipes = RECIPES
    published_parameters = PUBLISHED_PARAMETERS
    added = ADDED
    parameter_parts = (
        ("context fusion", ".fusion."),
        ("read attention", ".read"),
        ("latent layers", ".layers."),
        ("write attention", ".write"),
        ("token MLP and modulation", ".token_"),
        ("conditioning", "conditioner."),
        ("tokenizer, detokenizer, positions, latents", ""),
    )

    def config_from_dict(self, values: dict[str, Any]) -> HPDMConfig:
        return HPDMConfig.from_dict(values)

    def build(self, config: HPDMConfig, kernels: str = "auto", recompute: str = "none") -> HPDM:
        return HPDM(config, kernels, recompute)

    def draw(
        self,
        config: HPDMConfig,
        batch: int,
        generator: torch.Generator,
        *,
        times: tuple[float, float] = (0.0, 1.0),
        objective: Objective | None = None,
        dropout: float = 0.0,
        images: float = 0.0,
        rows: range | None = None,
    ) -> Draws:
        return draw(config, batch, generator, times, dropout, objective, images, rows)

    def losses(
        self,
        model: HPDM,
        batch: Mapping[str, Tensor],
        draws: Draws,
        network: Callable[..., Any] | None = None,
    ) -> dict[str, Tensor]:
        """The error of v of every level, ``level_0`` and up (paper eq. 4)."""
        errors = denoising_error(
            model,
            batch["video"],
            batch.get("labels"),
            draws,
            text=batch.get("text"),
            text_mask=batch.get("text_mask"),
            network=network,
        )  # [B, L]
        return {f"level_{level}": error for level, error in enumerate(errors.unbind(1))}

    def errors(
        self,
        model: HPDM,
        batch: Mapping[str, Tensor],
        generator: torch.Generator,
        *,
        times: tuple[float, float] = (0.0, 1.0),
        context: Context = "clean",
        context_noise: float = 0.0,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The error of v of every level; from level 1 up, that of its patches at the video's border and inside."""
        errors, border = evaluation_error(
            model,
            batch["video"],
            batch.get("labels"),
            generator,
            times,
            context,
            context_noise,
            text=batch.get("text"),
            text_mask=batch.get("text_mask"),
        )  # [B, L] both
        parts = {}
        for level in range(1, model.config.levels):
            at_border = border[:, level].to(errors.device)
            parts[f"level_{level}_border"] = errors[at_border, level]
            parts[f"level_{level}_interior"] = errors[~at_border, level]
        return {f"level_{level}": error for level, error in enumerate(errors.unbind(1))}, parts

    def sampler(self, model: HPDM, options: SamplerOptions) -> Sampler:
        return Sampler(model, options)

    def long_sampler(self, model: HPDM, options: SamplerOptions, long: LongOptions) -> LongSampler:
        return LongSampler(model, options, long)

    def sampler_defaults(self, config: HPDMConfig, preset: str | None = None) -> Mapping[str, Any]:
        """The preset's, and no churn for text to video.

        Appendix C: "we disabled stochasticity for text-to-video synthesis".
        """
        deterministic = {"solver": "heun"} if config.conditioning == "text" else {}
        return {**SAMPLING.get(preset or "", {}), **deterministic}

    def part_sizes(self, config: HPDMConfig) -> Sequence[Triple]:
        return [config.level_resolution(level) for level in range(config.levels)]

    def real_part(self, config: HPDMConfig, video: Tensor, part: int) -> Tensor:
        return level_of_video(config, video, part)

    def clip_frames(self, config: HPDMConfig) -> int:
        return config.clip_frames

    def configure(self, config: HPDMConfig, changes: Architecture) -> HPDMConfig:
        """The preset's network on a run's pyramid, with the ablations of Table 3 and appendix D.

        Raises:
            ValueError: a resolution that is no pyramid of the patch, or an option of another kind of model.
        """
        changes.check_only(
            "resolution", "patch", "dropout", "self_conditioning", "known_frames", "spacing", "memory", "fusion",
            "detach_context", "adaptive", "coordinates", "coordinate_embedding", "share_blocks",
        )  # fmt: skip
        if changes.resolution is not None or changes.patch is not None:
            config = config.with_pyramid(changes.patch or config.patch, changes.resolution or config.resolution)
        config = config.replace(
            fusion=changes.fusion,
            detach_context=changes.detach_context,
            coordinates=changes.coordinates,
            coordinate_embedding=changes.coordinate_embedding,
            share_blocks=changes.share_blocks,
            self_conditioning=changes.self_conditioning,
            known_frames=changes.known_frames,
            spacing=changes.spacing,
            memory=changes.memory,
            conditioning_dropout=config.conditioning_dropout if changes.dropout is None else changes.dropout,
        )
        return config if changes.adaptive else config.without_adaptive_computation()

    def start_from_base(self, model: HPDM, base: Any, source: Path) -> None:
        start_from_base(model, base, source)

    def sharded_modules(self, model: HPDM) -> Sequence[tuple[nn.Module, bool]]:
        return model.sharded_modules()

    def compiled_modules(self, model: HPDM) -> Sequence[nn.Module]:
        return model.compiled_modules()

    def hidden_modules(self, model: HPDM) -> Sequence[nn.Module]:
        return list(model.blocks)

    def example_inputs(self, config: HPDMConfig, batch: int) -> dict[str, Tensor]:
        return example_inputs(config, batch)

    def predict(self, config: HPDMConfig, network: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Tensor:
        first_pass = torch.ones(len(inputs["x"]), dtype=torch.bool, device=inputs["x"].device)
        return predict(network, first_pass if config.self_conditioning else None, **inputs)

    def sampling_plan(self, config: HPDMConfig, options: SamplerOptions) -> list[dict[str, Any]]:
        return [asdict(plan) for plan in sampling_cost.sampling_plan(config, options)]

    def long_plan(self, config: HPDMConfig, options: SamplerOptions, long: LongOptions, frames: int) -> dict[str, Any]:
        return long_cost.long_plan(config, options, long, frames).as_json()

    def long_plan_line(
        self, model: HPDM, options: SamplerOptions, long: LongOptions, frames: int, videos: int, at_a_time: int,
        world_size: int = 1,
    ) -> str:  # fmt: skip
        return long_cost.long_plan_line(model, options, long, frames, videos, at_a_time, world_size)

    def plan_line(self, model: HPDM, options: SamplerOptions, videos: int, at_a_time: int, world_size: int = 1) -> str:
        return sampling_cost.plan_line(model, options, videos, at_a_time, world_size)
