"""``hpdm train --latents``: checks that stored latents are those that a run would make itself, and opens them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpdm.data.clips import VideoDataset
from hpdm.data.latent_clips import LatentDataset
from hpdm.data.latent_store import LatentStore
from hpdm.recipe import Recipe
from hpdm.system import System
from hpdm.training.options import TrainOptions


def check_latents(options: TrainOptions, recipe: Recipe, system: System) -> None:
    """Raises ValueError for latents of a system that has none, or with options that change pixels."""
    given = options.latents
    if not given:
        return
    if not system.needs_autoencoder:
        raise ValueError(f"latents: got {given[0]}, expected none: {options.preset} does not work on latents")
    if len(given) != len(options.data):
        raise ValueError(f"latents: got {len(given)} folders, expected one for each of {len(options.data)} --data")
    if options.objective.flip:
        raise ValueError("flip: got True with latents, expected False: those of a mirrored clip are others")
    if recipe.images:
        raise ValueError(f"images: got {recipe.images} with latents, expected 0: those of a still are others")


def open_latents(
    options: TrainOptions, system: System, config: Any, sets: Sequence[VideoDataset]
) -> Sequence[LatentDataset]:
    """The latents of sets of clips.

    Args:
        options: name the folders, one for each set.
        system, config: kind and config of the model, which has its autoencoder.
        sets: the clips.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: latents of another autoencoder, or as :class:`hpdm.data.latent_clips.LatentDataset`.
    """
    _, weights = system.autoencoder_of(config)
    stores = [LatentStore(folder) for folder in options.latents]
    for store in stores:
        if store.info.autoencoder != weights:
            raise ValueError(
                f"latents: {store.folder} has those of an autoencoder with the hash {store.info.autoencoder[:16]}, "
                f"expected {weights[:16]}, which the run has"
            )
    return [LatentDataset(clips, store) for clips, store in zip(sets, stores)]
