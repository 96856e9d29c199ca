"""Norms of weights and updates for a run's log: whether each part of the model learns, and how fast."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpdm.training.lamb import Lamb
from hpdm.training.muon import MuonAdamW
from hpdm.training.sharded import shards, summed_over_shards, whole_norms


@torch.no_grad()
def optimizer_statistics(
    model: nn.Module, optimizer: torch.optim.Optimizer, parts: Sequence[tuple[str, str]]
) -> dict[str, float]:
    """What the last step did to the weights. A collective if the model is sharded.

    Call it after a step, on logged steps alone: it goes through the optimizer's state once, a tensor at a time, and
    reads its results from the device in one go.

    Args:
        model: whose parameters were stepped.
        optimizer: AdamW, LAMB or Muon, after the step.
        parts: as :attr:`hpdm.system.System.parameter_parts`: a parameter belongs to the first part whose text its name
            contains.

    Returns:
        For every part ``weight_norm_PART``, the norm of its weights, and ``update_norm_PART``, that of their last
        change (of Muon's matrices nominally, see :meth:`hpdm.training.muon.MuonAdamW.update_norm`); with LAMB also
        ``trust_min``, ``trust_median`` and ``trust_max``, the factors of the Adam steps over all matrices.
    """
    named = [(name, p) for name, p in model.named_parameters() if optimizer.state.get(p)]
    if not named:
        return {}
    updates = _update_norms(optimizer)
    params = [p for _, p in named]
    weights = whole_norms(shards(params), params)
    norms = [weights, torch.stack([updates[p] for p in params])]
    if isinstance(optimizer, Lamb):
        norms += [step.trust for step in optimizer.last]
    # Everything below is on the host.
    on_host = torch.cat([t.double() for t in norms]).cpu()
    squares, trust = on_host[: 2 * len(params)].square().view(2, -1), on_host[2 * len(params) :]
    part_of = [next(title for title, text in parts if text in name) for name, _ in named]
    statistics: dict[str, Tensor] = {}
    for title in dict.fromkeys(part_of):
        of_part = torch.tensor([title == other for other in part_of])
        for what, square in zip(("weight_norm", "update_norm"), squares):
            statistics[f"{what}_{_slug(title)}"] = square[of_part].sum().sqrt()
    if len(trust):
        statistics |= {"trust_min": trust.min(), "trust_median": trust.median(), "trust_max": trust.max()}
    return {name: float(value) for name, value in statistics.items()}


def _update_norms(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Norms of the last changes of all tensors that have been stepped."""
    norms: dict[Tensor, Tensor] = {}
    if isinstance(optimizer, MuonAdamW):
        norms |= {p: p.new_full((), optimizer.update_norm(p)) for p in optimizer.hidden}
    for step in optimizer.last if isinstance(optimizer, Lamb) else ():
        norms |= zip(step.params, step.updates)
    for group in optimizer.param_groups:
        others = [p for p in group["params"] if p not in norms and optimizer.state.get(p)]
        if others:
            local = torch.stack([_adam_change(p, optimizer.state[p], group).norm() for p in others])
            norms |= zip(others, summed_over_shards(local, others))
    return norms


def _adam_change(p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """This rank's part of the last change of ``p``, up to its sign: the Adam step from the state that it left.

    AdamW's decay acts on the weights before the step, ``w' = (1 - rate * decay) w - rate * adam``.
    """
    beta1, beta2 = group["betas"]
    step = state["step"].double()  # on the device, from where it is not read
    weights, first, second = shards((p, state["exp_avg"], state["exp_avg_sq"]))
    adam = (first / (1 - beta1**step)).div_((second / (1 - beta2**step)).sqrt_().add_(group["eps"]))
    rate, decay = float(group["lr"]), float(group["weight_decay"])
    before = (weights + rate * adam) / (1 - rate * decay) if decay else weights
    return adam.mul_(rate).add_(before, alpha=rate * decay)


def _slug(title: str) -> str:
    return re.sub(r"\W+", "_", title)
