"""Processes that differ in code, options, config or clips say what differs and where, before the first step."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from hpdm import distributed
from hpdm.commands.train import train
from hpdm.patch.system import PatchDiffusion
from tests.processes import ROOT, run_ranks
from tests.small import train_options

TRAIN = """
import os, sys
from pathlib import Path
if os.environ["RANK"] == sys.argv[3]:
    sys.path.insert(0, sys.argv[4])
import hpdm
from hpdm.commands.train import train
sys.path.append({root!r})
from tests.small import train_options
try:
    train(train_options(sys.argv[1], Path(sys.argv[2]), steps=1, batch=2, micro_batch=1, device="cpu"))
except ValueError as error:
    print(error)
"""


def differ(clips, out):
    """What each of three processes does: rank 1 or 2 differs in one thing after another."""
    clips, out = Path(clips), Path(out)
    texts = []
    with distributed.process_group(torch.device("cpu")):
        rank = distributed.rank()

        def fails(**changes):
            options = {"steps": 1, "batch": 3, "micro_batch": 1, "device": "cpu", "data": [clips, clips]} | changes
            with pytest.raises(ValueError, match="as in process 0") as error:
                train(train_options(clips, out / "run", **options))
            texts.append(str(error.value).replace("\n", " "))

        fails(lr=0.25 if rank == 1 else 0.125, seed=7 * (rank == 2), steps=1 + (rank > 0))
        configure = PatchDiffusion.configure
        for changes in ({"latents": 8}, {"conditioning_dropout": 1.0, "input_scale_decay": 0.5}):
            with pytest.MonkeyPatch.context() as patch:
                if rank == 2:
                    patch.setattr(
                        PatchDiffusion,
                        "configure",
                        lambda *arguments, changes=changes: configure(*arguments).replace(**changes),
                    )
                fails(parallel="fsdp")
        os.chdir(out / f"place_{rank}")
        fails(data=["clips", clips])
        fails(validate_every=1, validation=Path("clips"))
        distributed.assert_same_on_all_ranks("x", {"a": 1, "b": {"c": [rank // 3]}})
        distributed.assert_same_on_all_ranks("x", dict(sorted({"a": 1, "b": 2}.items(), reverse=rank == 1)))
        with pytest.raises(ValueError, match=r"^x: 1: process 1 got '1', .*; x: 5: .* as in process 0; 2 more differ$"):
            distributed.assert_same_on_all_ranks("x", {number: f"{number * (rank == 1)}" for number in range(8)})
        with pytest.raises(ValueError, match=r"^x: process 2 got 'y{199}\.\.\., expected 0 as in process 0$"):
            distributed.assert_same_on_all_ranks("x", "y" * 10_000 if rank == 2 else 0)
    (out / f"texts_{rank}").write_text("\n".join(texts))


@pytest.fixture(scope="module")
def texts(clips, tmp_path_factory):
    """The messages of each of three ranks."""
    out = tmp_path_factory.mktemp("agreement")
    for rank in range(3):
        shutil.copytree(clips, out / f"place_{rank}" / "clips")
    first = sorted((out / "place_0" / "clips" / "RedDisc").glob("*.mp4"))
    (out / "place_1" / "clips" / "RedDisc" / first[1].name).unlink()
    os.truncate(out / "place_2" / "clips" / "RedDisc" / first[0].name, 1000)
    run_ranks(differ, 3, clips, out)
    assert not (out / "run").exists()
    return first, [(out / f"texts_{rank}").read_text().splitlines() for rank in range(3)]


def test_every_process_says_the_same(texts):
    _, (first, *others) = texts
    assert len(first) == 5
    assert others == [first, first]


def test_options_that_differ_are_named_and_no_others(texts):
    assert texts[1][0][0] == (
        "options: recipe: steps: processes 1, 2 got 2, expected 1 as in process 0; "
        "options: recipe: lr: process 1 got 0.25, expected 0.125 as in process 0; "
        "options: seed: process 2 got 7, expected 0 as in process 0"
    )


def test_a_config_that_differs_is_named(texts):
    """Sharded weights of other shapes would end the processes without a word, and other constants would train."""
    assert texts[1][0][1] == "config: latents: process 2 got 8, expected 48 as in process 0"
    assert "config: conditioning_dropout: process 2 got 1.0, expected 0.1 as in process 0" in texts[1][0][2]
    assert "config: input_scale_decay: process 2 got 0.5, expected" in texts[1][0][2]


@pytest.mark.parametrize(("text", "name"), [(3, "data 1"), (4, "validation")])
def test_clips_that_differ_are_named(texts, text, name):
    (first, second, *_), messages = texts
    assert messages[0][text] == (
        f"process 1, {name}: 1 removed (RedDisc/{second.name}); "
        f"process 2, {name}: 1 of another size (RedDisc/{first.name}); expected the same as in process 0"
    )


@pytest.mark.parametrize("other", ["0", "1"])
def test_code_that_differs_is_named(clips, tmp_path, other):
    for package in ("hpdm", "hpdm_kernels"):
        shutil.copytree(ROOT / package, tmp_path / "code" / package)
    changed = tmp_path / "code" / "hpdm" / "patch" / "objective.py"
    changed.write_text(changed.read_text() + "\nSCALE = 2\n")
    arguments = (clips, tmp_path / "run", other, tmp_path / "code")
    printed = run_ranks(["-c", TRAIN.format(root=str(ROOT)), *map(str, arguments)], 2)
    assert printed[0] == printed[1]
    assert printed[0].startswith("code: hpdm/patch/objective.py: process 1 got '")
    assert printed[0].count("process 1") == 1
    assert not (tmp_path / "run").exists()
