"""The denoising error of a model on clips, per level and per noise level.

The number is the training loss without its randomness: the same clips, boxes, times and noise whatever the model, so
that two runs, or a run on its training and its held-out clips, can be compared.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from tqdm import tqdm

from hpdm import distributed
from hpdm.data.clips import VideoDataset
from hpdm.patch.model import HPDM
from hpdm.patch.objective import denoising_error
from hpdm.text import EmbeddingStore
from hpdm.training.batches import collate, noise_generator


@torch.no_grad()
def evaluate_denoising(
    model: HPDM,
    dataset: VideoDataset,
    *,
    clips: int,
    bins: int,
    batch: int,
    seed: int,
    embeddings: EmbeddingStore | None = None,
) -> dict[str, Any]:
    """Mean squared error of v on clips spread evenly over a set. The same in every process; they share the clips out.

    Args:
        model: in eval mode.
        dataset: clips at the model's resolution, with the model's classes.
        clips: clips to take, at most the set's.
        bins: ranges of the diffusion time, from clean to noise.
        batch: clips at a time. It takes part in the choice of the noise.
        seed: of boxes, times and noise.
        embeddings: of the clips' captions, for a model with text.

    Returns:
        ``clips``, ``times`` (the ranges) and ``error[level][range]``.
    """
    config, device = model.config, model.latents.device
    count = min(clips, len(dataset))
    chosen = [i * len(dataset) // count for i in range(count)]
    edges = [i / bins for i in range(bins + 1)]
    times = list(pairwise(edges))
    errors = {}
    own = distributed.shard(range(0, count, batch))
    for first in tqdm(own, unit="batch", dynamic_ncols=True, disable=not distributed.is_first()):
        found = collate([dataset[i] for i in chosen[first : first + batch]], embeddings)
        video = found["video"].to(device)
        labels = found["labels"].to(device) if config.conditioning == "class" else None
        text = {name: found[name].to(device) for name in ("text", "text_mask") if name in found}
        of_times = []
        for n, span in enumerate(times):
            generator = noise_generator(seed, first * bins + n)
            of_times.append(denoising_error(model, video, labels, generator, span, **text).double().sum(0).cpu())
        errors[first] = torch.stack(of_times, dim=1)
    total = torch.stack(distributed.gather(errors)).sum(0)
    return {"clips": count, "times": times, "error": (total / count).tolist()}


def denoising_table(result: dict[str, Any]) -> str:
    """A row per level, a column per range of times and their mean."""
    heads = [f"t {low:.2f}-{high:.2f}" for low, high in result["times"]]
    lines = ["level   " + "".join(f"{head:>14}" for head in (*heads, "mean"))]
    for level, row in enumerate(result["error"]):
        lines.append(f"{level:<8}" + "".join(f"{value:14.5f}" for value in (*row, sum(row) / len(row))))
    return "\n".join(lines)
