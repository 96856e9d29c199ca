"""A third system, made in a few lines, goes through the commands as they are: nothing in them knows what a model is."""

import dataclasses
import json
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import nn

import hpdm
from hpdm import cli, systems
from hpdm.process import add_noise, gamma
from hpdm.recipe import Recipe
from hpdm.system import System
from hpdm.training.checkpoint import list_checkpoints
from tests.small import stop_after_checkpoint


@dataclass(frozen=True)
class LinearConfig:
    """Whole clips, each pixel predicted by itself."""

    resolution: tuple[int, int, int] = (4, 8, 8)
    channels: int = 3
    conditioning: str = "none"
    classes: int = 1
    text_width: int = 1
    conditioning_dropout: float = 0.0
    replace = dataclasses.replace
    to_dict = dataclasses.asdict


class LinearDenoiser(nn.Module):
    """The pixel's mean given its noised value and the time: ``a(t) x + b(t)``."""

    def __init__(self, config):
        super().__init__()
        self.config, self.map = config, nn.Linear(2, 2)

    def forward(self, x, t, labels=None):
        a, b = self.map(torch.stack((gamma(t), torch.ones_like(t)), dim=1)).reshape(-1, 2, 1, 1, 1, 1).unbind(1)
        return a * x + b


class LinearDraws(NamedTuple):
    t: torch.Tensor
    noise: torch.Tensor


class LinearSystem(System):
    """The 20 lines that make a system."""

    name = "linear"
    presets = MappingProxyType({"linear": LinearConfig})
    recipes = MappingProxyType({"linear": Recipe(4, 2, optimizer="adamw", lr=1e-2, warmup=1)})

    def config_from_dict(self, values):
        return LinearConfig(**values | {"resolution": tuple(values["resolution"])})

    def build(self, config, kernels="auto", recompute="none"):
        return LinearDenoiser(config)

    def draw(self, config, batch, generator, *, times=(0.0, 1.0), rows=None, **_):
        t = times[0] + (times[1] - times[0]) * torch.rand(batch, 1, generator=generator)
        noise = torch.randn(batch, 1, config.channels, *config.resolution, generator=generator)
        return LinearDraws(*(x if rows is None else x[rows.start : rows.stop] for x in (t, noise)))

    def losses(self, model, batch, draws, network=None):
        x = batch["video"] / 127.5 - 1
        noised, _ = add_noise(x[:, None], draws.noise, draws.t, torch.ones(1))
        return {"pixels": ((network or model)(noised[:, 0], draws.t[:, 0]) - x).square().mean(dim=(1, 2, 3, 4))}

    def sampler(self, model, options):
        return LinearSampler(model, options)


class LinearSampler:
    """Noise, denoised as often as there are steps."""

    def __init__(self, model, options):
        self.model, self.options = model, options

    @torch.no_grad()
    def parts(self, seeds, labels=None, text=None, text_mask=None, progress=None, finished=()):
        if finished:
            return
        config = self.model.config
        shape = (config.channels, *config.resolution)
        x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        for step in range(self.options.steps):
            x = self.model(x, torch.full((len(seeds),), 1 - step / self.options.steps))
            if progress is not None:
                progress(0, step + 1, self.options.steps)
        yield x.clamp(-1, 1)

    def __call__(self, seeds, *arguments, finished=(), **options):
        return [*finished, *self.parts(seeds, *arguments, finished=finished, **options)]

    def seams(self, video):
        return {}


def command(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return ended.value.code


def rows(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_new_system_trains_resumes_samples_plans_evaluates_and_exports(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(systems.SYSTEMS, "linear", LinearSystem())
    clips, whole, parts = (tmp_path / name for name in ("clips", "whole", "parts"))
    sizes = ("--clips", 2, "--frames", 4, "--size", 8, 8)
    assert command("data", "synthetic", clips / "set", *sizes, "--classes", "RedDisc", "GreenSquare") == 0
    flat = clips / "set" / "RedDisc"  # no class folders: clips without conditioning
    train = ("train", "--preset", "linear", "--data", flat, "--workers", 0, "--log-every", 1, "--device", "cpu")

    assert command(*train, "--out", whole) == 0
    assert list(rows(whole)[0])[:3] == ["step", "loss", "loss_pixels"]
    about = json.loads((whole / "config.json").read_text())
    assert (about["system"], about["model"]["resolution"]) == ("linear", [4, 8, 8])

    # Interrupted after two steps and resumed: the same curve.
    stop_after_checkpoint(2, monkeypatch)
    assert command(*train, "--out", parts, "--save-every", 2) == cli.INTERRUPTED
    assert command(*train, "--out", parts, "--save-every", 2) == 0
    assert [row["loss"] for row in rows(parts)] == [row["loss"] for row in rows(whole)]
    assert list_checkpoints(parts)[-1].name == "step-00000004"

    loaded = hpdm.load(whole)
    assert (type(loaded.model), loaded.step, loaded.config.resolution) == (LinearDenoiser, 4, (4, 8, 8))

    assert command("export", "--run", whole, "--out", tmp_path / "linear.safetensors") == 0
    with safe_open(tmp_path / "linear.safetensors", "pt") as file:
        assert json.loads(file.metadata()["hpdm"])["system"] == "linear"

    for source in (whole, tmp_path / "linear.safetensors"):
        out = tmp_path / f"videos-{source.stem}"
        assert command("sample", "--run", source, "--out", out, "--count", 2, "--steps", 3, "--device", "cpu") == 0
        assert sorted(path.name for path in out.iterdir()) == [
            "contact_sheet.png",
            "video_seed0.mp4",
            "video_seed1.mp4",
        ]
    pictures = [(tmp_path / f"videos-{name}" / "video_seed1.mp4").read_bytes() for name in ("whole", "linear")]
    assert pictures[0] == pictures[1]

    report = tmp_path / "denoising.json"
    assert command("evaluate", "--run", whole, "--data", flat, "--clips", 2, "--bins", 2, "--json", report) == 0
    assert len(json.loads(report.read_text())["error"][0]) == 2

    plan = tmp_path / "plan.json"
    assert command("plan", "--preset", "linear", "--kernels", "torch", "--recompute", "none", "--json", plan) == 0
    result = json.loads(plan.read_text())
    assert sum(result["parameters"].values()) == 6
    assert result["training"][0]["peak_bytes"] > 0
    assert result["sampling"][0]["resolution"] == [4, 8, 8]
    capsys.readouterr()
    assert command("plan", "--preset", "linear", "--table1") == 1
    assert "table1" in capsys.readouterr().err
    assert command(*train, "--out", tmp_path / "x", "--fusion", "shallow") == 1
    assert "fusion: got shallow, expected deep" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"preset: got 'cubic', expected one of hpdm_s, .*, linear"):
        systems.of_preset("cubic")
