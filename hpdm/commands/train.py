"""``hpdm train``: sets up or resumes a run and trains it; the training loop is in :mod:`hpdm.training.trainer`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpdm import distributed, presets, published, runs, systems
from hpdm.commands import provenance
from hpdm.commands.autoencoder import autoencoder_of
from hpdm.commands.common import only_writer
from hpdm.commands.latents import check_latents, open_latents
from hpdm.commands.resume import check_resumable, history, recipe_of, with_options_of_run
from hpdm.commands.steering import choose_micro_batch, open_validation, snapshot_writer
from hpdm.data.clips import VideoDataset
from hpdm.data.layout import Split, split_applies
from hpdm.data.mixture import Mixture, parse_root
from hpdm.data.summary import log_summary
from hpdm.files import check_not_a_file
from hpdm.opponent import Opponent
from hpdm.planning.step_flops import StepFlops
from hpdm.recipe import Recipe
from hpdm.runs import RunConfig
from hpdm.system import System
from hpdm.text import EmbeddingStore
from hpdm.training.checkpoint import good_checkpoint, list_checkpoints, newest_checkpoint, remove_leftovers
from hpdm.training.inputs import Inputs
from hpdm.training.options import TrainOptions
from hpdm.training.parallel import shard_size
from hpdm.training.schedule import check_schedule, peak_rate
from hpdm.training.trainer import Job, Trainer

logger = logging.getLogger(__name__)


def run(options: TrainOptions) -> int:
    """The command ``hpdm train``; returns the exit status."""
    train(options)
    return 0


def train(options: TrainOptions) -> nn.Module:
    """Trains until the recipe's last step; returns the model.

    A collective: under ``torchrun`` every rank calls it. An error on one rank is raised on all.

    Raises:
        ValueError: options that contradict the run that is being resumed, the data, or those of another rank; or all
            checkpoints of the run are damaged.
        FileNotFoundError: no such data.
        LockedError: another process trains in the same folder.
        RuntimeError: another rank failed while the run was set up.
        FloatingPointError: too many gradients in a row are not finite, or the weights are not; the last checkpoint is.
        OSError: a checkpoint cannot be written; the one before it stays usable.
        Interrupted: a signal (:data:`hpdm.training.shutdown.SIGNALS`), after a checkpoint; a KeyboardInterrupt.
    """
    device = distributed.pick_device(options.device)
    with distributed.process_group(device, options.timeout) as device, only_writer(options.out, "hpdm train"):
        job = prepare(options, device)
        before = torch.get_float32_matmul_precision()
        values = job.options.as_json(job.recipe)
        values |= {"micro_batch": job.micro_batch, "history": list(job.history)}
        values |= {"provenance": provenance.of_run(job.inputs)}
        about = RunConfig(job.system, job.config, _class_names(job.config, job.dataset), values)
        share = job.recipe.batch // distributed.world_size()
        flops = StepFlops(job.system, job.config, share)
        job = dataclasses.replace(job, write_snapshot=snapshot_writer(job.options, about), step_flops=flops)
        trainer = Trainer(job, device)
        with distributed.raise_on_all_ranks():
            if distributed.is_first():
                runs.save_run_config(options.out, about)
                job.inputs.save_lists(options.out)
        if distributed.is_first():
            _describe(job.dataset)
        logger.info(
            "%s: %s parameters, %d clips, device %s, %d process(es)",
            options.preset, f"{sum(p.numel() for p in trainer.model.parameters()):,}", len(job.dataset), device,
            distributed.world_size(),
        )  # fmt: skip
        _announce_rate(job.recipe)
        try:
            if options.precision != "fp32":
                torch.set_float32_matmul_precision("high")
            trainer.fit()
        finally:
            flops.close()
            torch.set_float32_matmul_precision(before)
            # Frees DDP's wrapper while its process group exists: freed later it hung in most runs on a busy CPU.
            trainer.network = trainer.model
        return trainer.model


def prepare(options: TrainOptions, device: torch.device | None = None) -> Job:
    """Opens the data, determines the config, and checks both against the run to resume, if any. A collective.

    Raises:
        FileNotFoundError, RuntimeError, ValueError: as :func:`train`.
    """
    provenance.assert_same_code_on_all_ranks()
    distributed.assert_same_on_all_ranks("options", dataclasses.asdict(options))
    system = systems.of_preset(options.preset)
    with distributed.raise_on_all_ranks():
        check_not_a_file("out", options.out)
        if distributed.is_first():
            remove_leftovers(options.out)
            good_checkpoint(options.out)  # the newest from here on
    with distributed.raise_on_all_ranks():
        recipe = recipe_of(options)
        check_schedule(recipe)
        _check_cuts(options, recipe)
        sharded_over = shard_size(recipe.parallel, distributed.world_size(), recipe.shard_ranks)
        _check_sheets(options, system)
        system.check_objective(options.objective)
        check_latents(options, recipe, system)
        options = with_options_of_run(options)
        embeddings = None if options.embeddings is None else EmbeddingStore(options.embeddings)
        config = presets.get(options.preset)
        autoencoder = autoencoder_of(options, system)
        config = system.configure(
            config if autoencoder is None else autoencoder.put_into(system, config), options.architecture
        )
        dataset = _open_clips(options, system, config, captions=embeddings is not None)
        width = None if embeddings is None else embeddings.info.width
        config = system.condition(config, len(dataset.class_names), width)
        _check_opponent(options, recipe, system.opponent(config))
        if embeddings is not None:
            _check_embedded(embeddings, dataset)
    distributed.assert_same_on_all_ranks("shard_ranks", sharded_over)
    class_names = _class_names(config, dataset)
    distributed.assert_same_on_all_ranks("class", dict(enumerate(class_names)))
    distributed.assert_same_on_all_ranks("config", config.to_dict())
    with distributed.raise_on_all_ranks():
        validate = open_validation(options, system, config, class_names, embeddings)
        held_out = None if validate is None else validate.clips
        inputs = Inputs(dataset, held_out, embeddings, labeled=bool(class_names))
    inputs.assert_same_on_all_ranks()
    micro_batch = 0  # chosen below, unless the run to resume has it
    with distributed.raise_on_all_ranks():
        checkpoints = list_checkpoints(options.out)
        start, init = _start_of(options, system) if not checkpoints else (None, None)
        if autoencoder is not None and start is None and init is None and not checkpoints:
            start = autoencoder.start_of(system)
        job = Job(options, recipe, system, config, dataset, embeddings, inputs, micro_batch, start, init, validate)
        if checkpoints:
            micro_batch = check_resumable(job, class_names)
            job = dataclasses.replace(job, history=history(job, provenance.changed_inputs(options, inputs)))
    distributed.assert_same_on_all_ranks("out: checkpoints", [path.name for path in checkpoints])
    device = device or distributed.pick_device(options.device)
    micro_batch = micro_batch or choose_micro_batch(options, recipe, system, config, device)
    return dataclasses.replace(job, micro_batch=micro_batch)


def _check_cuts(options: TrainOptions, recipe: Recipe) -> None:
    """Raises ValueError for random cuts of the pyramid with sharded weights."""
    if options.objective.cuts and recipe.parallel != "ddp" and distributed.world_size() > 1:
        raise ValueError(
            f"cuts: got true with parallel={recipe.parallel!r} on several processes, expected parallel='ddp': "
            "processes that train different levels gather the weights in different orders"
        )


def _check_opponent(options: TrainOptions, recipe: Recipe, opponent: Opponent | None) -> None:
    """Raises ValueError for options that a run with an opponent does not have."""
    if opponent is None:
        return
    if recipe.parallel != "ddp" and distributed.world_size() > 1:
        raise ValueError(
            f"parallel: got {recipe.parallel!r} with a discriminator on several processes, expected 'ddp': the "
            "discriminator's weight needs gradients of the last layer, which is sharded"
        )
    if options.compile:
        raise ValueError(
            "compile: got true with a discriminator, expected false: the discriminator's weight needs gradients of the "
            "last layer alone, and a compiled model has those of all layers at once"
        )
    if options.micro_batch == "auto":
        raise ValueError("micro_batch: got 'auto' with a discriminator, expected a number: its memory is not predicted")


def _check_sheets(options: TrainOptions, system: System) -> None:
    """Raises ValueError for options about samples of a system that does not sample."""
    if system.generates:
        return
    defaults = {f.name: f.default for f in dataclasses.fields(options)}
    for name, value, expected in (
        ("sample_steps", options.sample_steps, defaults["sample_steps"]),
        ("sample_prompts", options.steering.sample_prompts, ()),
    ):
        if value != expected:
            raise ValueError(f"{name}: got {value}, expected none: {options.preset} samples no videos")


def _describe(clips: Mixture) -> None:
    """Logs what each set holds and leaves out, and the shares of several sets."""
    for part, weight in zip(clips.sets, clips.weights):
        log_summary(part.root, part.found)
        if len(clips.sets) > 1:
            logger.info("%s: gives %.4g %% of all clips", part.root, 100 * weight / sum(clips.weights))


def _announce_rate(recipe: Recipe) -> None:
    """Logs the learning rate that follows from the batch, if it does."""
    if recipe.lr_scaling != "none" and distributed.is_first():
        logger.info(
            "learning rate %.4g: %.4g for batch %d, scaled to batch %d by the %s rule",
            peak_rate(recipe), recipe.lr, recipe.lr_batch or recipe.batch, recipe.batch, recipe.lr_scaling,
        )  # fmt: skip


def _open_clips(options: TrainOptions, system: System, config: Any, captions: bool) -> Mixture:
    """Opens all sets of ``--data``, or their latents; labels do not matter where there are captions."""
    _, height, width = config.resolution
    roots = [parse_root(root) for root in options.data]
    splits = _splits(options, [part.root for part in roots])
    total = sum(part.weight for part in roots)
    sets = [
        VideoDataset(
            part.root,
            frames=system.clip_frames(config),
            size=(height, width),
            stride=options.stride,
            fps=options.fps,
            split=split,
            captions=captions,
            short=options.short or "skip",
            seed=options.seed,
            decoder=options.decoder,
            cache_bytes=int(options.cache_mb * 2**20 * part.weight / total),
        )
        for part, split in zip(roots, splits)
    ]
    opened = open_latents(options, system, config, sets) if options.latents else sets
    return Mixture(opened, [part.weight for part in roots], labeled=not captions)


def _splits(options: TrainOptions, roots: Sequence[Path]) -> list[Split | None]:
    """The split of each set: of several sets, those that the lists do not name are used whole, which the log says.

    Raises:
        FileNotFoundError: the split applies to none of the sets.
    """
    split = options.split
    if split is None or len(roots) == 1:
        return [split] * len(roots)
    splits = [split if root.is_dir() and split_applies(root, split) else None for root in roots]
    if not any(splits):
        raise FileNotFoundError(f"split: no {split}list01.txt names clips of {', '.join(map(str, roots))}")
    for root in (root for root, applied in zip(roots, splits) if applied is None):
        if distributed.is_first():
            logger.info("%s: used whole, as no %slist01.txt names clips of it", root, split)
    return splits


def _check_embedded(embeddings: EmbeddingStore, dataset: Mixture) -> None:
    """Raises ValueError if the store lacks captions of the clips."""
    for part in dataset.sets:
        missing = embeddings.missing(file.caption for file in part.files)
        if missing:
            raise ValueError(
                f"embeddings: {embeddings.folder} lacks {len(missing)} of the clips' captions, the first is "
                f"{missing[0]!r}; run `hpdm data embed --data {part.root}` first"
            )


def _start_of(options: TrainOptions, system: System) -> tuple[Callable[[nn.Module], None] | None, Path | None]:
    """What a new run starts from: a function that initializes its model, or a checkpoint; ``None`` for neither.

    Raises:
        FileNotFoundError: ``--init`` is no run, or one without a checkpoint.
    """
    if options.base is not None:
        base = options.base
        return lambda model: system.start_from_base(model, runs.load(base).model, base), None
    if options.init is None:
        return None, None
    exported = published.find(options.init) or options.init
    if not exported.is_file():
        return None, newest_checkpoint(options.init)
    return lambda model: runs.start_from_exported(model, exported, system.added), None


def _class_names(config: Any, dataset: Mixture) -> list[str]:
    """The classes that the model knows."""
    return dataset.class_names if config.conditioning == "class" else []
