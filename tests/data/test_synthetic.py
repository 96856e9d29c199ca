"""The synthetic set: motion as recorded, textures as promised, UCF-101's layout."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hpdm.data.decode import read_clip
from hpdm.data.synthetic import CLASSES, bounce, render_clip, render_synthetic

CLASS_WORDS = {
    "RedDisc": ("red", "disc", "upright stripes"),
    "GreenSquare": ("green", "square", "checks"),
    "BlueTriangle": ("blue", "triangle", "level stripes"),
    "YellowRing": ("yellow", "ring", "slanted stripes"),
    "MagentaCross": ("magenta", "cross", "checks"),
    "CyanDiamond": ("cyan", "diamond", "slanted stripes"),
}


def rng():
    return np.random.default_rng(torch.seed() % 2**32)


def test_bounce_agrees_with_a_walk_step_by_step():
    source = rng()
    for _ in range(20):
        low, span = source.uniform(0, 5), source.uniform(2, 20)
        start, velocity = low + span * source.random(), source.uniform(-1.5, 1.5)
        positions, velocities = bounce(start, velocity, low, low + span, np.arange(60))
        position, direction = start, 1
        for step in range(60):
            assert positions[step] == pytest.approx(position, abs=1e-9)
            assert velocities[step] == pytest.approx(velocity * direction)
            position += velocity * direction
            if not low <= position <= low + span:
                wall = low if position < low else low + span
                position, direction = 2 * wall - position, -direction


@pytest.mark.parametrize("name", CLASSES)
def test_object_is_where_the_record_says(name):
    size = (48, 72)
    clip = render_clip(name, frames=24, size=size, rng=rng())
    assert clip.frames.shape == (24, *size, 3)
    assert clip.frames.dtype == np.uint8
    # Dim background: what is bright is the object.
    weight = np.clip(clip.frames.max(axis=3).astype(float) - 110, 0, None)
    y, x = np.mgrid[0 : size[0], 0 : size[1]] + 0.5
    center = np.stack([(weight * x).sum((1, 2)), (weight * y).sum((1, 2))], axis=1) / weight.sum((1, 2))[:, None]
    # A triangle's centroid lies below the middle of its extent, by the same amount in every frame.
    offset = (center - clip.position).mean(0)
    assert abs(offset[0]) < 0.5
    assert abs(offset[1]) < (0.5 if name != "BlueTriangle" else 0.4 * clip.radius)
    assert np.abs(center - clip.position - offset).max() < 0.6
    assert (clip.position - clip.radius > -1e-9).all()
    assert (clip.position + clip.radius < np.array(size[::-1]) + 1e-9).all()
    moved, straight = np.diff(clip.position, axis=0), clip.velocity[1:] == clip.velocity[:-1]
    assert straight.mean() > 0.5
    assert np.allclose(moved[straight], clip.velocity[:-1][straight])


@pytest.mark.parametrize("name", CLASSES)
def test_texture_is_plain_at_64_and_gone_at_16(name):
    clip = render_clip(name, frames=8, rng=rng())
    video = torch.from_numpy(clip.frames).permute(0, 3, 1, 2).float()
    rgb = CLASSES[name][2]
    channel = rgb.index(max(rgb))

    def contrast(pixels):
        """Spread of the object's main color inside a disc around its center (for a ring: inside its band)."""
        ratio = pixels.shape[-1] / 64
        y, x = torch.meshgrid(*[torch.arange(pixels.shape[-1]) + 0.5] * 2, indexing="ij")
        spreads = []
        for t in range(len(pixels)):
            distance = torch.hypot(x / ratio - clip.position[t, 0], y / ratio - clip.position[t, 1]) / clip.radius
            inside = (distance - 0.72).abs() < 0.12 if name == "YellowRing" else distance < 0.33
            spreads.append(pixels[t, channel][inside].std())
        return torch.stack(spreads).nanmean()

    fine = contrast(video)
    coarse = contrast(F.interpolate(video, size=(16, 16), mode="area"))
    assert fine > 12
    assert coarse < fine / 2


def test_equal_seeds_give_equal_clips_and_others_do_not(tmp_path):
    seed = int(torch.seed() % 2**31)
    few = render_synthetic(tmp_path / "few", clips=2, frames=4, size=(16, 16), seed=seed)
    more = render_synthetic(
        tmp_path / "more", clips=3, frames=4, size=(16, 16), seed=seed, classes=["CyanDiamond", "RedDisc"]
    )
    other = render_synthetic(tmp_path / "other", clips=2, frames=4, size=(16, 16), seed=seed + 1)
    file = "RedDisc/v_RedDisc_g02_c01.mp4"
    assert (few / file).read_bytes() == (more / file).read_bytes()
    assert (few / file).read_bytes() != (other / file).read_bytes()


def test_layout_splits_and_record(tmp_path):
    out = render_synthetic(
        tmp_path / "set", clips=9, frames=5, size=(32, 48), fps=10, classes=["GreenSquare", "RedDisc"]
    )
    lists = out / "ucfTrainTestlist"
    assert (lists / "classInd.txt").read_text() == "1 GreenSquare\n2 RedDisc\n"
    train, test = ((lists / f"{split}list01.txt").read_text().splitlines() for split in ("train", "test"))
    assert all(line.endswith(" 1" if line.startswith("GreenSquare/") else " 2") for line in train)
    files = [line.split()[0] for line in train]
    assert sorted(files + test) == sorted(str(path.relative_to(out)) for path in out.glob("*/*.mp4"))
    assert len(files) + len(test) == 18
    group = lambda file: file.rsplit("_", 1)[0]
    assert test
    assert not {group(file) for file in files} & {group(file) for file in test}
    records = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert {record["file"] for record in records if record["split"] == "test"} == set(test)
    record = records[0]
    assert np.array(record["position"]).shape == np.array(record["velocity"]).shape == (5, 2)
    clip = render_clip(record["class"], frames=5, size=(32, 48), rng=np.random.default_rng([0, 1, 0]))
    assert np.allclose(record["position"], clip.position, atol=1e-3)
    decoded = read_clip(out / record["file"], range(5)).frames
    assert np.abs(decoded.astype(int) - clip.frames).mean() < 6


def test_bad_arguments_are_named(tmp_path):
    for arguments, error, match in [
        ({"classes": ["RedDisc", "Cat"]}, ValueError, "classes: got .*Cat"),
        ({"classes": ["RedDisc", "RedDisc"]}, ValueError, "classes: got"),
        ({"clips": 1}, ValueError, "clips: got 1"),
        ({"frames": 0}, ValueError, "frames: got 0"),
        ({"size": (4, 64)}, ValueError, "size: got"),
        ({"seed": -1}, ValueError, "seed: got -1"),
    ]:
        with pytest.raises(error, match=match):
            render_synthetic(tmp_path / "set", **arguments)
    assert not (tmp_path / "set").exists()
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not empty"):
        render_synthetic(tmp_path, clips=2)
    with pytest.raises(ValueError, match="class_name: got 'Cat'"):
        render_clip("Cat", rng=rng())


def test_captions_say_what_is_to_be_seen(tmp_path):
    out = render_synthetic(tmp_path / "set", clips=6, frames=16, size=(16, 16), seed=int(torch.seed() % 2**31))
    captions = {
        record["file"]: record["caption"]
        for record in map(json.loads, (out / "captions.jsonl").read_text().splitlines())
    }
    records = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert list(captions) == [record["file"] for record in records]
    assert len(set(captions.values())) > len(captions) / 2
    for record in records:
        caption = captions[record["file"]]
        color, shape, texture = CLASS_WORDS[record["class"]]
        assert f"{color} {shape} " in caption
        assert not any(f" {other} " in caption for other, *_ in CLASS_WORDS.values() if other != color)
        assert "with" not in caption or f" with {texture} " in caption
        # Said along an axis when the motion is within an eighth of a turn of it, to either side of the diagonals.
        x, y = np.array(record["velocity"][0]) / np.hypot(*record["velocity"][0])
        edge = np.sin(np.pi / 8)
        for word, part in (("right", x), ("left", -x), ("down", y), ("up", -y)):
            if abs(part - edge) > 1e-3:
                assert (f" {word}" in caption.replace("upright", "")) == (part > edge), (caption, x, y)
        if "bouncing" in caption:
            assert len(np.unique(np.sign(record["velocity"]), axis=0)) > 1


def test_captions_do_not_depend_on_the_other_clips(tmp_path):
    def captions(name, **options):
        lines = (render_synthetic(tmp_path / name, frames=4, size=(16, 16), **options) / "captions.jsonl").read_text()
        return {record["file"]: record["caption"] for record in map(json.loads, lines.splitlines())}

    few = captions("few", clips=2)
    some = captions("some", clips=3, classes=["CyanDiamond", "RedDisc"])
    both = few.keys() & some.keys()
    assert len(both) == 4
    assert all(few[file] == some[file] for file in both)
    assert few != captions("other", clips=2, seed=1)
