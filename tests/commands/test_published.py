"""Weights that come with the package are found by name, and sampled as their preset suggests."""

import shutil
from dataclasses import replace

import pytest
import torch

from hpdm import load, published, runs
from hpdm.commands.sampler_choice import choose_sampler, sampler_not_given
from tests.small import random_model, save_as_run, small_config


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A folder with the weights "small", in half precision, in place of the package's."""
    run = save_as_run(random_model(small_config()), tmp_path / "run")
    folder = tmp_path / "weights"
    folder.mkdir()
    runs.export(run, folder / "small.safetensors", precision="fp16")
    runs.export(run, tmp_path / "whole.safetensors")
    monkeypatch.setattr(published, "FOLDER", folder)
    return tmp_path


def test_they_are_loaded_by_name_and_come_back_in_the_models_own_precision(weights):
    assert published.names() == ["small"]
    half, whole = (dict(load(path).model.named_parameters()) for path in ("small", weights / "whole.safetensors"))
    for name, p in whole.items():
        assert half[name].dtype is torch.float32
        assert torch.equal(half[name], p.half().float()), name
    assert (weights / "weights" / "small.safetensors").stat().st_size < 0.6 * (
        weights / "whole.safetensors"
    ).stat().st_size


def test_a_folder_of_that_name_comes_first(weights, monkeypatch):
    monkeypatch.chdir(weights)
    shutil.copytree("run", "small")
    assert published.find("small") is None
    assert load("small").step == 1


def test_unknown_weights_are_an_error_that_names_the_known_ones(weights):
    with pytest.raises(FileNotFoundError, match=r"run: none has no config.json, .* come with the package \(small\)"):
        load("none")
    with pytest.raises(ValueError, match="precision: got 'fp8', expected one of 'fp32', 'fp16'"):
        runs.export(weights / "run", weights / "x.safetensors", precision="fp8")


def test_a_preset_suggests_how_to_sample_unless_told(weights):
    run = load("small")
    tiny = run._replace(training=run.training | {"preset": "tiny"})
    other = run._replace(training=run.training | {"preset": "hpdm_s"})
    steps = [choose_sampler(loaded, sampler_not_given()).steps for loaded in (tiny, other)]
    assert steps == [32, 128]
    assert type(choose_sampler(tiny, sampler_not_given()).guidance) is float
    assert [choose_sampler(loaded, sampler_not_given()).later_guidance for loaded in (tiny, other)] == [1.0, None]
    given = replace(sampler_not_given(), later_guidance=3.0)
    assert choose_sampler(tiny, given).later_guidance == 3.0
