"""The protocols of FVD, KVD and the Inception score: which clips and frames count, and how numbers are computed.

Published numbers depend on the protocol more than on the model, so the result names the protocol and all its parts.
``stylegan-v`` is that of StyleGAN-V's public code (``universome/stylegan-v``, ``src/metrics``, commit 1f630af),
``paper`` that of HPDM (section 5 and appendix B), by the same authors. They differ in three points:

- real videos for FVD: 2,048 of the set (``stylegan-v``); all of UCF-101's train split, about 9,500 (``paper``);
- generated videos: 2,048 (``stylegan-v``); 10,000 (``paper``). For the paper's Table 6, which also has 2,048, and its
  ablations, which have 512, pass ``--samples``;
- overlap of the tiles: 50 % in space (``paper``, appendix C); StyleGAN-V has no tiles.

``lvdm`` is that of Latent Video Diffusion (section 4 and its public code, ``YingqingHe/LVDM``, ``scripts``):

- 2,048 real and 2,048 generated videos of 16 frames, and ten runs, whose mean and standard deviation (divided by the
  number of runs) are reported. Every run draws real clips anew; the generated videos are the same in all of them;
- covariance: divided by the number of videos less one;
- the whole of UCF-101 and Taichi-HD, the train split of Sky Time-lapse.

Common to all:

- frames of a real video: a window of consecutive frames at a random position; shorter videos are left out;
- frames of a generated video: the first 16, or all 64;
- class of a generated video: that of a random real video, so classes are as frequent as in the set;
- covariance (but for ``lvdm``): divided by the number of videos, not by one less;
- Inception score: 10 splits of rows shuffled by ``RandomState(42)``; C3D takes 16 frames, so there is none for 64.

**Readings.** StyleGAN-V's code takes the *first* 2,048 real videos of its set, which in sorted folders belong to a few
classes; here they are drawn at random from the seed. The paper uses StyleGAN-V's metrics, but says neither how windows
are placed nor how covariances are divided; here both follow StyleGAN-V's code. For 16 frames, section 5 says
"subsample", appendix B "the first 16 frames out of the sequence"; here the first 16 are taken. Frames are read as in
the run's training (stride, rate, size).

LVDM's code reads real clips as in training, either at random places or cut one after another; here they are at random
places, and where a set has fewer videos than clips are wanted, further windows of the same videos are taken. LVDM does
not say what of conditional runs; here classes are drawn as in the other protocols.

None of these papers but LVDM has KVD. It has no setting that protocols could differ in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ProtocolName = Literal["stylegan-v", "paper", "lvdm"]


@dataclass(frozen=True)
class Protocol:
    """The numbers in which protocols differ."""

    real: int | None
    """Real videos, at most the set's unless ``repeat``; ``None`` for all."""
    generated: int
    overlap: str | None
    """Axes on which tiles overlap while sampling, unless others are asked for; ``None`` for the sampler's default."""
    draws: int = 1
    """How often the real clips are drawn."""
    unbiased: bool = False
    """Whether covariances are divided by the number of videos less one."""
    repeat: bool = False
    """Whether a set with fewer videos gives several windows of each."""
    split: bool = True
    """Whether the published numbers are of one side of a set's official split."""


PROTOCOLS: dict[ProtocolName, Protocol] = {
    "stylegan-v": Protocol(real=2048, generated=2048, overlap=None),
    # Appendix C: "spatial 50% patch overlapping to compute the metrics".
    "paper": Protocol(real=None, generated=10_000, overlap="hw"),
    "lvdm": Protocol(real=2048, generated=2048, overlap=None, draws=10, unbiased=True, repeat=True, split=False),
}
