"""Configs, presets and their parameter counts."""

import json

import pytest
import torch

import hpdm
from hpdm import HPDMConfig, presets
from hpdm.patch.config import pyramid_of
from hpdm.patch.presets import PRESETS, PUBLISHED_PARAMETERS


def count(config: HPDMConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in hpdm.HPDM(config).parameters())


@pytest.mark.parametrize("name", sorted(PUBLISHED_PARAMETERS))
def test_parameters_within_one_percent_of_table_8(name):
    published = PUBLISHED_PARAMETERS[name]
    assert abs(count(presets.get(name)) / published - 1) < 0.01


def test_tiny_is_tiny():
    assert count(presets.tiny()) < 1.98e6  # in half precision less than 4 MB


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_have_the_published_pyramids(name):
    config = presets.get(name)
    published = {
        "hpdm_s": (64, 256, 256),
        "hpdm_m": (64, 256, 256),
        "hpdm_l": (64, 256, 256),
        "hpdm_t2v": (64, 288, 512),
        "hpdm_t2v_1k": (16, 576, 1024),
        "tiny": (16, 64, 64),
    }
    assert config.resolution == published[name]
    assert config.level_resolution(0) == config.patch
    assert pyramid_of(config.patch, config.resolution) == (config.levels, config.ratio)


def test_unknown_preset_is_named():
    with pytest.raises(ValueError, match=r"preset: got 'hpdm_xl', expected one of hpdm_s"):
        presets.get("hpdm_xl")


def test_configs_survive_json():
    for name in PRESETS:
        config = presets.get(name)
        assert HPDMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_field_in_a_config_is_named():
    with pytest.raises(ValueError, match=r"config: got unknown fields \['depth'\]"):
        HPDMConfig.from_dict({"depth": 3})


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"patch": (16, 64)}, "patch"),
        ({"patch": (0, 64, 64)}, "patch"),
        ({"ratio": (2, 3, 2)}, "ratio"),
        ({"tokenizer": (1, 5, 4)}, "tokenizer"),
        ({"latent_width": 250}, "latent_width"),
        ({"levels": 4}, "levels_per_block"),
        ({"levels_per_block": (2, 1, 3)}, "levels_per_block"),
        ({"levels_per_block": ()}, "levels_per_block"),
        ({"conditioning": "audio"}, "conditioning"),
        ({"classes": 0}, "classes"),
        ({"fusion": "none"}, "fusion"),
        ({"conditioning_dropout": 1.5}, "conditioning_dropout"),
        ({"input_scale_decay": 0.0}, "input_scale_decay"),
        ({"latents": 0}, "latents"),
    ],
)
def test_bad_configs_name_the_field(changes, field):
    with pytest.raises(ValueError, match=field):
        presets.hpdm_s().replace(**changes)


@pytest.mark.parametrize(
    ("patch", "resolution"),
    [
        ((16, 64, 64), (48, 192, 192)),
        ((16, 64, 64), (64, 256, 128)),
        ((16, 64, 64), (64, 250, 256)),
        ((16, 64), (64, 256)),
    ],
)
def test_a_resolution_that_is_no_pyramid_is_refused(patch, resolution):
    with pytest.raises(ValueError, match="resolution: got"):
        pyramid_of(patch, resolution)


def test_pyramids_of_table_1():
    m = presets.hpdm_m()
    assert m.with_pyramid((64, 256, 256), (64, 256, 256)).levels_per_block == (1,) * 6
    assert m.with_pyramid((32, 128, 128), (64, 256, 256)).levels_per_block == (1, 1, 1, 2, 2, 2)
    assert m.with_pyramid((16, 64, 64), (64, 256, 256)) == m
    four = m.with_pyramid((8, 64, 64), (64, 512, 512))
    assert four.levels_per_block == presets.hpdm_t2v().levels_per_block
    assert m.without_adaptive_computation().with_pyramid((32, 128, 128), (64, 256, 256)).levels_per_block == (2,) * 6
    assert m.with_pyramid((1, 64, 64), (1, 256, 256)).ratio == (1, 2, 2)
