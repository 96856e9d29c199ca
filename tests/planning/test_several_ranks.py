"""The plan of several ranks against real processes, byte by byte, and closed forms of its times."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from hpdm import distributed, presets, systems
from hpdm.commands.plan import PlanCommand, run
from hpdm.patch.model import HPDM
from hpdm.planning.roofline import GPUS
from hpdm.planning.several_ranks import DDP_BUCKET, NETWORK_BYTES_PER_S, Layout, parts_of, rank_cost, ring
from hpdm.planning.training_cost import training_step
from hpdm.training.ema import EMA, PowerLaw
from hpdm.training.optim import make_optimizer
from hpdm.training.parallel import parallelize
from hpdm.training.step import update
from tests.processes import run_ranks
from tests.small import small_config

PATCH = systems.get("patch")
A100, H100, H200 = GPUS
WAYS = {"ddp": ("ddp", 1), "fsdp": ("fsdp", 4), "hsdp": ("hsdp", 2), "fsdp_shared": ("fsdp", 4)}


def config_of(way):
    """Of a small model; its rows do not divide by the ranks everywhere."""
    return small_config(latents=5, conditioning_width=24, share_blocks=way.endswith("shared"))


class Sent(TorchDispatchMode):
    """Counts what collectives send, as rings, in a pass through the network."""

    def __init__(self):
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name == "c10d::_allgather_base_":
            self.bytes += args[0].nbytes - args[1].nbytes
        elif name == "c10d::_reduce_scatter_base_":
            self.bytes += args[1].nbytes - args[0].nbytes
        elif name == "c10d::allreduce_":
            size = ProcessGroup.unbox(args[1]).size()
            self.bytes += sum(2 * (size - 1) / size * t.nbytes for t in args[0])
        elif name.startswith("c10d::") and name not in ("c10d::barrier", "c10d::monitored_barrier_"):
            raise AssertionError(f"not counted: {name}")
        return func(*args, **(kwargs or {}))


def measure(out):
    """Two micro-batches in each way: bytes that a rank holds after the step, and has sent before the optimizer."""
    with distributed.process_group(torch.device("cpu")):
        for way, (how, size) in WAYS.items():
            torch.manual_seed(0)
            config = config_of(way)
            model = HPDM(config)
            network = parallelize(PATCH, model, how, torch.device("cpu"), False, size if how == "hsdp" else None)
            optimizer = make_optimizer(model, "lamb", 1e-3, 0.0)
            ema = EMA(model, PowerLaw(0.05), PowerLaw(0.1))
            inputs = PATCH.example_inputs(config, 1)

            def losses(network=network, inputs=inputs):
                return network(**inputs).add(1).square().mean()

            for _ in range(2):  # which set things up: DDP orders its buckets after the first step
                update(network, optimizer, ema, [losses] * 2)
            counter = Sent()

            def phase(name, counter=counter):
                if name == "optimizer":
                    counter.__exit__(None, None, None)

            counter.__enter__()
            update(network, optimizer, ema, [losses] * 2, phase=phase)
            held = {
                "weights": [shard for p in model.parameters() for shard in local(p)],
                "gradients": [shard for p in model.parameters() for shard in local(p.grad)],
                "optimizer_state": [
                    s for p in model.parameters() for t in optimizer.state[p].values() for s in local(t)
                ],
                "ema": [shard for shadow in ema.shadows for t in shadow.values() for shard in local(t)],
            }
            values = {name: sum(t.nbytes for t in tensors) for name, tensors in held.items()}
            if isinstance(network, FSDPModule):
                groups = [m._get_fsdp_state()._fsdp_param_group for m in model.modules() if isinstance(m, FSDPModule)]
                values["padded"] = sum(p._sharded_param_data.nbytes for group in groups for p in group.fsdp_params)
            (Path(out) / f"{way}_{distributed.rank()}.json").write_text(json.dumps(values | {"sent": counter.bytes}))


def local(t):
    return [t.to_local() if hasattr(t, "to_local") else t]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """By way, what each of four processes held and sent."""
    out = tmp_path_factory.mktemp("several_ranks")
    run_ranks(measure, 4, out, LOCAL_WORLD_SIZE="2")
    return {way: [json.loads((out / f"{way}_{rank}.json").read_text()) for rank in range(4)] for way in WAYS}


@pytest.fixture(scope="module")
def cost():
    """Of a micro-batch of the small model."""
    return training_step(PATCH, small_config(), 1, "torch", optimizer="lamb", averages=2)


@pytest.mark.parametrize("way", WAYS)
def test_bytes_are_those_of_real_processes(measured, cost, way):
    how, size = WAYS[way]
    config = config_of(way)
    predicted = rank_cost(PATCH, config, cost, Layout(how, 4, size, micro_batches=2))
    for rank, got in enumerate(measured[way]):
        for name in ("weights", "gradients", "optimizer_state", "ema"):
            if rank == 0:  # its shards are the longest
                assert got[name] == getattr(predicted, f"{name}_bytes"), name
            assert got[name] <= getattr(predicted, f"{name}_bytes"), name
        assert got.get("padded", predicted.weights_bytes) == predicted.weights_bytes
        # Four processes on this machine are a node.
        assert predicted.network_bytes == 0
        assert got["sent"] == predicted.nvlink_bytes


def test_a_ring_through_nodes():
    """Of 64 ranks 8 share a node: of 63/64 of the data each GPU sends an eighth to another node."""
    inside, through, across = ring(64e9, 8), ring(64e9, 64), ring(64e9, 8, stride=8)
    assert (inside.nvlink, inside.network) == (56e9, 0)
    assert (through.nvlink, through.network) == pytest.approx((63e9 * 7 / 8, 63e9 / 8))
    assert (across.nvlink, across.network) == (0, 56e9)
    assert through.seconds(H100) == max(63e9 * 7 / 8 / 450e9, 63e9 / 8 / 50e9)
    assert ring(64e9, 1).seconds(H100) == 0


def test_the_least_time_of_a_step_in_closed_form(cost):
    """DDP, where all gradients are reduced once: with long micro-batches all but the last bucket is hidden."""
    config = small_config()
    cost = replace(
        cost,
        least_pass_seconds=dict.fromkeys((gpu.name for gpu in GPUS), 2.0),
        least_optimizer_seconds=dict.fromkeys((gpu.name for gpu in GPUS), 0.5),
    )
    predicted = rank_cost(PATCH, config, cost, Layout("ddp", 16, 1, micro_batches=3))
    size = 4 * sum(p.numel() for p in HPDM(config).parameters())
    assert size < DDP_BUCKET  # so that all of it is exposed
    seconds = 2 * size * 15 / 16 / 8 / NETWORK_BYTES_PER_S
    assert predicted.least_communication_seconds[H100.name] == pytest.approx(seconds)
    assert predicted.least_step_seconds[H100.name] == pytest.approx(3 * 2.0 + 0.5 + seconds)
    assert predicted.hidden(H100.name) == pytest.approx(0.0, abs=1e-6)
    # Sharded, the rest of the model alone is exposed; all micro-batches gather it, the last reduces it between nodes.
    predicted = rank_cost(PATCH, config, cost, Layout("hsdp", 16, 8, micro_batches=3))
    rest, parts = parts_of(PATCH, config)
    assert len(parts) > 6
    gathered = 7 * rest.shard_bytes(8) / H100.nvlink_bytes_per_s
    reduced = 2 * rest.shard_bytes(8) / 2 / NETWORK_BYTES_PER_S
    exposed = predicted.least_step_seconds[H100.name] - predicted.least_compute_seconds[H100.name]
    assert exposed == pytest.approx(4 * gathered + max(2 * gathered, reduced), rel=1e-6)
    assert 0 < predicted.hidden(H100.name) < 1
    assert predicted.batch == 48


def test_the_command_plans_several_ranks(tmp_path, capsys):
    file = tmp_path / "plan.json"
    command = PlanCommand(
        preset="tiny", batch=2, ranks=16, parallel="hsdp", micro_batches=2, kernels="torch", recompute="block",
        optimizer="lamb", json=file,
    )  # fmt: skip
    assert run(command) == 0
    (row,) = json.loads(file.read_text())["ranks"]
    assert (row["recompute"], row["shard_ranks"], row["batch"]) == ("block", 8, 64)
    assert row["network_bytes"] > 0 < row["nvlink_bytes"]
    assert row["peak_bytes"] == sum(
        row[f"{name}_bytes"]
        for name in ("weights", "gradients", "optimizer_state", "ema", "gathered", "passing")
    )  # fmt: skip
    assert "16 ranks, hsdp in 2 groups of 8, 64 clips a step" in capsys.readouterr().out


def test_one_rank_is_planned_as_before(tmp_path, capsys):
    assert run(PlanCommand(preset="tiny", kernels="torch", recompute="none", json=tmp_path / "plan.json")) == 0
    assert "ranks" not in json.loads((tmp_path / "plan.json").read_text())
    assert "ranks" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"ranks": 0}, "ranks"),
        ({"ranks": 12, "parallel": "hsdp"}, "shard_ranks: got 8, expected a divisor of the ranks, 12"),
        ({"ranks": 16, "parallel": "fsdp", "shard_ranks": 8}, "shard_ranks: got 8 with parallel='fsdp'"),
        ({"ranks": 16, "parallel": "fsdp", "optimizer": "muon"}, "optimizer: got 'muon' with sharded weights"),
        ({"parallel": "fsdp"}, "parallel: got 'fsdp' with 1 rank"),
        ({"micro_batches": 2}, "micro_batches: got 2 with 1 rank"),
    ],
)
def test_bad_options_are_named(arguments, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        run(PlanCommand(preset="tiny", kernels="torch", recompute="none", **arguments))


def test_the_presets_that_are_sharded_fit_on_paper(cost):
    """HPDM-T2V on 64 ranks: weights, gradients, two moments and two averages would fill an 80 GB GPU by themselves."""
    config = presets.hpdm_t2v()
    whole, nodes, all_ranks = (
        rank_cost(PATCH, config, cost, Layout(how, 64, size)) for how, size in (("ddp", 1), ("hsdp", 8), ("fsdp", 64))
    )
    assert whole.peak_bytes > 6 * 4 * 3.9e9
    assert all_ranks.peak_bytes < nodes.peak_bytes < 60e9
    assert whole.weights_bytes / 8 < nodes.weights_bytes < 1.01 * whole.weights_bytes / 8
