"""What an interrupted sampling has kept belongs to its weights: others begin anew."""

import hashlib
import shutil
import signal

from tests.reliability.commands import SMALL
from tests.reliability.hooks import die_after_the_first_level
from tests.reliability.soak import generator


def test_levels_of_other_weights_are_not_used(commands, training, tmp_path):
    """The run is trained anew in its folder, to the same step, between the kill and the next try."""
    run, out = tmp_path / "run", tmp_path / "videos"
    words = ["sample", "--run", run, "--out", out, "--count", 1, "--steps", 2, "--weights", "model", *SMALL]

    def hashes(folder):
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.mp4")]

    assert commands.run(*training, "--out", run, "--steps", 2).status() == 0
    killed = commands.run(*words, before=(die_after_the_first_level, ()))
    assert killed.status() == -signal.SIGKILL
    kept = shutil.copytree(out, tmp_path / "kept")
    assert "found 1 finished level(s)" in commands.run(*words).output()
    shutil.rmtree(run)
    assert commands.run(*training, "--out", run, "--steps", 2, "--seed", 1, "--lr", 0.02).status() == 0
    shutil.rmtree(out)
    shutil.copytree(kept, out)
    again = commands.run(*words)
    assert again.status() == 0
    assert "found" not in again.output()
    fresh = commands.run(*words[:3], "--out", tmp_path / "fresh", *words[5:])
    assert fresh.status() == 0, fresh.output()
    assert hashes(out) == hashes(tmp_path / "fresh")


def test_a_flipped_bit_in_a_kept_level_is_noticed(commands, trained, tmp_path):
    random, out = generator("kept"), tmp_path / "videos"
    words = ["sample", "--run", trained, "--out", out, "--count", 1, "--steps", 2, *SMALL]
    assert commands.run(*words, before=(die_after_the_first_level, ())).status() == -signal.SIGKILL
    (kept,) = (out / ".unfinished").glob("*.safetensors")
    good = kept.read_bytes()
    for _ in range(3):
        bad = bytearray(good)
        bad[random.randrange(len(bad))] ^= 1 << random.randrange(8)
        kept.write_bytes(bad)
        process = commands.run(*words)
        assert process.status() == 1, process.output()
        assert "the finished part of an interrupted run is damaged, delete it" in process.output()
    kept.write_bytes(good)
    assert commands.run(*words).status() == 0
