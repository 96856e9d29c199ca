"""What Triton's kernels allocate for themselves: the planner's count without launches against real calls of the ops."""

import json
import math
import subprocess
import sys

import pytest
import torch

from hpdm import presets, systems
from hpdm.planning.ledger import Ledger, fake_fp32
from hpdm.planning.training_cost import training_step
from hpdm_kernels import _triton, cross_attention, fuse_context, read_tokens, sample_context
from hpdm_kernels.attention.triton_backend import split_loop
from hpdm_kernels.dry_run import launches_left_out
from tests.processes import ROOT

GRID, WIDTH = (2, 4, 4), 16
SMALL = presets.tiny().replace(width=128, latent_width=64, latents=48)


def attend(mask=False):
    q, k, v = (torch.randn(1, 2, rows, 32, requires_grad=True) for rows in (24, 400, 400))
    key_mask = torch.ones(1, 400, dtype=torch.bool) if mask else None
    cross_attention(q, k, v, key_mask=key_mask, backend="triton").sum().backward()


def attend_with_a_mask():
    attend(mask=True)


def read():
    q, tokens = torch.randn(3, 2, 16, 16, requires_grad=True), torch.randn(3, 300, WIDTH, requires_grad=True)
    weight = torch.randn(2 * 2 * 16, WIDTH, requires_grad=True)
    read_tokens(q, tokens, weight, piece_rows=512, backend="triton").sum().backward()


def geometry():
    boxes = [torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]), torch.tensor([[0.25, 0.25, 0.25, 0.5, 0.5, 0.5]])]
    box = torch.tensor([[0.3, 0.3, 0.35, 0.25, 0.25, 0.25]])
    return [b.expand(2, 6) for b in boxes], box.expand(2, 6)


FOOTPRINTS = [(2, 3, 3), (2, 3, 4)]


def fuse():
    boxes, box = geometry()
    tokens = [torch.randn(2, math.prod(GRID), WIDTH, requires_grad=True) for _ in range(3)]
    weight, bias = torch.randn(WIDTH, 2 * WIDTH + 3, requires_grad=True), torch.randn(WIDTH, requires_grad=True)
    fuse_context(
        tokens[0], tokens[1:], boxes, box, weight, bias, [GRID] * 2, GRID, footprints=FOOTPRINTS, backend="triton"
    ).sum().backward()


def sample():
    boxes, box = geometry()
    tokens = [torch.randn(2, math.prod(GRID), WIDTH, requires_grad=True) for _ in range(2)]
    sample_context(tokens, boxes, box, [GRID] * 2, GRID, footprints=FOOTPRINTS, backend="triton").sum().backward()


def counted(run):
    """Sizes of everything that a call allocates, FLOPs and traffic; and the largest number of bytes alive at once."""
    with Ledger("triton") as ledger:
        run()
    sizes = sorted(size for _, size in ledger._changes if size > 0)
    return (sizes, ledger.flops, ledger.moved), sum(ledger.at_peak().values())


@pytest.mark.skipif(not _triton.INTERPRETED, reason="launches are real where kernels are interpreted")
@pytest.mark.parametrize("run", [attend, attend_with_a_mask, read, fuse, sample])
def test_what_is_counted_without_launches_is_what_the_kernels_allocate(run):
    """The same host code with launches on data, without launches, and without data."""
    expected, _ = counted(run)  # the interpreter keeps what it was given for a while, so not the peak
    with launches_left_out() as left_out:
        without_launches, peak = counted(run)
    with fake_fp32(), launches_left_out() as launched:
        assert counted(run) == (expected, peak)
    assert without_launches == expected
    assert left_out == launched != []


@pytest.mark.skipif(not _triton.INTERPRETED, reason="the interpreter splits small loops")
def test_an_op_moves_its_workspace_twice():
    with fake_fp32(), launches_left_out():
        q, kv = torch.randn(1, 2, 128, 32), torch.randn(1, 2, 1024, 32)
        with Ledger("triton") as ledger:
            cross_attention(q, kv, kv, backend="triton")
    splits, _ = split_loop(1 * 2, 8, slots=8, extra=0)
    results = 4 * (q.numel() + 2 * 128)
    assert splits > 1
    assert ledger.moved_by_group["attention"] == ledger.moved
    assert ledger.moved == 4 * (q.numel() + kv.numel()) + results + 2 * splits * results
    assert ledger.operations == [(2 * 2 * 2 * 128 * 1024 * 32, 4 * (q.numel() + kv.numel()) + results)]


ON_AN_H100 = """
import json, torch
from hpdm import presets, systems
from hpdm.commands.plan import PlanCommand, plan
from hpdm.planning.ledger import Ledger, fake_fp32
from hpdm.planning.training_cost import training_step
from hpdm_kernels import cross_attention
from hpdm_kernels.dry_run import launches_left_out
from tests.planning.test_workspaces import SMALL
with fake_fp32(), launches_left_out() as launched:
    q, kv = torch.randn(1, 8, 256, 64), torch.randn(1, 8, 8192, 64)
    with Ledger("triton") as ledger:
        cross_attention(q, kv, kv, backend="triton")
attention = {"launched": launched, "peak": sum(ledger.at_peak().values())}
costs = [
    training_step(systems.get("patch"), config, 4, "triton", "selective")
    for config in (SMALL, SMALL.replace(self_conditioning=0.9))
]
options = PlanCommand(preset="tiny", kernels="triton", recompute="selective")
print(json.dumps({
    "planned": plan(options, systems.get("patch"), presets.tiny())["training"],
    "attention": attention,
    "flops": [c.flops for c in costs],
    "first": [c.first_pass_flops for c in costs],
    "peak": [c.peak_bytes for c in costs],
    "kept": [c.activations_bytes for c in costs],
}))
"""


def test_the_prediction_for_kernels_on_an_h100():
    """Block sizes and splits as on the GPU, so in a process that does not interpret kernels."""
    environment = {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ON_AN_H100], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # fp32: 4 blocks of 64 queries of each of 8 heads, and places for 132 * 2 programs: the loop over keys is cut in 8.
    attention = found["attention"]
    assert attention["launched"] == ["cross_attention_fwd_kernel", "cross_attention_combine_kernel"]
    assert attention["peak"] == (1 + 8) * 4 * 8 * 256 * (64 + 1)
    # The same step as of the portable ops, but for workspaces, and for interpolation, which they count as products.
    portable = training_step(systems.get("patch"), SMALL, 4, "torch", "selective")
    assert found["kept"][0] == pytest.approx(portable.activations_bytes, rel=0.01)
    assert found["peak"][0] == pytest.approx(portable.peak_bytes, rel=0.05)
    assert 0.97 * portable.flops < found["flops"][0] < portable.flops
    assert [(row["kernels"], row["recompute"]) for row in found["planned"]] == [("triton", "selective")]
    assert found["first"][0] == 0
    assert found["flops"][1] > found["flops"][0] + found["first"][1] > found["flops"][0]


def test_kernels_are_not_planned_with_the_interpreters_blocks(monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED", True)
    with pytest.raises(RuntimeError, match="kernels: got 'triton' with TRITON_INTERPRET=1"):
        training_step(systems.get("patch"), SMALL, kernels="triton")


def test_a_target_without_properties_is_named():
    with pytest.raises(ValueError, match="target: got 70, expected one of 80, 90"), launches_left_out(70):
        pass
