"""What a run trains on, told apart by fingerprints: the same on all ranks, and the same when the run goes on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from hpdm import distributed
from hpdm.data.clips import VideoDataset
from hpdm.data.fingerprint import ClipRecord, ClipSet, differences, fingerprint, read_lists, save_lists
from hpdm.data.found import VideoFile
from hpdm.data.latent_clips import LatentDataset
from hpdm.data.mixture import Mixture
from hpdm.text import EmbeddingStore, normalize_caption

VALIDATION = "validation"
LATENTS = "latents"
"""The name of what was encoded ahead; a run that encodes its clips itself has none."""
_SAMPLED = 16  # embeddings whose values count


class Inputs:
    """The clips of a run and the embeddings of their captions.

    Args:
        data: the clips that are trained on, or their latents.
        held_out: those of the validation, if there is one.
        embeddings: of the captions, if the model has text.
        labeled: whether labels matter.

    Raises:
        OSError: a clip is gone.
    """

    def __init__(
        self, data: Mixture, held_out: VideoDataset | None, embeddings: EmbeddingStore | None, *, labeled: bool
    ) -> None:
        numbered = len(data.sets) > 1
        self.sets = {
            f"data {number}" if numbered else "data": ClipSet(part, labeled=labeled)
            for number, part in enumerate(data.sets, start=1)
        }
        if held_out is not None:
            self.sets[VALIDATION] = ClipSet(held_out, labeled=labeled)
        self.fingerprints = {name: part.fingerprint for name, part in self.sets.items()}
        stores = [part.store.fingerprint for part in data.sets if isinstance(part, LatentDataset)]
        if stores:
            self.fingerprints[LATENTS] = "; ".join(stores)
        if embeddings is not None:
            self.fingerprints["embeddings"] = _fingerprint(embeddings, data.files)
            if held_out is not None:
                self.fingerprints[f"{VALIDATION} embeddings"] = _fingerprint(embeddings, held_out.files)

    def save_lists(self, run: Path) -> None:
        """Writes the clips into the run's folder; raises as :func:`hpdm.data.fingerprint.save_lists`."""
        save_lists(run, self.sets)

    def assert_same_on_all_ranks(self) -> None:
        """Checks that every rank found the same. A collective.

        Raises:
            ValueError: the ranks differ; raised on every rank, with the clips that differ.
        """
        ranks = distributed.gather({distributed.rank(): self.fingerprints})
        differing = sorted({name for other in ranks for name, _ in other.items() ^ ranks[0].items()})
        if not differing:
            return
        named = [name for name in differing if name in self.sets]
        lists = distributed.broadcast({name: list(self.sets[name].records()) for name in named})
        found = {
            name: self._changed(name, ranks[0].get(name), lists)
            for name in differing
            if self.fingerprints.get(name) != ranks[0].get(name)
        }
        everywhere = enumerate(distributed.gather({distributed.rank(): found}))
        messages = [f"process {rank}, {name}: {text}" for rank, changed in everywhere for name, text in changed.items()]
        raise ValueError(f"{'; '.join(messages)}; expected the same as in process 0")

    def changes(self, run: Path, before: Mapping[str, str]) -> dict[str, str]:
        """What changed in which part since a run recorded it, in words."""
        changed = [name for name, now in self.fingerprints.items() if before.get(name, now) != now]
        lists = read_lists(run) if changed else {}
        return {name: self._changed(name, before[name], lists) for name in changed}

    def _changed(self, name: str, before: str | None, lists: Mapping[str, Sequence[ClipRecord]]) -> str:
        """What changed in one part against a list of clips, or against its fingerprint where there is no list of it."""
        if name in self.sets and fingerprint(lists.get(name, ())) == before:
            return differences(lists[name], list(self.sets[name].records()))
        return f"{before} -> {self.fingerprints.get(name)}"


def _fingerprint(embeddings: EmbeddingStore, files: Iterable[VideoFile]) -> str:
    """The encoder and a hash, which the values of some embeddings are part of: reading all would take long."""
    captions = sorted({normalize_caption(file.caption) for file in files})
    digest = hashlib.sha256(json.dumps([asdict(embeddings.info), captions]).encode())
    for caption in captions[:: math.ceil(len(captions) / _SAMPLED)]:
        digest.update(embeddings[caption].contiguous().view(torch.uint8).numpy().tobytes())
    return f"{embeddings.info.encoder}, {digest.hexdigest()[:16]}"
