"""``hpdm train``: the options of a run, what they are checked against, and its start; the steps are in ``trainer``."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from hpdm import distributed, presets
from hpdm.data.clips import VideoDataset
from hpdm.distributed import pick_device
from hpdm.patch.config import HPDMConfig
from hpdm.patch.model import HPDM
from hpdm.patch.presets import Recipe
from hpdm.text import EmbeddingStore
from hpdm.training.checkpoint import list_checkpoints, load_run_config, save_run_config
from hpdm.training.parallel import Parallel
from hpdm.training.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainOptions:
    """Train a model on videos. What is not given is the preset's (Table 8). Under torchrun on all processes."""

    data: Path
    """Folder of videos (UCF-101's layout, class folders, or flat) or of tar shards, or a pattern of shards."""
    out: Path
    """Folder of the run; a run that is there already is resumed."""
    embeddings: Path | None = None
    """Embeddings of the clips' captions, from `hpdm data embed`: the model is conditioned on text, not on classes."""
    init: Path | None = None
    """Run of the same model whose newest weights to start from, with a fresh optimizer and schedule."""
    base: Path | None = None
    """Run of the same network with fewer levels, trained at low resolution, to start from."""
    preset: str = "tiny"
    """hpdm_s, hpdm_m, hpdm_l, hpdm_t2v, hpdm_t2v_1k or tiny."""
    steps: int | None = None
    batch: int | None = None
    """Clips per step, over all processes."""
    micro_batch: int | None = None
    """Clips at a time per process; gradients are accumulated over the step. All of a process's share if not given."""
    parallel: Parallel | None = None
    """With several processes: ddp (replicated) or fsdp (sharded)."""
    compile: bool = False
    """Compile the network with torch.compile."""
    kernels: Literal["auto", "reference", "torch", "triton"] = "auto"
    """Backend of every op; "reference" is the paper's formulas without our kernels."""
    recompute: Literal["none", "selective", "block"] = "none"
    """What the backward pass computes again instead of keeping it: less memory, more work; see `hpdm plan`."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Of products: "tf32" on CUDA, "bf16" by automatic mixed precision. The paper found that mixed precision trains
    worse."""
    resolution: tuple[int, int, int] | None = None
    """Target frames, height, width; the preset's if not given. The levels of the pyramid follow from it."""
    patch: tuple[int, int, int] | None = None
    """Patch frames, height, width; the preset's if not given."""
    split: Literal["train", "test"] | None = None
    """Use UCF-101's official split."""
    stride: int = 1
    """Step between the frames of a clip."""
    fps: float | None = None
    """Frame rate to which every clip is resampled before; its own if not given."""
    short: Literal["error", "skip", "loop"] = "error"
    """What to do with a clip that is too short."""
    optimizer: Literal["adamw", "lamb"] | None = None
    lr: float | None = None
    """Learning rate after the warm-up, from where a cosine leads to 0."""
    warmup: int | None = None
    """Steps of linear warm-up."""
    weight_decay: float | None = None
    clip_norm: float = 1.0
    """Largest gradient norm; 0 for no clipping."""
    ema: float | None = None
    """Decay of the moving average of the weights."""
    images: float | None = None
    """Share of the batch that are still videos, made of one frame of a clip."""
    times: Literal["uniform", "logit-normal"] = "uniform"
    """How diffusion times are drawn; "logit-normal" favours the middle."""
    dropout: float | None = None
    """Share of unconditional samples, for guidance; the preset's (0.1) if not given."""
    self_conditioning: float = 0.0
    """Share of samples whose latents start from those of a first pass (RIN: 0.9), for one more forward pass a step."""
    fusion: Literal["deep", "shallow"] = "deep"
    """Table 3: "shallow" conditions on the RGB of the previous level only."""
    detach_context: bool = False
    """Table 3: no gradient from a level to those below."""
    adaptive: bool = True
    """Table 3: adaptive computation."""
    coordinates: bool = True
    """Table 3: coordinates in the fusion."""
    seed: int = 0
    workers: int = 1
    """Processes that read clips ahead, per training process; 0 reads between the steps."""
    cache_mb: int = 1024
    """Memory for decoded clips."""
    log: Literal["jsonl", "tensorboard"] = "jsonl"
    """log.jsonl is always written; "tensorboard" writes both."""
    log_every: int = 10
    save_every: int = 500
    sample_every: int = 0
    """Steps between sample grids in RUN/samples; 0 for none."""
    sample_steps: int = 32
    """Sampling steps on level 0 for the grids."""
    profile: int = 0
    """Steps to profile, from the fifth on, into RUN/profile; 0 for none."""
    device: str = "auto"
    """"auto" takes CUDA when there is one."""

    def __post_init__(self) -> None:
        least = dict.fromkeys(("steps", "batch", "micro_batch", "stride", "log_every", "save_every", "sample_steps"), 1)
        least |= dict.fromkeys(("lr", "warmup", "weight_decay", "clip_norm", "workers", "cache_mb", "sample_every"), 0)
        least |= dict.fromkeys(("seed", "profile"), 0)
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name}: got {value}, expected at least {bound}")
        if self.init is not None and self.base is not None:
            raise ValueError("base: got both init and base, expected one of them")

    def recipe(self) -> Recipe:
        """The preset's recipe with what was given in its place.

        Raises:
            ValueError: unknown preset.
        """
        preset = presets.recipe(self.preset)
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(preset)}
        return dataclasses.replace(preset, **{name: value for name, value in given.items() if value is not None})

    def run(self) -> int:
        """The command ``hpdm train``; returns the exit status."""
        train(self)
        return 0


def build_config(options: TrainOptions, class_names: list[str], embeddings: EmbeddingStore | None) -> HPDMConfig:
    """The preset with the run's changes.

    Raises:
        ValueError: unknown preset, a resolution that is no pyramid of the patch, a preset with text and no embeddings,
            or with text of another width.
    """
    config = presets.get(options.preset)
    if options.resolution is not None or options.patch is not None:
        config = config.with_pyramid(options.patch or config.patch, options.resolution or config.resolution)
    config = config.replace(
        fusion=options.fusion,
        detach_context=options.detach_context,
        coordinates=options.coordinates,
        self_conditioning=options.self_conditioning,
        conditioning_dropout=config.conditioning_dropout if options.dropout is None else options.dropout,
    )
    if config.conditioning == "text":
        if embeddings is None:
            raise ValueError(
                f"embeddings: got none, expected a folder that `hpdm data embed` wrote, since {options.preset} is "
                "conditioned on text"
            )
        if embeddings.info.width != config.text_width:
            raise ValueError(
                f"embeddings: got width {embeddings.info.width}, expected {config.text_width} for {options.preset}"
            )
    elif embeddings is not None:
        config = config.replace(conditioning="text", text_width=embeddings.info.width)
    else:
        config = config.replace(conditioning="class" if class_names else "none", classes=max(1, len(class_names)))
    return config if options.adaptive else config.without_adaptive_computation()


def _check_embedded(embeddings: EmbeddingStore, dataset: VideoDataset) -> None:
    missing = embeddings.missing(file.caption for file in dataset.files)
    if missing:
        raise ValueError(
            f"embeddings: {embeddings.folder} lacks {len(missing)} of the clips' captions, the first is "
            f"{missing[0]!r}; run `hpdm data embed --data {dataset.root}` first"
        )


def train(options: TrainOptions) -> HPDM:
    """Trains until ``options.steps``; returns the model.

    Under ``torchrun`` every process calls it. What is wrong for one of them is an error in all.

    Raises:
        ValueError: options that contradict the run that is being resumed, the data, or those of another process.
        FileNotFoundError: no such data.
        RuntimeError: another process failed while the run was set up.
        FloatingPointError: the loss is no longer finite.
        OSError: a checkpoint cannot be written; the one before it stays usable.
        KeyboardInterrupt: SIGINT or SIGTERM, after a checkpoint.
    """
    with distributed.process_group(pick_device(options.device)) as device:
        return _train(options, device)


def _train(options: TrainOptions, device: torch.device) -> HPDM:
    distributed.assert_same_on_all_ranks("options", dataclasses.asdict(options))
    recipe = options.recipe()
    with distributed.raise_on_all_ranks():
        embeddings = None if options.embeddings is None else EmbeddingStore(options.embeddings)
        resolution = options.resolution or presets.get(options.preset).resolution
        dataset = VideoDataset(
            options.data,
            frames=resolution[0],
            size=(resolution[1], resolution[2]),
            stride=options.stride,
            fps=options.fps,
            split=options.split,
            captions=embeddings is not None,
            short=options.short,
            seed=options.seed,
            cache_bytes=options.cache_mb * 2**20,
        )
        config = build_config(options, dataset.class_names, embeddings)
        if embeddings is not None:
            _check_embedded(embeddings, dataset)
    names = dataset.class_names if config.conditioning == "class" else []
    distributed.assert_same_on_all_ranks("data: number of clips", len(dataset))
    distributed.assert_same_on_all_ranks("data: classes", names)
    micro_batch = options.micro_batch or max(1, recipe.batch // distributed.world_size())
    with distributed.raise_on_all_ranks():
        if list_checkpoints(options.out):
            micro_batch = _check_resumable(options, config, names)
    distributed.assert_same_on_all_ranks("out: checkpoints", [path.name for path in list_checkpoints(options.out)])
    before = torch.get_float32_matmul_precision()
    trainer = Trainer(options, recipe, config, dataset, embeddings, micro_batch, device)
    with distributed.raise_on_all_ranks():
        if distributed.is_first():
            values = _plain(options) | {"micro_batch": micro_batch}
            save_run_config(options.out, config, names, values)
    logger.info(
        "%s: %s parameters, %d clips, device %s, %d process(es)",
        options.preset, f"{trainer.parameters:,}", len(dataset), device, distributed.world_size(),
    )  # fmt: skip
    try:
        if options.precision != "fp32":
            torch.set_float32_matmul_precision("high")
        trainer.fit()
    finally:
        torch.set_float32_matmul_precision(before)
    return trainer.model


# What may change between sittings without changing the curve by more than rounding.
_FREE = {
    "data", "out", "kernels", "recompute", "parallel", "compile", "workers", "cache_mb", "device", "log", "log_every",
    "save_every", "sample_every", "sample_steps", "profile",
}  # fmt: skip


def _check_resumable(options: TrainOptions, config: HPDMConfig, class_names: list[str]) -> int:
    """A run is resumed only as itself: same model, same classes, same batches, seed and schedule.

    Returns the size of its micro-batches, on which its noise depends, whatever the number of processes now.
    """
    old_config, old_classes, training = load_run_config(options.out)
    if old_config != config:
        old, new = old_config.to_dict(), config.to_dict()
        changed = ", ".join(f"{k}: {old[k]} -> {new[k]}" for k in new if old[k] != new[k])
        raise ValueError(f"out: {options.out} holds a run of another config ({changed}); choose another folder")
    if old_classes != class_names:
        raise ValueError(f"data: got classes {class_names}, expected {old_classes} as in the run at {options.out}")
    # A run of an earlier version has no value for an option that came later: it ran with what is now the default.
    was = _plain(TrainOptions(data=options.data, out=options.out, preset=options.preset)) | training
    now = _plain(options) | ({} if options.micro_batch else {"micro_batch": was["micro_batch"]})
    changed = ", ".join(f"{k}: {was[k]} -> {v}" for k, v in now.items() if k not in _FREE and was[k] != v)
    if changed:
        raise ValueError(f"out: {options.out} holds a run with other options ({changed}); choose another folder")
    return int(was["micro_batch"])


def _plain(options: TrainOptions) -> dict[str, Any]:
    """The options, complete, as JSON would give them back."""
    values = dataclasses.asdict(options) | dataclasses.asdict(options.recipe())
    return json.loads(json.dumps(values, default=str))
