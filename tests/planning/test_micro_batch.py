"""The automatic micro-batch, and the FLOPs of a step that a run asks for."""

import json
import time
from types import SimpleNamespace

import pytest

import hpdm.commands.steering as steering
from hpdm import presets, systems
from hpdm.commands.train import prepare, train
from hpdm.planning import step_flops
from hpdm.planning.micro_batch import fitting_micro_batch
from hpdm.planning.step_flops import StepFlops
from hpdm.planning.training_cost import training_step
from tests.small import small_config, train_options


def cost_of(floor, fixed, per_clip, asked=None):
    """The peak is set by the optimizer's step, or by the activations."""

    def cost(clips):
        if asked is not None:
            asked.append(clips)
        peak = max(floor, fixed + per_clip * clips)
        return SimpleNamespace(peak_bytes=peak, optimizer_state_bytes=60, ema_bytes=30)

    return cost


@pytest.mark.parametrize("share", [1, 2, 7, 12, 96, 768])
@pytest.mark.parametrize("floor", [100, 400])
def test_the_largest_divisor_that_fits(share, floor):
    for memory in (floor + 10, 511, 1000, 5000, 10**6):
        asked = []
        cost = cost_of(floor, 95, 5, asked)
        expected = max(n for n in range(1, share + 1) if share % n == 0 and cost(n).peak_bytes <= memory)
        asked.clear()
        assert fitting_micro_batch(share, memory, cost) == expected
        assert len(asked) <= 9


def test_shards_take_less_and_what_never_fits_is_told():
    cost = cost_of(0, 100, 10)
    assert fitting_micro_batch(8, 140, cost) == 4
    assert fitting_micro_batch(8, 140, cost, sharded_over=9) == 8  # 180 - 90 + 10 = 100 bytes
    with pytest.raises(ValueError, match=r"micro_batch: got auto with 0.00 GB, but one clip needs 5.00 GB"):
        fitting_micro_batch(8, 10**6, cost_of(5 * 10**9, 0, 1))


def test_a_run_takes_what_fits_and_keeps_it(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(steering, "training_step", lambda system, config, clips, *rest: cost_of(0, 1e9, 1e9)(clips))
    auto = {"batch": 6, "micro_batch": "auto"}
    assert prepare(train_options(clips, tmp_path / "run", **auto, memory_gb=4.5)).micro_batch == 3
    with pytest.raises(ValueError, match="micro_batch: got auto on a CPU, expected --memory-gb"):
        prepare(train_options(clips, tmp_path / "run", **auto, device="cpu"))
    train(train_options(clips, tmp_path / "run", **auto, memory_gb=4.5, steps=1))
    for later in ({"memory_gb": 100.0}, {}):
        assert prepare(train_options(clips, tmp_path / "run", **auto, steps=1, **later)).micro_batch == 3


def test_the_flops_of_a_step_come_from_a_process_of_their_own():
    system, config = systems.get("patch"), small_config()
    late = StepFlops(system, config, 3)
    assert late() is None
    assert late._process is None  # short runs do without
    flops = StepFlops(system, config, 3, start_s=0.0)
    end = time.monotonic() + 120
    while flops() is None and time.monotonic() < end:
        time.sleep(0.1)
    assert flops() == pytest.approx(training_step(system, config, batch=3).flops)
    flops.close()
    ended_early = StepFlops(system, config, 3, start_s=0.0)
    ended_early()
    ended_early.close()
    assert ended_early._process.returncode is not None


def test_the_first_pass_of_self_conditioning_is_no_flop_of_the_model(capsys):
    config = small_config(self_conditioning=0.9)
    step_flops.main(StepFlops(systems.get("patch"), config, 1)._question)
    told = json.loads(capsys.readouterr().out)["flops"]
    with_it, without = (
        training_step(systems.get("patch"), config.replace(self_conditioning=share)).flops for share in (0.9, 0.0)
    )
    assert without < told < 0.8 * with_it
    assert told == pytest.approx(without, rel=0.05)


def test_flops_that_cannot_be_predicted_are_told_once(caplog):
    nowhere = type("Nowhere", (), {"__module__": "json"})()
    flops = StepFlops(nowhere, presets.tiny(), 1, start_s=0.0)
    assert flops() is None
    assert flops._process is not None
    flops._process.wait(120)
    assert flops() is None
    assert flops() is None
    assert caplog.text.count("the log has no tflop_per_s") == 1
    assert "has no attribute 'Nowhere'" in caplog.text
