"""FVD and KVD over several draws of real clips: what is drawn and kept, and what is reported of it."""

import json

import numpy as np
import pytest
import torch

from hpdm import HPDM
from hpdm.commands.evaluate import evaluate, run
from hpdm.commands.evaluate_options import EvaluateOptions
from hpdm.data.clips import VideoDataset
from hpdm.data.synthetic import render_synthetic
from hpdm.evaluation.detector import Detector
from hpdm.evaluation.distribution import DistributionScore, distribution_lines
from hpdm.evaluation.feature_distances import draw_real
from hpdm.evaluation.kernel_distance import polynomial_mmd
from hpdm.evaluation.metrics import frechet_distance
from hpdm.evaluation.real_statistics import real_statistics
from hpdm.sampling import SamplerOptions
from tests.evaluation.test_evaluate import Features
from tests.small import save_as_run, small_config

CLASSES = ["RedDisc", "GreenSquare"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six clips of 20 frames, a run that was never trained, and a detector."""
    root = tmp_path_factory.mktemp("draws")
    render_synthetic(root / "set", clips=3, frames=20, size=(32, 32), classes=CLASSES)
    torch.manual_seed(0)
    save_as_run(HPDM(small_config(classes=2)), root / "run", CLASSES, {"stride": 1, "short": "error"})
    torch.jit.script(Features().eval()).save(str(root / "i3d.pt"))
    return root


@pytest.fixture
def detector(folder):
    return Detector(folder / "i3d.pt", "features")


def windows(folder, **changes):
    return VideoDataset(folder / "set", **{"frames": 4, "size": 32, "short": "skip"} | changes)


def test_every_draw_and_every_turn_takes_other_windows(folder, detector):
    dataset, common = windows(folder), {"batch": 4, "rows": True}
    first, other = (real_statistics(dataset, detector, count=None, draw=n, **common).rows for n in (0, 1))
    assert first.shape == other.shape == (6, 3)
    assert set(map(tuple, first.round(4))) != set(map(tuple, other.round(4)))
    # The first draw is that of a set without draws: a permutation from (seed, 0), windows of epoch 0.
    order = np.random.default_rng([0, 0]).permutation(6)
    expected = detector(torch.stack([dataset[int(n)]["video"] for n in order])).numpy()
    assert first == pytest.approx(expected, rel=1e-4)
    many = real_statistics(dataset, detector, count=20, repeat=True, **common)
    assert (many.features.count, many.left_out, many.rows.shape) == (20, 0, (20, 3))
    assert many.rows[:6] == pytest.approx(first, rel=1e-4)
    assert len(np.unique(many.rows.round(4), axis=0)) > 12  # 6 clips of 17 windows each
    assert many.features.mean == pytest.approx(many.rows.mean(axis=0, dtype=np.float64), rel=1e-12)
    assert real_statistics(dataset, detector, count=20, batch=4).features.count == 6


def test_rows_are_kept_with_the_statistics(folder, detector, tmp_path, monkeypatch):
    dataset, common = windows(folder), {"count": 5, "batch": 2, "folder": tmp_path / "kept"}
    rows = real_statistics(dataset, detector, rows=True, **common).rows
    monkeypatch.setattr(Detector, "__call__", lambda *_: pytest.fail("computed again"))
    again = real_statistics(dataset, detector, rows=True, **common)
    assert np.array_equal(again.rows, rows)
    assert again.rows.dtype == np.float32
    without = real_statistics(dataset, detector, **common)
    assert without.rows is None
    assert np.array_equal(without.features.mean, again.features.mean)
    (path,) = (tmp_path / "kept").iterdir()
    with np.load(path) as file:
        values = dict(file)
    for damaged in (rows[:3], rows.astype(np.float64), rows * np.float32("nan"), np.array([None] * 5, object)):
        np.savez(path, **(values | {"rows": damaged}), allow_pickle=True)
        with pytest.raises(ValueError, match=r"npz is damaged .* delete it"):
            real_statistics(dataset, detector, rows=True, **common)


def test_values_of_all_draws_their_mean_and_deviation(folder, detector):
    dataset, videos = windows(folder), torch.randint(256, (9, 3, 4, 32, 32), dtype=torch.uint8)
    real = draw_real(dataset, detector, distances=("fvd", "kvd"), draws=3, count=8, batch=3, repeat=True, unbiased=True)
    score = DistributionScore(frames=4, batch=4, real=real)
    for number, video in enumerate(videos):
        score.add(number, video)
    result = score.result()
    rows = np.stack([score.outputs[n][0] for n in range(9)]).astype(np.float64)
    assert rows == pytest.approx(detector(videos).numpy(), rel=1e-4)
    draws = [draw.kept_rows().astype(np.float64) for draw in real.draws]
    expected = {
        "fvd": [frechet_distance(rows.mean(0), np.cov(rows.T), r.mean(0), np.cov(r.T)) for r in draws],
        "kvd": [polynomial_mmd(rows, r) for r in draws],
    }
    for name, values in expected.items():
        found = result[name]
        assert found["values"] == pytest.approx(values, rel=1e-9)
        assert found["value"] == pytest.approx(np.mean(values), rel=1e-9)
        assert found["std"] == pytest.approx(np.sqrt(np.mean((values - np.mean(values)) ** 2)), rel=1e-6)
        assert len(set(values)) == 3
        assert (found["real"], found["left_out"], found["features"]) == (8, 0, 3)
    assert result["fvd"]["covariance"] == "n - 1"
    text = distribution_lines(result)
    assert "over 3 draws: 9 generated against 8 real videos" in text
    assert "KVD" in text


def test_the_protocol_of_lvdm(folder, tmp_path, capsys):
    """Smaller than published; the set has split lists, and all of it is taken."""
    options = EvaluateOptions(
        folder / "run", folder / "set", ("fvd", "kvd"), samples=4, protocol="lvdm", real_clips=7, draws=2, frames=4,
        detector=folder / "i3d.pt", sampler=SamplerOptions(steps=1, overlap="none"), batch=4,
        statistics=tmp_path / "kept", json=tmp_path / "out.json",
    )  # fmt: skip
    assert run(options) == 0
    assert "protocol lvdm" in (printed := capsys.readouterr().out)
    assert printed.count("over 2 draws: 4 generated against 7 real videos") == 2
    result = json.loads((tmp_path / "out.json").read_text())["distribution"]
    for name in ("fvd", "kvd"):
        assert len(result[name]["values"]) == 2
        assert result[name]["value"] == pytest.approx(np.mean(result[name]["values"]))
    assert len(list((tmp_path / "kept").iterdir())) == 2
    assert evaluate(options)["distribution"]["kvd"]["values"] == pytest.approx(result["kvd"]["values"], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"metrics": ("kvd",), "detector": None}, "detector: got none, expected a TorchScript file for kvd"),
        ({"metrics": ("kvd",), "samples": 1}, "samples: got 1, expected at least 2 for kvd"),
        ({"metrics": ("motion",), "draws": 2}, "draws: got 2 without a distance from real clips"),
        ({"metrics": ("denoising",), "real_clips": 9}, "real_clips: got 9 without a distance"),
        ({"metrics": ("kvd",), "real_clips": 1}, "real_clips: got 1, expected at least 2"),
        ({"metrics": ("kvd",), "draws": 0}, "draws: got 0, expected at least 1"),
    ],
)
def test_what_a_user_can_get_wrong_is_named(folder, changes, match):
    with pytest.raises(ValueError, match=match):
        EvaluateOptions(folder / "run", folder / "set", **({"detector": folder / "i3d.pt"} | changes))
