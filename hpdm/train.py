"""Training: clips -> patches of every level -> noise -> v -> loss -> weights, their moving average, checkpoints.

Everything random in step ``n`` comes from a generator seeded by ``(seed, n)`` and the clips of step ``n`` from the data
order, so that a resumed run continues the same loss curve, on the CPU bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from hpdm import presets
from hpdm.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    load_run_config,
    newest_checkpoint,
    save_checkpoint,
    save_run_config,
)
from hpdm.config import HPDMConfig
from hpdm.data import ClipItem, ClipSampler, VideoDataset
from hpdm.log import JsonlLog, Log, TensorBoardLog
from hpdm.model import HPDM
from hpdm.objective import denoising_error
from hpdm.optim import EMA, learning_rate, make_optimizer
from hpdm.sampler import Sampler, SamplerOptions
from hpdm.video import write_contact_sheet

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainOptions:
    """Train a model on a folder of videos."""

    data: Path
    """Folder of videos: UCF-101's layout, class folders, or flat."""
    out: Path
    """Folder of the run; a run that is there already is resumed."""
    init: Path | None = None
    """Run of the same model whose newest weights to start from, with a fresh optimizer and schedule."""
    preset: str = "tiny"
    """hpdm_s, hpdm_m, hpdm_l, hpdm_t2v, hpdm_t2v_1k or tiny."""
    steps: int = 10_000
    batch: int = 16
    """Clips per step."""
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
    short: Literal["error", "skip", "loop"] = "error"
    """What to do with a clip that is too short."""
    optimizer: Literal["adamw", "lamb"] = "adamw"
    lr: float = 1e-3
    """Peak learning rate (the paper: LAMB at 0.005)."""
    warmup: int = 200
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    """Largest gradient norm; 0 for no clipping."""
    ema: float = 0.999
    """Decay of the moving average of the weights."""
    times: Literal["uniform", "logit-normal"] = "uniform"
    """How diffusion times are drawn; "logit-normal" favours the middle."""
    dropout: float | None = None
    """Share of unconditional samples, for guidance; the preset's (0.1) if not given."""
    fusion: Literal["deep", "shallow"] = "deep"
    """Table 3: "shallow" conditions on the RGB of the previous level only."""
    detach_context: bool = False
    """Table 3: no gradient from a level to those below."""
    adaptive: bool = True
    """Table 3: adaptive computation."""
    coordinates: bool = True
    """Table 3: coordinates in the fusion."""
    seed: int = 0
    workers: int = 0
    """Processes that decode."""
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
    device: str = "auto"
    """"auto" takes CUDA when there is one."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "stride", "log_every", "save_every", "sample_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("lr", "warmup", "weight_decay", "clip_norm", "workers", "cache_mb", "sample_every", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 0")

    def run(self) -> int:
        """The command ``hpdm train``; returns the exit status."""
        train(self)
        return 0


def pick_device(name: str) -> torch.device:
    """``"auto"`` is CUDA when there is one, else the CPU.

    Raises:
        RuntimeError: CUDA asked for and not there, or no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device: got {name!r}, but PyTorch sees no CUDA device")
    return device


def build_config(options: TrainOptions, class_names: list[str]) -> HPDMConfig:
    """The preset with the run's changes.

    Raises:
        ValueError: unknown preset, a resolution that is no pyramid of the patch, or text conditioning, which needs
            captions that a folder of videos does not have.
    """
    config = presets.get(options.preset)
    if config.conditioning == "text":
        raise ValueError(
            f"preset: got {options.preset!r}, which is conditioned on text; folders of videos have no captions"
        )
    if options.resolution is not None or options.patch is not None:
        config = config.with_pyramid(options.patch or config.patch, options.resolution or config.resolution)
    config = config.replace(
        fusion=options.fusion,
        detach_context=options.detach_context,
        coordinates=options.coordinates,
        conditioning="class" if class_names else "none",
        classes=max(1, len(class_names)),
        conditioning_dropout=config.conditioning_dropout if options.dropout is None else options.dropout,
    )
    return config if options.adaptive else config.without_adaptive_computation()


class Batch(dict[str, Any]):
    """Clips of one step: ``video`` uint8 ``[B, 3, F, H, W]``, ``labels`` int64 ``[B]``, ``paths``."""


def collate(items: list[ClipItem]) -> Batch:
    """Stacks dataset items into a :class:`Batch`."""
    return Batch(
        video=torch.stack([item["video"] for item in items]),
        labels=torch.tensor([item["label"] for item in items]),
        paths=[item["path"] for item in items],
    )


def step_generator(seed: int, step: int) -> torch.Generator:
    """The one source of randomness of a training step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def train(options: TrainOptions) -> HPDM:
    """Trains until ``options.steps``; returns the model.

    Raises:
        ValueError: options that contradict the run that is being resumed, or the data.
        FileNotFoundError: no such data.
        FloatingPointError: the loss is no longer finite.
        OSError: a checkpoint cannot be written; the one before it stays usable.
    """
    device = pick_device(options.device)
    resolution = options.resolution or presets.get(options.preset).resolution
    dataset = VideoDataset(
        options.data,
        frames=resolution[0],
        size=(resolution[1], resolution[2]),
        stride=options.stride,
        split=options.split,
        short=options.short,
        seed=options.seed,
        cache_bytes=options.cache_mb * 2**20,
    )
    config = build_config(options, dataset.class_names)
    checkpoints = list_checkpoints(options.out)
    if checkpoints:
        _check_resumable(options, config, dataset.class_names)
    torch.manual_seed(options.seed)
    model = HPDM(config, options.kernels, options.recompute).to(device)
    optimizer = make_optimizer(model, options.optimizer, options.lr, options.weight_decay)
    ema = EMA(model, options.ema)
    start = load_checkpoint(checkpoints[-1], model, ema, optimizer) if checkpoints else 0
    if options.init is not None and not checkpoints:
        load_checkpoint(newest_checkpoint(options.init), model, ema)
    save_run_config(options.out, config, dataset.class_names, _plain(options))
    logs: list[Log] = [JsonlLog(options.out / "log.jsonl", start)]
    if options.log == "tensorboard":
        logs.append(TensorBoardLog(options.out / "tensorboard", start))
    batches = iter(
        DataLoader(
            dataset,
            batch_sampler=ClipSampler(len(dataset), options.batch, options.seed, start=start),
            num_workers=options.workers,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
            persistent_workers=options.workers > 0,
        )
    )
    logger.info("%s: %s parameters, %d clips, device %s", options.preset, f"{_count(model):,}", len(dataset), device)
    before = torch.get_float32_matmul_precision()
    try:
        if options.precision != "fp32":
            torch.set_float32_matmul_precision("high")
        _loop(options, model, ema, optimizer, batches, start, logs, device)
    finally:
        torch.set_float32_matmul_precision(before)
        for log in logs:
            log.close()
    return model


def _loop(
    options: TrainOptions,
    model: HPDM,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    start: int,
    logs: list[Log],
    device: torch.device,
) -> None:
    step, saved = start, start
    model.train()
    bar = tqdm(total=options.steps, initial=start, unit="step", dynamic_ncols=True, smoothing=0.05)
    since, data_time, clock = start, 0.0, time.perf_counter()
    try:
        while step < options.steps:
            before = time.perf_counter()
            batch = next(batches)
            data_time += time.perf_counter() - before
            video = batch["video"].to(device, non_blocking=True)
            labels = batch["labels"].to(device) if model.config.conditioning == "class" else None
            rate = learning_rate(step, options.steps, options.warmup, options.lr)
            for group in optimizer.param_groups:
                group["lr"] = rate
            generator = step_generator(options.seed, step)
            with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                dropout = model.config.conditioning_dropout
                losses = denoising_error(model, video, labels, generator, dropout=dropout, spread=options.times).mean(0)
            optimizer.zero_grad(set_to_none=True)
            losses.mean().backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm or float("inf"), foreach=True)
            optimizer.step()
            ema.update(model)
            step += 1
            if step % options.log_every == 0 or step == options.steps:
                now = time.perf_counter()
                row = _row(step, losses, float(norm), rate, (step - since) * options.batch, now - clock, data_time)
                for log in logs:
                    log.write(row)
                bar.set_postfix(loss=f"{row['loss']:.4f}", clips_s=f"{row['clips_per_s']:.1f}", refresh=False)
                since, data_time, clock = step, 0.0, now
                if not torch.isfinite(losses).all():
                    raise FloatingPointError(
                        f"the loss is {row['loss']} at step {step}; the last checkpoint is of step {saved}. "
                        "Lower --lr or set --clip-norm"
                    )
            bar.update()
            if step % options.save_every == 0 or step == options.steps:
                save_checkpoint(options.out, step, model, ema, optimizer)
                saved = step
            if options.sample_every and step % options.sample_every == 0:
                _sample_grid(options, model, ema, step)
    except KeyboardInterrupt:
        if step > saved:
            save_checkpoint(options.out, step, model, ema, optimizer)
        logger.warning("interrupted at step %d; the same command resumes", step)
        raise
    finally:
        bar.close()


def _row(
    step: int, losses: Tensor, norm: float, rate: float, clips: int, seconds: float, data_seconds: float
) -> dict[str, float]:
    levels = {f"loss_level_{n}": value for n, value in enumerate(losses.tolist())}
    return {
        "step": step,
        "loss": losses.mean().item(),
        **levels,
        "lr": rate,
        "grad_norm": norm,
        "clips_per_s": clips / seconds,
        "data_share": data_seconds / seconds,
    }


@torch.no_grad()
def _sample_grid(options: TrainOptions, model: HPDM, ema: EMA, step: int) -> None:
    """A contact sheet of EMA samples, one per class (at most eight), always from the same seeds."""
    config = model.config
    device = model.latents.device
    averaged = HPDM(config, options.kernels).to(device).eval()
    for name, p in averaged.named_parameters():
        p.copy_(ema.shadow[name])
    classes = min(8, config.classes if config.conditioning == "class" else 4)
    labels = torch.arange(classes) if config.conditioning == "class" else None
    videos = Sampler(averaged, SamplerOptions(steps=options.sample_steps, overlap="none"))(range(classes), labels)[-1]
    folder = options.out / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    write_contact_sheet(folder / f"step-{step:08d}.png", list(to_uint8(videos)))


def to_uint8(video: Tensor) -> Tensor:
    """[-1, 1] float -> [0, 255] uint8 on the CPU."""
    return video.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def _check_resumable(options: TrainOptions, config: HPDMConfig, class_names: list[str]) -> None:
    """A run is resumed only as itself: same model, same classes, same batch, seed and schedule."""
    old_config, old_classes, training = load_run_config(options.out)
    if old_config != config:
        old, new = old_config.to_dict(), config.to_dict()
        changed = ", ".join(f"{k}: {old[k]} -> {new[k]}" for k in new if old[k] != new[k])
        raise ValueError(f"out: {options.out} holds a run of another config ({changed}); choose another folder")
    if old_classes != class_names:
        raise ValueError(f"data: got classes {class_names}, expected {old_classes} as in the run at {options.out}")
    now = _plain(options)
    # What may change between sittings without changing the curve.
    free = {"data", "out", "kernels", "recompute", "workers", "cache_mb", "log", "log_every", "save_every",
            "sample_every", "sample_steps", "device"}  # fmt: skip
    # A run of an earlier version has no value for an option that came later: it ran with what is now the default.
    was = {f.name: f.default for f in dataclasses.fields(options)} | training
    changed = ", ".join(f"{k}: {was[k]} -> {v}" for k, v in now.items() if k not in free and was[k] != v)
    if changed:
        raise ValueError(f"out: {options.out} holds a run with other options ({changed}); choose another folder")


def _plain(options: TrainOptions) -> dict[str, Any]:
    """The options as JSON would give them back."""
    return json.loads(json.dumps(dataclasses.asdict(options), default=str))


def _count(model: HPDM) -> int:
    return sum(p.numel() for p in model.parameters())
