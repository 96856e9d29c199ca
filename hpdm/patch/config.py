"""The config of a model: sizes (paper Table 8), the pyramid, and the ablation switches of Table 3 and appendix D."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpdm.checks import Triple, at_least
from hpdm.json_file import checked

MOST_LAYERS = 1024
"""Latent layers of all blocks together, and blocks; more are taken for an error."""
MOST_PIXELS = 2**32
"""Pixels of a video; more are taken for an error."""
CONDITIONINGS = ("none", "class", "text")
FUSIONS = ("deep", "shallow")
COORDINATE_EMBEDDINGS = ("raw", "sinusoidal")


@dataclass(frozen=True)
class HPDMConfig:
    """Sizes, pyramid and switches of a Hierarchical Patch Diffusion Model. Triples are (frames, height, width).

    Raises:
        ValueError: a combination that cannot be built; the message names the field.
    """

    patch: Triple = (16, 64, 64)
    """Pixel size r of every patch, which is also the resolution of level 0."""
    ratio: Triple = (2, 2, 2)
    """Growth of the video resolution per level and axis, 1 or 2: R_l = r * ratio^l."""
    levels: int = 3
    """Pyramid levels L."""
    tokenizer: Triple = (1, 4, 4)
    """Pixels per token."""
    channels: int = 3
    width: int = 1024
    """Token width D."""
    latents: int = 768
    """Latents per level M."""
    latent_width: int = 256
    """Latent width E, also the attention width."""
    head_width: int = 64
    levels_per_block: tuple[int, ...] = (1, 1, 2, 2, 3, 3)
    """Adaptive computation (Listing 1): block b serves levels 0 .. levels_per_block[b] - 1."""
    latent_layers: int = 4
    """Self-attention layers on the latents per block."""
    latent_mlp_ratio: int = 4
    token_mlp_ratio: int = 2
    conditioning: str = "class"
    """"none", "class" (labels) or "text" (T5 embeddings)."""
    classes: int = 101
    text_width: int = 1024
    """Width of the text encoder's embeddings."""
    conditioning_width: int = 2048
    conditioning_dropout: float = 0.1
    """Probability that a training sample is unconditional, for guidance (Table 8)."""
    self_conditioning: float = 0.0
    """Probability that a training sample's latents start from the final ones of a first pass (RIN's latent
    self-conditioning, there 0.9). Each training step then takes one more forward pass. 0 builds a model without it."""
    known_frames: bool = False
    """Whether some frames of a patch can be given, see :mod:`hpdm.frames`. Not in the paper."""
    spacing: int = 1
    """Frames of level 0 from one frame of a sparse storyline to the next, which the network can show on level 0 besides
    its own clips; a divisor of ``patch[0] - 1``. 1 for none. Not in the paper."""
    memory: bool = False
    """Whether latents of level 0 can start from the final ones of the window before. Not in the paper."""
    input_scale: float = 1.0
    """b_0: scale of the clean signal on level 0."""
    input_scale_decay: float = 0.7
    """q: the signal on level l is scaled by b_0 * q^l (section 4.5, exponentially smaller per level)."""
    fusion: str = "deep"
    """"deep" (section 4.2), or Table 3's "shallow": RGB of the previous level only, concatenated to the input."""
    detach_context: bool = False
    """Table 3's "context detached": no gradient from a level to those below it."""
    coordinates: bool = True
    """Table 3's "no coordinates" when false."""
    coordinate_embedding: str = "raw"
    """How the fusion sees coordinates: "raw" (eq. 9), or "sinusoidal" (appendix D.2), see
    :class:`hpdm.patch.sinusoidal_fusion.SinusoidalFusion`."""
    share_blocks: bool = False
    """Appendix D.4: all blocks have the weights of the first one, but each its own fusion."""

    def __post_init__(self) -> None:
        self._check_triples()
        at_least(self, 1, "levels", "channels", "width", "latents", "latent_width", "head_width", "latent_layers")
        at_least(self, 1, "latent_mlp_ratio", "token_mlp_ratio", "text_width", "conditioning_width")
        self._check_bounds()
        self._check_sizes()
        self._check_choices()

    def _check_triples(self) -> None:
        """Checks the triples and makes tuples of sequences (JSON has lists)."""
        for name in ("patch", "ratio", "tokenizer"):
            value = tuple(getattr(self, name))
            if len(value) != 3 or not all(isinstance(n, int) and n >= 1 for n in value):
                raise ValueError(f"{name}: got {value}, expected three ints >= 1 (frames, height, width)")
            object.__setattr__(self, name, value)
        object.__setattr__(self, "levels_per_block", tuple(self.levels_per_block))

    def _check_bounds(self) -> None:
        """Checks what would take a very long time or all of the memory, whatever the weights are."""
        blocks = len(self.levels_per_block)
        if max(self.levels, blocks, blocks * self.latent_layers) > MOST_LAYERS:
            raise ValueError(
                f"levels_per_block: got {blocks} blocks of {self.latent_layers} latent layers, "
                f"{self.levels} levels, expected at most {MOST_LAYERS}"
            )
        pixels = math.prod(self.patch) * math.prod(self.ratio) ** (self.levels - 1)
        if pixels > MOST_PIXELS:
            raise ValueError(
                f"levels: got {self.levels} of patches of {self.patch}, expected videos of at most {MOST_PIXELS} pixels"
            )

    def _check_sizes(self) -> None:
        """Checks sizes that must fit each other."""
        if any(n not in (1, 2) for n in self.ratio):
            raise ValueError(f"ratio: got {self.ratio}, expected 1 or 2 on every axis")
        if any(r % p for r, p in zip(self.patch, self.tokenizer)):
            raise ValueError(f"tokenizer: got {self.tokenizer}, expected a divisor of patch = {self.patch}")
        if self.latent_width % self.head_width:
            raise ValueError(
                f"latent_width: got {self.latent_width}, expected a multiple of head_width = {self.head_width}"
            )
        if self.known_frames and self.grid[0] < 2:
            raise ValueError(
                f"known_frames: got true for patches of {self.grid[0]} frame of tokens, expected at least 2: a known "
                "one and one to predict"
            )
        if self.spacing < 1 or (self.spacing > 1 and (self.patch[0] - 1) % self.spacing):
            raise ValueError(f"spacing: got {self.spacing}, expected 1 or a divisor of {self.patch[0] - 1}")
        if self.spacing > 1 and self.tokenizer[0] > 1:
            raise ValueError(f"spacing: got {self.spacing} with tokens of {self.tokenizer[0]} frames, expected 1")
        if (self.spacing > 1 or self.memory) and not self.known_frames:
            raise ValueError(
                f"known_frames: got false with spacing={self.spacing} and memory={self.memory}, expected true"
            )
        lpb = self.levels_per_block
        if not lpb or max(lpb) != self.levels or min(lpb) < 1 or list(lpb) != sorted(lpb):
            raise ValueError(
                f"levels_per_block: got {lpb}, expected a rising sequence of 1..{self.levels} ending with {self.levels}"
            )

    def _check_choices(self) -> None:
        """Checks named variants, probabilities and scales."""
        if self.conditioning not in CONDITIONINGS:
            raise ValueError(f"conditioning: got {self.conditioning!r}, expected one of {CONDITIONINGS}")
        if self.conditioning == "class":
            at_least(self, 1, "classes")
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion: got {self.fusion!r}, expected one of {FUSIONS}")
        if self.coordinate_embedding not in COORDINATE_EMBEDDINGS:
            raise ValueError(
                f"coordinate_embedding: got {self.coordinate_embedding!r}, expected one of {COORDINATE_EMBEDDINGS}"
            )
        if self.coordinate_embedding != "raw" and (self.fusion != "deep" or not self.coordinates):
            raise ValueError(
                f"coordinate_embedding: got {self.coordinate_embedding!r} with fusion={self.fusion!r} and "
                f"coordinates={self.coordinates}, expected deep fusion with coordinates"
            )
        for name in ("conditioning_dropout", "self_conditioning"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a probability")
        if self.input_scale <= 0 or self.input_scale_decay <= 0:
            raise ValueError(
                f"input_scale, input_scale_decay: got {self.input_scale}, {self.input_scale_decay}, expected both > 0"
            )

    @property
    def grid(self) -> Triple:
        """Tokens of a patch per axis (F, H, W)."""
        f, h, w = (r // p for r, p in zip(self.patch, self.tokenizer))
        return (f, h, w)

    @property
    def tokens(self) -> int:
        """Tokens of a patch N."""
        return math.prod(self.grid)

    @property
    def resolution(self) -> Triple:
        """Target resolution R_{L-1}."""
        return self.level_resolution(self.levels - 1)

    def level_resolution(self, level: int) -> Triple:
        """Resolution of the whole video on a level, R_l = r * ratio^l."""
        f, h, w = (r * q**level for r, q in zip(self.patch, self.ratio))
        return (f, h, w)

    def level_scale(self, level: int) -> tuple[float, float, float]:
        """Scale of a box on a level, r / R_l."""
        f, h, w = (float(q) ** -level for q in self.ratio)
        return (f, h, w)

    @property
    def frame_scale(self) -> int:
        """Frames of the video per frame of level 0."""
        return self.resolution[0] // self.patch[0]

    @property
    def past_frames(self) -> int:
        """Frames of the video from the start of the window before to that of a window, if windows are remembered."""
        return (self.patch[0] - self.patch[0] // 2) * self.frame_scale if self.memory else 0

    @property
    def clip_frames(self) -> int:
        """Frames of a training clip: more than ``resolution[0]`` with memory or a sparse storyline."""
        sparse = ((self.patch[0] - 1) * self.spacing + 1) * self.frame_scale if self.spacing > 1 else 0
        return max(self.resolution[0] + self.past_frames, sparse)

    def signal_scale(self, level: int) -> float:
        """b_l = b_0 * q^l."""
        return self.input_scale * self.input_scale_decay**level

    @property
    def signal_scales(self) -> tuple[float, ...]:
        """b_l of every level."""
        return tuple(self.signal_scale(level) for level in range(self.levels))

    def replace(self, **changes: Any) -> HPDMConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def without_adaptive_computation(self) -> HPDMConfig:
        """Table 3's "no adaptive computation": every block serves every level."""
        return self.replace(levels_per_block=(self.levels,) * len(self.levels_per_block))

    def with_pyramid(self, patch: Sequence[int], resolution: Sequence[int]) -> HPDMConfig:
        """The same network on another pyramid; the number of levels follows from the two sizes.

        ``levels_per_block`` grows linearly with the block index, as in Table 8 (1/1/2/2/3/3, 1/2/2/3/3/4). Where a
        token does not divide the patch (in time, for images), it shrinks to their greatest common divisor.

        Raises:
            ValueError: ``resolution`` is not ``patch * ratio^l`` with ratio 1 or 2 per axis.
        """
        levels, ratio = pyramid_of(patch, resolution)
        blocks = len(self.levels_per_block)
        adaptive = self.levels_per_block[0] < self.levels or self.levels == 1
        linear = (*(1 + round(b * (levels - 1) / max(blocks - 1, 1)) for b in range(blocks - 1)), levels)
        levels_per_block = linear if adaptive else (levels,) * blocks
        f, h, w = patch
        tokenizer = tuple(math.gcd(r, p) for r, p in zip(patch, self.tokenizer))
        return self.replace(
            patch=(f, h, w), ratio=ratio, levels=levels, levels_per_block=levels_per_block, tokenizer=tokenizer
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HPDMConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: a field that this version does not know, or a value of another type; the message names it.
        """
        return checked(values, cls, "config")


def pyramid_of(patch: Sequence[int], resolution: Sequence[int]) -> tuple[int, Triple]:
    """Levels and ratio of the pyramid from ``patch`` to ``resolution``.

    Raises:
        ValueError: ``resolution`` is not ``patch * ratio^l`` for one ``l`` and a ratio of 1 or 2 per axis.
    """
    error = ValueError(
        f"resolution: got {tuple(resolution)}, expected patch = {tuple(patch)} times the same power of two on every "
        "axis that grows, e.g. " + str(tuple(4 * r for r in patch))
    )
    if len(patch) != 3 or len(resolution) != 3 or any(n < 1 for n in (*patch, *resolution)):
        raise error
    growth = {big // small for small, big in zip(patch, resolution) if big != small}
    if any(big % small for small, big in zip(patch, resolution)) or len(growth) > 1:
        raise error
    factor = growth.pop() if growth else 1
    if factor & (factor - 1):
        raise error
    f, h, w = (2 if big != small else 1 for small, big in zip(patch, resolution))
    return factor.bit_length(), (f, h, w)
