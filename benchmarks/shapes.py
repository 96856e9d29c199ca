"""The shapes of the paper (Table 8) as inputs of the ops. Values that the paper does not publish are marked."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hpdm_kernels import footprint_size
from hpdm_kernels.testing import random_boxes

Triple = tuple[int, int, int]


def _times(a: Triple, b: Triple) -> str:
    return "x".join(map(str, a)) if a == b else f"{'x'.join(map(str, a))} of {'x'.join(map(str, b))}"


@dataclass(frozen=True)
class Pyramid:
    """A row of Table 8: one pyramid of patches."""

    name: str
    patch: Triple
    """Pixels of one patch: frames, height, width; also the resolution of level 0."""
    tokenizer: Triple
    """Pixels of one token."""
    levels: int
    ratio: Triple
    """Factor of the resolution from one level to the next, per axis."""
    latent_width: int
    width: int = 1024
    latents: int = 768

    @property
    def grid(self) -> Triple:
        """Tokens of one patch."""
        f, h, w = (p // t for p, t in zip(self.patch, self.tokenizer))
        return (f, h, w)

    @property
    def resolution(self) -> Triple:
        """Pixels of the target video."""
        f, h, w = (p * r ** (self.levels - 1) for p, r in zip(self.patch, self.ratio))
        return (f, h, w)


UCF_S = Pyramid("UCF-S", (16, 64, 64), (1, 4, 4), 3, (2, 2, 2), 256)
UCF_M = Pyramid("UCF-M", (16, 64, 64), (1, 4, 4), 3, (2, 2, 2), 512)
UCF_L = Pyramid("UCF-L", (16, 64, 64), (1, 4, 4), 3, (2, 2, 2), 1024)
T2V = Pyramid("T2V", (8, 36, 64), (1, 3, 4), 4, (2, 2, 2), 3072)
T2V_1K = Pyramid("T2V-1K", (16, 72, 128), (1, 3, 4), 4, (1, 2, 2), 3072)
PYRAMIDS = (UCF_S, UCF_M, UCF_L, T2V, T2V_1K)


@dataclass(frozen=True)
class ContextShape:
    """The last level of a pyramid reads its context from all levels before it (paper eq. 7)."""

    pyramid: Pyramid
    batch: int = 1

    def __str__(self) -> str:
        f, h, w = self.grid
        return f"{self.pyramid.name} {f}x{h}x{w} tokens, {len(self.source_grids)} sources, B={self.batch}"

    @property
    def grid(self) -> Triple:
        return self.pyramid.grid

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def width(self) -> int:
        return self.pyramid.width

    @property
    def source_grids(self) -> tuple[Triple, ...]:
        return (self.grid,) * (self.pyramid.levels - 1)

    @property
    def footprints(self) -> tuple[Triple, ...]:
        """For each source, upper bounds of the tokens that a patch of the last level touches per axis."""
        out = []
        for source in range(len(self.source_grids)):
            steps = self.pyramid.levels - 1 - source
            f, h, w = (footprint_size(float(r) ** -steps, n, n) for n, r in zip(self.grid, self.pyramid.ratio))
            out.append((f, h, w))
        return tuple(out)

    def make(
        self, generator: torch.Generator, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        """Random ``sources`` ``[B, N, D]``, their boxes, and the box of the level that reads them; boxes are nested."""
        boxes: list[Tensor] = []
        for level in range(self.pyramid.levels):
            scale = [1.0 / r**level for r in self.pyramid.ratio]
            boxes.append(random_boxes(self.batch, scale, generator, inside=boxes[-1] if boxes else None))
        size = (self.batch, self.tokens, self.width)
        sources = tuple(torch.randn(size, generator=generator).to(device, dtype) for _ in self.source_grids)
        return sources, tuple(b.to(device) for b in boxes[:-1]), boxes[-1].to(device)

    def bytes(self, direction: str = "fwd", itemsize: int = 4) -> int:
        """Bytes of ``sample_context``: each touched source token is read once, the output is written once. Backward:
        the output's gradient is read once, the sources' gradients, including zeros, are written once.
        """
        touched = sum(math.prod(size) for size in self.footprints)
        forward = touched + self.tokens
        backward = self.tokens * (1 + len(self.source_grids)) if direction == "fwd+bwd" else 0
        return self.batch * self.width * itemsize * (forward + backward)


@dataclass(frozen=True)
class TiledContextShape(ContextShape):
    """``batch`` tiles of the last level at once, as in a sampler; all read the same finished levels."""

    def __str__(self) -> str:
        return f"{self.pyramid.name} {self.batch} tiles, cached levels of {', '.join(map(str, self.rows))} tiles"

    @property
    def rows(self) -> tuple[int, ...]:
        """Number of tiles of each finished level at 50 % overlap, but at most 16; a tile reads one of them."""
        counts = (math.prod(2 * r**level - 1 for r in self.pyramid.ratio) for level in range(len(self.source_grids)))
        return tuple(min(16, n) for n in counts)

    def make_tiles(
        self, generator: torch.Generator, device: torch.device
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor, Tensor]:
        """Sources with a row per cached tile, their boxes, the boxes of the tiles, and ``source_index``."""
        boxes: list[Tensor] = []
        for level, n in enumerate((*self.rows, self.batch)):
            parents = boxes[-1][torch.arange(n) % len(boxes[-1])] if boxes else None
            boxes.append(random_boxes(n, [1.0 / r**level for r in self.pyramid.ratio], generator, inside=parents))
        # Tile i of a level lies in tile i (modulo the number of tiles) of the coarser level before it, and so on.
        index = [torch.arange(self.batch)]
        for n in reversed(self.rows):
            index.insert(0, index[0] % n)
        sources = tuple(torch.randn(n, self.tokens, self.width, generator=generator).to(device) for n in self.rows)
        return (
            sources,
            tuple(b.to(device) for b in boxes[:-1]),
            boxes[-1].to(device),
            torch.stack(index[:-1], 1).to(device),
        )


@dataclass(frozen=True)
class AttentionShape:
    """A cross-attention of a RIN block. The paper publishes no head width; 64 is this library's choice."""

    pyramid: Pyramid
    reads: bool
    """True: latents read from tokens (few queries). False: tokens read from latents (few keys)."""
    batch: int = 1
    head_dim: int = 64

    def __str__(self) -> str:
        which = "read" if self.reads else "write"
        return (
            f"{self.pyramid.name} {which}, {self.queries} queries, {self.keys} keys, {self.heads} heads, B={self.batch}"
        )

    @property
    def heads(self) -> int:
        return self.pyramid.latent_width // self.head_dim

    @property
    def queries(self) -> int:
        return self.pyramid.latents if self.reads else math.prod(self.pyramid.grid)

    @property
    def keys(self) -> int:
        return math.prod(self.pyramid.grid) if self.reads else self.pyramid.latents

    def make(
        self, generator: torch.Generator, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Random ``q [B,h,M,d]``, ``k`` and ``v`` ``[B,h,N,d]``."""
        rows = (self.queries, self.keys, self.keys)
        q, k, v = (
            torch.randn(self.batch, self.heads, n, self.head_dim, generator=generator).to(device, dtype) for n in rows
        )
        return q, k, v

    def flops(self, direction: str = "fwd") -> int:
        """Two products forward, five more backward, which recomputes the scores."""
        product = 2 * self.batch * self.heads * self.queries * self.keys * self.head_dim
        return product * (7 if direction == "fwd+bwd" else 2)

    def bytes(self, direction: str = "fwd", itemsize: int = 4) -> int:
        """Forward: q, k, v and out once. Backward: reads q, k, v, out and its gradient; writes dq, dk, dv."""
        rows = 2 * self.queries + 2 * self.keys
        rows += 4 * self.queries + 4 * self.keys if direction == "fwd+bwd" else 0
        return self.batch * self.heads * self.head_dim * itemsize * rows


@dataclass(frozen=True)
class TilesShape:
    """The tiles of a pyramid's last level when sampling, with 50 % overlap on every axis by default."""

    pyramid: Pyramid
    overlap: tuple[bool, bool, bool] = (True, True, True)
    batch: int = 1
    channels: int = 3

    def __str__(self) -> str:
        return f"{self.pyramid.name} {self.tiles} tiles of {_times(self.tile, self.size)}, B={self.batch}"

    @property
    def tile(self) -> Triple:
        return self.pyramid.patch

    @property
    def size(self) -> Triple:
        return self.pyramid.resolution

    def _starts(self) -> list[list[int]]:
        steps = [t // 2 if o else t for t, o in zip(self.tile, self.overlap)]
        return [list(range(0, n - t + 1, s)) for n, t, s in zip(self.size, self.tile, steps)]

    @property
    def tiles(self) -> int:
        return math.prod(len(s) for s in self._starts())

    def origins(self, device: torch.device | str = "cpu") -> Tensor:
        """First voxel of each tile, ``[T, 3]`` int64."""
        f, h, w = self._starts()
        return torch.tensor([[i, j, k] for i in f for j in h for k in w], device=device)

    def make(
        self, generator: torch.Generator, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Random tiles ``[B,T,C,f,h,w]`` and a video ``[B,C,F,H,W]``."""
        tiles = torch.randn(self.batch, self.tiles, self.channels, *self.tile, generator=generator)
        video = torch.randn(self.batch, self.channels, *self.size, generator=generator)
        return tiles.to(device, dtype), video.to(device, dtype)

    def bytes(self, with_x: bool = False, itemsize: int = 4) -> int:
        """All tiles once, the video once; with ``x`` the video twice, because ``x`` is read, too."""
        tiles = self.tiles * math.prod(self.tile)
        video = math.prod(self.size) * (2 if with_x else 1)
        return self.batch * self.channels * itemsize * (tiles + video)


@dataclass(frozen=True)
class PatchesShape:
    """Patch extraction from a video of the target resolution, for one level of the pyramid (paper eq. 6)."""

    pyramid: Pyramid
    level: int
    batch: int = 1
    channels: int = 3

    def __str__(self) -> str:
        return f"{self.pyramid.name} level {self.level}, {_times(self.pyramid.patch, self.size)}, B={self.batch}"

    @property
    def size(self) -> Triple:
        return self.pyramid.resolution

    def make(
        self, generator: torch.Generator, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """A random video ``[B,C,F,H,W]`` (uint8: 0..255) and a box on whole pixels ``[B, 6]``."""
        video = torch.randint(0, 256, (self.batch, self.channels, *self.size), generator=generator, dtype=torch.uint8)
        scale = torch.tensor([1.0 / r**self.level for r in self.pyramid.ratio])
        size = torch.tensor(self.size)
        room = (size * (1 - scale)).round()
        offset = (torch.rand(self.batch, 3, generator=generator) * (room + 1)).floor().minimum(room) / size
        box = torch.cat((offset, scale.expand(self.batch, 3)), dim=1)
        return video.to(device, dtype), box.to(device)

    def bytes(self, itemsize: int = 4, out_itemsize: int = 4) -> int:
        """The part of the video inside the box once, the patch once."""
        box = math.prod(n / r**self.level for n, r in zip(self.size, self.pyramid.ratio))
        return int(self.batch * self.channels * (box * itemsize + math.prod(self.pyramid.patch) * out_itemsize))


# The shapes that run by default. Without a GPU only the smaller ones, so that the whole suite takes minutes on a CPU.
_CUDA = torch.cuda.is_available()
TILED_CONTEXT = (TiledContextShape(UCF_S, batch=32 if _CUDA else 4), TiledContextShape(T2V, batch=64 if _CUDA else 8))
CONTEXT = (
    ContextShape(UCF_S),
    ContextShape(T2V),
    *((ContextShape(UCF_S, batch=8), ContextShape(T2V_1K)) if _CUDA else ()),
)
ATTENTION = tuple(
    AttentionShape(pyramid, reads)
    for pyramid in ((UCF_S, UCF_M, UCF_L, T2V, T2V_1K) if _CUDA else (UCF_S, UCF_M))
    for reads in (True, False)
)
TILES = (TilesShape(UCF_S), *((TilesShape(T2V),) if _CUDA else ()))
PATCHES = tuple(PatchesShape(UCF_S, level) for level in range(3)) + ((PatchesShape(T2V_1K, 0),) if _CUDA else ())
