"""The modeled least time: closed forms of single operations, and no measured step may be faster."""

import json
from pathlib import Path

import pytest
import torch

from hpdm import presets, systems
from hpdm.planning.ledger import Ledger, fake_fp32
from hpdm.planning.roofline import GPUS, gpu_named, least_seconds
from hpdm.planning.table1 import CELLS
from hpdm.planning.training_cost import training_step
from hpdm_kernels import read_tokens

A100, H100, H200 = GPUS
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_a_product_takes_its_flops_or_its_bytes_whichever_is_longer():
    with fake_fp32(), Ledger() as ledger:
        torch.empty(4096, 4096) @ torch.empty(4096, 4096)  # 137 GFLOP, 201 MB
        torch.empty(2, 4096) @ torch.empty(4096, 4096)  # 67 MFLOP, 67 MB
    products = [operation for operation in ledger.operations if operation[0]]
    assert products == [(2 * 4096**3, 3 * 4 * 4096**2), (2 * 2 * 4096**2, 4 * (4096**2 + 2 * 2 * 4096))]
    expected = 2 * 4096**3 / 156e12 + 4 * (4096**2 + 2 * 2 * 4096) / 2.039e12
    assert least_seconds(products, A100) == pytest.approx(expected)
    half = 2 * 4096**3 / 312e12 + 4 * (4096**2 + 2 * 2 * 4096) / 2.039e12
    assert least_seconds(products, A100, "bf16") == pytest.approx(half)


def test_views_take_no_time_and_other_operations_their_bytes():
    with fake_fp32():
        x = torch.empty(1000, 6)
        with Ledger() as ledger:
            y = x.T.reshape(2, 3, 1000)[:, 1:].contiguous()
            y.add_(1.0)
    assert ledger.operations == [(0, 4 * 2 * 4000)] * 2


def test_an_op_of_the_library_is_one_operation_on_its_inputs_and_results():
    """Keys, values and weights of the attention are never in memory, though the portable implementation has them."""
    with fake_fp32():
        q, tokens, weight = torch.empty(3, 2, 64, 16), torch.empty(3, 512, 32), torch.empty(2 * 2 * 16, 32)
        with Ledger() as ledger:
            read_tokens(q, tokens, weight, recompute=True, backend="torch")
    (operation,) = [operation for operation in ledger.operations if operation[0]]
    projection, attention = 2 * 3 * 512 * 32 * 64, 2 * 2 * 3 * 64 * 512 * 32
    log_sum_exps = 3 * 2 * 64
    assert operation == (
        projection + attention,
        4 * (q.numel() + tokens.numel() + weight.numel() + q.numel() + log_sum_exps),
    )
    assert ledger.moved > operation[1]


def test_all_products_inside_an_op_count():
    """Forward, and backward, which projects the tokens again: 5 products of attention, and those of two gradients."""
    with fake_fp32():
        q, tokens = torch.empty(3, 2, 64, 16, requires_grad=True), torch.empty(3, 512, 32, requires_grad=True)
        weight = torch.empty(2 * 2 * 16, 32, requires_grad=True)
        with Ledger() as ledger:
            out = read_tokens(q, tokens, weight, recompute=True, backend="torch")
            forward = ledger.flops
            out.sum().backward()
    projection, product = 2 * 3 * 512 * 32 * 64, 2 * 3 * 2 * 64 * 512 * 16
    assert forward == projection + 2 * product
    assert ledger.flops - forward == 3 * projection + 5 * product


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA A100-SXM4-80GB", A100),
        ("NVIDIA H100 80GB HBM3", H100),
        ("NVIDIA H200", H200),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_gpus_are_known_by_the_drivers_names(name, gpu):
    assert gpu_named(name) is gpu


def test_no_measured_step_is_faster_than_modeled():
    """The fastest cell of Table 1, as an H100 ran it."""
    rows = [row for file in RESULTS.glob("nvidia-h100*/*.json") for row in json.loads(file.read_text())["rows"]]
    measured = [
        row["extra"]["videos_per_s"]
        for row in rows
        if row["group"] == "table 1"
        and row["shape"] == "64x256x256 in 16x64x64, adaptive"
        and "videos_per_s" in row["extra"]
    ]
    assert measured
    config = CELLS[4].config(presets.hpdm_m())
    cost = training_step(systems.get("patch"), config, 1, "torch")
    modeled = 1 / cost.least_pass_seconds[H100.name]
    assert max(measured) < modeled < 10 * max(measured)
    # One clip a step pays for the optimizer, too.
    assert cost.least_optimizer_seconds[H100.name] > 0.1 * cost.least_pass_seconds[H100.name]
