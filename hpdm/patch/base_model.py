"""Initializes a full pyramid from a base model that was trained on its lowest levels.

The paper's text-to-video models start from a generator of 36x64 videos, trained for 500,000 steps; all levels are then
trained together for 15,000 (T2V) or 100,000 steps (T2V-1K; section 5.2, Table 8). The paper does not say how to
initialize the parameters that the base lacks. **Reading:** every level starts as the base model. A new fusion is the
identity on a level's tokens, ``W = [I, 0, 0], b = 0`` (eq. 9), and the embedding of a new level starts as that of level
0. The context weights receive gradients from the first step on, since these are the gradients of the tokens times the
context.

T2V-1K has patches twice as large as its base: the tables of positions are interpolated.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpdm.patch.config import HPDMConfig
from hpdm.patch.model import HPDM

ADDED = ("frame_times.", "frame_copies.", "memory.", "sparse")
"""How the names of those parameters begin that may be added to a trained model: as they start, they change nothing."""

_MAY_DIFFER = {
    "levels", "levels_per_block", "patch", "conditioning_dropout", "detach_context", "known_frames", "spacing", "memory"
}  # fmt: skip
"""Fields in which a base may differ: they affect no weights, or only weights that :func:`_start` handles."""
_MAY_DIFFER_WITH_ONE_LEVEL = _MAY_DIFFER | {
    "ratio", "coordinates", "coordinate_embedding", "input_scale_decay"
}  # fmt: skip


@torch.no_grad()
def start_from_base(model: HPDM, base: nn.Module, source: Path) -> None:
    """Starts ``model`` from the weights of a base model with the same network and as many levels or fewer.

    Call it on the whole model, before it is sharded and before its moving average and its optimizer are made.

    Args:
        model: any weights; all are replaced.
        base: the trained base model. Patches may differ in size.
        source: where the base was read from, for error messages.

    Raises:
        ValueError: a base of another network, naming the fields that differ.
    """
    if not isinstance(base, HPDM):
        raise ValueError(f"base: {source} is a {type(base).__name__}, expected an {HPDM.__name__}")
    _check_base(base.config, model.config, source)
    weights = dict(base.named_parameters())
    for name, parameter in model.named_parameters():
        if name.startswith(ADDED) and name not in weights:
            continue
        parameter.copy_(_start(name, parameter.shape, weights.get(name), source))


def _start(name: str, shape: torch.Size, weight: Tensor | None, source: Path) -> Tensor:
    """The initial value of the parameter ``name``; ``weight`` is the base's of that name, ``None`` if it has none."""
    if weight is None:
        return _start_without_weight(name, shape, source)
    if name == "conditioner.level.weight":
        return torch.cat((weight, weight[:1].expand(shape[0] - len(weight), -1)))
    return _interpolated(weight, shape) if name.startswith("position_") else weight


def _start_without_weight(name: str, shape: torch.Size, source: Path) -> Tensor:
    """The initial value of a parameter that the base lacks: a new fusion, which is the identity on a level's tokens."""
    if name.endswith("fusion.weight"):
        return torch.eye(*shape)
    if name.endswith(("fusion.bias", "fusion.coordinate_weight")):
        return torch.zeros(shape)
    raise ValueError(f"base: {source} has no {name}")


def _check_base(base: HPDMConfig, full: HPDMConfig, source: Path) -> None:
    """Raises ValueError if the two configs differ in more than a base may."""
    old, new = base.to_dict(), full.to_dict()
    may_differ = _MAY_DIFFER_WITH_ONE_LEVEL if base.levels == 1 else _MAY_DIFFER
    different = [
        f"{name}: {old[name]}, not {new[name]}" for name in new if name not in may_differ and old[name] != new[name]
    ]
    if base.levels > full.levels:
        different.append(f"levels: {base.levels}, more than {full.levels}")
    if len(base.levels_per_block) != len(full.levels_per_block):
        different.append(f"blocks: {len(base.levels_per_block)}, not {len(full.levels_per_block)}")
    if different:
        raise ValueError(f"base: {source} is of another network ({'; '.join(different)})")


def _interpolated(table: Tensor, shape: torch.Size) -> Tensor:
    """The position table of one axis, e.g. ``[f, 1, 1, D]``, interpolated to ``shape`` where that is another one."""
    if table.shape == shape:
        return table
    rows = table.reshape(-1, shape[-1]).T[None]
    return F.interpolate(rows, size=shape.numel() // shape[-1], mode="linear")[0].T.reshape(shape)
