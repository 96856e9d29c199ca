"""Keeps a level in agreement with the finished level below: averaged down, it is that level.

The levels of a pyramid are one video at several sizes, so a clean level, averaged over blocks of ``ratio`` pixels, *is*
the level below. A network learns this only roughly: its context are features, interpolated between the centers of
tokens (docs/learning.md). Here it is imposed. The difference between the averages of each prediction ``y^`` and the
finished level is taken away from the prediction, and what the averages do not see is left to the network. This is the
projection of DDNM (Wang et al. 2023, section 3.1) and, for upsampling, of ILVR (Choi et al. 2021), with the level below
in place of a given picture. The paper does not have it.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from hpdm.checks import Triple

SMOOTH_ROUNDS = 2
"""Smooth corrections before the exact one. The exact one adds a constant to each block, which alone shows as edges."""


class Consistency:
    """Corrects the clean videos of one level that a solver works with.

    Args:
        below: the finished level below, scaled like the videos to correct, ``[B, C, F, H, W]``.
        ratio: pixels of the level per pixel of ``below``, per axis.
        share: share of the difference that is taken away, in (0, 1].
    """

    def __init__(self, below: Tensor, ratio: Triple, share: float = 1.0) -> None:
        self.below, self.ratio, self.share = below, ratio, share

    def correct_(self, combined: Tensor, base: Tensor, alpha: float, beta: float) -> Tensor:
        """``alpha * base + beta * y^``, with the corrected ``y^`` in place of the one that ``combined`` was made of.

        Args:
            combined: ``alpha * base + beta * y^``, ``[B, C, F_l, H_l, W_l]``; it is changed and returned.
            base, alpha, beta: the step of a solver (:class:`hpdm.solvers.Update`).
        """
        missing = beta * self.below - self._averages(combined)  # beta times (below - averages of y^)
        if alpha:
            missing += alpha * self._averages(base)
        missing *= self.share
        for _ in range(SMOOTH_ROUNDS):
            smooth = F.interpolate(missing, size=combined.shape[2:], mode="trilinear", align_corners=False)
            combined += smooth
            missing -= self._averages(smooth)
        combined += F.interpolate(missing, size=combined.shape[2:], mode="nearest")
        return combined

    def _averages(self, video: Tensor) -> Tensor:
        """Means over blocks of ``ratio`` pixels."""
        return F.avg_pool3d(video, self.ratio)
