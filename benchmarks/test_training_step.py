"""A whole training step with each backend of the kernels: patches, noise, forward, backward, optimizer.

The formulas and the ops in PyTorch's operations are also run under ``torch.compile``.

All backends get the same weights, clips and boxes. On the CPU the preset is ``tiny``, on CUDA the paper's S and M
(64x256x256, fp32), S also with products in TF32. Before timing, clips are rendered, encoded to mp4 and decoded by the
dataset (without PyAV the rendered clips are used), so that disk access and decoding are not timed.
"""

from __future__ import annotations

import importlib.util
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import harness
from hpdm import HPDM, presets, systems
from hpdm.objective import on_device
from hpdm.patch.draws import draw
from hpdm.patch.objective import denoising_error
from hpdm.planning.training_cost import training_step
from hpdm.training.optim import make_optimizer

# (preset, batch, products); products are in full fp32 or take one TF32 pass.
CASES = (("hpdm_s", 4, "ieee"), ("hpdm_s", 4, "tf32"), ("hpdm_m", 4, "ieee"))
CASES = CASES if torch.cuda.is_available() else (("tiny", 8, "ieee"),)
# Largest allowed difference of a gradient from the reference's in the same arithmetic, as a share of its norm.
TOLERANCE = {"ieee": 1e-3, "tf32": 5e-2}
ROUNDS = 5


def decoded_clips(folder, config, batch):
    """Clips decoded from mp4 files, uint8 ``[B, 3, F, H, W]``."""
    from hpdm.data.synthetic import render_clip, render_synthetic

    frames, height, width = config.resolution
    if importlib.util.find_spec("av") is None:
        rng = np.random.default_rng(0)
        clips = [render_clip("RedDisc", frames=frames, size=(height, width), rng=rng).frames for _ in range(batch)]
        return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).contiguous()
    from hpdm.data.clips import VideoDataset

    render_synthetic(folder, clips=max(2, batch), frames=frames, size=(height, width), classes=["RedDisc"])
    dataset = VideoDataset(folder, frames=frames, size=(height, width), train=False)
    return torch.stack([dataset[i]["video"] for i in range(batch)])


@pytest.mark.parametrize(("preset", "batch", "products"), CASES, ids=str)
def test_training_step(record, backends, device, tmp_path, preset, batch, products):
    """Validates the gradients of all backends against the reference's, then times whole steps in turns."""
    config = presets.get(preset)
    video = decoded_clips(tmp_path / "clips", config, batch).to(device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    models = {kernels: disturbed_model(config, kernels, device) for kernels in ("reference", *backends)}

    def loss(model, network=None):
        draws = on_device(draw(config, batch, torch.Generator().manual_seed(2)), device)
        return denoising_error(model, video, labels, draws, network=network).mean()

    with harness.products_in(products):
        check_gradients(models, loss, TOLERANCE[products])
        steps = {name_of(kernels): training_step_of(model, loss) for kernels, model in models.items()}
        for kernels in ("reference", "torch"):
            model = disturbed_model(config, kernels, device)
            network = torch.compile(model)
            steps[f"{name_of(kernels)}, torch.compile"] = training_step_of(model, partial(loss, network=network))
        memory = {name: harness.peak_extra_bytes(step, device) for name, step in steps.items()}
        timers = {name: harness.Timer(device) for name in steps}
        for _ in range(ROUNDS):
            for name, step in steps.items():
                timers[name].sample(step)
    # FLOPs of the formula for all contenders: products that the kernels save count as speed.
    flops = training_step(systems.get("patch"), config, batch, "reference").flops
    rows = []
    for name, timer in timers.items():
        row = record(
            "training step", f"{preset}, B={batch}, {products}", name,
            "fwd+bwd", timer.seconds(), flops=flops, reference=name == "reference",
            peak_extra_bytes=memory[name], arithmetic=products,
        )  # fmt: skip
        row.extra["videos_per_s"] = batch / row.median_s
        rows.append(row)
    for row in rows:
        row.speedup_vs_reference = rows[0].median_s / row.median_s


def name_of(kernels):
    return "reference" if kernels == "reference" else f"hpdm {kernels}"


def disturbed_model(config, kernels, device):
    """A model with the same weights for all kernels and no zero weights, since these make most gradients zero."""
    torch.manual_seed(0)
    model = HPDM(config, kernels=kernels).to(device)
    disturb = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=disturb).to(device))
    return model


def check_gradients(models, loss, tolerance):
    """Fails if a model's gradients differ from those of ``models["reference"]`` by more than a share of their norm."""
    gradients = {}
    for kernels, model in models.items():
        loss(model).backward()
        gradients[kernels] = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
    expected = gradients.pop("reference")
    for kernels, gradient in gradients.items():
        error = ((gradient - expected).norm() / expected.norm()).item()
        assert error < tolerance, f"{kernels}: gradients differ from the reference's by {error:.1e} of their norm"


def training_step_of(model, loss):
    """A function that takes one training step. It has run once, so that the optimizer state is allocated."""
    optimizer = make_optimizer(model, "adamw", 1e-4, 0.01)

    def step():
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return step
