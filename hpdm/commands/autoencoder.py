"""Which autoencoder a run of latent diffusion contains: ``--autoencoder``, or that of the run it goes on from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from hpdm import published, runs
from hpdm.latent.latent_model import hash_of_autoencoder
from hpdm.system import System
from hpdm.training.checkpoint import list_checkpoints
from hpdm.training.options import TrainOptions


class Autoencoder(NamedTuple):
    """An autoencoder for a run."""

    config: Any
    weights: str
    """Hash of its weights."""
    model: nn.Module | None
    """``None`` if the weights come with the checkpoint that the run goes on from."""

    def put_into(self, system: System, config: Any) -> Any:
        """``config`` with this autoencoder; raises ValueError if it does not fit."""
        return system.with_autoencoder(config, self.config, self.weights)

    def start_of(self, system: System) -> Callable[[nn.Module], None] | None:
        """What copies the weights into a new model; ``None`` for nothing."""
        autoencoder = self.model
        return None if autoencoder is None else lambda model: system.set_autoencoder(model, autoencoder)


def autoencoder_of(options: TrainOptions, system: System) -> Autoencoder | None:
    """The autoencoder of a run; ``None`` for a system without.

    A run that is resumed keeps its own, and a run with ``--init`` has that of the run it starts from.

    Raises:
        FileNotFoundError: no such run.
        ValueError: none where one is needed, one where none is, something else than a trained autoencoder, or another
            one than the run has that this one goes on from.
    """
    given = options.autoencoder
    if not system.needs_autoencoder:
        if given is not None:
            raise ValueError(f"autoencoder: got {given}, expected none: {options.preset} has no autoencoder")
        return None
    from_command = None if given is None else load_autoencoder(given)
    kept = _of_earlier(options, system)
    if kept is None and from_command is None:
        raise ValueError(
            f"autoencoder: got none, expected a run of an autoencoder such as lvdm_ae_tiny: {options.preset} works on "
            "its latents"
        )
    if kept is not None and from_command is not None and kept.weights != from_command.weights:
        raise ValueError(
            f"autoencoder: got {given}, expected the one that the run has which this one goes on from: its latents are "
            "others"
        )
    return kept or from_command


def load_autoencoder(path: Path, device: torch.device | str = "cpu") -> Autoencoder:
    """A trained autoencoder out of its run, or a file that ``hpdm export`` wrote of one; errors as above."""
    run = runs.load(path, device=device)
    if run.system.name != "autoencoder":
        raise ValueError(f"autoencoder: got {path}, a run of the system {run.system.name!r}, expected an autoencoder")
    if not run.system.is_measured(run.model):
        raise ValueError(
            f"autoencoder: got {path}, whose training is not finished, so that mean and deviation of its latents are "
            "not known; expected one trained to its last step"
        )
    return Autoencoder(run.config, hash_of_autoencoder(run.model), run.model)


def _of_earlier(options: TrainOptions, system: System) -> Autoencoder | None:
    """The autoencoder in the run that is resumed, or in what ``--init`` names."""
    earlier = options.out if list_checkpoints(options.out) else options.init
    if earlier is None:
        return None
    exported = published.find(earlier) or earlier
    old = runs.load(exported) if exported.is_file() else runs.load_run_config(earlier)
    if old.system is not system:
        return None  # refused later, with the reason
    config, weights = system.autoencoder_of(old.config)
    return Autoencoder(config, weights, None)
