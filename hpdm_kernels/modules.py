"""Thin ``nn.Module`` wrappers of the public functions. A module holds the parameters and the name of a backend.

Every module takes ``backend``, one of :data:`BACKENDS`, which changes neither parameters nor ``state_dict``. A model
that passes a backend on can validate it with :func:`check_backend`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpdm_kernels._backend import BACKENDS, check_backend, resolve
from hpdm_kernels.attention.api import packed_attention, read_tokens
from hpdm_kernels.context.api import fuse_context, fuse_projected, project_sources
from hpdm_kernels.patches.api import sample_patches
from hpdm_kernels.rows.api import bias_gelu
from hpdm_kernels.tiles.api import average_tiles

__all__ = [
    "BACKENDS",
    "MLP",
    "ContextFusion",
    "CrossAttention",
    "PatchSampler",
    "SelfAttention",
    "TileAverage",
    "check_backend",
]


class ContextFusion(nn.Module):
    """Deep context fusion with its linear map (paper eq. 7-9): :func:`hpdm_kernels.fuse_context` with parameters.

    Args:
        width: token width ``D``.
        coordinates: also feed the three absolute coordinates; ``weight`` is then ``[D, 2D + 3]``, else ``[D, 2D]``.
        backend: see :func:`hpdm_kernels.fuse_context`. It never changes the parameters.
    """

    def __init__(self, width: int, *, coordinates: bool = True, backend: str = "auto") -> None:
        super().__init__()
        self.backend = check_backend(backend)
        self.weight = nn.Parameter(torch.empty(width, 2 * width + 3 * coordinates))
        self.bias = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weight uniformly between ``-1 / sqrt(fan_in)`` and ``1 / sqrt(fan_in)``; sets the bias to zero."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor,
        sources: Sequence[Tensor],
        source_boxes: Sequence[Tensor],
        box: Tensor,
        source_grids: Sequence[Sequence[int]],
        grid: Sequence[int],
        source_index: Tensor | None = None,
        footprints: Sequence[Sequence[int]] | None = None,
        *,
        projected: bool = False,
    ) -> Tensor:
        """``x [B, N, D]`` -> ``[B, N, D]``; the arguments are those of :func:`hpdm_kernels.fuse_context`.

        ``projected``: the sources are results of :meth:`project`.
        """
        fuse = fuse_projected if projected else fuse_context
        return fuse(
            x,
            tuple(sources),
            tuple(source_boxes),
            box,
            self.weight,
            self.bias,
            source_grids,
            grid,
            source_index=source_index,
            footprints=footprints,
            backend=self.backend,
        )

    def project(self, source: Tensor) -> Tensor:
        """Projects a source ``[B_k, N_k, D]`` once for many patches: ``[B_k, N_k, D]``, see :meth:`forward`."""
        return project_sources((source,), self.weight, backend=self.backend)[0]


class CrossAttention(nn.Module):
    """Attention of ``queries`` to ``context`` with its projections, over :func:`hpdm_kernels.packed_attention`.

    Args:
        query_width: width of the queries' rows.
        context_width: width of the context's rows.
        width: attention width ``h * d``.
        out_width: width of the result, or ``None`` to return the concatenated heads (width ``width``) as they are.
        head_width: ``d``; ``width`` must be a multiple of it.
        backend: see :func:`hpdm_kernels.packed_attention`. It never changes the parameters.

    Raises:
        ValueError: ``width`` is no multiple of ``head_width``, or the backend is unknown.
    """

    def __init__(
        self,
        query_width: int,
        context_width: int,
        width: int,
        out_width: int | None,
        *,
        head_width: int = 64,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if width % head_width:
            raise ValueError(f"width: got {width}, expected a multiple of head_width = {head_width}")
        self.backend = check_backend(backend)
        self.heads, self.head_width = width // head_width, head_width
        self.to_q = nn.Linear(query_width, width, bias=False)
        self.to_kv = nn.Linear(context_width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, out_width) if out_width is not None else nn.Identity()

    def forward(
        self,
        queries: Tensor,
        context: Tensor | Sequence[Tensor],
        *,
        key_mask: Tensor | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """``queries [B, M, query_width]``, ``context [B, N, context_width]`` -> ``[B, M, out_width or width]``.

        Args:
            queries: rows that attend.
            context: rows that are attended to; several tensors are read as if they were concatenated along N.
            key_mask: ``[B, N]`` bool, true where the context may be attended to.
            recompute: recompute keys and values in the backward pass instead of saving them, see
                :func:`hpdm_kernels.read_tokens`.
        """
        if not recompute:
            rows = context if isinstance(context, Tensor) else torch.cat(list(context), dim=1)  # [B, N, context_width]
            return self.attend(queries, self.keys_and_values(rows), key_mask=key_mask)
        q = _split_heads(self.to_q(queries), self.heads)  # [B, h, M, d]
        out = read_tokens(q, context, self.to_kv.weight, key_mask=key_mask, recompute=True, backend=self.backend)
        return self.to_out(_merge_heads(out))  # [B, M, out_width or width]

    def keys_and_values(self, context: Tensor) -> Tensor:
        """``context [B, N, context_width]`` -> ``[B, N, 2 * width]``, for several calls of :meth:`attend`."""
        return self.to_kv(context)

    def attend(self, queries: Tensor, keys_and_values: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """:meth:`forward` with the context's keys and values ready-made.

        ``queries [B, M, query_width]``, ``keys_and_values [B, N, 2 * width]``, ``key_mask [B, N]`` bool, true where a
        row may be attended to -> ``[B, M, out_width or width]``.
        """
        q = _split_heads(self.to_q(queries), self.heads)  # [B, h, M, d]
        packed = keys_and_values.unflatten(-1, (2, self.heads, -1))  # [B, N, 2, h, d]
        out = packed_attention(q, packed, key_mask=key_mask, backend=self.backend)  # [B, h, M, d]
        return self.to_out(_merge_heads(out))  # [B, M, out_width or width]


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection, over :func:`hpdm_kernels.packed_attention`.

    Args:
        width: width of the rows, and ``h * d``.
        head_width: ``d``; ``width`` must be a multiple of it.
        backend: see :func:`hpdm_kernels.packed_attention`.

    Raises:
        ValueError: ``width`` is no multiple of ``head_width``, or the backend is unknown.
    """

    def __init__(self, width: int, *, head_width: int = 64, backend: str = "auto") -> None:
        super().__init__()
        if width % head_width:
            raise ValueError(f"width: got {width}, expected a multiple of head_width = {head_width}")
        self.backend = check_backend(backend)
        self.heads = width // head_width
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, M, width]`` -> ``[B, M, width]``."""
        packed = self.to_qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, M, 3, h, d]
        return self.to_out(_merge_heads(packed_attention(None, packed, backend=self.backend)))


class MLP(nn.Sequential):
    """Linear, GELU, Linear; where the kernels run, :func:`hpdm_kernels.bias_gelu` adds the first bias.

    Elsewhere PyTorch adds it within the product, which is as fast.

    Args:
        width: of the input and the output.
        ratio: width of the hidden layer, in multiples of ``width``.
        backend: see :func:`hpdm_kernels.bias_gelu`. It never changes the parameters.
    """

    def __init__(self, width: int, ratio: int, *, backend: str = "auto") -> None:
        hidden = ratio * width
        super().__init__(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.backend = check_backend(backend)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, width]`` -> ``[B, N, width]``."""
        if resolve(self.backend, "bias_gelu", x) != "triton":
            return super().forward(x)
        first, last = cast(nn.Linear, self[0]), self[2]
        return last(bias_gelu(F.linear(x, first.weight), first.bias, backend="triton"))


class PatchSampler(nn.Module):
    """:func:`hpdm_kernels.sample_patches` at a fixed patch size (paper eq. 6).

    Args:
        size: patch size in pixels (frames, height, width).
        backend: see :func:`hpdm_kernels.sample_patches`.
    """

    def __init__(self, size: Sequence[int], *, backend: str = "auto") -> None:
        super().__init__()
        self.size = tuple(size)
        self.backend = check_backend(backend)

    def forward(self, video: Tensor, box: Tensor) -> Tensor:
        """``video [B, C, F, H, W]``, ``box [B, 6]`` -> ``[B, C, f, h, w]``."""
        return sample_patches(video, box, self.size, backend=self.backend)


class TileAverage(nn.Module):
    """:func:`hpdm_kernels.average_tiles` for fixed tiles that cover a video (paper section 4.4).

    Args:
        origins: ``[T, 3]`` int, first voxels of the tiles.
        size: video size in pixels (frames, height, width).
        weights: three tensors or ``None``, see :func:`hpdm_kernels.average_tiles`; the module keeps copies.
        backend: see :func:`hpdm_kernels.average_tiles`.
    """

    origins: Tensor

    def __init__(
        self,
        origins: Tensor,
        size: Sequence[int],
        *,
        weights: Sequence[Tensor] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.backend = check_backend(backend)
        self.size = tuple(size)
        # A copy, which the caller cannot change. Not a buffer, which would move to a GPU with the module: origins are
        # read on the CPU.
        self.origins = origins.detach().clone()
        self.weights = None if weights is None else [weight.detach().clone() for weight in weights]

    def forward(self, tiles: Tensor, x: Tensor | None = None, alpha: float = 0.0, beta: float = 1.0) -> Tensor:
        """``tiles [B, T, C, f, h, w]``, ``x [B, C, F, H, W]`` -> ``alpha * x + beta * mean``, ``[B, C, F, H, W]``."""
        return average_tiles(
            tiles, self.origins, self.size, x=x, alpha=alpha, beta=beta, weights=self.weights, backend=self.backend
        )


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, N, h*d] -> [B, h, N, d]``, a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge_heads(x: Tensor) -> Tensor:
    """``[B, h, M, d] -> [B, M, h*d]``."""
    return x.transpose(1, 2).flatten(2)
