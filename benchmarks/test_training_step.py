"""A whole training step, kernels off and on: forward, backward, optimizer; the same weights, clips and boxes.

On the CPU the ``tiny`` preset, on CUDA the paper's S and M (64x256x256, fp32). Clips are drawn from memory: this times
the model, not the disk.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import harness
from hpdm import HPDM, presets
from hpdm.diffusion import add_noise, signal_scales
from hpdm.memory import training_step
from hpdm.optim import make_optimizer
from hpdm.pyramid import sample_boxes

CASES = (("hpdm_s", 4), ("hpdm_m", 4)) if torch.cuda.is_available() else (("tiny", 2),)
ROUNDS = 5


@pytest.mark.parametrize(("preset", "batch"), CASES, ids=str)
def test_training_step(record, backends, device, generator, preset, batch):
    config = presets.get(preset)
    boxes = sample_boxes(config, batch, generator).to(device)
    t = torch.rand(batch, config.levels, generator=generator).to(device)
    labels = torch.randint(0, config.classes, (batch,), generator=generator).to(device)
    size = (batch, config.levels, config.channels, *config.patch)
    clean, noise = (torch.randn(size, generator=generator).to(device) for _ in range(2))
    noised, target = add_noise(clean, noise, t, signal_scales(config, device))

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
        return (models[kernels](noised, boxes, t, labels) - target).square().mean()

    gradients = {}
    for kernels, model in models.items():
        loss(kernels).backward()
        gradients[kernels] = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
    truth = gradients.pop("reference")
    for kernels, gradient in gradients.items():
        error = ((gradient - truth).norm() / truth.norm()).item()
        assert error < 1e-3, f"{kernels}: gradients differ from the reference's by {error:.1e} of their norm"

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
        row = record(
            "training step", f"{preset}, B={batch}", "reference" if kernels == "reference" else f"hpdm {kernels}",
            "fwd+bwd", timer.seconds(), flops=flops, reference=kernels == "reference",
            peak_extra_bytes=memory[kernels],
        )  # fmt: skip
        row.extra["videos_per_s"] = batch / row.median_s
        rows.append(row)
    for row in rows:
        row.speedup_vs_reference = rows[0].median_s / row.median_s
