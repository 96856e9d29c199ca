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
        self._others: dict[str, Tensor] = {}  # [2] by column: sum, and number of the steps in it

    def add(
        self, losses: Mapping[str, Tensor], norm: Tensor, applied: Tensor, others: Mapping[str, Tensor] | None = None
    ) -> None:
        """Adds a step's losses, scalars of this rank, and the norm of its gradient, the same on all ranks.

        ``applied`` is one truth value on their device: the numbers of a step that was skipped count as zeros. Further
        scalars ``others`` are no part of ``loss``; of these a step may have some that others lack.
        """
        for name, value in (others or {}).items():
            sums = torch.where(applied, torch.stack((value, torch.ones_like(value))), 0.0).double()
            self._others[name] = self._others[name] + sums if name in self._others else sums
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
        """``loss``, a mean for each name, ``grad_norm`` and ``grad_norm_max`` over the steps, and others. A collective.

        Losses and others are means over all ranks, too; others over the steps that had them and were not skipped, NaN
        for none. :meth:`clear` begins anew.

        Args:
            skipped: how many of the steps were skipped.

        Raises:
            ValueError: no step since the last reading that was not skipped.
        """
        steps = self.steps - skipped
        if self._norm is None or steps < 1:
            raise ValueError("means: got no step since the last reading, expected at least one")
        losses = distributed.mean(torch.stack(list(self._losses.values()))) / steps
        parts = [losses.mean()[None], self._norm, losses]
        if self._others:
            sums = distributed.mean(torch.stack(list(self._others.values())))
            parts.append(sums[:, 0] / sums[:, 1])
        # One read of the device for all.
        mean, norm, largest, *values = torch.cat(parts).tolist()
        of_names, of_others = values[: len(self._losses)], values[len(self._losses) :]
        return {
            "loss": mean,
            **{f"loss_{name}": value for name, value in zip(self._losses, of_names)},
            "grad_norm": norm / steps,
            "grad_norm_max": largest,
            **dict(zip(self._others, of_others)),
        }

    def clear(self) -> None:
        """Forgets all steps."""
        self.steps, self._losses, self._norm, self._others = 0, {}, None, {}
