"""A whole training step, kernels off and on: patches, noise, forward, backward, optimizer.

Both get the same weights, clips and boxes. On the CPU the ``tiny`` preset, on CUDA the paper's S and M (64x256x256,
fp32), S with products in TF32 too. The clips are rendered, encoded to mp4 and decoded again by the dataset before the
clock starts (as they were rendered where PyAV is missing): this times the step, not the disk.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from benchmarks import harness
from hpdm import HPDM, presets
from hpdm.patch.objective import denoising_error
from hpdm.planning.training_cost import training_step
from hpdm.training.optim import make_optimizer

# Preset, batch, products: full fp32 or one TF32 pass.
CASES = (("hpdm_s", 4, "ieee"), ("hpdm_s", 4, "tf32"), ("hpdm_m", 4, "ieee"))
CASES = CASES if torch.cuda.is_available() else (("tiny", 8, "ieee"),)
# Largest error of a gradient against the reference's in the same arithmetic, as a share of its norm.
TOLERANCE = {"ieee": 1e-3, "tf32": 5e-2}
ROUNDS = 5


def decoded_clips(folder, config, batch):
    """uint8 ``[B, 3, F, H, W]`` out of mp4 files."""
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
    with harness.products_in(products):
        time_steps(record, backends, device, tmp_path, preset, batch, products)


def time_steps(record, backends, device, tmp_path, preset, batch, products):
    """Validates the gradients of all backends against the reference's, then times whole steps in turns."""
    config = presets.get(preset)
    video = decoded_clips(tmp_path / "clips", config, batch).to(device)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)

    models = {}
    for kernels in ("reference", *backends):
        torch.manual_seed(0)
        models[kernels] = HPDM(config, kernels=kernels).to(device)
        # Modulations and the detokenizer start at zero, where most gradients are zero too.
        disturb = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in models[kernels].parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=disturb).to(device))

    def loss(kernels):
        return denoising_error(models[kernels], video, labels, torch.Generator().manual_seed(2)).mean()

    gradients = {}
    for kernels, model in models.items():
        loss(kernels).backward()
        gradients[kernels] = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
    truth = gradients.pop("reference")
    for kernels, gradient in gradients.items():
        error = ((gradient - truth).norm() / truth.norm()).item()
        assert error < TOLERANCE[products], (
            f"{kernels}: gradients differ from the reference's by {error:.1e} of their norm"
        )

    steps = {}
    for kernels, model in models.items():
        optimizer = make_optimizer(model, "adamw", 1e-4, 0.01)

        def step(kernels=kernels, optimizer=optimizer):
            loss(kernels).backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        steps[kernels] = step
    memory = {kernels: harness.peak_extra_bytes(step, device) for kernels, step in steps.items()}
    timers = {kernels: harness.Timer(device) for kernels in steps}
    for _ in range(ROUNDS):
        for kernels, step in steps.items():
            timers[kernels].sample(step)
    # The formula's products, for all alike: what the kernels save on them is part of their speed.
    flops = training_step(config, batch, "reference").flops
    rows = []
    for kernels, timer in timers.items():
        name = "reference" if kernels == "reference" else f"hpdm {kernels}"
        row = record(
            "training step", f"{preset}, B={batch}, {products}", name,
            "fwd+bwd", timer.seconds(), flops=flops, reference=kernels == "reference",
            peak_extra_bytes=memory[kernels], arithmetic=products,
        )  # fmt: skip
        row.extra["videos_per_s"] = batch / row.median_s
        rows.append(row)
    for row in rows:
        row.speedup_vs_reference = rows[0].median_s / row.median_s
