"""The part of a level that is sampled where some of its frames are known: the tiles that show others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpdm.patch.config import HPDMConfig
from hpdm.patch.tiling import Tiling, lineage
from hpdm.sampling import SamplerOptions


@dataclass(frozen=True)
class Section:
    """Consecutive tiles of a level, in whole frames: all that a sampler computes of the level."""

    tiles: range
    """Numbers of the tiles."""
    frames: range
    """The frames that they cover."""
    origins: Tensor
    """First voxel of every tile, ``[n, 3]`` int64, with frames counted from the first of ``frames``."""
    known: Tensor
    """Frames that are known, bool ``[len(frames)]``."""
    known_tokens: Tensor | None
    """Frames of tokens that are known in every tile, bool ``[n, F]``; ``None`` if nothing is known."""


def whole(tiling: Tiling) -> Section:
    """All tiles of a level of which nothing is known."""
    frames = range(tiling.size[0])
    return Section(range(tiling.tiles), frames, tiling.origins, torch.zeros(len(frames), dtype=torch.bool), None)


def section_of(tiling: Tiling, known: Tensor, per_token: int, multiple: int = 1) -> Section:
    """The tiles of a level that show a frame that is not known, and those between.

    Args:
        tiling: of the level.
        known: frames that are known, bool ``[F]``; not all.
        per_token: frames of a token.
        multiple: the frames that are covered start and end at multiples of it.

    Raises:
        ValueError: tokens of which some frames are known and some are not.
    """
    (size, *_), (frames, *_), (stride, *_), (count, high, wide) = (
        tiling.size,
        tiling.patch,
        tiling.stride,
        tiling.counts,
    )
    unknown = (~known).nonzero()[:, 0]
    first = max(0, (int(unknown[0]) - frames) // stride + 1)  # the first tile that reaches beyond the first one
    last = min(count - 1, int(unknown[-1]) // stride)
    while first * stride % multiple:
        first -= 1
    while (last * stride + frames) % multiple:
        last += 1
    covered = range(first * stride, last * stride + frames)
    tiles = range(first * high * wide, (last + 1) * high * wide)
    origins = tiling.origins[tiles.start : tiles.stop]
    shown = known[origins[:, :1] + torch.arange(frames)].unflatten(1, (-1, per_token))  # [n, F, per_token]
    if bool((shown.any(dim=2) != shown.all(dim=2)).any()):
        raise ValueError(
            f"known: got frames {known.nonzero()[:, 0].tolist()} of {size}, expected whole tokens of {per_token} frames"
        )
    shifted = origins - torch.tensor([covered.start, 0, 0])
    return Section(tiles, covered, shifted, known[covered.start : covered.stop], shown.all(dim=2))


def level_section(config: HPDMConfig, options: SamplerOptions, tiling: Tiling, level: int, known: Tensor) -> Section:
    """What is sampled of a level whose ``known`` frames (bool ``[F]``, not all) are given.

    Raises:
        ValueError: as :func:`section_of`.
    """
    # Blocks of frames that are compared with the level below are covered as a whole.
    multiple = config.ratio[0] if level and options.consistency else 1
    return section_of(tiling, known, config.tokenizer[0], multiple)


def needed_features(ancestors: Sequence[Sequence[Tensor]], sections: Sequence[Section | None]) -> list[Tensor]:
    """For each level, the tiles whose features the sections of the levels above need, ascending.

    Args:
        ancestors: from :func:`hpdm.patch.tiling.find_ancestors`.
        sections: of every level; ``None`` for a level that is finished.
    """
    needed: list[list[Tensor]] = [[] for _ in ancestors]
    for level, section in enumerate(sections):
        if section is not None:
            tiles = slice(section.tiles.start, section.tiles.stop)
            for below, of_level in enumerate(lineage(ancestors, level, tiles)):
                needed[below].append(of_level)
    return [torch.cat(parts).unique() if parts else torch.empty(0, dtype=torch.int64) for parts in needed]
