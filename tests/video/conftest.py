"""Files of the corpus, made when they are first needed, and a table of what came of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import pytest

from tests.video.cases import Case
from tests.video.examine import RESULT
from tests.video.truth import FFMPEG


@pytest.fixture(scope="session")
def video_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """Makes the file of a case, once per process, and proves that it is of its kind; skips if it cannot be made."""
    folder, made = tmp_path_factory.mktemp("video"), set()

    def make(case: Case) -> Path:
        path = folder / case.name
        if case.name not in made:
            _skip_without(case)
            case.make(path)
            for claim in case.claims:
                assert claim(path), f"{case.name} is not what it is made for: {claim.__name__} does not hold"
            made.add(case.name)
        return path

    return make


def _skip_without(case: Case) -> None:
    if case.needs_command and FFMPEG is None:
        pytest.skip("the ffmpeg program, which makes this file, is not installed")
    for encoder in case.encoders:
        try:
            av.codec.Codec(encoder, "w")
        except av.codec.codec.UnknownCodecError:
            pytest.skip(f"this PyAV has no {encoder} encoder")


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> Iterator[None]:
    """Nothing of what encoders and damaged files make FFmpeg's libraries say."""
    before = av.logging.get_level()
    av.logging.set_level(av.logging.PANIC)
    yield
    av.logging.set_level(before)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A row for every kind: files, reads, wrong ones, refused ones; then the reasons of refusals."""
    results = [
        result
        for reports in terminalreporter.stats.values()
        for report in reports
        for key, result in getattr(report, "user_properties", ())
        if key == RESULT and report.when == "call"
    ]
    if not results:
        return
    rows: dict[str, list[int]] = {}
    for result in results:
        row = rows.setdefault(result["kind"], [0] * len(_COLUMNS))
        for place, name in enumerate(_COLUMNS):
            row[place] += result[name]
    table = [(kind, *map(str, row)) for kind, row in sorted(rows.items(), key=lambda item: item[0].lower())]
    totals = ("all", *(str(sum(column)) for column in zip(*rows.values())))
    terminalreporter.section("videos: every frame and every window of 8 against a sequential decode")
    for line in (("kind", *_COLUMNS), ("---", *["---:"] * len(_COLUMNS)), *table, totals):
        terminalreporter.write_line("| " + " | ".join(line) + " |")
    for result in results:
        for reason in result["reasons"]:
            terminalreporter.write_line(f"refused, {result['name']}: {reason}")


_COLUMNS = ("files", "frames", "reads", "wrong", "refused", "faulty")
