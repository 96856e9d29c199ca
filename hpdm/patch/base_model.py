"""All levels of a pyramid from a base model that was trained on its lowest ones.

The paper's text-to-video models start from a generator of 36x64 videos, trained for 500,000 steps; all levels are then
trained together for 15,000 (T2V) or 100,000 steps (T2V-1K; section 5.2, Table 8). How what the base lacks is started it
does not say. **Reading:** so that the first step is the base's work on every level. A new fusion hands a level's tokens
on as they are, ``W = [I, 0, 0], b = 0`` (eq. 9), and a new level takes itself for level 0. Level 0 is then the base
itself, and the weights of the context start to learn at once: their gradient is that of the tokens times the context.

T2V-1K has patches twice as large as its base: their tables of positions are interpolated.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hpdm.patch.config import HPDMConfig
from hpdm.patch.model import HPDM
from hpdm.training.checkpoint import load_model

_FREE = {"levels", "levels_per_block", "patch", "conditioning_dropout", "detach_context"}
"""Fields that a base may have its own way: they change no weights, or some that are told below how to start."""
_FREE_OF_ONE_LEVEL = _FREE | {"ratio", "coordinates", "input_scale_decay"}


@torch.no_grad()
def load_base(model: HPDM, run: Path) -> None:
    """Starts ``model`` from the averaged weights of a base run with the same network and as many levels or fewer.

    Call it on the whole model, before it is sharded and before its moving average and its optimizer are made.

    Args:
        model: any weights; all are replaced.
        run: the base: its run's folder, one of its checkpoints or an exported file, see
            :func:`hpdm.training.checkpoint.load_model`. Patches may differ in size.

    Raises:
        FileNotFoundError: no such run.
        ValueError: a base of another network, naming the fields that differ, or damaged files.
    """
    base = load_model(run)[0]
    _check_base(base.config, model.config, run)
    weights = dict(base.named_parameters())
    for name, parameter in model.named_parameters():
        if name == "conditioner.level.weight":
            new = parameter.shape[0] - len(weights[name])
            parameter.copy_(torch.cat((weights[name], weights[name][:1].expand(new, -1))))
        elif name.startswith("position_"):
            parameter.copy_(_stretched(weights[name], parameter.shape))
        elif name in weights:
            parameter.copy_(weights[name])
        elif name.endswith("fusion.weight"):
            parameter.copy_(torch.eye(*parameter.shape))
        elif name.endswith("fusion.bias"):
            parameter.zero_()
        else:
            raise ValueError(f"base: {run} has no {name}")


def _check_base(base: HPDMConfig, full: HPDMConfig, run: Path) -> None:
    old, new = base.to_dict(), full.to_dict()
    free = _FREE_OF_ONE_LEVEL if base.levels == 1 else _FREE
    different = [f"{name}: {old[name]}, not {new[name]}" for name in new if name not in free and old[name] != new[name]]
    if base.levels > full.levels:
        different.append(f"levels: {base.levels}, more than {full.levels}")
    if len(base.levels_per_block) != len(full.levels_per_block):
        different.append(f"blocks: {len(base.levels_per_block)}, not {len(full.levels_per_block)}")
    if different:
        raise ValueError(f"base: {run} is of another network ({'; '.join(different)})")


def _stretched(table: Tensor, shape: torch.Size) -> Tensor:
    """The positions of one axis, ``[f, 1, 1, D]`` or its like, at another number of tokens: itself at the same."""
    if table.shape == shape:
        return table
    rows = table.reshape(-1, shape[-1]).T[None]
    return F.interpolate(rows, size=shape.numel() // shape[-1], mode="linear")[0].T.reshape(shape)
