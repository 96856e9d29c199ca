"""The context that finished levels give to patches of a level above them, while sampling."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Context:
    """Context of B patches of one level, from ``T_k`` patches (tiles) of every finished level ``k`` below.

    The B patches share the sources: ``index`` says which row of each source belongs to which patch.
    """

    features: dict[int, tuple[Tensor, ...]]
    """For each block that fuses into this level, its projected inputs ``[T_k, N, D]`` of every level below, as
    :meth:`hpdm.patch.model.HPDM.level_features` returns them."""
    pixels: Tensor | None
    """For shallow fusion, clean patches of the previous level ``[T, C, f, h, w]``, scaled as network inputs."""
    boxes: tuple[Tensor, ...]
    """Boxes of the sources ``[T_k, 6]``, one tensor per level below."""
    index: Tensor
    """``[B, levels below]`` int64: the row of each source that serves a patch."""
