"""Patch extraction at odd and real shapes."""

import pytest
import torch

from benchmarks.gpu.checks import DTYPES, check, needs_cuda
from benchmarks.shapes import UCF_S, PatchesShape, Pyramid
from hpdm_kernels import reference, sample_patches
from hpdm_kernels.testing import max_error, random_boxes

pytestmark = needs_cuda

ODD = Pyramid("odd", (3, 10, 14), (1, 1, 1), 3, (1, 2, 2), 64)
SHAPES = (*(PatchesShape(ODD, level, batch=2) for level in range(3)), PatchesShape(UCF_S, 0), PatchesShape(UCF_S, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sample_patches(request, device, generator, shape, dtype):
    video, box = shape.make(generator, device)
    video = (video / 127.5 - 1).to(DTYPES[dtype])
    check(
        request,
        lambda v: sample_patches(v, box, shape.pyramid.patch, backend="triton"),
        lambda v: reference.sample_patches(v, box, shape.pyramid.patch),
        (video,),
    )


def test_boxes_between_pixels(request, device, generator):
    video = torch.randn(2, 3, 7, 33, 29, device=device)
    box = random_boxes(2, (0.6, 0.37, 0.9), generator).to(device)
    check(
        request,
        lambda v: sample_patches(v, box, (5, 8, 40), backend="triton"),
        lambda v: reference.sample_patches(v, box, (5, 8, 40)),
        (video,),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_uint8_video(device, generator, shape):
    video, box = shape.make(generator, device, torch.uint8)
    got = sample_patches(video, box, shape.pyramid.patch, backend="triton")
    true = reference.sample_patches(video.double(), box, shape.pyramid.patch)
    assert got.dtype == torch.float32
    assert max_error(got, true) <= 1e-4 * 255
