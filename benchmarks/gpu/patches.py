"""Checks patch extraction at odd and real shapes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.cases import DTYPES, Case, against_formula
from benchmarks.shapes import UCF_S, PatchesShape, Pyramid
from hpdm_kernels import reference, sample_patches
from hpdm_kernels.testing import Comparison, max_error, random_boxes

ODD = Pyramid("odd", (3, 10, 14), (1, 1, 1), 3, (1, 2, 2), 64)
SHAPES = (*(PatchesShape(ODD, level, batch=2) for level in range(3)), PatchesShape(UCF_S, 0), PatchesShape(UCF_S, 2))


def patches(shape: PatchesShape, dtype: str, device: torch.device, generator: torch.Generator) -> Comparison:
    """Floating-point videos, boxes on whole pixels."""
    video, box = shape.make(generator, device)
    return against_formula(
        lambda v: sample_patches(v, box, shape.pyramid.patch, backend="triton"),
        lambda v: reference.sample_patches(v, box, shape.pyramid.patch),
        [(video / 127.5 - 1).to(DTYPES[dtype])],
    )


def between_pixels(device: torch.device, generator: torch.Generator) -> Comparison:
    """Boxes whose edges lie between pixels."""
    video = torch.randn(2, 3, 7, 33, 29, device=device)
    box = random_boxes(2, (0.6, 0.37, 0.9), generator).to(device)
    return against_formula(
        lambda v: sample_patches(v, box, (5, 8, 40), backend="triton"),
        lambda v: reference.sample_patches(v, box, (5, 8, 40)),
        [video],
    )


def bytes_video(shape: PatchesShape, device: torch.device, generator: torch.Generator) -> None:
    """uint8 videos give fp32 patches."""
    video, box = shape.make(generator, device, torch.uint8)
    patch = sample_patches(video, box, shape.pyramid.patch, backend="triton")
    assert patch.dtype == torch.float32
    assert max_error(patch, reference.sample_patches(video.double(), box, shape.pyramid.patch)) <= 1e-4 * 255


def cases() -> Iterator[Case]:
    """All cases."""
    for shape in SHAPES:
        for dtype in DTYPES:
            yield Case(f"sample_patches[{shape}-{dtype}]", partial(patches, shape, dtype))
    yield Case("boxes_between_pixels", between_pixels)
    for shape in SHAPES:
        yield Case(f"uint8_video[{shape}]", partial(bytes_video, shape))
