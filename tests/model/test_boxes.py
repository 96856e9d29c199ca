"""Boxes, patches and tilings."""

import pytest
import torch

from hpdm import presets
from hpdm.patch.boxes import extract_patches, sample_boxes
from hpdm.patch.tiling import level_tiling
from hpdm.sampling import SamplerOptions, parse_overlap

CONFIGS = ["tiny", "hpdm_s", "hpdm_t2v", "hpdm_t2v_1k"]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("law", ["uniform", "nested"])
def test_boxes_are_nested_and_the_last_lies_on_whole_pixels(name, law, generator):
    config = presets.get(name)
    boxes = sample_boxes(config, 50, generator, law).double()
    assert torch.equal(boxes[:, 0], torch.tensor([0, 0, 0, 1, 1, 1.0]).double().expand(50, 6))
    for level in range(1, config.levels):
        child, parent = boxes[:, level], boxes[:, level - 1]
        assert torch.allclose(child[:, 3:], torch.tensor(config.level_scale(level)).double().expand(50, 3))
        assert (child[:, :3] >= parent[:, :3] - 1e-6).all()
        assert (child[:, :3] + child[:, 3:] <= parent[:, :3] + parent[:, 3:] + 1e-6).all()
    pixels = boxes[:, -1, :3] * torch.tensor(config.resolution)
    assert (pixels - pixels.round()).abs().max() < 1e-4


@pytest.mark.parametrize("law", ["uniform", "nested"])
def test_boxes_depend_on_the_generator_alone_and_spread(law):
    config = presets.tiny()
    first = sample_boxes(config, 200, torch.Generator().manual_seed(1), law)
    assert torch.equal(first, sample_boxes(config, 200, torch.Generator().manual_seed(1), law))
    assert not torch.equal(first, sample_boxes(config, 200, torch.Generator().manual_seed(2), law))
    # By symmetry the mean offset of level 1 is 1/4; its standard error is at most that of a fair choice of 0 and 1/2.
    assert (first[:, 1, :3].mean(0) - 0.25).abs().max() < 5 * 0.25 / 200**0.5


def test_image_mode_never_moves_in_time(generator):
    config = presets.tiny().with_pyramid((1, 16, 16), (1, 64, 64))
    boxes = sample_boxes(config, 20, generator)
    assert (boxes[:, :, 0] == 0).all()
    assert (boxes[:, :, 3] == 1).all()


def test_patches_show_what_their_boxes_say(generator):
    config = presets.tiny()
    video = torch.randint(0, 256, (3, 3, *config.resolution), dtype=torch.uint8, generator=generator)
    boxes = sample_boxes(config, 3, generator)
    patches = extract_patches(video, boxes, config)
    assert patches.shape == (3, config.levels, 3, *config.patch)
    # The last level is a copy, level 0 a mean over blocks of the whole video.
    f, h, w = config.patch
    for b in range(3):
        i, j, k = (boxes[b, -1, :3] * torch.tensor(config.resolution)).round().long().tolist()
        crop = video[b, :, i : i + f, j : j + h, k : k + w] / 127.5 - 1
        torch.testing.assert_close(patches[b, -1], crop)
    blocks = torch.nn.functional.avg_pool3d(video.float(), 4) / 127.5 - 1
    torch.testing.assert_close(patches[:, 0], blocks)


def test_patches_refuse_float_video_and_other_sizes(generator):
    config = presets.tiny()
    boxes = sample_boxes(config, 1, generator)
    with pytest.raises(TypeError, match=r"video: got dtype torch\.float32"):
        extract_patches(torch.rand(1, 3, *config.resolution), boxes, config)
    with pytest.raises(ValueError, match="video: got size"):
        extract_patches(torch.zeros(1, 3, 16, 64, 32, dtype=torch.uint8), boxes, config)


def test_tile_counts_are_the_papers():
    config = presets.hpdm_t2v()
    half, none = SamplerOptions(overlap="fhw"), SamplerOptions(overlap="none")
    assert level_tiling(config, half, 3).tiles == 3375
    assert level_tiling(config, none, 3).tiles == 512
    assert level_tiling(config, half, 0).tiles == 1
    assert level_tiling(presets.hpdm_t2v_1k(), half, 3).counts == (1, 15, 15)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("overlap", ["none", "hw", "f", "fhw"])
def test_every_tile_has_ancestors_on_every_level(name, overlap):
    config = presets.get(name)
    options = SamplerOptions(overlap=overlap)
    for level in range(1, config.levels):
        boxes = level_tiling(config, options, level).boxes
        for below in range(level):
            cover = level_tiling(config, options, below)
            parent = cover.boxes[cover.containing(boxes)]
            assert (boxes[:, :3] >= parent[:, :3] - 1e-5).all()
            assert ((boxes[:, :3] + boxes[:, 3:]) <= parent[:, :3] + parent[:, 3:] + 1e-5).all()


def test_a_box_that_no_tile_contains_is_refused():
    config = presets.tiny()
    straddling = torch.tensor([[0.375, 0.0, 0.0, 0.25, 0.25, 0.25]])
    with pytest.raises(ValueError, match="no tile contains row 0"):
        level_tiling(config, SamplerOptions(overlap="none"), 1).containing(straddling)


def test_odd_patches_cannot_overlap_by_half():
    config = presets.tiny().replace(patch=(4, 15, 16), tokenizer=(1, 5, 4))
    with pytest.raises(ValueError, match="axis 'h' with patch size 15"):
        level_tiling(config, SamplerOptions(overlap="h"), 1)
    assert level_tiling(config, SamplerOptions(overlap="h", tiles_per_patch=5), 1).counts == (2, 6, 2)


@pytest.mark.parametrize("overlap", ["", "x", "ww", "fhwf", "hx"])
def test_unknown_overlaps_are_refused(overlap):
    with pytest.raises(ValueError, match="overlap: got"):
        parse_overlap(overlap)


@pytest.mark.parametrize("law", ["uniform", "nested"])
def test_boxes_are_fp32_whatever_the_default_dtype(law):
    """The ops take boxes in fp32 alone."""
    torch.set_default_dtype(torch.float64)
    try:
        boxes = sample_boxes(presets.tiny(), 3, torch.Generator().manual_seed(1), law)
    finally:
        torch.set_default_dtype(torch.float32)
    assert boxes.dtype == torch.float32
