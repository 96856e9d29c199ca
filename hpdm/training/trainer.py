"""The training loop: clips, losses, updates of the weights and their moving average, logs, checkpoints.

Everything random in a step comes from generators seeded by (seed, number of the micro-batch), and its clips from the
data's order (:mod:`hpdm.training.batches`). So a resumed run continues the same loss curve: bit for bit on one process
of a CPU, up to rounding on another number of ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from hpdm import distributed
from hpdm.data.mixture import Mixture
from hpdm.recipe import Recipe
from hpdm.sampling import SamplerOptions
from hpdm.system import System
from hpdm.text import EmbeddingStore
from hpdm.training.batches import Batch, MicroBatches, loader, noise_generator
from hpdm.training.checkpoint import list_checkpoints, load_checkpoint, newest_checkpoint, save_checkpoint
from hpdm.training.ema import EMA, laws
from hpdm.training.log import Reports
from hpdm.training.optim import make_optimizer, zero_matrices
from hpdm.training.options import TrainOptions
from hpdm.training.parallel import parallelize
from hpdm.training.profiling import profiled
from hpdm.training.schedule import rate_of_step
from hpdm.training.short_clips import ShortClips
from hpdm.training.shutdown import Stop
from hpdm.training.statistics import optimizer_statistics
from hpdm.training.step import update
from hpdm.video import to_uint8, write_contact_sheet

logger = logging.getLogger(__name__)

GRID_VIDEOS = 8
"""Largest number of videos in a sample grid."""


@dataclass(frozen=True)
class Job:
    """A run's model, data and options."""

    options: TrainOptions
    recipe: Recipe
    system: System
    config: Any
    """The model's."""
    dataset: Mixture
    """Clips at the config's resolution."""
    embeddings: EmbeddingStore | None
    """Of the clips' captions, for a model with text."""
    micro_batch: int
    """Clips of a micro-batch."""
    start: Callable[[nn.Module], None] | None = None
    """Initializes the model of a new run, e.g. from a base model; ``None`` for random weights."""
    history: Sequence[Any] = ()
    """How the run's schedule was changed, for its config."""


class Trainer:
    """One run on this rank: its model, optimizer and moving average, from the newest checkpoint if there is one.

    Args:
        job: what to train.
        device: this rank's.

    Raises:
        ValueError, FileNotFoundError: a checkpoint that is damaged, missing or of another model, or a batch that the
            ranks cannot share.
    """

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.options, self.recipe, self.device = job, job.options, job.recipe, device
        options, recipe = job.options, job.recipe
        torch.manual_seed(options.seed)
        self.model = job.system.build(job.config, options.kernels, options.recompute).to(device)
        zero_started = zero_matrices(self.model) if recipe.lamb_floor == "xavier" else ()
        checkpoints = list_checkpoints(options.out)
        with distributed.raise_on_all_ranks():
            if job.start is not None and not checkpoints:
                job.start(self.model)
        self.network = parallelize(job.system, self.model, recipe.parallel, device, options.compile)
        self.optimizer = make_optimizer(self.model, recipe.optimizer, recipe.lr, recipe.weight_decay, zero_started)
        with distributed.raise_on_all_ranks():
            if options.init is not None and not checkpoints:
                load_checkpoint(newest_checkpoint(options.init), self.model)
        self.ema = EMA(self.model, *laws(recipe.ema, recipe.ema_decay))
        self.step = 0
        with distributed.raise_on_all_ranks():
            if checkpoints:
                self.step = load_checkpoint(checkpoints[-1], self.model, self.ema, self.optimizer)
        self.saved = self.step
        self.batches = MicroBatches(job.dataset, recipe.batch, job.micro_batch, options.seed, self.step)
        self.short_clips = ShortClips(job.dataset)

    def fit(self) -> None:
        """Trains to the recipe's last step; raises as :func:`hpdm.commands.train.train`."""
        options, last = self.options, self.recipe.steps
        self.model.train()
        clips = loader(self.job.dataset, self.batches, options.workers, self.device, self.job.embeddings)
        with distributed.raise_on_all_ranks():
            folder = options.out if distributed.is_first() else None
            reports = Reports(folder, options.log, self.step, last, self.recipe.batch)
        with reports, Stop() as stop, profiled(options.profile, options.out / "profile") as profile_step:
            while self.step < last:
                with reports.waiting(), record_function("data"):
                    batches = [next(clips) for _ in range(self.batches.own)]
                losses, norm, rate = self.train_step(batches)
                self.step += 1
                reports.step()
                profile_step()
                self._after_step(reports, stop, losses, norm, rate)

    def _after_step(self, reports: Reports, stop: Stop, losses: dict[str, Tensor], norm: Tensor, rate: float) -> None:
        """Logs, saves, samples and stops, each if it is due after this step."""
        options, last = self.options, self.recipe.steps
        logged = self.step % options.log_every == 0 or self.step == last
        if logged:
            values = distributed.mean(torch.stack(list(losses.values())))
            row = _row(self.step, dict(zip(losses, values.tolist())), values, full_tensor(norm), rate)
            reports.write(row | optimizer_statistics(self.model, self.optimizer, self.job.system.parameter_parts))
            self.short_clips.report(last=self.step == last)
            self.check_finite(values)
        if self.step % options.save_every == 0 or self.step == last:
            self.save()
        if options.sample_every and self.step % options.sample_every == 0:
            self.sample_grid()
        # any_rank is a collective: call it only on steps that synchronize anyway.
        may_stop = logged or distributed.world_size() == 1
        if may_stop and distributed.any_rank(stop.requested) and self.step < last:
            self.save()
            logger.warning("stopped at step %d; the same command resumes", self.step)
            raise KeyboardInterrupt

    def check_finite(self, losses: Tensor) -> None:
        """Raises FloatingPointError where a loss is no longer finite."""
        if not torch.isfinite(losses).all():
            raise FloatingPointError(
                f"the loss is {losses.mean().item()} at step {self.step}; the last checkpoint is of step {self.saved}. "
                "Lower --lr or set --clip-norm"
            )

    def train_step(self, batches: list[Batch]) -> tuple[dict[str, Tensor], Tensor, float]:
        """One update from this rank's micro-batches; its losses by name, the gradient's norm and the learning rate."""
        options, recipe = self.options, self.recipe
        rate = rate_of_step(recipe, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        names: list[str] = []

        def losses_of(batch: Batch, number: int) -> Tensor:
            losses = self.losses(batch, noise_generator(options.seed, number))
            names[:] = losses
            return torch.stack(list(losses.values()), dim=1).mean(0)  # [B, L] -> [L]

        numbers = self.batches.numbers(self.step)
        total, norm = update(
            self.network,
            self.optimizer,
            self.ema,
            [partial(losses_of, batch, number) for batch, number in zip(batches, numbers)],
            clip_norm=options.clip_norm,
            autocast=lambda: torch.autocast(self.device.type, torch.bfloat16, enabled=options.precision == "bf16"),
        )
        return dict(zip(names, total)), norm, rate

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The losses of a micro-batch by name, each ``[B]``."""
        config = self.job.config
        return self.job.system.losses(
            self.model,
            batch.inputs(config.conditioning, self.device),
            generator,
            time_distribution=self.options.times,
            dropout=config.conditioning_dropout,
            images=self.recipe.images,
            network=self.network,
        )

    def save(self) -> None:
        """Saves a checkpoint of this step, unless it is saved already. A collective."""
        if self.saved < self.step:
            save_checkpoint(self.options.out, self.step, self.model, self.ema, self.optimizer)
            self.saved = self.step

    @torch.no_grad()
    def sample_grid(self) -> None:
        """Writes a contact sheet of samples from the moving average, one per class, always from the same seeds.

        A collective: the ranks share the tiles, and each holds the full weights.
        """
        config, system = self.job.config, self.job.system
        averaged = system.build(config, self.options.kernels).to(self.device).eval()
        for name, p in averaged.named_parameters():
            p.copy_(full_tensor(self.ema.shadow[name]))
        by_class = config.conditioning == "class"
        count = min(GRID_VIDEOS, config.classes) if by_class else GRID_VIDEOS // 2
        sampler = system.sampler(averaged, SamplerOptions(steps=self.options.sample_steps, overlap="none"))
        videos = sampler(range(count), torch.arange(count) if by_class else None)[-1]
        if distributed.is_first():
            folder = self.options.out / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            write_contact_sheet(folder / f"step-{self.step:08d}.png", list(to_uint8(videos)))


def full_tensor(t: Tensor) -> Tensor:
    """Gathers a DTensor; a collective, to be called on every rank."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def _row(step: int, losses: dict[str, float], values: Tensor, norm: Tensor, rate: float) -> dict[str, float]:
    by_name = {f"loss_{name}": value for name, value in losses.items()}
    return {"step": step, "loss": values.mean().item(), **by_name, "lr": rate, "grad_norm": norm.item()}
