"""The interface through which training, sampling, evaluation and planning use a kind of model.

A *system* is one kind of generative video model: its config, its network, its objective and its sampler. Patch
diffusion is one (:mod:`hpdm.patch`). The rest of this library works with any system and names none;
:mod:`hpdm.systems` lists them.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from hpdm.checks import Triple
from hpdm.long_video import LongOptions, LongSampler
from hpdm.objective import Context, Objective, on_device
from hpdm.opponent import Opponent
from hpdm.recipe import Recipe
from hpdm.sampling import Sampler, SamplerOptions


@dataclass(frozen=True)
class Architecture:
    """Changes of a run to its preset's model; fields that are not given keep the preset's values."""

    resolution: Triple | None = None
    """Target frames, height, width; the preset's if not given. The levels of the pyramid follow from it."""
    patch: Triple | None = None
    """Patch frames, height, width; the preset's if not given."""
    dropout: float | None = None
    """Share of unconditional samples, for guidance; the preset's (0.1) if not given."""
    self_conditioning: float = 0.0
    """Share of samples whose latents start from those of a first pass (RIN: 0.9); costs a forward pass per step."""
    known_frames: bool = False
    """Train with known frames too, which `hpdm sample` needs for videos longer than a clip and for those that go on
    from a clip or an image. --init may be a run without."""
    spacing: int = 1
    """With --known-frames, also train level 0 on frames this far apart, a divisor of its patch's frames less one, for
    the scheme hierarchical; 1 for none. Training clips are longer then. Latent diffusion: latents, and those of a
    clip."""
    memory: bool = False
    """With --known-frames, also train the latents of level 0 to start from those of the window before. Training clips
    are longer then."""
    fusion: Literal["deep", "shallow"] = "deep"
    """Table 3: "shallow" conditions on the RGB of the previous level only."""
    detach_context: bool = False
    """Table 3: no gradient from a level to those below."""
    adaptive: bool = True
    """Table 3: adaptive computation."""
    coordinates: bool = True
    """Table 3: coordinates in the fusion."""
    coordinate_embedding: Literal["raw", "sinusoidal"] = "raw"
    """Appendix D.2: "sinusoidal" gives the fusion sines and cosines of the coordinates in their place."""
    share_blocks: bool = False
    """Appendix D.4: all blocks share one set of weights."""
    norm: Literal["frame", "clip"] | None = None
    """Autoencoder: normalization over each "frame", with which long videos are coded exactly in pieces, or over the
    "clip", as published. Default: frame."""
    crop: Triple | None = None
    """Autoencoder: frames, height, width of the random crops to train on; whole clips if not given."""
    loss: Literal["l2", "l1"] | None = None
    """Autoencoder: error of pixels, squared (LVDM's paper) or absolute (its code). Latent diffusion: error of what the
    network predicts. Default: the preset's."""
    perceptual: Path | None = None
    """Autoencoder: TorchScript file of a perceptual distance such as LPIPS, see docs/latent.md. Without one the error
    of differences between neighboring pixels takes its place."""
    perceptual_weight: float | None = None
    """Autoencoder: weight of --perceptual. Default: 1."""
    edge_weight: float | None = None
    """Autoencoder: weight of the error of differences between neighboring pixels. Default: 0.1."""
    gan_weight: float | None = None
    """Autoencoder: weight of the loss against a discriminator of single frames, as a share of the other losses'
    gradient at the last layer (published: 0.5). Default: 0, no discriminator."""
    gan_start: int | None = None
    """With --gan-weight: first step with the discriminator. Default: 50001, as published."""

    def check_only(self, *names: str) -> None:
        """Checks that a run changes no other fields than ``names``, for systems that do not support all.

        Raises:
            ValueError: a field that is none of ``names`` is not its default.
        """
        for f in dataclasses.fields(self):
            if f.name not in names and getattr(self, f.name) != f.default:
                raise ValueError(
                    f"{f.name}: got {getattr(self, f.name)}, expected {f.default} as this preset's model has no choice"
                )


class Config(Protocol):
    """The config of a model; a frozen dataclass."""

    @property
    def resolution(self) -> Triple:
        """Frames, height and width of a video."""

    @property
    def channels(self) -> int:
        """Channels of a pixel."""

    @property
    def conditioning(self) -> str:
        """``"none"``, ``"class"`` or ``"text"``."""

    @property
    def classes(self) -> int:
        """Number of classes."""

    @property
    def text_width(self) -> int:
        """Width of the text embeddings."""

    @property
    def conditioning_dropout(self) -> float:
        """Share of training samples without label or text."""

    def replace(self, **changes: Any) -> Any:
        """A copy with other values of some fields."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""


class System(ABC):
    """One kind of model. The defaults of optional methods do nothing, or raise an error that says what is missing."""

    name: ClassVar[str]
    """Name of the system in a run's ``config.json``."""
    generates: ClassVar[bool] = True
    """Whether it samples videos from noise, so that its errors depend on a diffusion time. Else it encodes and decodes
    given videos, see :meth:`reconstruct`."""
    needs_autoencoder: ClassVar[bool] = False
    """Whether its models contain the weights of an autoencoder, a run of its own, which `--autoencoder` names."""
    presets: Mapping[str, Callable[[], Any]]
    """Configs by the name that ``--preset`` takes."""
    recipes: Mapping[str, Recipe]
    """How each preset is trained."""
    added: tuple[str, ...] = ()
    """How names of parameters begin that may be added to a trained model: as they start, they change nothing."""
    published_parameters: Mapping[str, float] = {}
    """Number of parameters of some presets, as published."""
    parameter_parts: Sequence[tuple[str, str]] = (("all", ""),)
    """Parts of the model for ``hpdm plan``, as (title, text): a parameter belongs to the first part whose text its name
    contains. The last text is empty."""

    objective_settings: tuple[str, ...] | None = None
    """The fields of :class:`~hpdm.objective.Objective` that apply; ``None`` for all."""

    @abstractmethod
    def config_from_dict(self, values: dict[str, Any]) -> Any:
        """The inverse of :meth:`Config.to_dict`; ``ValueError`` for fields that this version does not know."""

    @abstractmethod
    def build(self, config: Any, kernels: str = "auto", recompute: str = "none") -> nn.Module:
        """A new model with random weights and the attribute ``config``.

        In training it is called with the keyword arguments that :meth:`example_inputs` returns.
        """

    def check_objective(self, objective: Objective) -> None:
        """Raises ValueError for settings of ``objective`` that this system does not have."""
        if self.objective_settings is not None:
            objective.check_only(*self.objective_settings)

    def condition(self, config: Any, classes: int, text_width: int | None) -> Any:
        """``config`` conditioned on what the data has: text, else classes, else nothing.

        Args:
            config: the model's.
            classes: number of classes of the clips; 0 for clips without.
            text_width: width of the embeddings of their captions; ``None`` for clips without.

        Raises:
            ValueError: a model with text and no embeddings, or embeddings that it cannot take.
        """
        if config.conditioning == "text":
            if text_width is None:
                raise ValueError(
                    "embeddings: got none, expected a folder that `hpdm data embed` wrote, since the model is "
                    "conditioned on text"
                )
            if text_width != config.text_width:
                raise ValueError(f"embeddings: got width {text_width}, expected {config.text_width} as of the model")
            return config
        if text_width is not None:
            return config.replace(conditioning="text", text_width=text_width)
        return config.replace(conditioning="class" if classes else "none", classes=max(1, classes))

    def with_autoencoder(self, config: Any, autoencoder: Any, weights: str) -> Any:
        """``config`` with a given autoencoder.

        Args:
            config: the model's.
            autoencoder: config of the autoencoder.
            weights: a hash of its weights.

        Raises:
            ValueError: an autoencoder that does not fit, or a system without.
        """
        raise self._no_autoencoder()

    def autoencoder_of(self, config: Any) -> tuple[Any, str]:
        """What :meth:`with_autoencoder` put into ``config``; ``ValueError`` for a system without."""
        raise self._no_autoencoder()

    def set_autoencoder(self, model: Any, autoencoder: nn.Module) -> None:
        """Copies the weights of an autoencoder into ``model``, whose config names it; ``ValueError`` for a system
        without.
        """
        raise self._no_autoencoder()

    def _no_autoencoder(self) -> ValueError:
        return ValueError(f"autoencoder: got one, expected none: {self.name} models have none")

    @abstractmethod
    def draw(
        self,
        config: Any,
        batch: int,
        generator: torch.Generator,
        *,
        times: tuple[float, float] = (0.0, 1.0),
        objective: Objective | None = None,
        dropout: float = 0.0,
        images: float = 0.0,
        rows: range | None = None,
    ) -> Any:
        """Everything random in the losses of a batch: a ``NamedTuple`` of CPU tensors, some of which may be ``None``.

        Args:
            config: the model's.
            batch: number of clips.
            generator: CPU generator, the only source of randomness.
            times: range of the diffusion time, from clean 0 to noise 1.
            objective: how the samples are drawn and weighted; ``None`` for the default.
            dropout: share of the clips whose label or text is dropped.
            images: share of the clips that become still images.
            rows: the rows of the batch to return; ``None`` for all. Given rows have the same values whichever they
                are, so that a step does not depend on how its batch is split; they need not be those without ``rows``.
        """

    @abstractmethod
    def losses(
        self, model: Any, batch: Mapping[str, Tensor], draws: Any, network: Callable[..., Any] | None = None
    ) -> dict[str, Tensor]:
        """The training losses of a batch by name, each ``[B]``, one value per clip; their mean is minimized.

        On a GPU they neither wait for the host nor read from it, so that a training step can be a CUDA graph.

        Args:
            model: of this system.
            batch: ``video`` uint8 ``[B, C, F, H, W]`` and, by the kind of conditioning, ``labels`` int64 ``[B]``, or
                ``text [B, S, W]`` and ``text_mask [B, S]``; on the model's device. A system with an autoencoder also
                takes ``latents`` float ``[B, z, T, h, w]`` in place of ``video``.
            draws: what :meth:`draw` returned for as many clips, on the model's device.
            network: called in place of the model, e.g. its DDP wrapper.
        """

    def errors(
        self,
        model: Any,
        batch: Mapping[str, Tensor],
        generator: torch.Generator,
        *,
        times: tuple[float, float] = (0.0, 1.0),
        context: Context = "clean",
        context_noise: float = 0.0,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What an evaluation reports of a batch: errors by name, each ``[B]``, and errors of parts of it, each ``[n]``.

        A part is, for instance, the patches at a border. Here, for a model without levels: its losses, and no parts.

        Args:
            model, batch: as of :meth:`losses`.
            generator: CPU generator, the only source of randomness.
            times: range of the diffusion time of what is measured.
            context: noise of the lower levels meanwhile; a model without levels has none.
            context_noise: diffusion time of clean lower levels.
        """
        video = batch["video"]
        draws = self.draw(model.config, len(video), generator, times=times)
        return self.losses(model, batch, on_device(draws, video.device)), {}

    def error_name(self, config: Any) -> str:
        """What :meth:`errors` are, for tables."""
        return "mean squared error of v"

    def is_measured(self, model: Any) -> bool:
        """Whether all is known that :meth:`measure` measures; here there is nothing."""
        return True

    def measure(self, model: Any, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Measures, at the end of training, what is stored with the weights, and sets the model's persistent buffers.

        A collective. It is called for the last weights and for each of their averages.

        Args:
            model: in eval mode and whole on this rank.
            batches: this rank's training clips, as of :meth:`losses`; they are read once.
        """
        raise NotImplementedError(f"{self.name} models have nothing to measure, see is_measured")

    def reconstruct(
        self,
        model: Any,
        video: Tensor,
        chunk: int | None = None,
        tile: tuple[int, int] | None = None,
        overlap: int | None = None,
    ) -> Tensor:
        """Videos, encoded and decoded by a model with an autoencoder.

        Args:
            model: of this system, in eval mode.
            video: uint8 ``[B, C, F, H, W]`` of any size, on the model's device.
            chunk: latents along time that are coded at once; ``None`` for all.
            tile: height and width in latents of tiles that are blended; ``None`` for whole frames.
            overlap: of neighboring tiles in latents; ``None`` for a quarter of a tile's shorter side.

        Returns:
            float32 of the same shape in [-1, 1].

        Raises:
            ValueError: this system has no autoencoder, it cannot code in chunks, or a tile or overlap is out of range.
        """
        raise ValueError(
            f"run: got one of the system {self.name!r}, which encodes no videos, expected one of an autoencoder"
        )

    def compression(self, config: Any) -> Triple:
        """Pixels per latent along each axis; ``ValueError`` if this system has no autoencoder."""
        raise ValueError(
            f"run: got one of the system {self.name!r}, which encodes no videos, expected one of an autoencoder"
        )

    def opponent(self, config: Any) -> Opponent | None:
        """What a model of this config trains against, as a second player of its training; ``None`` for nothing."""
        return None

    @abstractmethod
    def sampler(self, model: Any, options: SamplerOptions) -> Sampler:
        """A sampler of videos from ``model``; it uses the options that apply to this system."""

    def long_sampler(self, model: Any, options: SamplerOptions, long: LongOptions) -> LongSampler:
        """A sampler of videos of any length; ``ValueError`` if this system has none."""
        raise ValueError(f"frames: {self.name} models sample clips of their own length, expected none of the options")

    def sampler_defaults(self, config: Any, preset: str | None = None) -> Mapping[str, Any]:
        """Fields of :class:`~hpdm.sampling.SamplerOptions` whose default is another one for this model.

        Args:
            config: of the model.
            preset: from which it was made; ``None`` for none.
        """
        return {}

    def part_sizes(self, config: Any) -> Sequence[Triple]:
        """Frames, height and width of every part that the sampler yields; the last is ``config.resolution``."""
        return (config.resolution,)

    def real_part(self, config: Any, video: Tensor, part: int) -> Tensor:
        """What the sampler's part ``part`` of real videos would be, as the model sees them in training.

        Args:
            config: the model's.
            video: uint8 ``[B, C, F, H, W]`` with height and width of ``config.resolution``, and as many frames, or
                fewer: as many as some frames of the part stand for.
            part: number of a part, one of those of :meth:`part_sizes`.

        Returns:
            ``[B, C, f, h, w]`` float32 in [-1, 1], on the device of ``video``.
        """
        return video.float() / 127.5 - 1

    def clip_frames(self, config: Any) -> int:
        """Frames of a training clip, at least those of ``config.resolution``."""
        frames, _, _ = config.resolution
        return int(frames)

    def configure(self, config: Any, changes: Architecture) -> Any:
        """``config`` with a run's changes; ``ValueError`` for a change that this system does not support."""
        changes.check_only("dropout")
        return config if changes.dropout is None else config.replace(conditioning_dropout=changes.dropout)

    def start_from_base(self, model: Any, base: Any, source: Path) -> None:
        """Starts ``model`` from a trained model of lower resolution, read from ``source``.

        Raises:
            ValueError: ``base`` does not match, or this system does not support it.
        """
        raise ValueError(f"base: got {source}, expected none: {self.name} models do not start from another")

    def sharded_modules(self, model: Any) -> Sequence[tuple[nn.Module, bool]]:
        """Modules that FSDP shards on their own, inner ones first, each with the flag ``reshard_after_forward``."""
        return ()

    def compiled_modules(self, model: Any) -> Sequence[nn.Module]:
        """Modules that are compiled one by one if the model is sharded."""
        return (model,)

    def hidden_modules(self, model: Any) -> Sequence[nn.Module]:
        """Modules whose matrices map hidden features to hidden features: those that the optimizer Muon steps."""
        return ()

    def example_inputs(self, config: Any, batch: int) -> dict[str, Tensor]:
        """Valid keyword arguments of the model in training, zeros wherever possible.

        The model predicts a tensor of the shape of ``x``.
        """
        inputs = {"x": torch.zeros(batch, config.channels, *config.resolution), "t": torch.zeros(batch)}
        if config.conditioning == "class":
            inputs["labels"] = torch.zeros(batch, dtype=torch.long)
        return inputs

    def predict(self, config: Any, network: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Tensor:
        """Calls ``network`` as :meth:`losses` does in a training step; returns what its losses compare.

        Planning counts and measures the calls that a step makes by this.

        Args:
            config: the model's.
            network: the model, or what is called in its place.
            inputs: as :meth:`example_inputs` returns them.
        """
        predicted: Tensor = network(**inputs)
        return predicted

    def sampling_plan(self, config: Any, options: SamplerOptions) -> list[dict[str, Any]]:
        """The cost of sampling one video, a row for every part that the sampler yields.

        Keys: ``level``, ``resolution``, ``tiles``, ``steps``, ``predictions``, ``network_calls``, ``patches`` (inputs
        of the network), ``flops`` (``None`` where it is not known), ``cached_blocks`` and ``cache_bytes``.
        """
        steps = options.level_solver(0).predictions
        return [{
            "level": 0, "resolution": config.resolution, "tiles": 1, "steps": options.steps, "predictions": steps,
            "network_calls": steps, "patches": steps, "flops": None, "cached_blocks": 0, "cache_bytes": 0,
        }]  # fmt: skip

    def long_plan(self, config: Any, options: SamplerOptions, long: LongOptions, frames: int) -> dict[str, Any]:
        """The cost of sampling one video of ``frames`` frames, as JSON values; ``ValueError`` if this system has none.

        Keys: ``frames``, ``windows``, ``known``, ``first`` and ``next`` (rows of the first window and of one after it,
        with ``level``, ``tiles``, ``features``, ``patches`` and ``flops``), ``memory_bytes``, ``patches``, ``flops``.
        """
        raise ValueError(f"frames: {self.name} models sample clips of their own length, expected none")

    def long_plan_line(
        self, model: Any, options: SamplerOptions, long: LongOptions, frames: int, videos: int, at_a_time: int,
        world_size: int = 1,
    ) -> str:  # fmt: skip
        """One line to print before sampling long videos: the work, memory and time that it will take."""
        return f"{videos} video(s) of {frames} frames, {at_a_time} at a time, {long.scheme}"

    def plan_line(self, model: Any, options: SamplerOptions, videos: int, at_a_time: int, world_size: int = 1) -> str:
        """One line to print before sampling: the work, memory and time that it will take."""
        return f"{videos} videos, {at_a_time} at a time, {options.steps} steps"
