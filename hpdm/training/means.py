"""Means over the steps since the last row of the log, collected without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hpdm import distributed


class Means:
    """Losses and gradient norms since they were last read.

    A resumed run begins anew: the sums are not part of a checkpoint.
    """

    def __init__(self) -> None:
        self.steps = 0
        """Number of steps since the last reading, skipped ones too."""
        self._losses: dict[str, Tensor] = {}  # sums by name
        self._norm: Tensor | None = None  # [2]: sum and largest

    def add(self, losses: Mapping[str, Tensor], norm: Tensor, applied: Tensor) -> None:
        """Adds a step's losses, scalars of this rank, and the norm of its gradient, the same on all ranks.

        ``applied`` is one truth value on their device: the numbers of a step that was skipped count as zeros.
        """
        losses = {name: torch.where(applied, loss, 0.0) for name, loss in losses.items()}
        norm = torch.where(applied, norm, 0.0)
        if self._norm is None:
            self._losses = {name: loss.double() for name, loss in losses.items()}
            self._norm = norm.double().expand(2).clone()
        else:
            self._losses = {name: self._losses[name] + loss for name, loss in losses.items()}
            # torch.maximum, unlike Python's max, keeps a NaN.
            self._norm = torch.stack((self._norm[0] + norm, torch.maximum(self._norm[1], norm.double())))
        self.steps += 1

    def read(self, skipped: int = 0) -> dict[str, float]:
        """``loss``, a mean for each name, ``grad_norm`` and ``grad_norm_max`` over the steps. A collective.

        Losses are means over all ranks, too. :meth:`clear` begins anew.

        Args:
            skipped: how many of the steps were skipped.

        Raises:
            ValueError: no step since the last reading that was not skipped.
        """
        steps = self.steps - skipped
        if self._norm is None or steps < 1:
            raise ValueError("means: got no step since the last reading, expected at least one")
        losses = distributed.mean(torch.stack(list(self._losses.values()))) / steps
        # One read of the device for all.
        mean, *of_names, norm, largest = torch.cat((losses.mean()[None], losses, self._norm)).tolist()
        return {
            "loss": mean,
            **{f"loss_{name}": value for name, value in zip(self._losses, of_names)},
            "grad_norm": norm / steps,
            "grad_norm_max": largest,
        }

    def clear(self) -> None:
        """Forgets all steps."""
        self.steps, self._losses, self._norm = 0, {}, None
