"""One small call of every op, for tests of what all ops have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import hpdm_kernels as ops

BACKENDS = ("reference", "torch", "triton")
GRID, SOURCE_GRIDS, BOX = (2, 3, 2), [(2, 2, 3), (3, 1, 2)], torch.tensor([[0.25, 0.5, 0.0, 0.5, 0.4, 0.6]] * 2)
WHOLE = [torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]] * 2)] * 2
ORIGINS, TILE, SIZE = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 2, 0], [0, 2, 1]]), (2, 3, 4), (2, 5, 5)


class Call(NamedTuple):
    """An op as a function of its differentiable inputs."""

    shapes: dict[str, tuple[int, ...]]
    """Name and shape of each input."""
    run: Callable[..., Tensor]
    """``run(backend, *inputs)``."""

    def inputs(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Random inputs, by :attr:`shapes`."""
        return [torch.randn(shape, generator=generator).to(dtype) for shape in self.shapes.values()]


def _fuse(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(backend, x, weight, bias, *sources):
        return op(x, sources, WHOLE, BOX, weight, bias, SOURCE_GRIDS, GRID, backend=backend)

    return run


_SOURCES = {"source 0": (2, 12, 5), "source 1": (2, 6, 5)}
_FUSION = {"x": (2, 12, 5), "weight": (5, 13), "bias": (5,), **_SOURCES}
CALLS = {
    "sample_context": Call(
        _SOURCES, lambda backend, *s: ops.sample_context(s, WHOLE, BOX, SOURCE_GRIDS, GRID, backend=backend)
    ),
    "fuse_context": Call(_FUSION, _fuse(ops.fuse_context)),
    "fuse_projected": Call(_FUSION, _fuse(ops.fuse_projected)),
    "fuse_projected without coordinates": Call(_FUSION | {"weight": (5, 10)}, _fuse(ops.fuse_projected)),
    "project_sources": Call(
        {"source": (2, 6, 5), "weight": (5, 13)}, lambda backend, s, w: ops.project_sources((s,), w, backend=backend)[0]
    ),
    "cross_attention": Call(
        {"q": (2, 3, 4, 8), "k": (2, 3, 20, 8), "v": (2, 3, 20, 8)},
        lambda backend, q, k, v: ops.cross_attention(q, k, v, backend=backend),
    ),
    "packed_attention": Call(
        {"q": (2, 3, 4, 8), "packed": (2, 20, 2, 3, 8)},
        lambda backend, q, packed: ops.packed_attention(q, packed, backend=backend),
    ),
    "packed_attention of itself": Call(
        {"packed": (2, 20, 3, 3, 8)}, lambda backend, packed: ops.packed_attention(None, packed, backend=backend)
    ),
    "read_tokens": Call(
        # Parts of 20 and 18 tokens, enough for PyTorch's fused kernel for the CPU.
        {"q": (2, 3, 4, 8), "weight_kv": (48, 5), "tokens 0": (2, 40, 5), "tokens 1": (2, 18, 5)},
        lambda backend, q, w, *tokens: ops.read_tokens(q, tokens, w, recompute=True, piece_rows=20, backend=backend),
    ),
    "sample_patches": Call(
        {"video": (2, 2, 3, 6, 7)}, lambda backend, video: ops.sample_patches(video, BOX, (2, 3, 2), backend=backend)
    ),
    "extract_tiles": Call(
        {"video": (2, 2, *SIZE)}, lambda backend, video: ops.extract_tiles(video, ORIGINS, TILE, backend=backend)
    ),
    "average_tiles": Call(
        {"tiles": (2, 4, 2, *TILE), "x": (2, 2, *SIZE)},
        lambda backend, tiles, x: ops.average_tiles(tiles, ORIGINS, SIZE, x=x, alpha=0.3, beta=0.7, backend=backend),
    ),
    "modulated_norm": Call(
        {"x": (2, 4, 6), "shift": (2, 6), "scale": (2, 6)},
        lambda backend, *tensors: ops.modulated_norm(*tensors, backend=backend),
    ),
    "modulated_norm after a residual": Call(
        {"x": (2, 4, 6), "shift": (2, 6), "scale": (2, 6), "branch": (2, 4, 6), "gate": (2, 6)},
        lambda backend, *tensors: ops.modulated_norm(*tensors, backend=backend)[1],
    ),
    "gated_residual": Call(
        {"x": (2, 4, 6), "branch": (2, 4, 6), "gate": (2, 6)},
        lambda backend, *tensors: ops.gated_residual(*tensors, backend=backend),
    ),
    "group_norm_act": Call(
        {"x": (2, 2, 2, 3, 4), "weight": (4,), "bias": (4,)},
        lambda backend, *tensors: ops.group_norm_act(*tensors, 2, backend=backend),
    ),
    "group_norm_act with a modulation and edges": Call(
        {"x": (2, 2, 2, 3, 4), "weight": (4,), "bias": (4,), "scale": (2, 2, 4), "shift": (2, 2, 4)},
        lambda backend, x, weight, bias, *modulation: ops.group_norm_act(
            x, weight, bias, 2, *modulation, over="clip", pad=((1, 0), (1, 1), (0, 2)), backend=backend
        ),
    ),
    "temporal_attention": Call(
        {"qkv": (2, 3, 4, 24), "rel_k": (3, 4), "rel_v": (3, 4)},
        lambda backend, *t: ops.temporal_attention(*t, backend=backend),
    ),
    "bias_gelu": Call({"x": (2, 4, 6), "bias": (6,)}, lambda backend, *t: ops.bias_gelu(*t, backend=backend)),
}
