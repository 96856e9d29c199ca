"""What ``hpdm train`` needs to follow and keep a run: validation clips, the automatic micro-batch, snapshots."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpdm import distributed, runs
from hpdm.data.clips import VideoDataset
from hpdm.data.layout import Split, split_applies
from hpdm.data.mixture import parse_root
from hpdm.evaluation.validation import Validation
from hpdm.planning.micro_batch import fitting_micro_batch
from hpdm.planning.training_cost import StepCost, training_step
from hpdm.recipe import Recipe
from hpdm.runs import RunConfig
from hpdm.system import System
from hpdm.tensor_file import DTYPES
from hpdm.text import EmbeddingStore
from hpdm.training.options import TrainOptions
from hpdm.training.parallel import shard_size
from hpdm.training.saving import WriteSnapshot

logger = logging.getLogger(__name__)

CACHE_BYTES = 256 * 2**20
"""Memory for validation clips, on each rank."""
GPU_SHARE = 0.9
"""Share of a GPU's memory that a step may take by prediction, which leaves out the CUDA context and fragmentation."""


def open_validation(
    options: TrainOptions, system: System, config: Any, class_names: Sequence[str], embeddings: EmbeddingStore | None
) -> Validation | None:
    """Opens the held-out clips; ``None`` for a run without validation.

    Raises:
        FileNotFoundError: no such clips.
        ValueError: it is not clear which clips are meant, they have other classes than the training clips, or captions
            without embeddings.
    """
    if not options.steering.validate_every:
        return None
    root, split = _held_out(options)
    frames, height, width = config.resolution
    clips = VideoDataset(
        root,
        frames=frames,
        size=(height, width),
        stride=options.stride,
        fps=options.fps,
        split=split,
        captions=embeddings is not None,
        train=False,
        short=options.short or "skip",
        decoder=options.decoder,
        cache_bytes=CACHE_BYTES,
    )
    if config.conditioning == "class" and clips.class_names != list(class_names):
        raise ValueError(f"validation: got classes {clips.class_names}, expected {list(class_names)} as in --data")
    if embeddings is not None:
        missing = embeddings.missing(file.caption for file in clips.files)
        if missing:
            raise ValueError(
                f"validation: {embeddings.folder} lacks {len(missing)} of the clips' captions, the first is "
                f"{missing[0]!r}; run `hpdm data embed --data {root}` first"
            )
    return Validation(system, config, clips, options.steering.validation_clips, embeddings)


def _held_out(options: TrainOptions) -> tuple[Path, Split | None]:
    """Folder and split of the validation.

    Raises:
        ValueError: none is given and none follows from ``--data`` and ``--split``.
    """
    steering, roots = options.steering, [parse_root(root).root for root in options.data]
    split = steering.validation_split
    if steering.validation is not None:
        root = steering.validation
    else:
        split = split or {"train": "test", "test": "train", None: None}[options.split]
        with_split = [root for root in roots if split is not None and root.is_dir() and split_applies(root, split)]
        if len(with_split) != 1:
            raise ValueError(
                f"validation: got no folder and {len(with_split)} sets of --data with "
                f"{'a split' if split is None else f'{split}list01.txt'}, expected --validation with a folder of "
                "held-out clips, or one set with UCF-101's split lists"
            )
        root = with_split[0]
    if root in roots and split in (None, options.split):
        logger.warning("validation: %s is trained on, too: its errors are not those of held-out clips", root)
    return root, split


def choose_micro_batch(options: TrainOptions, recipe: Recipe, system: System, config: Any, device: torch.device) -> int:
    """The size of a new run's micro-batches: as given, a rank's whole share, or what fits into memory. A collective.

    Raises:
        ValueError: ``auto`` on a CPU without ``memory_gb``, a batch that the ranks cannot share, or a model that does
            not fit with one clip.
    """
    ranks = distributed.world_size()
    share = max(1, recipe.batch // ranks)
    if options.micro_batch != "auto":
        return options.micro_batch or share
    if recipe.batch % ranks:
        raise ValueError(f"batch: got {recipe.batch}, expected a multiple of {ranks} process(es)")
    memory_gb = options.steering.memory_gb
    if memory_gb is None and device.type != "cuda":
        raise ValueError(
            "micro_batch: got auto on a CPU, expected --memory-gb, the memory that a process may take, or a number"
        )
    memory = GPU_SHARE * _gpu_memory(device) if memory_gb is None else memory_gb * 1e9

    def cost(clips: int) -> StepCost:
        kernels = options.kernels
        if kernels in ("auto", "triton"):
            kernels = "triton" if device.type == "cuda" else "torch"
        precision = "bf16" if options.precision == "bf16" else "fp32"
        return training_step(
            system, config, clips, kernels, options.recompute, precision, recipe.optimizer, max(1, len(recipe.ema))
        )

    sharded_over = shard_size(recipe.parallel, ranks, recipe.shard_ranks)
    # The device with the least memory decides, and rank 0 predicts for all.
    memory = min(distributed.gather({distributed.rank(): memory}))
    chosen = 0
    with distributed.raise_on_all_ranks():
        if distributed.is_first():
            chosen = fitting_micro_batch(share, int(memory), cost, sharded_over)
            logger.info(
                "micro-batch %d: the largest divisor of %d clips that fits into %.1f GB by prediction",
                chosen, share, memory / 1e9,
            )  # fmt: skip
    return distributed.broadcast(chosen)


def _gpu_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def snapshot_writer(options: TrainOptions, run_config: RunConfig) -> WriteSnapshot:
    """Writes averaged weights in the form of ``hpdm export``."""
    dtype = DTYPES[options.steering.snapshot_precision]

    def write(path: Path, averaged: Mapping[str, Tensor], step: int) -> None:
        runs.write_weights(path, averaged, run_config, step, dtype=dtype)

    return write
