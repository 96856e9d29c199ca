"""A training step's passes and a sampler's network call can be CUDA graphs: the device never meets the host in them.

There need not be a GPU: the model lies on the ``meta`` device, whose tensors have no values. Whatever reads one fails,
and copies between the devices are seen.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpdm import systems
from hpdm.objective import Objective, on_device
from hpdm.patch.context import Context
from hpdm.patch.tile_network import KnownTiles, TileNetwork, VideoConditions
from hpdm.sampling import SamplerOptions
from hpdm.training.ahead import DrawnAhead
from tests.small import random_model, small_config

DEVICE = torch.device("meta")
KNOWN = {"patch": (4, 8, 8), "tokenizer": (1, 2, 2), "known_frames": True}
OPTIONS = {"objective": Objective(clean_context=0.25, flip=True, low_discrepancy=True), "dropout": 0.1, "images": 0.5}


class Meetings(TorchDispatchMode):
    """Collects operations on tensors of both devices; numbers, which a kernel takes as arguments, do not count."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, out)) if isinstance(value, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.ndim}
        if len(devices) > 1:
            self.found.append(str(func))
        return out


class Uploads(TorchFunctionMode):
    """Collects calls that make a tensor of the device from Python's numbers, which is a copy from the host."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) and out.device == DEVICE:
            self.found.append(func.__name__)
        return out


def inputs(config, batch=2):
    """A model on the device, clips with their conditions, and draws."""
    system = systems.get("patch")
    model = random_model(config).to(DEVICE).train()
    size = (config.clip_frames, *config.resolution[1:])
    clips = {"video": torch.zeros(batch, 3, *size, dtype=torch.uint8, device=DEVICE)}
    if config.conditioning == "class":
        clips["labels"] = torch.zeros(batch, dtype=torch.long, device=DEVICE)
    if config.conditioning == "text":
        clips["text"] = torch.zeros(batch, 5, config.text_width, device=DEVICE)
        clips["text_mask"] = torch.ones(batch, 5, dtype=torch.bool, device=DEVICE)
    draws = system.draw(config, batch, torch.Generator().manual_seed(0), **OPTIONS)
    return system, model, clips, draws


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"conditioning": "none", "fusion": "shallow"},
        {"conditioning": "text", "text_width": 8},
        {"self_conditioning": 0.9},
        {"coordinate_embedding": "sinusoidal", "detach_context": True},
        {**KNOWN, "self_conditioning": 0.9},
        {**KNOWN, "spacing": 3, "memory": True},
    ],
    ids=str,
)
def test_the_device_meets_the_host_nowhere_in_a_step(changes):
    system, model, clips, draws = inputs(small_config(**changes))
    draws = on_device(draws, DEVICE)
    with Meetings() as meetings, Uploads() as uploads:
        losses = system.losses(model, clips, draws)
        torch.stack(list(losses.values())).mean().backward()
    assert meetings.found == []
    assert uploads.found == []
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("self_conditioning", [0.0, 0.9])
def test_nor_in_a_network_call_of_the_sampler(level, self_conditioning):
    config = small_config(self_conditioning=self_conditioning)
    model = random_model(config).to(DEVICE)
    labels = torch.tensor([1, 4])
    conditions = VideoConditions(config, SamplerOptions(guidance=2.0), 2, labels, None, None, DEVICE)
    network = TileNetwork(model, SamplerOptions(guidance=2.0), conditions)
    tiles, copies = 3, 2
    rows = copies * 2 * tiles
    x = torch.zeros(2, tiles, config.channels, *config.patch, device=DEVICE)
    boxes = torch.zeros(tiles, 6, device=DEVICE)
    context = None
    if level:
        features = torch.zeros(5, config.tokens, config.width, device=DEVICE)
        context = Context(
            features=dict.fromkeys(model.fusing_blocks(level), (features,) * level),
            pixels=None,
            boxes=(torch.zeros(5, 6, device=DEVICE),) * level,
            index=torch.zeros(rows, level, dtype=torch.long, device=DEVICE),
        )
    with torch.no_grad(), Meetings() as meetings, Uploads() as uploads:
        for _ in range(2):
            assert network.denoise(level, x, boxes, 0.5, context, 2.0).shape == x.shape
    assert meetings.found == []
    assert uploads.found == []


def test_nor_in_one_with_known_frames():
    config = small_config(**KNOWN, spacing=3, memory=True)
    model = random_model(config).to(DEVICE)
    options = SamplerOptions(guidance=2.0, frame_guidance=0.5)
    conditions = VideoConditions(config, options, 2, torch.tensor([1, 4]), None, None, DEVICE)
    network = TileNetwork(model, options, conditions)
    x = torch.zeros(2, 1, config.channels, *config.patch, device=DEVICE)
    boxes = torch.zeros(1, 6, device=DEVICE)
    known = KnownTiles(x, torch.zeros(1, 4, device=DEVICE), 0.5)
    with torch.no_grad():
        network.remember(x[:, 0])
        with Meetings() as meetings, Uploads() as uploads:
            assert network.denoise(0, x, boxes, 0.5, None, 2.0, known).shape == x.shape
    assert meetings.found == []
    assert uploads.found == []


def test_what_is_looked_for_is_seen():
    """The copies of the draws themselves, which belong before the step; and a loss that reads a value."""
    system, model, clips, draws = inputs(small_config())
    with Meetings() as meetings, Uploads() as uploads:
        on_device(draws, DEVICE)
        torch.tensor([1.0, 2.0], device=DEVICE)
    assert meetings.found == ["aten._to_copy.default"] * sum(value is not None for value in draws)
    assert uploads.found == ["tensor"]
    losses = system.losses(model, clips, on_device(draws, DEVICE))
    with pytest.raises(RuntimeError, match="meta"):
        losses["level_0"].sum().item()


def test_draws_are_made_ahead_and_depend_on_their_number_alone():
    made = []

    def draw(number):
        made.append(number)
        if number == 7:
            raise ValueError("no such number")
        return -number

    with DrawnAhead(draw) as ahead:
        assert ahead.take(range(2), range(2, 4)) == [0, -1]
        assert ahead.take(range(2, 4), range(4, 6)) == [-2, -3]
        assert ahead.take(range(4, 6)) == [-4, -5]
        assert made == list(range(6))
        ahead.take([6], [7])
        with pytest.raises(ValueError, match="no such number"):
            ahead.take([7])
