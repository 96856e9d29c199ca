"""Floors of the roofline, and comparisons with a made-up device timer."""

import dataclasses

import pytest
import torch

from benchmarks import harness
from benchmarks.gpu import roofline

CEILINGS = {
    "copy_gbs": 4000.0, "matmul_fp32_tflops": 50.0, "matmul_tf32_tflops": 400.0, "matmul_bf16_tflops": 800.0
}  # fmt: skip


def row(contender="hpdm triton", median=2e-3, **fields):
    made = harness.row_from_samples("op", "small", contender, "fwd", [median], **fields)
    return dataclasses.asdict(harness.add_floor(made, CEILINGS))


# ---- the roofline ----


def test_floors():
    gigabyte, teraflop = 10**9, 10**12
    assert roofline.floor(4 * gigabyte, None, "ieee", CEILINGS) == (pytest.approx(1e-3), "bytes")
    for arithmetic, seconds in (("ieee", 1 / 50), ("tf32", 1 / 400), ("tf32x3", 3 / 400), ("bf16", 1 / 800)):
        assert roofline.floor(gigabyte, teraflop, arithmetic, CEILINGS) == (pytest.approx(seconds), "flops")
    assert roofline.floor(None, None, "ieee", CEILINGS) == (None, None)
    cpu = {"copy_gbs": 10.0, "matmul_fp32_tflops": 0.1}
    assert roofline.floor(gigabyte, teraflop, "tf32", cpu) == (None, None), "no ceiling of that arithmetic"
    with pytest.raises(ValueError, match="arithmetic: got 'fp8'"):
        roofline.floor(1, 1, "fp8", CEILINGS)


def test_rows_get_the_floor_of_their_own_arithmetic():
    for arithmetic, share in (("ieee", 1.0), ("tf32", 1 / 8), ("tf32x3", 3 / 8)):
        made = row(median=0.02, flops=10**12, arithmetic=arithmetic)
        assert made["share"] == pytest.approx(share)
        assert made["floor_by"] == "flops"


# ---- comparisons with a made-up device timer ----


class FakeTimer:
    """Every call of contender n, in the order of their timers, takes n + 1 milliseconds."""

    made = 0

    def __init__(self, device):
        self.each = 1e-3 * (FakeTimer.made + 1)
        FakeTimer.made += 1
        self.calls = 0

    def sample(self, call):
        call()
        self.calls += 1

    def seconds(self):
        return [self.each] * self.calls


@pytest.fixture
def fake_timer():
    FakeTimer.made = 0
    return FakeTimer


def product(a, b):
    return a @ b


def options(**more):
    return {
        "group": "product", "shape": "8x8", "direction": "fwd+bwd", "reference": "plain", "flops": 1024, "seconds": 0.1
    } | more  # fmt: skip


def test_compare_by_a_fake_timer(fake_timer):
    a, b = torch.randn(8, 8), torch.randn(8, 8)
    seen = []

    def spy(a, b):
        seen.append(torch.get_float32_matmul_precision())
        return a @ b

    rows = harness.compare(
        {"plain": product, "hpdm": product, "peer": spy}, (a, b), timer=fake_timer,
        **options(arithmetic={"peer": "tf32"}, peers=["peer"]),
    )  # fmt: skip
    assert [r.median_s for r in rows] == [pytest.approx(1e-3 * n) for n in (1, 2, 3)]
    assert [r.speedup_vs_reference for r in rows] == [pytest.approx(1 / n) for n in (1, 2, 3)]
    assert [r.arithmetic for r in rows] == ["ieee", "ieee", "tf32"]
    assert set(seen) == {"high"}, "the peer ran with TF32 products"
    assert torch.get_float32_matmul_precision() == "highest", "and nobody else"


def test_one_wrong_contender_does_not_stop_the_others(fake_timer):
    def wrong(a, b):
        return a @ b + 1

    def broken(a, b):
        raise RuntimeError("no kernel image\nmore")

    contenders = {"plain": product, "wrong": wrong, "broken": broken, "absent": broken, "hpdm": product}
    inputs = (torch.randn(8, 8), torch.randn(8, 8))
    with pytest.raises(harness.Wrong, match="wrong: AssertionError") as caught:
        harness.compare(contenders, inputs, timer=fake_timer, **options(peers=["absent"]))
    assert "broken: RuntimeError: no kernel image" in str(caught.value)
    assert "absent" not in str(caught.value), "peers need not run"
    by_name = {r.contender: r for r in caught.value.rows}
    assert by_name["hpdm"].median_s
    assert by_name["plain"].median_s
    assert all(by_name[n].error and by_name[n].median_s is None for n in ("wrong", "broken", "absent"))


def test_nothing_is_timed_after_a_lost_context(fake_timer, monkeypatch):
    tried = []

    def crashes(a, b):
        tried.append("crashes")
        raise RuntimeError("an illegal memory access was encountered")

    def after(a, b):
        tried.append("after")
        return a @ b

    monkeypatch.setattr(harness, "context_lost", lambda device: bool(tried))
    contenders = {"plain": product, "crashes": crashes, "after": after}
    with pytest.raises(harness.Wrong, match="crashes: RuntimeError: an illegal memory access") as caught:
        harness.compare(contenders, (torch.randn(8, 8), torch.randn(8, 8)), timer=fake_timer, **options())
    assert [(r.contender, r.median_s) for r in caught.value.rows] == [("crashes", None)]
    assert tried == ["crashes"]
    assert fake_timer.made == 0


def test_no_seconds_means_validation_alone(fake_timer):
    inputs = (torch.randn(8, 8), torch.randn(8, 8))
    assert harness.compare({"plain": product}, inputs, timer=fake_timer, **options(seconds=0)) == []
    with pytest.raises(harness.Wrong):
        harness.compare(
            {"plain": product, "hpdm": lambda a, b: a @ b * 2}, inputs, timer=fake_timer, **options(seconds=0)
        )
    assert fake_timer.made == 0
