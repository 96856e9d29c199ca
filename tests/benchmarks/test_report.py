"""The benchmarks' report: tables, comparisons, the page of results, charts."""

import itertools
import json
import math
from pathlib import Path

import pytest

from benchmarks import charts, harness, report, tables, test_growth

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def row(contender, median, *, reference=False, iqr=0.01, **fields):
    return {
        "group": "op", "shape": "small", "direction": "fwd", "contender": contender, "median_s": median, "iqr_s": iqr,
        "reference": reference, "speedup_vs_reference": 4.0 / median if median else None, "error": None, "gbs": None,
        "tflops": None, "bytes": None, "flops": None, "peak_extra_bytes": 1000, "extra": {}, **fields,
    }  # fmt: skip


def result(ours=1.0, *more, **fields):
    return {
        "machine": {"cpu": "some CPU", "threads": 2, "cores": 2, "copy_gbs": 10.0, "matmul_fp32_tflops": 0.1},
        "versions": {"torch": "2.13", "cuda": None}, "float32_matmul_precision": "highest", "commit": "abc",
        "date": "2026-11-21T08:00:00+00:00", "command": "pytest benchmarks",
        "tests": [{"outcome": "passed"}, {"outcome": "passed"}, {"outcome": "skipped"}],
        "rows": [
            row("reference", 4.0, reference=True), row("slow peer", 3.0), row("peer", 2.0), row("hpdm torch", ours),
            *more,
        ],
        **fields,
    }  # fmt: skip


def growth(contender, seconds, sizes, **fields):
    return [
        row(contender, s, group="growth: op", shape=f"N={n}", peak_extra_bytes=m, extra={"tokens": n}, **fields)
        for n, s, m in zip((1024, 4096, 16384), seconds, sizes)
    ]


def write(folder, name, content):
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return path


# --- numbers ---


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "-"), (2.0, "2 s"), (0.0123, "12.3 ms"), (0.9997, "1 s"), (0.9994, "999 ms"), (1e-6, "1 us"),
        (5e-9, "5 ns"), (0.0, "0 ns"), (1234.0, "1234 s"),
    ],
)  # fmt: skip
def test_durations(seconds, words):
    assert tables.duration(seconds) == words


@pytest.mark.parametrize(
    ("size", "words"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (1_000, "1 kB"), (65.3e9, "65.3 GB"), (2.5e6, "2.5 MB")],
)
def test_sizes(size, words):
    assert tables.memory(size) == words


def test_the_exponent_of_a_fit():
    assert tables.exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2.0)
    # log y = 0, 0, log 4 at log x = 0, log 2, log 4: slope 1 by least squares.
    assert tables.exponent([1, 2, 4], [1, 1, 4]) == pytest.approx(1.0)
    assert tables.exponent([1024], [1.0]) is None
    assert tables.exponents([1, 2, 4], [1, 1, 4]) == "1.00, last 2.00"


# --- tables ---


def test_the_summary_takes_the_strongest_peer():
    line = report.summary(result(1.0)).splitlines()[-1]
    assert line == "| op | small | fwd | 4 s | peer, 2 s | 1 s | 4.00x | 2.00x |"


def test_losing_shows():
    assert "0.50x" in report.summary(result(4.0))


def test_no_one_is_measured_against_less_exact_products():
    rows = [
        row("reference", 8.0, reference=True, arithmetic="ieee"), row("reference, tf32", 4.0, arithmetic="tf32"),
        row("peer", 3.0, arithmetic="tf32x3"), row("peer, tf32", 2.0, arithmetic="tf32"),
        row("hpdm triton ieee", 2.5, arithmetic="ieee"), row("hpdm triton tf32x3", 1.5, arithmetic="tf32x3"),
        row("hpdm triton tf32", 1.0, arithmetic="tf32"),
    ]  # fmt: skip
    exact, inexact = report.summary(result(rows=rows)).splitlines()[2:]
    assert exact == "| op | small | fwd | 8 s | peer, 3 s | 1.5 s | 5.33x | 2.00x |"
    assert inexact == "| op | small | fwd, tf32 | 4 s | peer, tf32, 2 s | 1 s | 4.00x | 2.00x |"
    # A peer that is exact and yet faster counts against us in TF32 too.
    rows[2]["median_s"] = 0.5
    exact, inexact = report.summary(result(rows=rows)).splitlines()[2:]
    assert exact.endswith("| peer, 500 ms | 1.5 s | 5.33x | 0.33x |")
    assert inexact.endswith("| peer, 500 ms | 1 s | 4.00x | 0.50x |")


def test_the_header_says_what_was_measured_where():
    words = "\n".join(tables.header(result()))
    for part in (
        "some CPU; 2 threads on 2 cores; torch 2.13",
        "commit abc",
        "2026-11-21",
        "command: pytest benchmarks",
    ):
        assert part in words
    assert "copy 10 GB/s, fp32 matmul 0.1 TFLOP/s" in words
    assert "2 of 3 tests passed, 1 skipped" in words
    assert "cuda" not in words
    bare = result(machine={"cpu": "some CPU", "threads": 2, "cores": 2}, tests=[])
    assert "ceilings measured in the same run: none" in "\n".join(tables.header(bare))
    assert "tests passed" not in "\n".join(tables.header(bare))


def test_shares_are_of_the_ceiling_of_the_same_arithmetic():
    fast = [row("hpdm triton", 1.0, group="g", gbs=5.0, tflops=50.0, arithmetic=a) for a in ("ieee", "tf32", "tf32x3")]
    machine = {"gpu": "some GPU", "copy_gbs": 10.0, "matmul_fp32_tflops": 200.0, "matmul_tf32_tflops": 300.0}
    titles, *lines = tables.grid(fast, machine)
    shares = [dict(zip(titles, line))["% matmul"] for line in lines]
    assert shares == ["25", "17", "50"]
    assert {dict(zip(titles, line))["% copy"] for line in lines} == {"50"}


def test_empty_columns_are_left_out_and_notes_are_columns():
    rows = [
        row("reference", None, iqr=None, reference=True, extra={"published_gb": 65.3, "videos_per_s": 1.24}),
        row("hpdm torch", None, iqr=None, extra={"published_gb": None, "videos_per_s": 4.0, "fits": True}),
    ]
    assert tables.grid(rows, {}) == [
        ["contender", "extra memory", "published GB", "videos/s", "fits"],
        ["reference *", "1 kB", "65.3", "1.24", "-"],
        ["hpdm torch", "1 kB", "-", "4", "yes"],
    ]


def test_what_could_not_run_says_why():
    rows = [row("reference", 4.0, reference=True), row("peer", None, error="RuntimeError: no | fp32")]
    table = tables.in_markdown(tables.grid(rows, {}))
    assert table[-1].startswith("| peer | could not run: RuntimeError: no \\| fp32 |")
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert "could not run: RuntimeError" in report.text(result(1.0, rows[1]))


def test_rows_that_say_more_are_a_table_of_their_own():
    more = [
        row("reference", 2.0, group="table 1", shape="64x256x256", reference=True, extra={"published_gb": 65.3}),
        row("hpdm torch", 1.0, group="table 1", shape="64x256x256", extra={"published_gb": 65.3}),
    ]
    words = report.summary(result(1.0, *more))
    assert "**table 1**" in words
    assert "| 64x256x256 | fwd | hpdm torch | 1 s | 10 ms | 4.00x | 1 kB | 65.3 |" in words
    assert words.splitlines()[2] == "| op | small | fwd | 4 s | peer, 2 s | 1 s | 4.00x | 2.00x |"


def test_growth_is_one_table_with_fits():
    rows = growth("reference", (1.0, 4.0, 16.0), (1e6, 16e6, 256e6), reference=True)
    rows += growth("hpdm torch", (1.0, 2.0), (1e6, 4e6))
    (contenders,) = tables.growths(rows).values()
    assert tables.growth_grid(contenders) == [
        ["tokens", "reference", "reference, memory", "hpdm torch", "hpdm torch, memory"],
        ["1024", "1 s", "1 MB", "1 s", "1 MB"],
        ["4096", "4 s", "16 MB", "2 s", "4 MB"],
        ["16384", "16 s", "256 MB", "-", "-"],
        ["p of ~ tokens^p", "1.00, last 1.00", "2.00, last 2.00", "0.50, last 0.50", "1.00, last 1.00"],
    ]
    line = report.summary(result(1.0, *rows)).splitlines()[-1]
    assert line == "| growth: op | fwd | hpdm torch | 1024 to 4096 | 2 s | 0.50, last 0.50 | 4 MB | 1.00, last 1.00 |"
    assert "1024" in report.markdown(result(1.0, *rows))


def test_a_benchmark_notes_its_exponents():
    rows = [
        harness.Row("g", "s", name, "fwd", seconds, None, 1, peak_extra_bytes=size, extra={"tokens": n})
        for name, n, seconds, size in [
            ("a", 10, 1.0, 100), ("a", 100, 10.0, 100), ("b", 10, None, 7), ("b", 1000, None, 70),
        ]
    ]  # fmt: skip
    test_growth.add_exponents(rows)
    assert rows[0].extra == pytest.approx({"tokens": 10, "time_exponent": 1.0, "memory_exponent": 0.0})
    assert rows[3].extra == pytest.approx({"tokens": 1000, "memory_exponent": 0.5})


# --- comparison ---


def test_what_got_slower_is_named_and_noise_is_not():
    assert report.compare(result(1.0), result(1.05))["slower"] == []
    assert report.compare(result(1.0), result(1.5))["slower"] == ["op | small | fwd | hpdm torch: 1 s -> 1.5 s (1.50x)"]
    noisy = result(1.0, row("other", 1.0, iqr=0.6)), result(1.0, row("other", 1.5))
    assert report.compare(*noisy)["slower"] == []


def test_what_got_faster_or_needs_other_memory_is_named():
    before, after = result(2.0), result(1.0)
    before["rows"][3]["peak_extra_bytes"], after["rows"][2]["peak_extra_bytes"] = 2000, 1100
    after["rows"][1]["peak_extra_bytes"] = 1040
    assert report.compare(before, after) == {
        "slower": [],
        "more memory": ["op | small | fwd | peer: 1 kB -> 1.1 kB (1.10x)"],
        "faster": ["op | small | fwd | hpdm torch: 2 s -> 1 s (0.50x)"],
        "less memory": ["op | small | fwd | hpdm torch: 2 kB -> 1 kB (0.50x)"],
        "not measured now": [],
    }


def test_sizes_are_compared_each_with_its_own_and_predictions_by_memory():
    was = growth("hpdm torch", (None, None, None), (1e6, 2e6, 4e6), iqr=None)
    now = growth("hpdm torch", (None, None, None), (1e6, 2e6, 8e6), iqr=None)
    changes = report.compare(result(1.0, *was), result(1.0, *now))
    assert changes["more memory"] == ["growth: op | N=16384 | fwd | hpdm torch | 16384 tokens: 4 MB -> 8 MB (2.00x)"]
    assert changes["slower"] == []


def test_what_is_missing_is_named():
    broken = result(1.0)
    broken["rows"] = [*broken["rows"][:2], row("hpdm torch", None, error="RuntimeError: no")]
    assert report.compare(result(1.0), broken)["not measured now"] == [
        "op | small | fwd | hpdm torch: RuntimeError: no",
        "op | small | fwd | peer: no such row",
    ]


def test_the_command_compares_files(tmp_path, capsys):
    old, new = write(tmp_path, "old", result(1.0)), write(tmp_path, "new", result(2.0))
    assert report.main(["--no-chart", str(old)]) == 0
    assert report.main(["--summary", str(old), str(new)]) == 1
    assert "1 s -> 2 s" in capsys.readouterr().out
    assert report.main(["--summary", str(new), str(old)]) == 0
    assert "2 s -> 1 s (0.50x)" in capsys.readouterr().out
    hungry = result(1.0)
    hungry["rows"][3]["peak_extra_bytes"] = 2000
    assert report.main(["--summary", str(old), str(write(tmp_path, "hungry", hungry))]) == 1
    other = result(1.0, machine={**result()["machine"], "cpu": "another CPU"})
    assert report.main(["--summary", str(old), str(write(tmp_path, "other", other))]) == 0
    assert "not the same setting, machine: some CPU -> another CPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "not JSON"), ("[]", "no machine, versions"), ('{"rows": []}', "no machine"), (None, "No such file")],
)
def test_unusable_files_are_named(tmp_path, capsys, content, words):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    assert report.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "bad.json" in error


@pytest.mark.parametrize("arguments", [[], ["--check"], ["--readme", "README.md"]])
def test_unusable_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        report.main(arguments)
    assert stop.value.code == 2
    assert "expected" in capsys.readouterr().err


# --- README ---

BEFORE, AFTER = "# Title\n\nText with | and \\1.\r\n", "\n\n## Next\n\nEnd without a newline"


@pytest.fixture
def project(tmp_path):
    """A README with empty markers, and one result file."""
    readme = tmp_path / "README.md"
    readme.write_bytes(f"{BEFORE}{report.BEGIN}\n{report.END}{AFTER}".encode())
    (tmp_path / "results").mkdir()
    return readme, write(tmp_path / "results", "one", result())


def test_only_the_block_is_rewritten_and_only_once(project, capsys):
    readme, file = project
    assert report.main(["--readme", str(readme), "--check", str(file)]) == 1
    assert report.main(["--readme", str(readme), str(file)]) == 0
    content = readme.read_bytes().decode()
    assert content.startswith(BEFORE + report.BEGIN)
    assert content.endswith(report.END + AFTER)
    for part in ("### some CPU, 2026-11-21", "commit abc", "torch 2.13", "command: pytest benchmarks", "| peer, 2 s |"):
        assert part in content
    assert "[one.json](results/one.json)" in content
    assert "![speed-up, some CPU](results/one.png)" in content
    assert (readme.parent / "results" / "one.png").stat().st_size > 1000

    stamp = readme.stat().st_mtime_ns
    assert report.main(["--readme", str(readme), str(file)]) == 0
    assert readme.read_bytes().decode() == content
    assert readme.stat().st_mtime_ns == stamp
    assert sorted(p.name for p in readme.parent.iterdir()) == ["README.md", "results"]


def test_check_finds_changed_figures_and_missing_charts(project, capsys):
    readme, file = project
    report.main(["--readme", str(readme), str(file)])
    # The block itself names its files.
    assert report.main(["--readme", str(readme), "--check"]) == 0
    good = readme.read_text()
    readme.write_text(good.replace("4.00x", "5.00x"))
    capsys.readouterr()
    assert report.main(["--readme", str(readme), "--check"]) == 1
    out = capsys.readouterr().out
    assert "5.00x" in out
    assert "4.00x" in out
    assert "5.00x" in readme.read_text()  # --check writes nothing
    readme.write_text(good.replace("# Title", "# Another title"))
    assert report.main(["--readme", str(readme), "--check"]) == 0
    file.write_text(json.dumps(result(3.0)))
    assert report.main(["--readme", str(readme), "--check"]) == 1
    file.write_text(json.dumps(result()))
    file.with_suffix(".png").unlink()
    assert report.main(["--readme", str(readme), "--check"]) == 1
    assert "missing chart" in capsys.readouterr().out


def test_the_block_does_not_depend_on_how_files_are_given(project, monkeypatch):
    readme, file = project
    whole = report.block(readme, [file])
    monkeypatch.chdir(file.parent)
    assert report.block(Path("../README.md"), [Path("one.json")]) == whole


@pytest.mark.parametrize(
    ("markers", "got"),
    [
        ("nothing", (0, 0)), (report.BEGIN, (1, 0)), (f"{report.END}\n{report.BEGIN}", (1, 1)),
        (f"{report.BEGIN}\n{report.END}\n{report.BEGIN}\n{report.END}", (2, 2)),
        (f"see `{report.BEGIN}` and\n{report.END}", (0, 1)),
    ],
)  # fmt: skip
def test_without_its_markers_a_readme_is_left_alone(project, capsys, markers, got):
    readme, file = project
    readme.write_text(f"text\n{markers}\n")
    for check in ([], ["--check"]):
        assert report.main(["--readme", str(readme), *check, str(file)]) == 2
        error = capsys.readouterr().err
        assert f"README.md: got {got[0]} lines '{report.BEGIN}' and {got[1]} lines" in error
        assert "expected one each, in this order" in error
    assert readme.read_text() == f"text\n{markers}\n"


def test_check_without_files_needs_links(project, capsys):
    readme, _ = project
    assert report.main(["--readme", str(readme), "--check"]) == 2
    assert "no result file is named between the markers" in capsys.readouterr().err


def test_the_page_of_this_project_is_what_its_result_files_give(capsys):
    assert report.main(["--readme", str(PAGE), "--check"]) == 0, capsys.readouterr().out


# --- charts ---


def many(count):
    rows = []
    for n in range(count):
        options = {"group": f"op {n}", "bytes": 10**9, "flops": 10**11}
        rows += [row("reference", 4.0, reference=True, tflops=0.025, **options)]
        rows += [row("peer", 2.0, tflops=0.05, **options), row("hpdm torch", 1.0, tflops=0.1, **options)]
    return rows


def test_each_kind_of_chart_is_drawn_when_there_are_rows_for_it(tmp_path):
    file = tmp_path / "run.json"
    assert [p.name for p in charts.paths(result(), file)] == ["run.png"]
    assert charts.paths(result(rows=[]), file) == []
    assert charts.draw(result(rows=[]), file) == []
    rows = [*many(2), *growth("hpdm torch", (1.0, 4.0, 16.0), (1e6, 4e6, 16e6))]
    rows += growth("reference", (2.0, 8.0, 32.0), (2e6, 8e6, 32e6), reference=True)
    drawn = charts.draw(result(rows=rows), file)
    assert [p.name for p in drawn] == ["run.png", "run-roofline.png", "run-time.png", "run-memory.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.stat().st_size > 5000 for p in drawn)
    predicted = [*growth("hpdm torch", (None, None, None), (1e6, 4e6, 16e6))]
    assert [p.name for p in charts.paths(result(rows=predicted), file)] == ["run-memory.png"]


def test_at_most_twelve_panels_a_picture(tmp_path):
    names = [p.name for p in charts.paths(result(rows=many(13)), tmp_path / "run.json")]
    assert names == ["run.png", "run-2.png", "run-roofline.png", "run-roofline-2.png"]


def test_panels_hold_what_the_tables_say():
    rows = [*many(1), row("hpdm torch, slow", 3.0, group="op 0"), row("peer", None, group="op 0", error="no")]
    ((group, ((label, comparison),)),) = charts.speedup_panels(result(rows=rows))
    assert (group, label, comparison.ours["median_s"], comparison.peer["contender"]) == (
        "op 0",
        "small, fwd",
        1.0,
        "peer",
    )
    assert (comparison.speedup(comparison.ours), comparison.speedup(comparison.peer)) == (4.0, 2.0)
    ((_, points),) = charts.roofline_panels(result(rows=rows))
    assert [p["contender"] for p in points] == ["reference", "peer", "hpdm torch"]
    (panel,) = charts.token_panels(result(rows=growth("hpdm torch", (1.0, 2.0, 4.0), (1e6, 2e6, 4e6))), "median_s")
    assert panel[0] == "growth: op, fwd"
    unknown = {"cpu": "some CPU", "threads": 2, "cores": 2}
    assert charts.roofline_panels(result(rows=rows, machine=unknown)) == []
    single = growth("hpdm torch", (1.0,), (1e6,))
    assert charts.token_panels(result(rows=single), "median_s") == []


def test_ours_stands_out():
    names = ["reference", "peer", "hpdm torch", "hpdm triton", "another peer"]
    paint = charts.colors(names, ["reference"])
    assert len(set(paint.values())) == 5
    assert {paint["hpdm torch"], paint["hpdm triton"]} <= set(charts.OURS)
    assert paint["reference"] == charts.REFERENCE
    assert paint["peer"] in charts.PEERS


def test_labels_of_ends_do_not_overlap():
    from matplotlib.figure import Figure

    axis = Figure(figsize=(5, 4)).subplots()
    axis.set(xscale="log", yscale="log", xlim=(1e3, 1e6), ylim=(1, 1000))
    ends = [("black", 2.0**16, y) for y in (100.0, 101.0, 102.0)] + [("red", 2.0**18, y) for y in (300.0, 301.0)]
    charts._label_ends(axis, ends, tables.duration)
    heights = sorted(math.log10(note.xy[1]) for note in axis.texts)
    assert len(heights) == 5
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 0.99 * 0.035 * 3
