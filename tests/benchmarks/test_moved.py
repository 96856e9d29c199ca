"""The chart of the bytes of a training step."""

import json

import pytest

from benchmarks.moved import bar, chart, main


def plan(path, **groups):
    path.write_text(json.dumps({"training": [{"moved_by_group": groups}]}))
    return path


def test_bars_are_as_long_as_their_plans_say(tmp_path):
    old = plan(tmp_path / "old.json", products=14e9, optimizer=31e9)
    new = plan(tmp_path / "new.json", products=14e9, optimizer=0.1e9)
    assert bar(old) == {"products": 14.0, "optimizer": 31.0}
    figure = chart({"before": bar(old), "now": bar(new)})
    widths = [round(patch.get_width(), 6) for patch in figure.axes[0].patches]
    assert widths == [14.0, 14.0, 31.0, 0.1]
    told = [text.get_text() for text in figure.axes[0].texts]
    assert told == ["14.0", "14.0", "31.0", "45.0 GB", "14.1 GB"]
    picture = tmp_path / "moved.png"
    assert main([f"before={old}", f"now={new}", "--save", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "got no plan"), ("[", "got no plan"), ('{"training": []}', "got no plan"), (None, "No such file")],
)
def test_what_is_no_plan_is_refused(text, message, tmp_path, capsys):
    file = tmp_path / "plan.json"
    if text is not None:
        file.write_text(text)
    assert main([f"now={file}", "--save", str(tmp_path / "moved.png")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "moved.png").exists()


def test_a_file_needs_a_label(tmp_path, capsys):
    assert main([str(plan(tmp_path / "plan.json", products=1e9)), "--save", str(tmp_path / "moved.png")]) == 2
    assert "expected LABEL=FILE" in capsys.readouterr().err
