"""Clips are encoded once and trained on: the stored latents, the windows of them, what resumes and what is refused."""

import json
import logging
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hpdm import cli, runs, systems
from hpdm.commands.train import train
from hpdm.data import decode, latent_store
from hpdm.data.clips import ShortClipError, VideoDataset
from hpdm.data.latent_clips import LatentDataset
from hpdm.data.latent_store import Entry, LatentStore
from hpdm.data.mixture import Mixture
from hpdm.data.order import ClipKey
from hpdm.latent import coding, encoding
from hpdm.training.batches import collate
from hpdm.training.checkpoint import newest_checkpoint
from hpdm.video import write_video
from tests.latent.latent_runs import random_latent_model, save_autoencoder, small_latent_config, train_latents
from tests.small import stop_after_checkpoint


def encode(data, autoencoder, out, *more):
    """``hpdm data encode``; returns its exit status."""
    words = ["data", "encode", "--data", data, "--autoencoder", autoencoder, "--out", out, "--device", "cpu", *more]
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    return ended.value.code


def whole(store, number):
    """All latents of a clip, ``[z, f, h, w]``."""
    factor = store.info.factors[0]
    return store.rows(number, 0, -(-int(store.frames[number]) // factor)).transpose(0, 1)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    return save_autoencoder(tmp_path_factory.mktemp("first_stage") / "ae")


@pytest.fixture(scope="module")
def model(autoencoder):
    return runs.load(autoencoder).model


@pytest.fixture(scope="module")
def latents(clips, autoencoder, tmp_path_factory):
    """The latents of the shared clips, three along time each."""
    folder = tmp_path_factory.mktemp("latents") / "clips"
    assert encode(clips, autoencoder, folder) == 0
    return folder


def write_noise(path, frames, height=32, width=32):
    """A video of blocks of 8x8 pixels."""
    video = torch.randint(256, (3, frames, height // 8, width // 8), dtype=torch.uint8)
    path.parent.mkdir(exist_ok=True)
    write_video(path, video.repeat_interleave(8, 2).repeat_interleave(8, 3), 10)


@pytest.fixture
def videos(tmp_path):
    """Videos of 29, 12, 7 and 30 frames of several sizes, the fourth of five no video."""
    for name, *size in (("a", 29, 40, 64), ("b", 12, 32, 32), ("c", 7, 64, 40), ("e", 30, 48, 48)):
        write_noise(tmp_path / "videos" / f"{name}.mp4", *size)
    (tmp_path / "videos" / "d.mp4").write_bytes(b"no video" * 100)
    return tmp_path / "videos"


def test_stored_latents_are_those_of_whole_clips(videos, autoencoder, model, tmp_path, monkeypatch):
    """At a stride and resized, read in parts and encoded in chunks, against the coding of all frames at once."""
    monkeypatch.setattr(encoding, "PART_BYTES", 7 * 3 * 32 * 32)
    assert encode(videos, autoencoder, tmp_path / "z", "--stride", 2, "--chunk", 2) == 1  # as one is no video
    store = LatentStore(tmp_path / "z")
    assert store.frames.tolist() == [15, 6, 4, 0, 15]
    for number in (0, 1, 2, 4):
        frames = int(store.frames[number])
        video = VideoDataset(videos, frames=frames, stride=2, size=32, train=False)[number]["video"]
        expected = coding.encode(model, video[None], chunk=None)[0]
        found = whole(store, number)
        assert found.dtype is torch.float16
        torch.testing.assert_close(found.float(), expected, rtol=2**-11 + 1e-5, atol=1e-4)


def test_windows_follow_seed_and_epoch_and_leave_out_the_videos_that_are_too_short(videos, autoencoder, tmp_path):
    assert encode(videos, autoencoder, tmp_path / "z") == 1
    store = LatentStore(tmp_path / "z")
    clips = VideoDataset(videos, frames=8, size=32, seed=3)
    dataset = LatentDataset(clips, store)
    starts = {}
    for number in range(5):
        for epoch in range(30):
            item, again = dataset[ClipKey(number, epoch)], dataset[ClipKey(number, epoch)]
            used = {2: 4, 3: 4}.get(number, number)
            assert item["path"] == clips.files[used].path
            assert torch.equal(item["latents"], again["latents"])
            assert torch.equal(item["latents"], whole(store, used)[:, item["start"] : item["start"] + 2])
            starts.setdefault(number, set()).add(item["start"])
    assert starts[0] == set(range(6))  # 7 latents of 29 frames; an eighth stands for one frame
    assert starts[1] == {0, 1}
    assert dataset.short_clips() == {2: 7}
    assert clips[2]["path"] == clips.files[4].path
    assert clips.short_clips() == dataset.short_clips()
    middle = LatentDataset(VideoDataset(videos, frames=8, size=32, train=False), store)
    assert middle[0]["start"] == 2
    with pytest.raises(ShortClipError, match=r"c.mp4: got 7 frames, expected >= 8 "):
        LatentDataset(VideoDataset(videos, frames=8, size=32, short="error"), store)
    with pytest.raises(ValueError, match=r"^latents: .* has no clip of 32 frames"):
        LatentDataset(VideoDataset(videos, frames=32, size=32), store)


@pytest.mark.parametrize("kind", ["video", "image"])
def test_a_window_that_is_a_whole_clip_gives_the_loss_of_its_frames(autoencoder, model, kind, tmp_path):
    """An image is one latent, repeated."""
    for name in "xy":
        if kind == "video":
            write_noise(tmp_path / "set" / f"{name}.mp4", 8)
        else:
            (tmp_path / "set").mkdir(exist_ok=True)
            Image.effect_noise((32, 40), 60).convert("RGB").save(tmp_path / "set" / f"{name}.png")
    assert encode(tmp_path / "set", autoencoder, tmp_path / "z") == 0
    clips = VideoDataset(tmp_path / "set", frames=8, size=32)
    system, network = systems.get("latent"), random_latent_model(small_latent_config(conditioning="none"))
    network.autoencoder.load_state_dict(model.state_dict())
    losses = []
    for dataset in (clips, LatentDataset(clips, LatentStore(tmp_path / "z"))):
        batch = collate([dataset[i] for i in range(2)]).inputs("none", torch.device("cpu"))
        losses.append(system.errors(network, batch, torch.Generator().manual_seed(0))[0]["latent"])
    torch.testing.assert_close(losses[1], losses[0], rtol=0.01, atol=1e-4)


def test_a_mixture_gives_labels_and_captions_as_of_the_videos(clips, latents):
    shown = VideoDataset(clips, frames=8, size=32, captions=True)
    encoded = LatentDataset(shown, LatentStore(latents))
    mixtures = Mixture([shown, shown], [1, 1]), Mixture([encoded, encoded], [1, 1])
    assert mixtures[0].class_names == mixtures[1].class_names
    for number in (0, 5, 6, 11):
        items = [mixture[ClipKey(number, 4)] for mixture in mixtures]
        assert [items[1][name] for name in ("label", "caption", "path")] == [
            items[0][name] for name in ("label", "caption", "path")
        ]
        assert torch.equal(mixtures[1].with_video(number)["video"], mixtures[0][number]["video"])


def test_encoding_goes_on_where_it_stopped(clips, autoencoder, latents, tmp_path, monkeypatch):
    """Interrupted it keeps all clips that it had; stopped while it writes a file, those of the files before."""
    encoded, of_clip, write, stops = [], encoding._of_clip, latent_store.write_tensors, {"clip": 2, "file": -1}

    def stopping_at_a_clip(model, clips, number, chunk):
        if number == stops["clip"]:
            raise KeyboardInterrupt
        encoded.append(number)
        return of_clip(model, clips, number, chunk)

    def stopping_at_a_file(path, tensors, *more, **options):
        write(path, tensors, *more, **options)
        if stops["file"] in tensors["numbers"]:
            path.write_bytes(path.read_bytes()[:-1])
            raise KeyboardInterrupt

    monkeypatch.setattr(encoding, "_of_clip", stopping_at_a_clip)
    monkeypatch.setattr(latent_store, "write_tensors", stopping_at_a_file)
    assert encode(clips, autoencoder, tmp_path / "z") == cli.INTERRUPTED
    assert LatentStore(tmp_path / "z").missing() == [2, 3, 4, 5]
    monkeypatch.setattr(encoding, "FILE_S", 0.0)  # a file for every clip
    stops |= {"clip": -1, "file": 4}
    assert encode(clips, autoencoder, tmp_path / "z") == cli.INTERRUPTED
    assert LatentStore(tmp_path / "z").missing() == [4, 5]
    stops["file"] = -1
    for _ in range(2):
        assert encode(clips, autoencoder, tmp_path / "z") == 0
    assert encoded == [0, 1, 2, 3, 4, 4, 5]
    store, expected = LatentStore(tmp_path / "z"), LatentStore(latents)
    assert all(torch.equal(whole(store, number), whole(expected, number)) for number in range(6))
    assert sorted(path.suffix for path in (tmp_path / "z").iterdir()) == [".json", *[".safetensors"] * 5]


def rows(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def weights(run):
    return {part: load_file(next((newest_checkpoint(run) / part).iterdir())) for part in ("model", "ema", "optimizer")}


def test_a_run_trains_without_decoding_and_resumes_bit_for_bit(clips, autoencoder, latents, tmp_path, monkeypatch):
    """The sheets of samples still show a video, once; the folder of the latents may move."""

    def options(name, first_stage=autoencoder, **changes):
        values = {"latents": latents, "steps": 4, "save_every": 2} | changes
        return train_latents(clips, tmp_path / name, first_stage, **values)

    with monkeypatch.context() as patched:
        patched.setattr(decode, "_ask", None)  # nothing can be decoded
        train(options("whole"))
        stop_after_checkpoint(2, patched)
        with pytest.raises(KeyboardInterrupt):
            train(options("parts"))
    moved = shutil.copytree(latents, tmp_path / "moved")
    train(options("parts", None, latents=moved, sample_every=4, sample_steps=2))
    assert [row["loss"] for row in rows(tmp_path / "parts")] == [row["loss"] for row in rows(tmp_path / "whole")]
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(found[part][name], t) for part in found for name, t in expected[part].items())
    assert (tmp_path / "parts" / "samples" / "step-00000004.png").is_file()


def test_a_run_goes_on_without_latents_but_not_with_others(clips, autoencoder, latents, tmp_path, caplog):
    """Without them is another curve, which its history tells."""
    train(train_latents(clips, tmp_path / "run", autoencoder, latents=latents, steps=1))
    store, other = LatentStore(latents), LatentStore.create(tmp_path / "z", LatentStore(latents).info)
    other.add([Entry(n, store.keys[n].tobytes(), 12, store.rows(n, 0, 3) + 0.5) for n in range(6)])
    with pytest.raises(ValueError, match=r"^latents: 6 clips, \w+ -> 6 clips, \w+; expected what the run at .* had"):
        train(train_latents(clips, tmp_path / "run", autoencoder, latents=tmp_path / "z", steps=2))
    with caplog.at_level(logging.WARNING):
        train(train_latents(clips, tmp_path / "run", autoencoder, steps=2))
    assert "goes on from step 1 with steps: 1 -> 2, latents: 6 clips, " in caplog.text
    (entry,) = runs.load_run_config(tmp_path / "run").training["history"]
    assert entry["changes"]["latents"] == [store.fingerprint, "none"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip": True}, "flip: got True with latents, expected False"),
        ({"images": 0.5}, "images: got 0.5 with latents, expected 0"),
        ({"short": "loop"}, "short: got 'loop' with latents, expected 'skip' or 'error'"),
        ({"stride": 2}, "latents: .* has latents of stride 1, expected 2"),
        ({"fps": 8}, "latents: .* has latents of fps None, expected 8"),
        ({"resolution": (8, 32, 48)}, r"latents: .* has latents of size \(32, 32\), expected \(32, 48\)"),
        ({"preset": "lvdm_ae_tiny", "autoencoder": None}, "latents: got .*, expected none: lvdm_ae_tiny does not work"),
        ({"preset": "tiny", "autoencoder": None}, "latents: got .*, expected none: tiny does not work on latents"),
        ({"latents": ["a", "b"]}, "latents: got 2 folders, expected one for each of 1 --data"),
        ({"latents": "nowhere"}, "latents: no index.json in nowhere, expected a folder that `hpdm data encode` wrote"),
    ],
)  # fmt: skip
def test_what_latents_do_not_fit_is_refused(clips, autoencoder, latents, changes, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=f"^{message}"):
        train(train_latents(clips, tmp_path / "run", **({"autoencoder": autoencoder, "latents": latents} | changes)))


def test_latents_of_another_autoencoder_or_of_other_clips_are_refused(clips, autoencoder, latents, tmp_path):
    other = save_autoencoder(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"^latents: .* has those of an autoencoder with the hash \w+, expected \w+"):
        train(train_latents(clips, tmp_path / "run", other, latents=latents))
    assert encode(clips, other, latents) == 1
    per_clip = save_autoencoder(tmp_path / "per_clip", norm="clip")
    with pytest.raises(ValueError, match=r"^autoencoder: got one with norm='clip', expected norm='frame'"):
        encoding.describe(runs.load(per_clip).model, VideoDataset(clips, frames=1, size=32))
    with pytest.raises(ValueError, match=r"^size: got \(36, 32\), expected multiples of \(8, 8\)"):
        encoding.describe(runs.load(autoencoder).model, VideoDataset(clips, frames=1, size=(36, 32)))
    fewer = shutil.copytree(clips, tmp_path / "fewer")
    next((fewer / "RedDisc").iterdir()).unlink()
    part = LatentDataset(VideoDataset(fewer, frames=8, size=32), LatentStore(latents))  # as a split has fewer
    labels = [part[number]["label"] for number in range(5)]
    assert labels == [file.label for file in part.files]
    write_noise(fewer / "RedDisc" / "zz.mp4", 12)
    with pytest.raises(ValueError, match=r"^latents: .* lacks 1 of the 6 clips of .*, the first is .*zz.mp4; expected"):
        LatentDataset(VideoDataset(fewer, frames=8, size=32), LatentStore(latents))


def test_damaged_and_incomplete_stores_are_refused(clips, latents, tmp_path):
    folder = shutil.copytree(latents, tmp_path / "z")
    (file,) = folder.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    file.write_bytes(data[:-20])
    with pytest.raises(ValueError, match=rf"^latents: .*{file.name} is damaged .* delete it and encode again$"):
        LatentStore(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"^latents: .* lacks 6 of 6 clips; run `hpdm data encode` again"):
        LatentDataset(VideoDataset(clips, frames=8, size=32), LatentStore(folder))
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"factors": [4, 8]}))
    with pytest.raises(ValueError, match=r"^latents: .*index.json: factors: got"):
        LatentStore(folder)
