"""Training: clips -> patches of every level -> noise -> v -> loss -> weights, their moving average, checkpoints.

Everything random in a step comes from generators seeded by (seed, number of the micro-batch), and its clips from the
data's order (``batches``), so that a resumed run continues the same loss curve: on one process of a CPU bit for bit, on
another number of processes up to rounding.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from hpdm import distributed
from hpdm.data.clips import VideoDataset
from hpdm.patch.base_model import load_base
from hpdm.patch.config import HPDMConfig
from hpdm.patch.model import HPDM
from hpdm.patch.objective import denoising_error
from hpdm.patch.presets import Recipe
from hpdm.patch.sampler import Sampler, SamplerOptions
from hpdm.text import EmbeddingStore
from hpdm.training.batches import Batch, MicroBatches, loader, noise_generator
from hpdm.training.checkpoint import list_checkpoints, load_checkpoint, newest_checkpoint, save_checkpoint
from hpdm.training.log import Reports
from hpdm.training.optim import EMA, learning_rate, make_optimizer
from hpdm.training.parallel import gradients_averaged, parallelise
from hpdm.training.profiling import profiled
from hpdm.training.shutdown import Stop
from hpdm.video import to_uint8, write_contact_sheet

if TYPE_CHECKING:
    from hpdm.commands.train import TrainOptions

logger = logging.getLogger(__name__)


class Trainer:
    """One run on this process: its model, optimizer and moving average, from the newest checkpoint if there is one.

    Args:
        options: what the recipe does not say.
        recipe: steps, batch and optimizer.
        config: the model's.
        dataset: clips at the target resolution.
        embeddings: of their captions, for a model with text.
        micro_batch: clips at a time.
        device: this process's.

    Raises:
        ValueError, FileNotFoundError: a checkpoint or base that is damaged, missing or of another model, or a batch
            that the processes cannot share.
    """

    def __init__(
        self, options: TrainOptions, recipe: Recipe, config: HPDMConfig, dataset: VideoDataset,
        embeddings: EmbeddingStore | None, micro_batch: int, device: torch.device,
    ) -> None:  # fmt: skip
        self.options, self.recipe, self.config = options, recipe, config
        self.dataset, self.embeddings, self.device = dataset, embeddings, device
        torch.manual_seed(options.seed)
        self.model = HPDM(config, options.kernels, options.recompute).to(device)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        checkpoints = list_checkpoints(options.out)
        with distributed.raise_on_all_ranks():
            if options.base is not None and not checkpoints:
                load_base(self.model, options.base)
        self.network = parallelise(self.model, recipe.parallel, device, options.compile)
        self.optimizer = make_optimizer(self.model, recipe.optimizer, recipe.lr, recipe.weight_decay)
        self.ema = EMA(self.model, recipe.ema)
        self.step = 0
        with distributed.raise_on_all_ranks():
            if checkpoints:
                self.step = load_checkpoint(checkpoints[-1], self.model, self.ema, self.optimizer)
            elif options.init is not None:
                load_checkpoint(newest_checkpoint(options.init), self.model, self.ema)
        self.saved = self.step
        self.batches = MicroBatches(len(dataset), recipe.batch, micro_batch, options.seed, self.step)

    def fit(self) -> None:
        """Steps, logs and saves to the recipe's last step; see :func:`hpdm.commands.train.train` for what it raises."""
        options, last = self.options, self.recipe.steps
        rank, processes = (distributed.rank(), distributed.world_size())
        self.model.train()
        clips = loader(self.dataset, self.batches, options.workers, self.device, self.embeddings)
        with distributed.raise_on_all_ranks():
            folder = options.out if rank == 0 else None
            reports = Reports(folder, options.log, self.step, last, self.recipe.batch)
        with (
            reports,
            Stop() as stop,
            profiled(options.profile, options.out / "profile") as stepped,
        ):
            while self.step < last:
                with reports.waiting(), record_function("data"):
                    batches = [next(clips) for _ in range(self.batches.own)]
                losses, norm, rate = self.train_step(batches)
                self.step += 1
                reports.step()
                stepped()
                logged = self.step % options.log_every == 0 or self.step == last
                if logged:
                    losses = distributed.mean(losses)
                    reports.write(_row(self.step, losses, whole(norm), rate))
                    self.check(losses)
                if self.step % options.save_every == 0 or self.step == last:
                    self.save()
                if options.sample_every and self.step % options.sample_every == 0:
                    self.sample_grid()
                # Asking the others means waiting for them: only where the loss is looked at anyway.
                if (logged or processes == 1) and distributed.any_rank(stop.asked) and self.step < last:
                    self.save()
                    logger.warning("stopped at step %d; the same command resumes", self.step)
                    raise KeyboardInterrupt

    def check(self, losses: Tensor) -> None:
        """Raises FloatingPointError where a level's loss is no longer finite."""
        if not torch.isfinite(losses).all():
            raise FloatingPointError(
                f"the loss is {losses.mean().item()} at step {self.step}; the last checkpoint is of step {self.saved}. "
                "Lower --lr or set --clip-norm"
            )

    def train_step(self, batches: list[Batch]) -> tuple[Tensor, Tensor, float]:
        """One update from this process's micro-batches; its loss per level, the gradient's norm and the rate."""
        options, recipe = self.options, self.recipe
        rate = learning_rate(self.step, recipe.steps, recipe.warmup, recipe.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(self.config.levels, device=self.device)
        for i, (number, batch) in enumerate(zip(self.batches.numbers(self.step), batches)):
            with gradients_averaged(self.network, last=i == len(batches) - 1):
                with (
                    record_function("forward"),
                    torch.autocast(self.device.type, torch.bfloat16, enabled=options.precision == "bf16"),
                ):
                    losses = self.losses(batch, noise_generator(options.seed, number)) / len(batches)
                with record_function("backward"):
                    losses.mean().backward()
            total += losses.detach()
        with record_function("optimizer"):
            norm = torch.nn.utils.clip_grad_norm_(
                self.model.parameters(), options.clip_norm or float("inf"), foreach=True
            )
            self.optimizer.step()
            self.ema.update(self.model)
        return total, norm, rate

    def losses(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Mean over the clips of the error of v per level, ``[L]``."""
        wanted = {"none": ("video",), "class": ("video", "labels"), "text": ("video", "text", "text_mask")}
        there = {key: batch[key].to(self.device, non_blocking=True) for key in wanted[self.config.conditioning]}
        errors = denoising_error(
            self.model,
            there["video"],
            there.get("labels"),
            generator,
            dropout=self.config.conditioning_dropout,
            spread=self.options.times,
            text=there.get("text"),
            text_mask=there.get("text_mask"),
            images=self.recipe.images,
            network=self.network,
        )
        return errors.mean(0)

    def save(self) -> None:
        """A checkpoint of this step, unless there is one already."""
        if self.saved < self.step:
            save_checkpoint(self.options.out, self.step, self.model, self.ema, self.optimizer)
            self.saved = self.step

    @torch.no_grad()
    def sample_grid(self) -> None:
        """A contact sheet of EMA samples, one per class (at most eight), always from the same seeds.

        All processes share the work, each with whole weights.
        """
        config = self.config
        averaged = HPDM(config, self.options.kernels).to(self.device).eval()
        for name, p in averaged.named_parameters():
            p.copy_(whole(self.ema.shadow[name]))
        count = min(8, config.classes if config.conditioning == "class" else 4)
        labels = torch.arange(count) if config.conditioning == "class" else None
        sampler = Sampler(averaged, SamplerOptions(steps=self.options.sample_steps, overlap="none"))
        videos = sampler(range(count), labels)[-1]
        if distributed.is_first():
            folder = self.options.out / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            write_contact_sheet(folder / f"step-{self.step:08d}.png", list(to_uint8(videos)))


def whole(t: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every process asks."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def _row(step: int, losses: Tensor, norm: Tensor, rate: float) -> dict[str, float]:
    levels = {f"loss_level_{n}": value for n, value in enumerate(losses.tolist())}
    return {"step": step, "loss": losses.mean().item(), **levels, "lr": rate, "grad_norm": norm.item()}
