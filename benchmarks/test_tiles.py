"""Tiled sampling: cutting a video into tiles that overlap by half, and averaging tiles (MultiDiffusion).

The paper's largest case also runs on the CPU: 3375 tiles of 8x36x64 that cover 64x288x512.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import peers, shapes
from hpdm_kernels import TileAccumulator, average_tiles, extract_tiles, reference

PAPER = shapes.TilesShape(shapes.T2V)
SHAPES = (*(shape for shape in shapes.TILES if shape != PAPER), PAPER)
CUDA = torch.cuda.is_available()
# The reference adds tiles in place, and for each of them autograd copies the whole gradient. On the shapes above its
# backward would take minutes.
GRADIENTS = shapes.TilesShape(
    shapes.UCF_S if CUDA else shapes.Pyramid("small", (8, 32, 32), (1, 4, 4), 2, (2, 2, 2), 256)
)


@pytest.mark.parametrize(
    ("shape", "direction"), [*((shape, "fwd") for shape in SHAPES), (GRADIENTS, "fwd+bwd")], ids=str
)
def test_average_tiles(compare, backends, device, generator, shape, direction):
    tiles, _ = shape.make(generator, device)
    origins = shape.origins()
    reads_and_writes = shape.bytes() * (2 if direction == "fwd+bwd" else 1)

    def ours(backend):
        return lambda t: average_tiles(t, origins, shape.size, backend=backend)

    # If MONAI is not installed, its row in the table says so.
    def monai(t):
        return peers.monai_average(t, shape.size, [half / 2 for half in shape.overlap])

    compare(
        {
            "reference (accumulate and count)": lambda t: reference.average_tiles(
                t, origins, shape.size, None, 0.0, 1.0
            ),
            "accumulate and count, in place": lambda t: peers.accumulate_and_count(t, origins, shape.size),
            # Without a GPU the largest shape would take minutes.
            **({"index_add_": lambda t: peers.index_add_average(t, origins, shape.size)} if CUDA else {}),
            **({"MONAI sliding window": monai} if direction == "fwd" else {}),
            **{f"hpdm {backend}": ours(backend) for backend in backends},
        },
        inputs=(tiles,),
        group="average_tiles",
        shape=str(shape),
        direction=direction,
        reference="reference (accumulate and count)",
        peers=["accumulate and count, in place", "index_add_", "MONAI sliding window"],
        bytes=reads_and_writes,
    )


@pytest.mark.parametrize("shape", [GRADIENTS, *shapes.TILES], ids=str)
def test_average_tiles_with_weights(compare, backends, device, generator, shape):
    """Ramps over the overlap; the peer adds weighted tiles to one map and weights to another."""
    tiles, _ = shape.make(generator, device)
    origins = shape.origins()
    weights = [torch.minimum(torch.arange(n) + 0.5, n - torch.arange(n) - 0.5) for n in shape.tile]
    f, h, w = (weight.to(device) for weight in weights)
    weight = f[:, None, None] * h[:, None] * w

    def ours(backend):
        return lambda t: average_tiles(t, origins, shape.size, weights=weights, backend=backend)

    compare(
        {
            "reference (accumulate and count)": lambda t: reference.average_tiles(
                t, origins, shape.size, None, 0.0, 1.0, weights
            ),
            "accumulate and count, in place": lambda t: peers.accumulate_and_count(t, origins, shape.size, weight),
            **{f"hpdm {backend}": ours(backend) for backend in backends},
        },
        inputs=(tiles,),
        group="average_tiles with weights",
        shape=str(shape),
        direction="fwd",
        reference="reference (accumulate and count)",
        peers=["accumulate and count, in place"],
        bytes=shape.bytes(),
    )


def compare_steps(compare, device, generator, shape, group, ours):
    """The average and the sampler's linear step; contenders compute ``(tiles, x) -> 0.9 * x + 0.1 * mean``."""
    origins = shape.origins()
    compare(
        {
            "reference (accumulate and count)": lambda t, x: reference.average_tiles(
                t, origins, shape.size, x, 0.9, 0.1
            ),
            "accumulate and count, then step": lambda t, x: torch.add(
                x * 0.9, peers.accumulate_and_count(t, origins, shape.size), alpha=0.1
            ),
            **ours,
        },
        inputs=shape.make(generator, device),
        group=group,
        shape=str(shape),
        direction="fwd",
        reference="reference (accumulate and count)",
        peers=["accumulate and count, then step"],
        bytes=shape.bytes(with_x=True),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sampler_step(compare, backends, device, generator, shape):
    """Ours averages and steps in one pass over the tiles; on a GPU in one launch."""
    origins = shape.origins()

    def ours(backend):
        return lambda t, x: average_tiles(t, origins, shape.size, x=x, alpha=0.9, beta=0.1, backend=backend)

    contenders = {f"hpdm {backend}": ours(backend) for backend in backends}
    compare_steps(compare, device, generator, shape, "average_tiles, alpha * x + beta * mean", contenders)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tile_accumulator(compare, backends, device, generator, shape):
    """The same step from chunks of 64 tiles, as in a sampler; only the buffer of sums is kept between steps."""

    def ours(backend):
        sums = TileAccumulator(shape.origins(), shape.tile, shape.size, backend=backend)

        def run(t, x):
            for chunk in t.split(64, dim=1):
                sums.add(chunk)
            return sums.step(x, 0.9, 0.1)

        return run

    contenders = {f"hpdm {backend}": ours(backend) for backend in backends}
    compare_steps(compare, device, generator, shape, "TileAccumulator, chunks of 64 tiles", contenders)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_extract_tiles(compare, backends, device, generator, shape):
    _, video = shape.make(generator, device)
    origins = shape.origins()
    step = [n // 2 if half else n for n, half in zip(shape.tile, shape.overlap)]

    def ours(backend):
        return lambda v: extract_tiles(v, origins, shape.tile, backend=backend)

    compare(
        {
            "reference (slices, stacked)": lambda v: reference.extract_tiles(v, origins, shape.tile),
            "unfold": lambda v: peers.tiles_by_unfold(v, shape.tile, step),
            **{f"hpdm {backend}": ours(backend) for backend in backends},
        },
        inputs=(video,),
        group="extract_tiles",
        shape=str(shape),
        direction="fwd",
        reference="reference (slices, stacked)",
        peers=["unfold"],
        bytes=shape.bytes(),
    )
