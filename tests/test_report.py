"""The benchmarks' report: summaries and comparisons of result files."""

import json

import pytest

from benchmarks import report


def row(contender, median, *, reference=False, iqr=0.01):
    return {
        "group": "op", "shape": "small", "direction": "fwd", "contender": contender, "median_s": median, "iqr_s": iqr,
        "reference": reference, "speedup_vs_reference": 1.0, "error": None, "gbs": None, "tflops": None,
        "peak_extra_bytes": 1000,
    }  # fmt: skip


def result(ours):
    return {
        "machine": {"cpu": "some CPU", "threads": 2, "cores": 2, "copy_gbs": 10.0, "matmul_fp32_tflops": 0.1},
        "versions": {"torch": "2.13"}, "float32_matmul_precision": "highest", "commit": "abc", "date": "today",
        "command": "pytest benchmarks",
        "rows": [
            row("reference", 4.0, reference=True), row("slow peer", 3.0), row("peer", 2.0), row("hpdm torch", ours)
        ],
    }  # fmt: skip


def test_the_summary_takes_the_strongest_peer():
    line = report.summary(result(1.0)).splitlines()[-1]
    assert line == "| op | small | fwd | 4 s | peer, 2 s | 1 s | 4.00x | 2.00x |"


def test_losing_shows():
    assert "0.50x" in report.summary(result(4.0))


def test_what_got_slower_is_named_and_noise_is_not():
    assert report.slower(result(1.0), result(1.05)) == []
    assert report.slower(result(1.0), result(1.5)) == ["op | small | fwd | hpdm torch: 1 s -> 1.5 s (1.50x)"]


def test_the_command_compares_files(tmp_path, capsys):
    paths = []
    for name, ours in (("old", 1.0), ("new", 2.0)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(result(ours)))
    assert report.main([str(paths[0])]) == 0
    assert paths[0].with_suffix(".png").stat().st_size > 1000
    assert report.main(["--summary", *map(str, paths)]) == 1
    assert "1 s -> 2 s" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        report.main([])
