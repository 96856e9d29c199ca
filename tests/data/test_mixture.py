"""Several sets as one: fixed shares, every clip of a set once before any twice, and one set as ever, bit for bit."""

from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from PIL import Image

from hpdm import distributed
from hpdm.data.clips import VideoDataset
from hpdm.data.mixture import Mixture, WeightedRoot, parse_root
from hpdm.data.order import ClipKey, ClipOrder, MixedOrder
from hpdm.training.batches import MicroBatches
from hpdm.video import write_video


def harmonic(n):
    return sum(1 / i for i in range(1, n + 1))


# Written down before sets could be mixed: runs that were begun then must go on with the same clips.
FIRST_KEYS = {
    0: [(5, 0), (6, 0), (2, 0), (1, 0)],
    1: [(4, 0), (3, 0), (0, 0), (2, 1)],
    2: [(1, 1), (4, 1), (0, 1), (5, 1)],
    5: [(5, 2), (1, 3), (6, 3), (5, 3)],
    100: [(3, 57), (6, 57), (1, 57), (4, 57)],
}


def test_one_set_has_the_order_that_it_always_had():
    for order in (ClipOrder(7, 4, 3), MixedOrder([7], [1.0], 4, 3), MixedOrder([7], [0.25], 4, 3)):
        assert {number: [tuple(key) for key in order.keys(number)] for number in FIRST_KEYS} == FIRST_KEYS
    large = MixedOrder([13320], [1.0], 3)
    assert large.keys(0) == [(8295, 0), (6394, 0), (7557, 0)]
    assert large.keys(10**7) == [(5920, 2252), (141, 2252), (6034, 2252)]


def test_two_sets_alternate_by_their_weights():
    """Worked out by hand: of n positions the heavy set takes n * 2/3, rounded."""
    order = MixedOrder([100, 10], [1.0, 0.5], 1)
    sets = ["B" if order.keys(n)[0].clip >= 100 else "A" for n in range(9)]
    assert "".join(sets) == "ABAABAABA"


@pytest.mark.parametrize(
    "weights", [(1, 0.5), (0.5, 1), (1, 1), (1, 0.001), (1, 1, 1), (3, 0.7, 0.1), (1, 1, 1, 1), (0.2, 5, 1, 1, 0.4, 2)]
)
def test_shares_are_right_after_any_number_of_clips(weights):
    """Simulated: draw by draw, each from one set, and never farther from its share than the class says."""
    bounds = {2: 0.5, 3: 1.0}
    bound = bounds.get(len(weights), (1 + harmonic(len(weights) - 1)) / 2)
    lengths = [3 + 2 * number for number in range(len(weights))]
    order = MixedOrder(lengths, weights, 1, seed=1)
    total = sum(Fraction(str(weight)) for weight in weights)
    shares = [Fraction(str(weight)) / total for weight in weights]
    firsts = [sum(lengths[:number]) for number in range(len(lengths))]
    counts = [0] * len(weights)
    for position in range(2000):
        clip = order.keys(position)[0].clip
        counts[max(number for number, first in enumerate(firsts) if first <= clip)] += 1
        errors = [abs(count - share * (position + 1)) for count, share in zip(counts, shares)]
        assert max(errors) <= bound, position
    far = 10**12 + 7
    assert sum(order.counts(far)) == far
    assert max(abs(count - share * far) for count, share in zip(order.counts(far), shares)) <= bound


def test_each_set_is_shuffled_by_epochs_of_its_own():
    order = MixedOrder([6, 4, 5], [1.0, 0.5, 2.0], 7, seed=5)
    keys = [key for number in range(200) for key in order.keys(number)]
    orders = []
    for first, length in ((0, 6), (6, 4), (10, 5)):
        own = [ClipKey(key.clip - first, key.epoch) for key in keys if first <= key.clip < first + length]
        for epoch in range(len(own) // length):
            part = own[epoch * length : (epoch + 1) * length]
            assert sorted(key.clip for key in part) == list(range(length))
            assert {key.epoch for key in part} == {epoch}
        orders.append([key.clip for key in own])
    assert orders[0][:6] != orders[0][6:12]
    equal = MixedOrder([50, 50], [1.0, 1.0], 2, seed=5)
    pairs = [equal.keys(number) for number in range(50)]
    assert sum(a.clip == b.clip - 50 for a, b in pairs) < 10, "sets of the same length are shuffled differently"


def test_batches_are_pure_functions_of_seed_and_number():
    def make(seed=3):
        return MixedOrder([30, 7], [1.0, 0.4], 5, seed)

    forward = [make().keys(number) for number in range(40)]
    one = make()
    assert [one.keys(number) for number in reversed(range(40))] == forward[::-1]
    assert [make(4).keys(number) for number in range(40)] != forward


@pytest.mark.parametrize("world", [1, 2])
def test_training_resumes_in_the_middle_on_any_number_of_processes(flat_sets, monkeypatch, world):
    mixture = Mixture([VideoDataset(root, frames=2, size=8) for root in flat_sets], [1.0, 0.5])

    def steps(start, count):
        """The keys of each step, put together from all ranks."""
        monkeypatch.setattr(distributed, "world_size", lambda: world)
        ranks = []
        for rank in range(world):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            batches = iter(MicroBatches(mixture, 4, 2, seed=9, start=start))
            ranks.append([[next(batches) for _ in range(2 // world)] for _ in range(count)])
        return [[key for rank in ranks for batch in rank[step] for key in batch] for step in range(count)]

    whole = steps(0, 12)
    assert steps(5, 7) == whole[5:]
    order = MixedOrder([4, 3], [1.0, 0.5], 4, 9)
    assert whole == [order.keys(number) for number in range(12)]


@pytest.fixture(scope="module")
def flat_sets(tmp_path_factory):
    """Two flat folders with four and three clips; the brightness of a clip is 20 times its number."""
    root = tmp_path_factory.mktemp("sets")
    for name, first, count in (("a", 1, 4), ("b", 5, 3)):
        (root / name).mkdir()
        for number in range(first, first + count):
            video = torch.full((3, 6 if number < 7 else 3, 16, 16), 20 * number, dtype=torch.uint8)
            write_video(root / name / f"{number}.mp4", video, crf=5)
    return root / "a", root / "b"


def test_items_are_those_of_their_sets(flat_sets):
    sets = [VideoDataset(root, frames=2, size=8, seed=1) for root in flat_sets]
    mixture = Mixture(sets, [1.0, 0.5])
    assert (len(mixture), mixture.class_names) == (7, [])
    assert [round(float(mixture[number]["video"].float().mean()) / 20) for number in range(7)] == [1, 2, 3, 4, 5, 6, 7]
    assert [Path(file.path).name for file in mixture.files] == [f"{number}.mp4" for number in range(1, 8)]
    key = ClipKey(5, 3)
    assert mixture[key]["start"] == sets[1][ClipKey(1, 3)]["start"]
    assert mixture[-1]["path"] == mixture[6]["path"]
    with pytest.raises(IndexError, match="index: got 7, expected one of 7 clips"):
        mixture[7]


def test_a_short_clip_is_replaced_within_its_set_and_counted(flat_sets):
    mixture = Mixture([VideoDataset(root, frames=4, size=8) for root in flat_sets], [1.0, 0.5])
    assert mixture.short_clips() == {}
    assert Path(mixture[6]["path"]).name == "5.mp4"
    assert mixture.short_clips() == {6: 3}


def test_a_batch_holds_the_shares(flat_sets):
    mixture = Mixture([VideoDataset(root, frames=2, size=8) for root in flat_sets], [1.0, 0.5])
    order = mixture.order(batch=6, seed=0)
    for number in range(10):
        counts = Counter(key.clip >= 4 for key in order.keys(number))
        assert counts == {False: 4, True: 2}


def test_sets_that_do_not_fit_are_named(flat_sets, clips, tmp_path):
    def read(root, **changes):
        return VideoDataset(root, **{"frames": 4, "size": 8} | changes)

    flat = read(flat_sets[0])
    for sets, weights, match in [
        ([], [], r"^data: got no sets, expected at least one$"),
        ([flat], [1, 2], "weights: got 2, expected one for each of 1 sets"),
        ([flat], [0], "weights: got 0, expected finite numbers > 0"),
        ([flat], [float("nan")], "weights: got nan"),
        ([flat, read(flat_sets[1], frames=2)], [1, 1], r"got clips of \(2, 8, 8\) from .*b, expected \(4, 8, 8\) as"),
        ([read(clips), flat], [1, 1], r"^data: got no classes from .*a and 2 from .*clips; a class model needs"),
        ([flat, read(clips)], [1, 1], r"^data: got no classes from .*a and 2 from .*clips; a class model needs"),
    ]:
        with pytest.raises(ValueError, match=match):
            Mixture(sets, weights)
    mixed = Mixture([read(clips), flat], [1, 1], labeled=False)
    assert (mixed.class_names, len(mixed)) == ([], 10)


def test_classes_must_be_the_same_ones(tmp_path):
    for name, classes in (("one", "AB"), ("other", "AC"), ("more", "ABC")):
        for folder in classes:
            (tmp_path / name / folder).mkdir(parents=True)
            write_video(tmp_path / name / folder / "x.mp4", torch.zeros(3, 4, 16, 16, dtype=torch.uint8))
    one, other, more = (VideoDataset(tmp_path / name, frames=4, size=8) for name in ("one", "other", "more"))
    assert Mixture([one, one], [1, 1]).class_names == ["A", "B"]
    with pytest.raises(
        ValueError, match=r"^data: class 1 of .*other is C, expected B as in .*one; the sets need the same"
    ):
        Mixture([one, other], [1, 1])
    with pytest.raises(ValueError, match=r"^data: class 2 of .*more is C, expected none as in .*one;"):
        Mixture([one, more], [1, 1])


def test_a_set_may_lack_folders_of_classes_that_its_index_names(tmp_path):
    for name, folders in (("videos", "AB"), ("images", "B")):
        for folder in folders:
            (tmp_path / name / folder).mkdir(parents=True)
    for path in ("videos/A/x.mp4", "videos/B/x.mp4"):
        write_video(tmp_path / path, torch.zeros(3, 4, 16, 16, dtype=torch.uint8))
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "B" / "x.png")
    videos, images = tmp_path / "videos", tmp_path / "images"
    with pytest.raises(ValueError, match=r"class 0 of .*images is B, expected A as in .*videos"):
        Mixture([VideoDataset(root, frames=4, size=8) for root in (videos, images)], [1, 1])
    (images / "classInd.txt").write_text("1 A\n2 B\n")
    mixture = Mixture([VideoDataset(root, frames=4, size=8) for root in (videos, images)], [1, 1])
    assert mixture.class_names == ["A", "B"]
    assert [mixture[number]["label"] for number in range(3)] == [0, 1, 1]


def test_a_weight_is_a_number_behind_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "2026:11", "x:0.5"):
        (tmp_path / name).mkdir()
    assert parse_root("plain") == WeightedRoot(Path("plain"), 1.0)
    assert parse_root(Path("plain:0.5")) == WeightedRoot(Path("plain"), 0.5)
    assert parse_root("2026:11") == WeightedRoot(Path("2026:11"), 1.0)
    assert parse_root("2026:11:2") == WeightedRoot(Path("2026:11"), 2.0)
    assert parse_root("x:0.5") == WeightedRoot(Path("x:0.5"), 1.0)
    assert parse_root("x:0.5:0.25") == WeightedRoot(Path("x:0.5"), 0.25)
    assert parse_root("gone:here") == WeightedRoot(Path("gone:here"), 1.0)
    assert parse_root("s-{000..009}.tar:1e-2") == WeightedRoot(Path("s-{000..009}.tar"), 0.01)
    for weight in ("0", "-1", "nan", "inf"):
        with pytest.raises(ValueError, match=rf"^data: got weight {weight} for plain, expected a finite number > 0$"):
            parse_root(f"plain:{weight}")
