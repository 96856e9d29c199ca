"""The optimizer of a model: which parameters decay, which are rescaled, and which started at zero."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from hpdm.training.adamw import AdamW
from hpdm.training.lamb import Lamb, xavier_norm
from hpdm.training.muon import MuonAdamW


def make_optimizer(
    model: nn.Module,
    name: str,
    lr: float,
    weight_decay: float,
    zero_started: Collection[str] = (),
    hidden_modules: Sequence[nn.Module] = (),
    kernels: str = "auto",
) -> torch.optim.Optimizer:
    """``"adamw"``, ``"lamb"`` or ``"muon"`` over the model.

    Biases, norms and other vectors have no decay, and take Adam's steps whatever the optimizer.

    Args:
        model: already sharded, if it will be.
        name: of the optimizer.
        lr: learning rate.
        weight_decay: of matrices.
        zero_started: names of the matrices that start at zero, see :func:`zero_matrices`, whose norm LAMB counts as
            that of Xavier's initialization until it is larger.
        hidden_modules: parts of the model whose matrices map hidden features to hidden features, for Muon.
        kernels: backend of the step of AdamW and LAMB; Muon is PyTorch's.

    Raises:
        ValueError: unknown name; ``"muon"`` for a model without hidden modules, or with sharded weights.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    if name == "adamw":
        return AdamW(groups, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, backend=kernels)
    if name == "lamb":
        groups[1]["adapt"] = False
        least_norms = {p: xavier_norm(p.shape) for n, p in model.named_parameters() if n in zero_started}
        return Lamb(groups, lr=lr, weight_decay=weight_decay, least_norms=least_norms, backend=kernels)
    if name == "muon":
        inside = {p for module in hidden_modules for p in module.parameters()}
        hidden = [p for p in matrices if p.ndim == 2 and p in inside]
        groups[0]["params"] = [p for p in matrices if p.ndim != 2 or p not in inside]
        return MuonAdamW(hidden, groups, lr, weight_decay)
    raise ValueError(f"optimizer: got {name!r}, expected 'adamw', 'lamb' or 'muon'")


def zero_matrices(model: nn.Module) -> frozenset[str]:
    """Names of the matrices of a new model that its initialization sets to zero.

    Call it on a model as it was built, before weights are loaded into it. So a run that is resumed, or that starts from
    another one's weights, finds the same names as one that begins.
    """
    return frozenset(name for name, p in model.named_parameters() if p.ndim >= 2 and not bool(p.any()))
