"""The denoising error of a model on clips, per training loss (the level of a pyramid) and per noise level.

It is the training loss without weights, on fixed clips, boxes, times and noise, so that two runs, or the training and
the held-out clips of one run, can be compared.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hpdm import distributed
from hpdm.data.clips import VideoDataset
from hpdm.objective import Context
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
    context: Context = "clean",
    context_noise: float = 0.0,
    embeddings: EmbeddingStore | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Mean errors on clips spread evenly over a set (:meth:`hpdm.system.System.errors`). Ranks share the clips.

    Args:
        run: the model and its system.
        dataset: clips at the model's resolution, with the model's classes.
        clips: number of clips; all of the set if it has fewer.
        bins: number of equal ranges of the diffusion time, from clean to noise.
        batch: clips at a time. The noise depends on it.
        seed: seed of boxes, times and noise.
        context: noise of the levels below the one that is measured: ``"clean"``, none, as when sampling; ``"same"``,
            in the same range; ``"independent"``, any, as in training.
        context_noise: diffusion time of clean levels below.
        embeddings: of the clips' captions, for a model with text.
        progress: show a progress bar.

    Returns:
        ``measured``, what the errors are; ``clips``, their number; ``context`` and ``context_noise``; ``times``, the
        ranges; ``losses``, their names; ``error[loss][range]``; and ``parts``, by name, with the ``patches`` of a part
        in all ranges together and its ``error[range]``, ``None`` where there is no such patch. The same on all ranks.

    Raises:
        ValueError: ``context_noise`` outside of 0..1, or with a context that is not clean.
    """
    if not 0 <= context_noise <= 1 or (context_noise and context != "clean"):
        raise ValueError(f"context_noise: got {context_noise}, expected 0 to 1, and 0 unless context is 'clean'")
    count = min(clips, len(dataset))
    chosen = [i * len(dataset) // count for i in range(count)]
    times = list(pairwise(i / bins for i in range(bins + 1)))
    names: list[str] = []  # of the losses, then of the parts
    losses = 0
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
            errors, parts = run.system.errors(
                run.model, inputs, noise_generator(seed, first * bins + n), times=span, context=context,
                context_noise=context_noise,
            )  # fmt: skip
            names, losses = [*errors, *parts], len(errors)
            rows = [(float(error.double().sum()), len(error)) for error in (*errors.values(), *parts.values())]
            columns.append(torch.tensor(rows, dtype=torch.float64))
        sums[first] = torch.stack(columns, dim=1)  # [rows, bins, 2]: sums, and of how many patches
    total, patches = torch.stack(distributed.gather(sums)).sum(0).unbind(2)  # [rows, bins] both
    names, losses = distributed.broadcast((names, losses))  # rank 0 has at least one batch, others may have none
    error = [[s / n if n else None for s, n in zip(*row)] for row in zip(total.tolist(), patches.tolist())]
    measured = {
        name: {"patches": int(patches[row].sum()), "error": error[row]}
        for row, name in enumerate(names)
        if row >= losses
    }
    return {
        "measured": run.system.error_name(run.config), "clips": count, "context": context,
        "context_noise": context_noise, "times": times, "losses": names[:losses], "error": error[:losses],
        "parts": measured,
    }  # fmt: skip


def denoising_table(result: dict[str, Any]) -> str:
    """A row per loss and per part, a column per range of times and their mean; "-" where there is no such patch."""
    heads = [f"t {low:.2f}-{high:.2f}" for low, high in result["times"]]
    lines = [f"{'':<18}" + "".join(f"{head:>14}" for head in (*heads, "mean"))]
    rows = dict(zip(result["losses"], result["error"])) | {n: part["error"] for n, part in result["parts"].items()}
    for name, row in rows.items():
        cells = (*row, None if None in row else sum(row) / len(row))
        text = (f"{'-' if value is None else format(value, '.5f'):>14}" for value in cells)
        lines.append(f"{name.replace('_', ' '):<18}" + "".join(text))
    return "\n".join(lines)
