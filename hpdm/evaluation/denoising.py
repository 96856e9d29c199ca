"""The denoising error of a model on clips, per training loss (the level of a pyramid) and per noise level.

It is the training loss on fixed clips, times and noise, so that two runs, or the training and the held-out clips of one
run, can be compared.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hpdm import distributed
from hpdm.data.clips import VideoDataset
from hpdm.runs import Run
from hpdm.text import EmbeddingStore
from hpdm.training.batches import collate, noise_generator


@torch.no_grad()
def evaluate_denoising(
    run: Run,
    dataset: VideoDataset,
    *,
    clips: int,
    bins: int,
    batch: int,
    seed: int,
    embeddings: EmbeddingStore | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Mean of every training loss on clips spread evenly over a set. A collective: ranks share the clips.

    Args:
        run: the model and its system.
        dataset: clips at the model's resolution, with the model's classes.
        clips: number of clips; all of the set if it has fewer.
        bins: number of equal ranges of the diffusion time, from clean to noise.
        batch: clips at a time. The noise depends on it.
        seed: seed of times and noise.
        embeddings: of the clips' captions, for a model with text.
        progress: show a progress bar.

    Returns:
        ``clips``, their number; ``times``, the ranges; ``losses``, their names; and ``error[loss][range]``. The same on
        all ranks.
    """
    count = min(clips, len(dataset))
    chosen = [i * len(dataset) // count for i in range(count)]
    times = list(pairwise(i / bins for i in range(bins + 1)))
    names: list[str] = []
    sums: dict[int, Tensor] = {}  # per batch, by the number of its first clip
    starts = range(0, count, batch)
    batches = list(distributed.shard(starts))
    # All ranks call the model equally often, as sharded weights require. The repeated batch counts once.
    batches += [0] * (-(-len(starts) // distributed.world_size()) - len(batches))
    for first in tqdm(batches, unit="batch", dynamic_ncols=True, disable=not (progress and distributed.is_first())):
        clips_of_batch = collate([dataset[i] for i in chosen[first : first + batch]], embeddings)
        inputs = clips_of_batch.inputs(run.config.conditioning, run.device)
        columns = []
        for n, span in enumerate(times):
            losses = run.system.losses(run.model, inputs, noise_generator(seed, first * bins + n), times=span)
            names = list(losses)
            columns.append(torch.stack(list(losses.values()), dim=1).double().sum(0).cpu())  # [B, L] -> [L]
        sums[first] = torch.stack(columns, dim=1)  # [L, bins]
    total = torch.stack(distributed.gather(sums)).sum(0)  # [L, bins]
    names = distributed.broadcast(names)  # rank 0 has at least one batch, others may have none
    return {"clips": count, "times": times, "losses": names, "error": (total / count).tolist()}


def denoising_table(result: dict[str, Any]) -> str:
    """A row per loss, a column per range of times and their mean."""
    heads = [f"t {low:.2f}-{high:.2f}" for low, high in result["times"]]
    lines = [f"{'':<12}" + "".join(f"{head:>14}" for head in (*heads, "mean"))]
    for name, row in zip(result["losses"], result["error"]):
        cells = (*row, sum(row) / len(row))
        lines.append(f"{name.replace('_', ' '):<12}" + "".join(f"{value:14.5f}" for value in cells))
    return "\n".join(lines)
