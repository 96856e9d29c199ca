"""Folders, lists and captions as people have them: read right, or told with file and line, never lost in silence."""

import os

import pytest

from hpdm.data.captions import add_captions, check_captions
from hpdm.data.finding import find_clips, survey
from hpdm.data.found import VideoFile
from tests.data.trees import captions, clips, left_out, lines, put, write

# ---- folders ----


def test_clips_are_found_at_any_depth_below_their_class(tmp_path):
    put(tmp_path, "A/a.mp4", "A/2019/x/deep.mp4", "A/2018.mkv", "B/2019/b.mp4")
    assert clips(tmp_path) == [
        ("A/2018.mkv", "A"), ("A/2019/x/deep.mp4", "A"), ("A/a.mp4", "A"), ("B/2019/b.mp4", "B"),
    ]  # fmt: skip
    assert survey(tmp_path).left_out == ()


def test_classes_whose_clips_are_all_in_groups(tmp_path):
    put(tmp_path, "basketball/v_01/v_01_01.mpg", "biking/v_01/v_01_01.mpg")
    assert clips(tmp_path) == [
        ("basketball/v_01/v_01_01.mpg", "basketball"), ("biking/v_01/v_01_01.mpg", "biking"),
    ]  # fmt: skip


@pytest.mark.parametrize("parts", [("UCF-101",), ("train", "val"), ("Train", "x"), ("test",)])
def test_a_folder_above_the_classes_is_not_taken_for_a_class(tmp_path, parts):
    put(tmp_path, *(f"{part}/{name}/clip.mp4" for part in parts for name in ("Archery", "Diving")))
    with pytest.raises(
        ValueError, match=r"^root: no videos directly in .*, but in folders below it .*Archery/clip\.mp4"
    ):
        find_clips(tmp_path)
    assert clips(tmp_path / parts[0]) == [("Archery/clip.mp4", "Archery"), ("Diving/clip.mp4", "Diving")]


def test_a_list_of_classes_says_that_folders_are_classes(tmp_path):
    put(tmp_path, "test/deep/clip.mp4")
    write(tmp_path / "classInd.txt", "1 test\n")
    assert clips(tmp_path) == [("test/deep/clip.mp4", "test")]


def test_flat_folders_of_videos_are_classes_whatever_their_names(tmp_path):
    put(tmp_path, "train/a.mp4", "val/b.mp4")
    assert clips(tmp_path) == [("train/a.mp4", "train"), ("val/b.mp4", "val")]


def test_videos_in_the_root_beside_deep_ones_are_refused(tmp_path):
    put(tmp_path, "a.mp4", "more/2019/b.mp4")
    with pytest.raises(ValueError, match=r"root: .* holds videos beside class folders \(more\), expected one"):
        find_clips(tmp_path)


def test_links_that_lead_back_end(tmp_path):
    put(tmp_path, "A/a.mp4", "A/deep/b.mp4", "B/b.mp4")
    (tmp_path / "A/deep/up").symlink_to(tmp_path / "A")
    (tmp_path / "A/root").symlink_to(tmp_path)
    (tmp_path / "B/self.mp4").symlink_to("self.mp4")
    (tmp_path / "B/gone.mp4").symlink_to("nowhere.mp4")
    os.mkfifo(tmp_path / "B/fifo.mp4")
    assert clips(tmp_path) == [("A/a.mp4", "A"), ("A/deep/b.mp4", "A"), ("B/b.mp4", "B")]
    assert left_out(tmp_path) == {
        "folders that were read already, under another name": (2, ["A/deep/up", "A/root"]),
        "links that lead nowhere, and special files": (3, ["B/fifo.mp4", "B/gone.mp4", "B/self.mp4"]),
    }


def test_linked_folders_and_clips_are_read(tmp_path):
    store = put(tmp_path / "store", "x/a.mp4")
    root = tmp_path / "set"
    (root / "B").mkdir(parents=True)
    (root / "A").symlink_to(store / "x")
    (root / "B/b.mp4").symlink_to(store / "x/a.mp4")
    assert clips(root) == [("A/a.mp4", "A"), ("B/b.mp4", "B")]


def test_a_folder_three_hundred_deep(tmp_path):
    deep = "A/" + "d/" * 300 + "a.mp4"
    put(tmp_path, deep, "A/b.mp4")
    assert clips(tmp_path) == [("A/b.mp4", "A"), (deep, "A")]


def test_what_is_left_out_is_counted_by_reason(tmp_path):
    put(tmp_path, "A/a.mp4", "A/b.flv", "A/c.FLV", "A/README", "A/._a.mp4", "A/.DS_Store", "A/a.txt", "A/m.json")
    put(tmp_path, ".trash/old.mp4", "docs/index.html")
    put(tmp_path, "A/empty.mp4", content=b"")
    assert clips(tmp_path) == [("A/a.mp4", "A")]
    assert left_out(tmp_path) == {
        "hidden folders": (1, [".trash"]),
        "hidden files": (1, ["A/._a.mp4"]),
        "files without a suffix": (1, ["A/README"]),
        "files ending in .flv": (2, ["A/b.flv", "A/c.FLV"]),
        "empty files": (1, ["A/empty.mp4"]),
        "files ending in .html": (1, ["docs/index.html"]),
        "folders without videos": (1, ["docs"]),
    }


def test_endings_that_are_no_suffixes_are_counted_together(tmp_path):
    put(tmp_path, "a.mp4", "core.1", "core.2", "a.b c", "x.mp4~", "y.mp4.part", "z.3gp", "z.7z", "e.\x1b[0m")
    assert {reason: count for reason, (count, _) in left_out(tmp_path).items()} == {
        "files of other kinds": 5, "files ending in .part": 1, "files ending in .3gp": 1, "files ending in .7z": 1,
    }  # fmt: skip


def test_a_class_of_empty_files_stays_a_class(tmp_path):
    put(tmp_path, "A/a.mp4", "C/c.mp4")
    put(tmp_path, "B/b.mp4", content=b"")
    assert clips(tmp_path) == [("A/a.mp4", "A"), ("C/c.mp4", "C")]
    found = survey(tmp_path)
    assert (found.class_names, [file.label for file in found.files]) == (["A", "B", "C"], [0, 2])
    assert left_out(tmp_path) == {"empty files": (1, ["B/b.mp4"]), "classes without clips": (1, ["'B'"])}
    write(tmp_path / "list.txt", "C/c.avi 3\nB/b.avi 2\n")
    assert clips(tmp_path, split_file=tmp_path / "list.txt") == [("C/c.mp4", "C")]


def test_many_are_counted_and_the_first_hundred_named(tmp_path):
    put(tmp_path, "a.mp4", *(f"{i:03d}.jpg" for i in range(130)))
    count, places = left_out(tmp_path)["images beside videos"]
    assert (count, len(places), places[-1]) == (130, 100, "099.jpg")


def test_a_set_of_empty_files_alone_has_no_videos(tmp_path):
    put(tmp_path, "A/a.mp4", "A/b.mp4", content=b"")
    with pytest.raises(ValueError, match=r"^root: no videos in .*; 2 are empty$"):
        find_clips(tmp_path)


def test_videos_deep_in_a_folder_of_shards_are_refused(tmp_path):
    put(tmp_path, "a.tar", "deep/er/clip.mp4")
    with pytest.raises(ValueError, match=r"root: .* holds videos beside shards \(a\.tar\), expected one"):
        survey(tmp_path)


# ---- lists ----


@pytest.fixture
def ucf(tmp_path):
    """A copy whose folder and clips are spelled otherwise than in the official lists, in another container."""
    root = put(
        tmp_path / "UCF-101", "Archery/v_Archery_g01_c01.mp4", "Archery/v_Archery_g02_c01.mp4",
        "HandStandPushups/v_HandStandPushups_g01_c01.mp4",
    )  # fmt: skip
    lists = tmp_path / "ucfTrainTestlist"
    write(lists / "classInd.txt", "1 Archery\r\n2 Diving\r\n3 HandstandPushups\r\n")
    write(
        lists / "trainlist01.txt",
        "Archery/v_Archery_g02_c01.avi 1\r\nHandstandPushups/v_HandStandPushups_g01_c01.avi 3\r\n",
    )
    return root


def test_another_spelling_of_a_class_is_read_and_told(ucf):
    assert clips(ucf) == [
        ("Archery/v_Archery_g01_c01.mp4", "Archery"),
        ("Archery/v_Archery_g02_c01.mp4", "Archery"),
        ("HandStandPushups/v_HandStandPushups_g01_c01.mp4", "HandstandPushups"),
    ]
    found = survey(ucf)
    assert found.class_names == ["Archery", "Diving", "HandstandPushups"]
    assert [file.label for file in found.files] == [0, 0, 2]
    listing = ucf.parent / "ucfTrainTestlist/classInd.txt"
    assert found.notes == (f"class folder 'HandStandPushups' is read as class 'HandstandPushups' of {listing}",)
    assert left_out(ucf) == {"classes without clips": (1, ["'Diving'"])}


def test_another_spelling_in_a_split(ucf):
    assert clips(ucf, split="train") == [
        ("Archery/v_Archery_g02_c01.mp4", "Archery"),
        ("HandStandPushups/v_HandStandPushups_g01_c01.mp4", "HandstandPushups"),
    ]
    assert left_out(ucf, split="train") == {
        "clips that trainlist01.txt does not list": (1, ["Archery/v_Archery_g01_c01.mp4"]),
        "classes without clips": (1, ["'Diving'"]),
    }
    write(ucf.parent / "ucfTrainTestlist/trainlist01.txt", "HandStandPushups/v_HandstandPushups_g01_c01.avi 3\n")
    assert clips(ucf, split="train") == [("HandStandPushups/v_HandStandPushups_g01_c01.mp4", "HandstandPushups")]
    assert "1 clips are spelled otherwise in trainlist01.txt" in survey(ucf, split="train").notes[-1]


def test_the_official_archive_needs_no_note(tmp_path):
    put(tmp_path, "HandstandPushups/v_HandStandPushups_g01_c01.avi")
    write(tmp_path / "classInd.txt", "1 HandstandPushups\n")
    write(tmp_path / "testlist01.txt", "HandstandPushups/v_HandStandPushups_g01_c01.avi\n")
    found = survey(tmp_path, split="test")
    assert (found.class_names, len(found.files), found.left_out, found.notes) == (["HandstandPushups"], 1, (), ())


def test_two_folders_of_one_class_are_refused(ucf):
    put(ucf, "HandstandPushups/v.mp4")
    match = r"class folders 'HandStandPushups' and 'HandstandPushups', which both stand for 'HandstandPushups' of .*Ind"
    with pytest.raises(ValueError, match=match):
        find_clips(ucf)


def test_a_folder_that_may_be_two_classes_is_refused(ucf):
    write(ucf / "classInd.txt", "1 archery\n2 HANDSTANDPUSHUPS\n3 ARCHERY\n")
    with pytest.raises(ValueError, match=r"class 'Archery' may be 'archery' or 'ARCHERY' of .*classInd\.txt"):
        find_clips(ucf)


def test_accents_in_two_forms_are_one_class(tmp_path):
    put(tmp_path, "Cafe\u0301/a.mp4")
    write(tmp_path / "classInd.txt", "1 Caf\u00e9\n")
    assert clips(tmp_path) == [("Cafe\u0301/a.mp4", "Caf\u00e9")]


def test_a_listed_clip_may_lie_deeper_or_be_ambiguous(tmp_path):
    put(tmp_path, "A/g01/a.mp4", "A/g02/b.mp4", "A/g03/b.mkv")
    write(tmp_path / "list.txt", "A/a.avi 1\nA/g02/b.avi\n")
    assert clips(tmp_path, split_file=tmp_path / "list.txt") == [
        ("A/g01/a.mp4", "A"), ("A/g02/b.mp4", "A"),
    ]  # fmt: skip
    write(tmp_path / "list.txt", "A/a.avi 1\nA/b.avi\n")
    with pytest.raises(ValueError, match=r"list\.txt:2: b\.avi may be .*g02/b\.mp4 or .*g03/b\.mkv, expected one"):
        find_clips(tmp_path, split_file=tmp_path / "list.txt")


def test_names_with_spaces(tmp_path):
    put(tmp_path, "Playing Guitar/clip 1.avi", "Playing Guitar/clip 2.avi", "Top 10/a.avi")
    write(tmp_path / "classInd.txt", "1 Playing Guitar\n2\tTop 10 \n")
    lines = "Playing Guitar/clip 2.avi 1\nPlaying Guitar/clip 1.avi\nTop 10/a.avi 2\nTop 10/a.avi\n"
    write(tmp_path / "list.txt", lines)
    assert clips(tmp_path, split_file=tmp_path / "list.txt") == [
        ("Playing Guitar/clip 2.avi", "Playing Guitar"), ("Playing Guitar/clip 1.avi", "Playing Guitar"),
        ("Top 10/a.avi", "Top 10"), ("Top 10/a.avi", "Top 10"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "error", "match"),
    [
        ("A/../B/b.mp4", ValueError, r"got 'A/\.\./B/b\.mp4', expected 'Class/clip\.avi'"),
        ("A//etc/passwd", ValueError, "expected 'Class/clip"),
        ("A/", ValueError, "expected 'Class/clip"),
        ("A/.", ValueError, "expected 'Class/clip"),
        ("A/a.mp4 A", ValueError, "expected 'Class/clip"),
        ("A/a.mp4,1", ValueError, "expected 'Class/clip"),
        ("A/a.mp4 2", ValueError, "got label 2 for A, expected 1"),
        ("A/c d.mp4", FileNotFoundError, r"A/c d\.mp4 does not exist"),
        ("C/a.mp4", ValueError, "class 'C' is not one of the 2 classes"),
        ("A\\a.mp4 1", ValueError, "expected 'Class/clip"),
    ],
)
def test_a_bad_line_of_a_split_is_named(tmp_path, line, error, match):
    put(tmp_path, "A/a.mp4", "B/b.mp4")
    write(tmp_path / "list.txt", f"A/a.mp4 1\n\n{line}\n")
    with pytest.raises(error, match=rf"^{tmp_path}/list\.txt:3: .*{match}"):
        find_clips(tmp_path, split_file=tmp_path / "list.txt")


def test_listed_clips_that_are_empty_or_have_an_unknown_suffix(tmp_path):
    put(tmp_path, "A/a.mp4", "A/b.3gp")
    put(tmp_path, "A/empty.mp4", content=b"")
    write(tmp_path / "list.txt", "A/a.mp4\nA/b.3gp\nA/empty.avi\n")
    assert clips(tmp_path, split_file=tmp_path / "list.txt") == [("A/a.mp4", "A"), ("A/b.3gp", "A")]
    assert left_out(tmp_path, split_file=tmp_path / "list.txt")["empty files"] == (1, ["A/empty.mp4"])


def test_a_class_listed_twice_is_refused(tmp_path):
    put(tmp_path, "A/a.mp4")
    write(tmp_path / "classInd.txt", "1 A\n2 A\n")
    with pytest.raises(ValueError, match=r"classInd\.txt:2: class 'A' is listed already, in .*classInd\.txt:1$"):
        find_clips(tmp_path)


# ---- captions ----


def test_captions_find_their_clips(tmp_path):
    put(tmp_path, "A/a.mp4", "A/b.mp4", "A/c.mp4", "A/d.mp4")
    write(tmp_path / "A/a.txt", "beside")
    write(tmp_path / "A/d.txt", " beside\n")
    write(
        tmp_path / "captions.jsonl",
        lines(("./A/a.mp4", "listed"), ("A\\b.mp4", "from Windows"), ("A/x/../c.mp4", "c")) + "\n",
    )
    assert captions(tmp_path) == {
        "A/a.mp4": "listed", "A/b.mp4": "from Windows", "A/c.mp4": "c", "A/d.mp4": "beside",
    }  # fmt: skip


def test_lines_that_match_no_clip_are_told_with_their_numbers(tmp_path):
    put(tmp_path, "a.mp4", "b.mp4")
    listing = write(
        tmp_path / "captions.jsonl", lines(("a.mp4", "a"), ("typo.mp4", "x")) + "\n" + lines(("/b.mp4", "y"))
    )
    assert captions(tmp_path) == {"a.mp4": "a", "b.mp4": ""}
    (item,) = survey(tmp_path, captions=True).left_out
    assert (item.reason, item.count) == ("lines of captions.jsonl that match no clip", 2)
    assert item.places == (f"{listing}:2 'typo.mp4'", f"{listing}:4 '/b.mp4'")
    assert survey(tmp_path).left_out == (), "without captions the file is not read"
    write(listing, lines(("typo.mp4", "x"), ("b.avi", "y")))
    with pytest.raises(
        ValueError, match=r"captions\.jsonl: none of its 2 lines matches a clip; the first names 'typo\."
    ):
        survey(tmp_path, captions=True)


def test_lines_for_clips_outside_of_the_split_are_no_news(ucf):
    for split in ("train", None):
        write(
            ucf / "captions.jsonl",
            lines(("Archery/v_Archery_g01_c01.mp4", "one"), ("Archery/v_Archery_g02_c01.mp4", "two")),
        )
        assert "captions.jsonl" not in str(survey(ucf, split=split, captions=True).left_out)
    assert captions(ucf, split="train")["Archery/v_Archery_g02_c01.mp4"] == "two"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (lines(("a.mp4", "x"), ("./a.mp4", "y")), r"captions\.jsonl:2: \./a\.mp4 has a caption already, in .*jsonl:1"),
        (lines(("a.mp4", "x" * 65_537)), r"captions\.jsonl:1: got a caption of 65537 bytes, expected at most 65536"),
        ('{"file": "a.mp4", "caption": "\\ud800"}\n', r"captions\.jsonl:1: caption: got .*, expected text"),
        ("\n" + '{"a":' * 100_000, r"captions\.jsonl:2: not JSON \(nested too deeply\)"),
        (
            '{"file": "a.mp4", "caption": ' + "1" * 5000 + "}",
            r"captions\.jsonl:1: not JSON \(an integer of 5000 digits",
        ),
    ],
)
def test_bad_captions_are_named(tmp_path, text, match):
    put(tmp_path, "a.mp4")
    write(tmp_path / "captions.jsonl", text)
    with pytest.raises(ValueError, match=match):
        find_clips(tmp_path, captions=True)


def test_a_caption_beside_its_clip_is_bounded(tmp_path):
    put(tmp_path, "a.mp4")
    write(tmp_path / "a.txt", "x" * 65_536)
    assert len(captions(tmp_path)["a.mp4"]) == 65_536
    write(tmp_path / "a.txt", "x" * 65_537)
    with pytest.raises(ValueError, match=r"a\.txt: got more than 65536 bytes, expected at most 65536"):
        captions(tmp_path)


def test_missing_captions_are_counted(tmp_path):
    put(tmp_path, "a.mp4", "b.mp4")
    write(tmp_path / "captions.jsonl", lines(("a.mp4", "x")))
    files = add_captions(tmp_path, [VideoFile(str(tmp_path / name), 0) for name in ("a.mp4", "b.mp4")])
    with pytest.raises(ValueError, match=r"captions: 1 of 2 clips of .* have none \(b\.mp4\)"):
        check_captions(tmp_path, files)
