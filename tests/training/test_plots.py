"""The loss curve."""

import json

import pytest
from PIL import Image

from hpdm.training.plots import plot_losses, read_log, running_mean


def test_running_mean():
    assert running_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


def test_a_plot_of_a_log(tmp_path):
    rows = [{"step": n, "loss_level_0": 1 / n, "loss_level_1": 2 / n} for n in range(1, 30)]
    rows.append({"step": 29, "validation_level_0": 0.5, "validation_level_0_t0": 0.7})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_losses(tmp_path, tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 20)) > 10


def test_no_log_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"log\.jsonl does not exist"):
        read_log(tmp_path)
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        read_log(tmp_path)
