"""Small calls of the ops that together launch every kernel in every shipped configuration.

Each case calls a public function, or a registered op where no public function reaches a configuration, and compares
values and gradients with the paper's formula in fp64. Sizes are odd where the configuration has masks, so that blocks
are partial on every axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

import hpdm_kernels
from hpdm_kernels import reference
from hpdm_kernels.attention.layout import unpack
from hpdm_kernels.attention.specs import BLOCKS_D
from hpdm_kernels.groupnorm.specs import VARIANTS, configurations
from hpdm_kernels.rows.specs import WIDTHS
from hpdm_kernels.temporal.block_sizes import tile
from hpdm_kernels.temporal.specs import SIZES
from hpdm_kernels.testing import assert_within_budget, check_op, random_boxes, steps
from hpdm_kernels.tiles import ops as tile_ops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Products of fp32 -> allowed error in units in the last place of fp32, beside twice that of the plain formula. One
# pass of TF32 cuts operands to 11 bits; three passes drop the product of the two low parts.
PRECISIONS = {"ieee": 8.0, "tf32x3": 64.0, "tf32": 2.0**15}


class Case(NamedTuple):
    """One call with its gradients."""

    name: str
    """Op, dtype and what selects the configurations."""
    check: Callable[[Generator], object]
    """Draws inputs and calls; raises ``AssertionError`` if a result is wrong."""


def all_cases() -> list[Case]:
    """The cases of all ops."""
    return [
        *_attention_cases(), *_context_cases(), *_patch_cases(), *_tile_cases(), *_row_cases(), *_group_cases(),
        *_temporal_cases(),
        *_optimizer_cases(),
    ]  # fmt: skip


# ---- attention ----


def _attention_cases() -> Iterator[Case]:
    arithmetic = [("fp32", p) for p in PRECISIONS] + [("bf16", "ieee"), ("fp16", "ieee")]
    for dtype, precision in arithmetic:
        for block in BLOCKS_D:
            width = block * 3 // 4
            for masked in (False, True):
                name = f"cross_attention[{dtype},{precision},d{width}{',mask' * masked}]"
                yield Case(name, _attention(dtype, precision, (1, 2, 70, 100, width), masked))
        yield Case(
            f"cross_attention[{dtype},{precision},d64]", _attention(dtype, precision, (1, 1, 128, 128, 64), False)
        )
    for dtype in DTYPES:
        for block in BLOCKS_D:
            # One block of queries and many keys: the loop over the keys is split, and its parts are combined.
            check = _attention(dtype, "tf32", (1, 1, 5, 2100, block), False, gradients=False)
            yield Case(f"cross_attention[{dtype},split,d{block}]", check)
    for dtype, parts in (("fp32", 2), ("bf16", 3)):
        yield Case(f"packed_attention[{dtype},{parts} parts]", _packed(dtype, parts))


def _attention(
    dtype: str, precision: str, shape: tuple[int, int, int, int, int], masked: bool, gradients: bool = True
) -> Callable[[Generator], object]:
    batch, heads, queries, keys, width = shape

    def check(generator: Generator) -> object:
        # Heads lie beside each other, as a projection writes them.
        draw = lambda rows: (
            torch.randn(batch, rows, heads, width, generator=generator).to(DTYPES[dtype]).transpose(1, 2)
        )
        q, k, v, grad = draw(queries), draw(keys), draw(keys), draw(queries)
        mask = torch.rand(batch, keys, generator=generator) < 0.7 if masked else None
        options: Any = {"key_mask": mask, "precision": precision, "backend": "triton"}
        ours = lambda q, k, v: hpdm_kernels.cross_attention(q, k, v, **options)
        formula = lambda q, k, v: reference.cross_attention(q, k, v, width**-0.5, mask)
        if gradients:
            return check_op(ours, formula, [q, k, v], grad, ulps=_ulps(dtype, precision))
        return _check_value(ours, formula, [q, k, v], _ulps(dtype, precision))

    return check


def _packed(dtype: str, parts: int) -> Callable[[Generator], object]:
    """Gradients beside each other: queries, keys and values, or the last two."""

    def check(generator: Generator) -> object:
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(DTYPES[dtype])
        inputs = [draw(1, 70, parts, 2, 48), *([draw(1, 2, 100, 48)] if parts == 2 else [])]
        ours = lambda packed, q=None: hpdm_kernels.packed_attention(q, packed, precision="ieee", backend="triton")
        formula = lambda packed, q=None: reference.cross_attention(*unpack(q, packed), 48**-0.5)
        return check_op(ours, formula, inputs, ulps=_ulps(dtype, "ieee"))

    return check


# ---- context ----


def _context_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for width, index in ((144, None), (70, torch.int32), (144, torch.int64), (70, None)):
            label = f"{dtype},D={width},index={str(index).removeprefix('torch.')}"
            yield Case(f"sample_context[{label}]", _context("sample", dtype, width, index))
            yield Case(f"fuse_context[{label}]", _context("fuse", dtype, width, index))
    for precision in PRECISIONS:
        for extras in (False, True):
            label = f"fp32,{precision},{'extras' if extras else 'plain'}"
            yield Case(f"fuse_context[{label}]", _context("fuse", "fp32", 144, None, precision, extras))
    # Fewer rows than columns: the product does not transpose the weight first.
    yield Case("fuse_context[fp32,tf32,B=1]", _context("fuse", "fp32", 144, None, "tf32", batch=1))


def _context(
    op: str,
    dtype: str,
    width: int,
    index: torch.dtype | None,
    precision: str | None = None,
    extras: bool = True,
    batch: int = 2,
) -> Callable[[Generator], object]:
    grid, grids = (2, 5, 9), [(3, 6, 8), (2, 7, 5)]
    scales = [(1.0, 1.0, 1.0), (0.6, 0.7, 0.55)]
    # Bounds, not what the boxes need: which products a configuration makes must not depend on the draw.
    footprints = [
        [hpdm_kernels.footprint_size(0.3 / scale, n, m) for scale, n, m in zip(box, grid, source)]
        for box, source in zip(scales, grids)
    ]

    def check(generator: Generator) -> object:
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(DTYPES[dtype])
        whole = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]])
        half = random_boxes(1, scales[1], generator).expand(3, 6).contiguous()
        rows = batch if index is None else 3
        boxes, box = [whole.repeat(rows, 1), half[:rows]], random_boxes(batch, (0.3,) * 3, generator, half[:batch])
        choice = None if index is None else torch.randint(rows, (batch, 2), generator=generator, dtype=index)
        sources = [draw(rows, math.prod(g), width) for g in grids]
        x, bias = draw(batch, math.prod(grid), width), draw(width) if extras else None
        weight = draw(width, 2 * width + 3 * extras) / math.sqrt(width)
        options: dict[str, Any] = {"source_index": choice}
        bounded = {"footprints": footprints, "backend": "triton"}

        def sample(ours: bool) -> Callable[..., Tensor]:
            function: Any = hpdm_kernels.sample_context if ours else reference.sample_context
            same = options | bounded if ours else options
            return lambda *s: function(s, boxes, box, grids, grid, **same)

        def fuse(ours: bool) -> Callable[..., Tensor]:
            function: Any = hpdm_kernels.fuse_context if ours else reference.fuse_context
            same = (
                options | {"footprints": footprints, "backend": "triton", "precision": precision} if ours else options
            )
            return lambda x, w, b, *s: function(x, s, boxes, box, w, b, grids, grid, **same)

        before = torch.get_float32_matmul_precision()
        # PyTorch's own products serve a precision that equals its setting.
        torch.set_float32_matmul_precision("high" if precision == "ieee" else "highest")
        try:
            if op == "sample":
                return check_op(sample(True), sample(False), sources, ulps=_ulps(dtype, "ieee"))
            inputs = [x, weight, bias, *sources]
            return check_op(fuse(True), fuse(False), inputs, ulps=_ulps(dtype, precision or "ieee"))
        finally:
            torch.set_float32_matmul_precision(before)

    return check


# ---- patches and tiles ----


def _patch_cases() -> Iterator[Case]:
    for dtype in ("fp32", "bf16", "fp16", "uint8"):
        yield Case(f"sample_patches[{dtype}]", _patches(dtype))


def _patches(dtype: str) -> Callable[[Generator], object]:
    def check(generator: Generator) -> object:
        box = random_boxes(2, (0.6, 0.8, 0.7), generator)
        shape, size = (2, 2, 3, 11, 70), (2, 9, 41)
        call = lambda v, **options: hpdm_kernels.sample_patches(v, box, size, **options)
        ours = lambda v: call(v, backend="triton")
        if dtype == "uint8":
            video = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            return _check_value(ours, lambda v: reference.sample_patches(v, box, size), [video], 8.0)
        video = torch.randn(shape, generator=generator).to(DTYPES[dtype])
        return check_op(ours, lambda v: reference.sample_patches(v, box, size), [video])

    return check


def _tile_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for aligned in (True, False):
            label = f"{dtype}{'' if aligned else ',unaligned'}"
            yield Case(f"extract_tiles[{label}]", _tiles("extract", dtype, aligned))
            for has_x in (False, True):
                for op in ("average", "sum", "accumulate"):
                    yield Case(f"{op}_tiles[{label}{',x' * has_x}]", _tiles(op, dtype, aligned, has_x))
                for op in ("average", "accumulate"):
                    check = _tiles(op, dtype, aligned, has_x, weighted=True)
                    yield Case(f"{op}_tiles[{label}{',x' * has_x},weights]", check)
            for op in ("extract", "average"):  # the average's gradient extracts
                yield Case(f"{op}_tiles[{label},w64]", _tiles(op, dtype, aligned, width=64))
            yield Case(
                f"average_tiles[{label},w64,weights]", _tiles("average", dtype, aligned, width=64, weighted=True)
            )


def _tiles(
    op: str, dtype: str, aligned: bool, has_x: bool = False, width: int = 272, weighted: bool = False
) -> Callable[[Generator], object]:
    # Blocks are those of large frames from 257 columns on.
    step, width = (width // 2 // 8 * 8, width) if aligned else (width // 2 + 1, width - 1)
    tile, size = (2, 5, width), (3, 9, width + step)
    origins = torch.cartesian_prod(torch.tensor([0, 1]), torch.tensor([0, 4]), torch.tensor([0, step]))

    def check(generator: Generator) -> object:
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(DTYPES[dtype])
        if op == "extract":
            extract = lambda v: hpdm_kernels.extract_tiles(v, origins, tile, backend="triton")
            return check_op(extract, lambda v: reference.extract_tiles(v, origins, tile), [draw(1, 2, *size)])
        tiles, x = draw(1, len(origins), 2, *tile), draw(1, 2, *size) if has_x else None
        factors: dict[str, Any] = {"alpha": 0.3 if has_x else 0.0, "beta": 0.7}
        weights = [torch.randn(n, generator=generator).exp() for n in tile] if weighted else None
        average = lambda t, x: reference.average_tiles(t, origins, size, x, **factors, weights=weights)
        options: Any = {"weights": weights, "backend": "triton"}
        if op == "average":
            ours = lambda t, x: hpdm_kernels.average_tiles(t, origins, size, x=x, **factors, **options)
            return check_op(ours, average, [tiles, x])
        if op == "sum":  # the op behind the gradient of extraction
            direct = lambda t, x: tile_ops.average_tiles(t, origins, size, x, *factors.values(), False, None, "triton")
            return _check_value(direct, lambda t, x: _sum(t, origins, size, x, **factors), [tiles, x], 8.0)

        def accumulate(tiles: Tensor, x: Tensor | None) -> Tensor:
            sums = hpdm_kernels.TileAccumulator(origins, tile, size, **options)
            for first in range(0, len(origins), 3):
                sums.add(tiles[:, first : first + 3])
            return sums.step(x, **factors)

        return _check_value(accumulate, average, [tiles, x], 8.0)

    return check


def _sum(tiles: Tensor, origins: Tensor, size: Sequence[int], x: Tensor | None, alpha: float, beta: float) -> Tensor:
    """``alpha * x`` plus ``beta`` times the sum of the tiles, by slices."""
    f, h, w = tiles.shape[3:]
    wide = torch.promote_types(tiles.dtype, torch.float32)
    total = tiles.new_zeros(tiles.shape[0], tiles.shape[2], *size, dtype=wide)
    for t, (i, j, k) in enumerate(origins.tolist()):
        total[:, :, i : i + f, j : j + h, k : k + w] += tiles[:, t]
    return (beta * total + (0.0 if x is None else alpha * x.to(wide))).to(tiles.dtype)


# ---- rows ----


def _row_cases() -> Iterator[Case]:
    for dtype in (*DTYPES, "fp32+bf16"):
        for width in WIDTHS:
            yield Case(f"modulated_norm[{dtype},D={width}]", _norms(dtype, width))
    for dtype in DTYPES:
        yield Case(f"gated_residual[{dtype}]", _residual(dtype))
        yield Case(f"bias_gelu[{dtype}]", _gelu(dtype))


def _norms(dtype: str, width: int) -> Callable[[Generator], object]:
    """The norm alone, after a branch and after a gated one, of rows in two chunks where they are not too long."""

    def check(generator: Generator) -> object:
        rows, _, beside = dtype.partition("+")
        shape = (2, 19 if width <= 1024 else 3, width)
        tensors = [torch.randn(size, generator=generator) for size in (shape, *[(2, width)] * 2, shape, (2, width))]
        inputs = [t.to(DTYPES[beside or rows] if i else DTYPES[rows]) for i, t in enumerate(tensors)]
        for number in (3, 4, 5):
            ours, formula = (
                lambda *t, backend=backend: _joined(hpdm_kernels.modulated_norm(*t, backend=backend))
                for backend in ("triton", "reference")
            )
            check_op(ours, formula, inputs[:number], ulps=16.0, repeat=False)
        return None

    return check


def _joined(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return result if isinstance(result, Tensor) else torch.stack(result)


def _residual(dtype: str) -> Callable[[Generator], object]:
    def check(generator: Generator) -> object:
        inputs = [
            torch.randn(size, generator=generator).to(DTYPES[dtype]) for size in ((2, 37, 288),) * 2 + ((2, 288),)
        ]
        ours, formula = (
            lambda *t, backend=backend: hpdm_kernels.gated_residual(*t, backend=backend)
            for backend in ("triton", "reference")
        )
        return check_op(ours, formula, inputs)

    return check


def _gelu(dtype: str) -> Callable[[Generator], object]:
    def check(generator: Generator) -> object:
        inputs = [torch.randn(size, generator=generator).to(DTYPES[dtype]) for size in ((2, 37, 288), (288,))]
        ours, formula = (
            lambda *t, backend=backend: hpdm_kernels.bias_gelu(*t, backend=backend)
            for backend in ("triton", "reference")
        )
        return check_op(ours, formula, inputs, ulps=16.0)

    return check


# ---- group normalization ----


def _group_cases() -> Iterator[Case]:
    for dtype, channels, variant in configurations():
        yield Case(f"group_norm_act[{dtype},C={channels}{variant}]", _groups(dtype, channels, variant))


def _groups(dtype: str, channels: int, variant: str) -> Callable[[Generator], object]:
    """A clip of one frame, or of two where there is a modulation, of two chunks of rows."""

    def check(generator: Generator) -> object:
        rows, _, weights = dtype.partition("+")
        flags = VARIANTS[variant]
        frames = 1 + flags["MODULATED"]
        sizes = [(1, frames, 3, 6, channels), (channels,), (channels,), *[(1, frames, channels)] * 2]
        dtypes = [DTYPES[name] for name in (rows, weights or rows, weights or rows, rows, rows)]
        inputs = [torch.randn(size, generator=generator).to(d) for size, d in zip(sizes, dtypes)]
        options: dict[str, Any] = {
            "over": "clip" if flags["MODULATED"] else "frame", "act": "silu" if flags["SILU"] else "none",
            "pad": ((1, 0), (0, 1), (1, 1)) if flags["PAD"] else None,
        }  # fmt: skip
        ours, formula = (
            lambda x, w, b, *vectors, backend=backend: hpdm_kernels.group_norm_act(
                x, w, b, 16, *vectors, **options, backend=backend
            )
            for backend in ("triton", "reference")
        )
        return check_op(ours, formula, inputs if flags["MODULATED"] else inputs[:3], ulps=16.0)

    return check


# ---- temporal attention ----


def _temporal_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for frames, width in SIZES:
            yield Case(f"temporal_attention[{dtype},T={frames},d={width}]", _temporal(dtype, frames, width))
    frames, width = SIZES[0]
    yield Case(f"temporal_attention[bf16+fp32,T={frames},d={width}]", _temporal("bf16+fp32", frames, width))


def _temporal(dtype: str, frames: int, width: int) -> Callable[[Generator], object]:
    """Two heads, a block of positions and a part of another one, distances beyond the tables from 4 frames on."""

    def check(generator: Generator) -> object:
        data, _, table = dtype.partition("+")
        positions, rows = tile(frames, width, backward=False).positions + 1, 5
        shapes = ((1, frames, positions, 6 * width), (rows, width), (rows, width))
        tensors = [torch.randn(shape, generator=generator) for shape in shapes]
        inputs = [t.to(DTYPES[table or data] if i else DTYPES[data]) for i, t in enumerate(tensors)]
        ours, formula = (
            lambda *t, backend=backend: hpdm_kernels.temporal_attention(*t, backend=backend)
            for backend in ("triton", "reference")
        )
        return check_op(ours, formula, inputs, ulps=16.0, products=True)

    return check


# ---- optimizers ----


def _optimizer_cases() -> Iterator[Case]:
    for op in steps.OPS:
        for dtype in DTYPES:
            for aligned in (True, False):
                yield Case(f"{op}[{dtype}{'' if aligned else ',unaligned'}]", _step(op, dtype, aligned))


def _step(op: str, dtype: str, aligned: bool) -> Callable[[Generator], object]:
    def check(generator: Generator) -> object:
        shapes = ((2, 2050), (3, 5), (2048,), ())
        arguments = steps.draw(generator, shapes, averages=2, grad_dtype=DTYPES[dtype], op=op)
        if not aligned:
            arguments = steps.copied(arguments, lambda t: steps.shifted(t) if t.ndim == 2 else t)
        return steps.check_step(op, arguments, "triton")

    return check


# ---- judging ----


def _ulps(dtype: str, precision: str) -> float:
    return PRECISIONS[precision] if dtype == "fp32" else 8.0


def _check_value(
    ours: Callable[..., Tensor], formula: Callable[..., Tensor], inputs: Sequence[Tensor | None], ulps: float
) -> float:
    """As :func:`check_op`, without gradients."""
    wide = [t if t is None else t.double() for t in inputs]
    return assert_within_budget("output", ours(*inputs), formula(*inputs), formula(*wide), ulps=ulps)
