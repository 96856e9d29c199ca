"""Memory, traffic and least time of a training step over several ranks: from shapes and published rates.

What a rank holds and sends follows from the shapes of the weights and from when FSDP2 gathers them; tests compare both
with real processes, byte by byte. The times are modeled: a lower bound for rings, as :mod:`hpdm.planning.roofline` has
one for compute.

**Traffic.** Collectives are counted as rings: of ``n`` ranks each sends ``(n - 1) / n`` of the whole data in an
all-gather or a reduce-scatter, and twice that in an all-reduce. Per micro-batch, a part that FSDP2 shards on its own is
gathered for each of its forward and backward passes; where it is not resharded after forward passes, one gathering
serves all of these and the first backward pass. Its gradients are reduced once, when all are added up. Between replicas
gradients are reduced in the last micro-batch alone. Norms, flags and the first pass of self-conditioning are left out.

**Links.** Ranks that follow each other share a node of :data:`NODE` GPUs. Of the traffic of a ring through nodes with
``g`` of its ranks in each, every g-th transfer leaves the node; such rings are laid so that each GPU's network card
carries one g-th of it. The others go over NVLink.

**Time.** Of a micro-batch, the gathering of the weights that belong to no part comes before everything else, and
reducing their gradients comes last: neither can be hidden behind compute. With DDP it is one bucket of gradients. The
rest takes at least the longer of compute and the busiest link. Left out, all of which make a real step slower:
latencies, rates below the peak, and that compute and communication share memory and multiprocessors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from hpdm.planning.ledger import fake_fp32
from hpdm.planning.roofline import GPU, GPUS
from hpdm.planning.training_cost import StepCost
from hpdm.recipe import Parallel
from hpdm.system import System
from hpdm.training.optim import make_optimizer

NODE = 8
"""GPUs of a node."""
NETWORK_BYTES_PER_S = 400e9 / 8
"""Of the network card that each GPU has: 400 Gb/s in each direction."""
DDP_BUCKET = 25 * 2**20
"""Bytes of gradients that DDP reduces at once."""


@dataclass(frozen=True)
class Layout:
    """How ranks share a training step.

    Raises:
        ValueError: ranks that do not divide into groups of ``shard_ranks``.
    """

    parallel: Parallel
    ranks: int
    shard_ranks: int
    """Ranks that share one copy of the weights; 1 with DDP."""
    micro_batches: int = 1
    """Per step and rank."""

    def __post_init__(self) -> None:
        if self.ranks % self.shard_ranks:
            raise ValueError(f"shard_ranks: got {self.shard_ranks}, expected a divisor of the ranks, {self.ranks}")

    @property
    def replicas(self) -> int:
        """Copies of the weights among all ranks."""
        return self.ranks // self.shard_ranks


class Part(NamedTuple):
    """Weights that FSDP2 gathers together."""

    shapes: tuple[tuple[int, ...], ...]
    """Of fp32 tensors."""
    reshard: bool
    """Whether only the shards are kept between forward and backward pass."""
    calls: int
    """In a forward pass."""

    def shard_bytes(self, ranks: int) -> int:
        """Bytes of the shards on one rank, each padded to the longest."""
        return sum(4 * _sharded(shape, ranks) for shape in self.shapes)

    @property
    def gathers(self) -> int:
        """All-gathers of a micro-batch; without resharding the first backward pass finds what the forward pass used."""
        return 2 * self.calls if self.reshard else self.calls


def _sharded(shape: Sequence[int], ranks: int) -> int:
    """Numbers of a tensor on the first rank, if its first axis is shared out."""
    return -(-shape[0] // ranks) * math.prod(shape[1:])


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends."""

    nvlink: float = 0.0
    """To GPUs of the same node."""
    network: float = 0.0
    """To other nodes."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.nvlink + other.nvlink, self.network + other.network)

    def __mul__(self, count: int) -> Traffic:
        return Traffic(count * self.nvlink, count * self.network)

    def seconds(self, gpu: GPU) -> float:
        """The least time of transfers that go on beside each other: that of the busiest link."""
        return max(self.nvlink / gpu.nvlink_bytes_per_s, self.network / NETWORK_BYTES_PER_S)


def ring(size: float, ranks: int, stride: int = 1) -> Traffic:
    """What one rank sends when data of ``size`` bytes go around a ring once.

    Args:
        size: of the whole data: what an all-gather returns, or a reduce-scatter is given.
        ranks: in the ring.
        stride: between the numbers of neighboring ranks.
    """
    sent = size * (ranks - 1) / ranks
    together = min(ranks, max(1, NODE // stride))
    return Traffic(nvlink=sent) if together == ranks else Traffic(sent * (together - 1) / together, sent / together)


@dataclass(frozen=True)
class RankCost:
    """The predicted cost of one training step on one rank, the one with the longest shards."""

    parallel: Parallel
    ranks: int
    shard_ranks: int
    micro_batches: int
    batch: int
    """Clips of a step, over all ranks."""
    weights_bytes: int
    gradients_bytes: int
    """Of the rank's shards, which stay between micro-batches."""
    optimizer_state_bytes: int
    ema_bytes: int
    gathered_bytes: int
    """Most bytes of whole weights, their whole gradients and the buffers of collectives at once."""
    passing_bytes: int
    """Most bytes of inputs, activations and temporaries at once."""
    nvlink_bytes: float
    """Sent to GPUs of the same node."""
    network_bytes: float
    """Sent to other nodes."""
    least_compute_seconds: dict[str, float]
    """By name of the GPU, modeled: of the whole step, see :mod:`hpdm.planning.roofline`."""
    least_communication_seconds: dict[str, float]
    """The same of what is sent, if nothing were computed."""
    least_step_seconds: dict[str, float]
    """The same of both, beside each other as far as they can be."""

    @property
    def peak_bytes(self) -> int:
        """The memory that is needed if all largest moments coincide: an upper bound of the model."""
        return (
            self.weights_bytes + self.gradients_bytes + self.optimizer_state_bytes + self.ema_bytes
            + self.gathered_bytes + self.passing_bytes
        )  # fmt: skip

    def hidden(self, gpu: str) -> float:
        """The share of communication that can be hidden behind compute; 1 where nothing is sent."""
        exposed = self.least_step_seconds[gpu] - self.least_compute_seconds[gpu]
        total = self.least_communication_seconds[gpu]
        return 1 - exposed / total if total else 1.0


def rank_cost(system: System, config: Any, cost: StepCost, layout: Layout) -> RankCost:
    """Predicts a training step over several ranks.

    Args:
        system: kind of the model.
        config: the model's.
        cost: of one micro-batch on a single rank.
        layout: how the ranks share the step.

    Raises:
        ValueError: sharded weights with Muon, which needs whole ones.
    """
    rest, parts = parts_of(system, config)
    everything = [rest, *parts]
    n = layout.shard_ranks
    weights = sum(part.shard_bytes(n) for part in everything)
    state = _state_bytes(system, config, cost.optimizer, n)
    share = weights / sum(part.shard_bytes(1) for part in everything)  # of the optimizer's work
    micro_batch, last = (_sent(rest, parts, layout, last) for last in (False, True))
    before = layout.micro_batches - 1
    sent = micro_batch.everything * before + last.everything
    compute, communication, step = {}, {}, {}
    for gpu in GPUS:
        passes = cost.least_pass_seconds[gpu.name]
        optimizer = share * cost.least_optimizer_seconds[gpu.name]
        compute[gpu.name] = layout.micro_batches * passes + optimizer
        communication[gpu.name] = before * micro_batch.everything.seconds(gpu) + last.everything.seconds(gpu)
        step[gpu.name] = before * micro_batch.beside(passes, gpu) + last.beside(passes, gpu) + optimizer
    return RankCost(
        parallel=layout.parallel,
        ranks=layout.ranks,
        shard_ranks=n,
        micro_batches=layout.micro_batches,
        batch=cost.batch * layout.micro_batches * layout.ranks,
        weights_bytes=weights,
        gradients_bytes=weights,
        optimizer_state_bytes=state,
        ema_bytes=cost.averages * weights,
        gathered_bytes=_gathered_bytes(rest, parts, n) if layout.parallel != "ddp" else 0,
        passing_bytes=cost.passing_bytes,
        nvlink_bytes=sent.nvlink,
        network_bytes=sent.network,
        least_compute_seconds=compute,
        least_communication_seconds=communication,
        least_step_seconds=step,
    )


def parts_of(system: System, config: Any) -> tuple[Part, list[Part]]:
    """The weights that belong to no part, and the parts in the order in which a forward pass first calls them."""
    with fake_fp32(), torch.no_grad():
        model = system.build(config, kernels="torch")
        modules = list(system.sharded_modules(model))
        order: list[nn.Module] = []
        for module, _ in modules:
            module.register_forward_pre_hook(lambda module, _: order.append(module))
        model(**system.example_inputs(config, 1))
    seen: set[nn.Parameter] = set()

    def own(module: nn.Module) -> Iterator[tuple[int, ...]]:
        for p in module.parameters():
            if p not in seen:
                seen.add(p)
                yield tuple(p.shape)

    parts = {module: Part(tuple(own(module)), reshard, order.count(module)) for module, reshard in modules}
    rest = Part(tuple(own(model)), reshard=False, calls=1)
    return rest, [parts[module] for module in dict.fromkeys(order)]


def _state_bytes(system: System, config: Any, optimizer_name: str, ranks: int) -> int:
    """Bytes of the optimizer's state on a rank: of each parameter what has its shape is shared out as it is."""
    if optimizer_name == "muon" and ranks > 1:
        raise ValueError("optimizer: got 'muon' with sharded weights, expected 'adamw' or 'lamb'")
    with fake_fp32():
        model = system.build(config, kernels="torch")
        optimizer = make_optimizer(model, optimizer_name, 1e-3, 0.01, hidden_modules=system.hidden_modules(model))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        return sum(
            t.element_size() * (_sharded(t.shape, ranks) if t.shape == p.shape else t.numel())
            for p in model.parameters()
            for t in optimizer.state[p].values()
        )


def _gathered_bytes(rest: Part, parts: Sequence[Part], ranks: int) -> int:
    """Most bytes of whole weights, their gradients and the buffers of collectives that FSDP2 holds at once.

    Throughout the backward pass these are the weights of no part with their gradients. While the gradients of a part
    are computed its weights and gradients are whole, parts before it are if they were not resharded, the one right
    before it is gathered already, and the gradients of the one right after it are being reduced.
    """
    whole = [0, *(ranks * part.shard_bytes(ranks) for part in parts), 0]
    resharded = [True, *(part.reshard for part in parts), True]
    most = 0
    for i in range(1, len(parts) + 1):
        kept = sum(size for size, reshard in zip(whole[: i + 1], resharded) if not reshard)
        gathered = sum(whole[j] for j in (i - 1, i) if resharded[j])
        most = max(most, kept + gathered + whole[i] + whole[i + 1])
    return 2 * ranks * rest.shard_bytes(ranks) + most


class _Sent(NamedTuple):
    """What a rank sends in a micro-batch."""

    everything: Traffic
    exposed: Traffic
    """What is sent while nothing can be computed."""

    def beside(self, compute: float, gpu: GPU) -> float:
        """The least seconds of this and of so many seconds of compute."""
        exposed = self.exposed.seconds(gpu)
        return exposed + max(compute, self.everything.seconds(gpu) - exposed)


def _sent(rest: Part, parts: Sequence[Part], layout: Layout, last: bool) -> _Sent:
    """What a rank sends in a micro-batch; the ``last`` one of a step reduces gradients over the replicas."""
    n, replicas = layout.shard_ranks, layout.replicas
    if layout.parallel == "ddp":
        size = sum(part.shard_bytes(1) for part in (rest, *parts))
        sizes = (size, min(size, DDP_BUCKET)) if last else (0, 0)
        return _Sent(*(ring(size, replicas) * 2 for size in sizes))

    def sent(part: Part) -> Traffic:
        """Gatherings of the part's weights and reductions of its gradients."""
        inside = ring(n * part.shard_bytes(n), n) * (part.gathers + 1)
        return inside + ring(part.shard_bytes(n), replicas, stride=n) * (2 * last)

    everything = sum(map(sent, parts), start=sent(rest))
    return _Sent(everything, exposed=sent(rest))
