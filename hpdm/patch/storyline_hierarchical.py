"""Level 0 from coarse to fine in time: first frames that are far apart, then the frames between.

The sparse frames are sampled window by window, each of which knows the last half of the one before. A window of
consecutive frames then knows the sparse ones among its own, the first and the last always, so two windows share a frame
(hierarchical generation of Latent Video Diffusion Models, He et al. 2022, section 3.4).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hpdm.frames import Known
from hpdm.long_video import State
from hpdm.patch.sampler import Sampler
from hpdm.patch.storyline import Autoregressive
from hpdm.windows import Window, Windows


class Hierarchical(Autoregressive):
    """Sparse frames first; see :class:`hpdm.patch.storyline.Autoregressive`."""

    def __init__(self, sampler: Sampler, windows: Windows, seeds: Sequence[int], conditions: Mapping[str, Any]) -> None:
        super().__init__(sampler, windows, seeds, conditions)
        self.level_0 = copy.copy(sampler)
        self.level_0.tilings = sampler.tilings[:1]
        self.spacing, self.size = sampler.config.spacing, tuple(sampler.config.patch)
        self.sparse_windows = 0
        """Windows of sparse frames that are sampled."""
        self._sparse = torch.empty(0)  # the newest sparse frames [B, C, n, h, w], at least those that are still needed

    def window(self, window: Window, known: Known | None) -> list[Tensor]:
        frames = self.size[0]
        inside = (frames - 1) // self.spacing  # sparse frames of a window, without the one that the next one shares
        first = window.number * inside
        while self._count() <= first + inside:
            self._sample_sparse()
        start = first - (self._count() - self._sparse.shape[2])
        sparse = self._sparse[:, :, start : start + inside + 1]
        video = sparse.new_zeros(*sparse.shape[:2], *self.size)
        mask = torch.arange(frames) % self.spacing == 0
        video[:, :, mask] = sparse
        return self.level_0(self.seeds, **self.conditions, known=[Known(video, mask)], window=window.number)

    def state(self) -> State:
        return {"sparse": self._sparse, "sparse_windows": torch.tensor(self.sparse_windows)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._sparse, self.sparse_windows = state["sparse"], int(state["sparse_windows"])

    @property
    def _known(self) -> int:
        """Sparse frames that a window of these knows."""
        return max(1, self.size[0] // 2)

    def _count(self) -> int:
        """Sparse frames that are sampled."""
        return self.size[0] + (self.sparse_windows - 1) * (self.size[0] - self._known) if self.sparse_windows else 0

    def _sample_sparse(self) -> None:
        """Samples the next window of sparse frames."""
        known = None
        if self.sparse_windows:
            known = Known.ends(self._sparse[:, :, -self._known :], None, self.size)
        (video,) = self.level_0(self.seeds, **self.conditions, known=[known], window=self.sparse_windows, sparse=True)
        new = video if known is None else video[:, :, self._known :]
        # Two windows are enough: a window of consecutive frames begins in the newest one or the one before.
        kept = [self._sparse] if self.sparse_windows else []
        self._sparse = torch.cat((*kept, new), dim=2)[:, :, -2 * self.size[0] :]
        self.sparse_windows += 1
