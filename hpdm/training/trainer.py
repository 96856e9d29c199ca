"""The training loop: clips, losses, updates of the weights and their moving average, logs, checkpoints.

Everything random in a step comes from generators seeded by (seed, number of the step), and its clips from the data's
order (:mod:`hpdm.training.batches`). So a resumed run continues the same loss curve: bit for bit on one process of a
CPU, up to rounding on another number of ranks. Runs of earlier versions draw by the number of the micro-batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from hpdm import distributed
from hpdm.data.mixture import Mixture
from hpdm.objective import on_device, pinned
from hpdm.recipe import Recipe
from hpdm.system import System
from hpdm.text import EmbeddingStore
from hpdm.training.ahead import DrawnAhead
from hpdm.training.averaged import averaged_weights
from hpdm.training.batches import Batch, MicroBatches, loader, noise_generator
from hpdm.training.checkpoint import list_checkpoints, load_checkpoint, load_initial
from hpdm.training.delayed import Delayed
from hpdm.training.ema import EMA, laws
from hpdm.training.inputs import Inputs
from hpdm.training.log import Reports
from hpdm.training.means import Means
from hpdm.training.measuring import Measuring
from hpdm.training.optim import make_optimizer, zero_matrices
from hpdm.training.options import TrainOptions
from hpdm.training.parallel import full_tensor, parallelize
from hpdm.training.profiling import profiled
from hpdm.training.reconstructions import ReconstructionSheet
from hpdm.training.samples import SampleGrid
from hpdm.training.saving import Saver, WriteSnapshot
from hpdm.training.schedule import rate_of_step
from hpdm.training.second_player import SecondPlayer
from hpdm.training.short_clips import ShortClips
from hpdm.training.shutdown import Interrupted, Stop
from hpdm.training.skips import Skips, advice
from hpdm.training.speed import Speed, peak_tflops
from hpdm.training.statistics import optimizer_statistics
from hpdm.training.step import Update, update
from hpdm.training.stored import weights_of

logger = logging.getLogger(__name__)


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
    inputs: Inputs
    """What tells the clips and embeddings from others, for a run that goes on."""
    micro_batch: int
    """Clips of a micro-batch."""
    start: Callable[[nn.Module], None] | None = None
    """Initializes the model of a new run, e.g. from a base model; ``None`` for random weights."""
    init: Path | None = None
    """The checkpoint from whose weights a new run starts."""
    validate: Callable[[nn.Module], dict[str, float]] | None = None
    """Validates a model in eval mode: columns of the log. A collective; ``None`` for no validation."""
    write_snapshot: WriteSnapshot | None = None
    """Writes a snapshot of the averaged weights."""
    step_flops: Callable[[], float | None] = lambda: None
    """FLOPs of a step on this rank; ``None`` as long as they are not known."""
    history: Sequence[Any] = ()
    """How the run's schedule and inputs were changed, for its config."""


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
        built = job.system.build(job.config, options.kernels, options.recompute)
        zero_started = zero_matrices(built) if recipe.lamb_floor == "xavier" else ()  # reads all matrices
        self.measuring = Measuring(job.system, job.config, job.dataset, job.embeddings, job.micro_batch, built)
        self.model = built.to(device)
        checkpoints = list_checkpoints(options.out)  # the newest is good, see prepare
        with distributed.raise_on_all_ranks():
            if job.start is not None and not checkpoints:
                job.start(self.model)
        self.network = parallelize(job.system, self.model, recipe.parallel, device, options.compile, recipe.shard_ranks)
        hidden = job.system.hidden_modules(self.model)
        self.optimizer = make_optimizer(
            self.model, recipe.optimizer, recipe.lr, recipe.weight_decay, zero_started, hidden, options.kernels
        )
        with distributed.raise_on_all_ranks():
            if job.init is not None and not checkpoints:
                load_initial(job.init, self.model, job.system.added)
        self.ema = EMA(self.model, *laws(recipe.ema, recipe.ema_decay))
        opponent = job.system.opponent(job.config)
        self.second = None if opponent is None else SecondPlayer(opponent, device, options.kernels)
        self.step = 0
        self.loss_names: list[str] = []
        with distributed.raise_on_all_ranks():
            if checkpoints:
                self.step = load_checkpoint(
                    checkpoints[-1], self.model, self.ema, self.optimizer, verified=True, second=self.second
                )
        if self.step < recipe.steps:
            self.measuring.forget(self.model, self.ema)
        self.saved, self.snapshot = self.step, 0
        self.means, self.stop = Means(), Stop()
        self.skips, self.flags = Skips(min(options.max_skipped, max(1, recipe.steps - self.step))), Delayed()
        self.stopping = 0
        """Number of the signal by which the ranks have agreed to stop; 0 for none."""
        steering = options.steering
        self.grid: SampleGrid | ReconstructionSheet | None = None
        with distributed.raise_on_all_ranks():
            if options.sample_every and job.system.generates:
                self.grid = SampleGrid(
                    job.system, job.config, job.dataset, job.embeddings, steering.sample_prompts, options.sample_steps,
                    options.preset,
                )  # fmt: skip
            elif options.sample_every:
                self.grid = ReconstructionSheet(job.system, job.dataset)
        self.saver = Saver(
            options.out, self.model, self.ema, self.optimizer, steering.keep, job.write_snapshot, self.second
        )
        self.batches = MicroBatches(job.dataset, recipe.batch, job.micro_batch, options.seed, self.step)
        self.draws = DrawnAhead(self.draw)
        self.waiting: Callable[[], AbstractContextManager[None]] = nullcontext
        """Makes the context in which the training waits for clips or draws."""
        self.short_clips = ShortClips(job.dataset)

    def fit(self) -> None:
        """Trains to the recipe's last step; raises as :func:`hpdm.commands.train.train`."""
        options, last = self.options, self.recipe.steps
        self.model.train()
        batch_bytes = self.job.micro_batch * self.job.config.channels * math.prod(self.job.config.resolution)
        clips = loader(self.job.dataset, self.batches, options.workers, self.device, self.job.embeddings, batch_bytes)
        peak = options.steering.peak_tflops or peak_tflops(self.device, options.precision)
        with distributed.raise_on_all_ranks():
            folder = options.out if distributed.is_first() else None
            speed = Speed(self.device, self.job.step_flops if distributed.is_first() else lambda: None, peak)
            about = options.as_json(self.recipe) | {"micro_batch": self.job.micro_batch}
            reports = Reports(folder, options.log, self.step, last, self.recipe.batch, speed, about)
        with (
            reports, self.stop, profiled(options.profile, options.out / "profile") as profile_step, self.saver,
            closing(clips), self.draws,
        ):  # fmt: skip
            if self.step == last:
                self._complete_measurements(reports)
            self._complete_snapshots()
            self.waiting = reports.waiting
            while self.step < last:
                distributed.at(self.step, 0, "reading clips")
                try:
                    with self._interruptible(), self.waiting():
                        self.draws.begin(self.batches.numbers(self.step))  # beside the clips
                        batches = [next(clips) for _ in range(self.batches.own)]
                except Interrupted as interruption:
                    self._save_and_stop(interruption.number)
                except Exception:
                    self._save_after_error()
                    raise
                distributed.at(self.step, 1, "training")
                done, rate = self.train_step(batches)
                distributed.at(self.step, 2, "")  # what may follow, such as a validation, takes any time
                second = self._second_of_step()
                others = None if second is None else second.columns(done.losses)
                self.means.add(dict(zip(self.loss_names, done.losses)), done.norm, done.applied, others)
                self.step += 1
                reports.step()
                profile_step()
                self._after_step(reports, rate)

    def _after_step(self, reports: Reports, rate: float) -> None:
        """Logs, validates, saves, samples and stops, each if it is due after this step."""
        options, steering, at_end = self.options, self.options.steering, self.step == self.recipe.steps
        logged = self._is_due(options.log_every) or at_end
        checkpoint = self._is_due(options.save_every) or at_end
        self._read_flags(wait=logged or checkpoint)
        if logged:
            self._log(reports, rate, at_end)
        # Collectives are called only on steps that synchronize anyway.
        if logged or distributed.world_size() == 1:
            self.saver.check()
        # A scheduler kills a process soon after its SIGTERM, so only what resumption needs is still done.
        if self.stopping and not at_end:
            self._save_and_stop(self.stopping)
        if self.job.validate is not None and (self._is_due(steering.validate_every) or at_end):
            with self._pausing(reports):
                self.validate(self.job.validate, reports)
        if at_end:
            with self._pausing(reports):
                self.measure()
        snapshot = self._is_due(steering.snapshot_every) or (at_end and steering.snapshot_every > 0)
        self.save(checkpoint=checkpoint, snapshot=snapshot)
        if self.grid is not None and self._is_due(options.sample_every):
            with self._pausing(reports):
                reports.write_image("samples", self.sample_grid(self.grid), self.step)

    def _log(self, reports: Reports, rate: float, at_end: bool) -> None:
        """Writes a row about the steps since the last one; of steps that were all skipped there are no means."""
        skipped = self.skips.read()
        steps = self.means.steps - skipped
        if steps:
            row = self.means.read(skipped)
            norms = optimizer_statistics(self.model, self.optimizer, self.job.system.parameter_parts)
            reports.write({"step": self.step, **row, "lr": rate, "steps": steps, "skipped": skipped, **norms})
        else:
            reports.write_row({"step": self.step, "lr": rate, "steps": 0, "skipped": skipped})
        self.means.clear()
        self.short_clips.report(last=at_end)

    def _interruptible(self) -> AbstractContextManager[None]:
        """Within the block a signal ends the work at once, unless other ranks would wait for this one."""
        return self.stop.interruptible(distributed.world_size() == 1)

    @contextmanager
    def _pausing(self, reports: Reports) -> Iterator[None]:
        """For work beside the training, which a signal ends at once."""
        try:
            with self._interruptible(), reports.paused():
                yield
        except Interrupted as interruption:
            self._save_and_stop(interruption.number)

    def _save_and_stop(self, number: int) -> NoReturn:
        """Saves a checkpoint of this step and raises :class:`Interrupted` with the number of the signal."""
        self._read_flags(wait=True)
        self.save(checkpoint=True)
        self.saver.wait()
        if distributed.is_first():
            logger.warning("stopped at step %d; the same command resumes", self.step)
        raise Interrupted(number)

    def _save_after_error(self) -> None:
        """Saves what was learned before an error that has nothing to do with it, where no other rank is needed."""
        if distributed.world_size() > 1 or self.saved == self.step:
            return
        try:
            self.save(checkpoint=True)
            self.saver.wait()
            logger.warning("saved step %d before ending with an error", self.step)
        except (OSError, FloatingPointError) as error:
            logger.error("step %d could not be saved: %s", self.step, error)

    def _complete_measurements(self, reports: Reports) -> None:
        """Measures a model whose last step is done: it was stopped before that, or this step was not to be the last."""
        with self._pausing(reports):
            measured = self.measure()
        if measured:
            self.saved = self.step - 1  # the checkpoint of this step is written again
            self.save(checkpoint=True)

    def _complete_snapshots(self) -> None:
        """Writes the snapshot of the step that is resumed from, if the run stopped between checkpoint and snapshot."""
        every, at_end = self.options.steering.snapshot_every, self.step == self.recipe.steps
        if self.step > 0 and (self._is_due(every) or (at_end and every > 0)):
            missing = distributed.broadcast(not self.saver.snapshot_path(self.step).exists())
            self.save(checkpoint=False, snapshot=missing)

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def train_step(self, batches: list[Batch]) -> tuple[Update, float]:
        """One update from this rank's micro-batches, and its learning rate.

        The update is not applied, on any rank, where the norm of its gradient is not finite.
        """
        options, recipe = self.options, self.recipe
        rate = rate_of_step(recipe, self.step)
        second = self._second_of_step()
        for group in (*self.optimizer.param_groups, *(() if second is None else second.optimizer.param_groups)):
            group["lr"] = rate

        def losses_of(batch: Batch, draws: Any) -> Tensor:
            if second is not None:
                values = second.values(self.model, *self._on_device(batch, draws), self.network)
                self.loss_names[:] = second.loss_names
                return values
            losses = self.losses(batch, draws)
            self.loss_names[:] = losses
            return torch.stack(list(losses.values()), dim=1).mean(0)  # [B, L] -> [L]

        following = self.batches.numbers(self.step + 1) if self.step + 1 < recipe.steps else ()
        with self.waiting():
            draws = self.draws.take(self.batches.numbers(self.step), following)
        done = update(
            self.network,
            self.optimizer,
            self.ema,
            [partial(losses_of, *each) for each in zip(batches, draws)],
            clip_norm=options.clip_norm,
            autocast=self.autocast,
            accept=self._accept,
            second=second,
        )
        return done, rate

    def _second_of_step(self) -> SecondPlayer | None:
        """The second player, if it takes part in the step that is next or being made."""
        return self.second if self.second is not None and self.second.plays(self.step + 1) else None

    def _accept(self, norm: Tensor) -> Tensor:
        """Whether a gradient of this norm is finite on every rank; agrees on a signal to stop, too. A collective.

        The answer stays on the device, and :meth:`_read_flags` reads it later.
        """
        broken = (~norm.isfinite()).float()
        # Filled on the device: a number that is copied to it would wait for it.
        flags = distributed.maximum(torch.stack((broken, torch.full_like(broken, self.stop.requested))))
        self.flags.put(self.step + 1, flags)
        return flags[0] == 0

    def _read_flags(self, wait: bool) -> None:
        """Counts skipped steps and hears of signals on all ranks: up to the step before the last, or with ``wait`` all.

        Raises:
            FloatingPointError: too many steps in a row were skipped.
        """
        for step, (broken, stopping) in self.flags.take(but=0 if wait else 1):
            self.skips.count(step, bool(broken), self.saved)
            self.stopping = int(stopping)
        if distributed.world_size() == 1:
            self.stopping = self.stop.requested

    def draw(self, number: int) -> Any:
        """What is random in the micro-batch ``number`` of the run; pinned for a GPU."""
        config, recipe, micro = self.job.config, self.recipe, self.job.micro_batch
        batch, rows = micro, None
        if self.options.objective.draws == "step":
            batch = recipe.batch
            number, first = divmod(number * micro, batch)
            rows = range(first, first + micro)
        draws = self.job.system.draw(
            config,
            batch,
            noise_generator(self.options.seed, number),
            objective=self.options.objective,
            dropout=config.conditioning_dropout,
            images=recipe.images,
            rows=rows,
        )
        return pinned(draws) if self.device.type == "cuda" else draws

    def losses(self, batch: Batch, draws: Any) -> dict[str, Tensor]:
        """The losses of a micro-batch by name, each ``[B]``."""
        return self.job.system.losses(self.model, *self._on_device(batch, draws), self.network)

    def _on_device(self, batch: Batch, draws: Any) -> tuple[dict[str, Tensor], Any]:
        """A micro-batch and what is random in it, on the device."""
        return batch.inputs(self.job.config.conditioning, self.device), on_device(draws, self.device)

    def autocast(self) -> AbstractContextManager[object]:
        """Automatic mixed precision, if the run has it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16")

    def save(self, *, checkpoint: bool, snapshot: bool = False) -> None:
        """Saves a checkpoint or snapshot of this step, unless it is saved already. A collective.

        Raises:
            FloatingPointError: the weights or what belongs to them are not finite; nothing is saved.
            OSError: as :meth:`hpdm.training.saving.Saver.save`.
        """
        checkpoint, snapshot = checkpoint and self.saved < self.step, snapshot and self.snapshot < self.step
        if not checkpoint and not snapshot:
            return
        try:
            self.saver.save(self.step, checkpoint=checkpoint, snapshot=snapshot)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} after step {self.step}; {advice(self.saved)}") from None
        self.saved = self.step if checkpoint else self.saved
        self.snapshot = self.step if snapshot else self.snapshot

    @torch.no_grad()
    def validate(self, validate: Callable[[nn.Module], dict[str, float]], reports: Reports) -> None:
        """Writes a row with the errors of the moving average. A collective."""
        with averaged_weights(self.model, self.ema), self.autocast():
            errors = validate(self.model)
        trained = [errors[name] for name in (f"validation_{loss}" for loss in self.loss_names) if name in errors]
        mean = {"validation": sum(trained) / len(trained)} if trained else {}
        reports.write_row({"step": self.step, **mean, **errors})

    def sample_grid(self, grid: SampleGrid | ReconstructionSheet) -> Path:
        """Writes a contact sheet of the moving average and returns its path. A collective."""
        path = self.options.out / "samples" / f"step-{self.step:08d}.png"
        with self._whole_model(0) as model:
            grid.write(model, self.step, path)
        return path

    def measure(self) -> bool:
        """Measures what is stored with the weights, unless it is measured; returns whether it was not. A collective."""
        weights = (None, *range(len(self.ema.shadows)))
        models = {number: self._whole_model(number) for number in weights}
        return self.measuring.measure(self.model, self.ema, models, self.device)

    @contextmanager
    def _whole_model(self, average: int | None) -> Iterator[nn.Module]:
        """The model in eval mode, whole on this rank, with the weights of an average, or with ``None`` its own.

        A collective. Evaluation calls parts of a model by themselves, for which sharded weights are not gathered.
        """
        if self.saver.sharded:
            whole = self.job.system.build(self.job.config, self.options.kernels).to(self.device).eval()
            weights = weights_of(self.model) if average is None else self.ema.stored(average)
            with torch.no_grad():
                for name, t in weights_of(whole).items():
                    t.copy_(full_tensor(weights[name]))
            yield whole
        elif average is not None:
            with averaged_weights(self.model, self.ema, average):
                yield self.model
        else:
            self.model.eval()
            try:
                yield self.model
            finally:
                self.model.train()
