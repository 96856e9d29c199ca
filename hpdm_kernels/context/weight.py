"""The fusion's weight, split into its columns for x, context and coordinates (paper eq. 9)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class FusionWeight(NamedTuple):
    """Views of a weight ``[D, 2D + 3]`` or ``[D, 2D]``: ``concat[x, context, coordinates] @ weight.T``."""

    of_tokens: Tensor
    """``[D, 2D]``, the columns of the two that follow."""
    of_x: Tensor
    """``[D, D]``."""
    of_context: Tensor
    """``[D, D]``."""
    of_coordinates: Tensor | None
    """``[D, 3]``; ``None`` where the coordinates are left out."""

    @classmethod
    def split(cls, weight: Tensor) -> FusionWeight:
        """Splits ``weight`` into views of its columns."""
        d, columns = weight.shape
        of_coordinates = weight.narrow(1, 2 * d, columns - 2 * d) if columns > 2 * d else None
        return cls(weight.narrow(1, 0, 2 * d), weight.narrow(1, 0, d), weight.narrow(1, d, d), of_coordinates)

    def new_empty(self) -> tuple[Tensor, FusionWeight]:
        """An uninitialized contiguous weight of the same shape, whole and split; used for gradients."""
        d = self.of_x.shape[0]
        whole = self.of_x.new_empty(d, 2 * d + (0 if self.of_coordinates is None else 3))
        return whole, FusionWeight.split(whole)
