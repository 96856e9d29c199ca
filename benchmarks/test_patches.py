"""Patch extraction (paper eq. 6) for each level: shrinking the whole video, shrinking a part of it, copying a crop.

The strongest peer is a slice and ``F.interpolate(mode="area")``, which needs boxes on whole pixels. ``F.grid_sample``
is a peer only at the last level, where nothing shrinks, so that trilinear interpolation equals the area filter.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks import peers, shapes
from hpdm_kernels import reference, sample_patches
from hpdm_kernels.boxes import token_coordinates
from hpdm_kernels.testing import random_boxes


def ours(backend, box, size):
    return lambda v: sample_patches(v, box, size, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", shapes.PATCHES, ids=str)
def test_sample_patches(compare, backends, device, generator, shape, dtype):
    video, box = shape.make(generator, device, dtype)
    size = shape.pyramid.patch
    compare(
        {
            "reference (dense matrices)": lambda v: reference.sample_patches(v, box, size),
            "slice and F.interpolate(area)": lambda v: peers.crop_and_interpolate(v, box, size),
            **{f"hpdm {backend}": ours(backend, box, size) for backend in backends},
        },
        inputs=(video,),
        group=f"sample_patches {str(dtype).removeprefix('torch.')}",
        shape=str(shape),
        direction="fwd",
        reference="reference (dense matrices)",
        oracle=lambda v: reference.sample_patches(v.double(), box, size),
        peers=["slice and F.interpolate(area)"],
        bytes=shape.bytes(dtype.itemsize),
    )


@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("batch", [1, 4], ids="B={}".format)
@pytest.mark.parametrize("pyramid", [shapes.UCF_S], ids=lambda p: p.name)
def test_between_pixels(compare, backends, device, generator, pyramid, batch, direction):
    """Boxes of the last level's size at random positions between pixels: linear interpolation."""
    shape = shapes.PatchesShape(pyramid, pyramid.levels - 1, batch)
    video = torch.rand(batch, 3, *shape.size, generator=generator).to(device)
    box = random_boxes(batch, [n / m for n, m in zip(pyramid.patch, shape.size)], generator).to(device)
    positions = (2 * token_coordinates(box, pyramid.patch) - 1).flip(-1).reshape(batch, *pyramid.patch, 3)

    def grid_sample(v):
        return F.grid_sample(v, positions.to(v.dtype), padding_mode="border", align_corners=False)

    name = "F.grid_sample (grid ready-made)"
    rows = compare(
        {
            "reference (dense matrices)": lambda v: reference.sample_patches(v, box, pyramid.patch),
            name: grid_sample,
            **{f"hpdm {backend}": ours(backend, box, pyramid.patch) for backend in backends},
        },
        inputs=(video,),
        group="sample_patches between pixels",
        shape=str(shape),
        direction=direction,
        reference="reference (dense matrices)",
        # Its coordinates run from -1 to 1, which rounds more.
        budgets={name: 32.0},
        peers=[name],
    )
    for row in rows:
        if row.contender == "hpdm torch" and device.type == "cpu" and direction == "fwd+bwd":
            # The gradient's memory is allocated by numpy, which the profiler does not see.
            row.peak_extra_bytes += video.nbytes
