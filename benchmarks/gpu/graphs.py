"""Checks that the passes of a whole training step can be captured in a CUDA graph, with the kernels and without."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.cases import Case, capture
from hpdm import presets, systems
from hpdm.objective import Objective, on_device

OBJECTIVE = Objective(clean_context=0.25, flip=True)


def training_step(kernels: str, device: torch.device, generator: torch.Generator) -> None:
    """A captured forward and backward pass, replayed for other clips and draws, gives the gradients of eager calls."""
    system, config, batch = systems.get("patch"), presets.get("tiny"), 4
    torch.manual_seed(0)
    model = system.build(config, kernels).to(device).train()
    parameters = list(model.parameters())
    with torch.no_grad():
        for parameter in parameters:  # zeros would hide errors
            parameter.add_(torch.randn_like(parameter) * 0.02)
    video = torch.randint(0, 256, (batch, config.channels, *config.resolution), dtype=torch.uint8, device=device)
    labels = torch.randint(config.classes, (batch,), device=device)

    def drawn():
        return on_device(system.draw(config, batch, generator, objective=OBJECTIVE, dropout=0.1), device)

    draws = drawn()

    def step():
        losses = system.losses(model, {"video": video, "labels": labels}, draws)
        loss = torch.stack(list(losses.values())).mean()
        return (loss, *torch.autograd.grad(loss, parameters))

    graph, captured = capture(step)
    for _ in range(2):
        video.random_(0, 256)
        labels.random_(0, config.classes)
        for buffer, fresh in zip(draws, drawn(), strict=True):
            if buffer is not None:
                buffer.copy_(fresh)
        graph.replay()
        # The same kernels in the same order; some of PyTorch's own add gradients in any order.
        for i, (replayed, eager) in enumerate(zip(captured, step(), strict=True)):
            torch.testing.assert_close(replayed, eager, rtol=1e-4, atol=1e-6, msg=lambda m, i=i: f"tensor {i}: {m}")


def cases() -> Iterator[Case]:
    """All cases."""
    for kernels in ("triton", "torch"):
        yield Case(f"training_step[{kernels}]", partial(training_step, kernels))
