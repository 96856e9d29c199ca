"""How the paper's tables are measured, on the CPU with a small model."""

import pytest
import torch

from benchmarks import paper
from hpdm import presets
from hpdm.planning.training_cost import training_step

CPU = torch.device("cpu")
SMALL = presets.tiny()
PLAIN = paper.Contender("reference", "reference")


def test_memory_batch_and_time_of_a_step():
    cost = training_step(paper.PATCH_DIFFUSION, SMALL, 1, "reference")
    added = cost.peak_bytes - cost.static_bytes
    measured = paper.measure(SMALL, PLAIN, CPU, cap=4 * added)
    assert measured.peak_bytes == pytest.approx(added, rel=0.1)
    assert 3 <= measured.batch <= 6
    assert len(measured.samples) == paper.ROUNDS
    assert min(measured.samples) > 0


def test_one_clip_may_be_too_much():
    with pytest.raises(paper.OutOfMemory, match="one clip needs"):
        paper.measure(SMALL, PLAIN, CPU, cap=1000)


def test_a_batch_that_does_not_fit_after_all_is_reduced(monkeypatch):
    step = paper.NoiseTraining.step

    def limited(self, batch):
        if batch > 3:
            raise paper.OutOfMemory("too much")
        return step(self, batch)

    monkeypatch.setattr(paper.NoiseTraining, "step", limited)
    assert paper.measure(SMALL, PLAIN, CPU).batch == 3


def test_setups_of_table_3():
    setups = paper.ablations(paper.base_config())
    assert {name: published for name, (_, published) in setups.items()} == {
        "shallow fusion": 4.91, "context detached": 4.4, "no adaptive computation": 2.73, "no coordinates": 4.47,
        "default": 4.4,
    }  # fmt: skip
    configs = [config for config, _ in setups.values()]
    assert len({str(config) for config in configs}) == 5
    assert setups["default"][0] == presets.hpdm_m()
