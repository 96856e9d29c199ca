"""Every file of the corpus ends in one line, soon, in little memory, and leaves nothing where it should not."""

import random

import pytest

from hpdm import runs
from tests.hostile.corpus import Good, cases
from tests.hostile.runner import CRASHED, control_characters, run, tree
from tests.hostile.soak import everything, seed
from tests.small import random_model, save_as_run, small_config

CASES = cases()
# The others are drawn anew in every run.
ALWAYS = ("3 GB", "bomb", "ffconcat", "escapes", "10^9", "pickle", "nested")
SHOWN = 40
SECONDS, MEGABYTES = 5, 1000


def chosen():
    """All cases, or those that are known to be hard and a draw of the others."""
    hard = [case for case in CASES if any(word in case.name for word in ALWAYS)]
    others = [case for case in CASES if case not in hard]
    return CASES if everything() else hard + random.Random(seed()).sample(others, SHOWN)


@pytest.fixture(scope="module")
def good(clips, tmp_path_factory):
    root = tmp_path_factory.mktemp("good")
    model = random_model(small_config(classes=2))
    folder = save_as_run(
        model, root / "run", ["RedDisc", "GreenSquare"], {"stride": 1, "short": "error", "ema": [0.05]}
    )
    runs.export(folder, root / "good.safetensors")
    return Good(clips, folder, root / "good.safetensors")


def test_the_corpus_is_large_and_its_names_differ():
    assert len(CASES) > 150
    assert len({case.name for case in CASES}) == len(CASES)


def test_the_good_files_are_read(good, tmp_path):
    (tmp_path / "out").mkdir()
    for source in (good.run, good.exported):
        ended = run(["export", "--run", source, "--out", tmp_path / "out" / "x.safetensors"], tmp_path)
        assert (ended.status, ended.error_lines) == (0, [])
    ended = run(["data", "inspect", good.clips], tmp_path)
    assert (ended.status, ended.error_lines) == (0, [])


@pytest.mark.parametrize("case", chosen(), ids=lambda case: case.name)
def test_a_hostile_file(case, good, tmp_path):
    folder = tmp_path / "a" / "b" / "c"
    (folder / "out").mkdir(parents=True)
    arguments = case.make(folder, good)
    before = tree(tmp_path)
    ended = run(arguments, folder)
    print(f"HPDM_SOAK_SEED={seed()}", ended)
    assert ended.status is not None, "it does not end"
    assert ended.status != CRASHED
    assert "Traceback" not in ended.errors
    assert ended.status == case.status
    assert ended.seconds < SECONDS
    assert ended.megabytes < MEGABYTES
    assert not control_characters(ended.out + ended.errors)
    new = tree(tmp_path) - before
    assert {name for name in new if not name.startswith("a/b/c/out/")} == set()
    assert case.status == 0 or not new, "something half-written"
    if case.line:
        assert len(ended.error_lines) == 1
        (line,) = ended.error_lines
        assert line.startswith("hpdm: error: ")
        assert len(line) < 1500
        assert str(folder) in line
