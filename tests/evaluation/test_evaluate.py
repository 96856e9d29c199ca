"""``hpdm evaluate``: FVD and Inception score with a tiny detector, motion on the synthetic set, and what goes wrong."""

import json
import logging
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpdm import HPDM, presets
from hpdm.commands.evaluate import EvaluateOptions, evaluate, run
from hpdm.data.clips import VideoDataset
from hpdm.data.synthetic import render_clip, render_synthetic
from hpdm.evaluation import feature_distances
from hpdm.evaluation.detector import Detector
from hpdm.evaluation.distribution import DistributionScore, draw_labels
from hpdm.evaluation.feature_distances import RealFeatures
from hpdm.evaluation.generated import measure
from hpdm.evaluation.metrics import frechet_distance, inception_score
from hpdm.evaluation.real_statistics import real_statistics
from hpdm.sampling import SamplerOptions
from hpdm.text import EmbeddingInfo, EmbeddingStore
from hpdm.video import write_video
from tests.processes import run_ranks
from tests.small import save_as_run, small_config

CLASSES = ["GreenSquare", "RedDisc"]
SAMPLER = SamplerOptions(steps=1, overlap="none")


class Features(nn.Module):
    """Called as StyleGAN-V's I3D is; three features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 3, 3)

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        assert rescale
        assert resize
        assert return_features
        assert x.dtype == torch.uint8
        return self.conv(x.float() / 127.5 - 1).abs().mean([2, 3, 4])


class Classes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.float().mean([2, 3, 4]) / 16).softmax(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A set, a run that was never trained, and two detectors."""
    root = tmp_path_factory.mktemp("evaluate")
    render_synthetic(root / "set", clips=6, frames=10, size=(32, 32), classes=CLASSES[::-1])
    torch.manual_seed(0)
    model = HPDM(small_config(classes=2))
    save_as_run(model, root / "run", CLASSES[::-1], {"stride": 1, "short": "error"})
    torch.jit.script(Features().eval()).save(str(root / "i3d.pt"))
    torch.jit.script(Classes().eval()).save(str(root / "c3d.pt"))
    return root


def options(folder, **changes):
    values = {"run_folder": folder / "run", "data": folder / "set", "sampler": SAMPLER, "batch": 5, "frames": 4}
    return EvaluateOptions(**(values | changes))


def scored(videos, **score):
    """FVD and Inception score of the first four frames of videos."""
    return measure(((n, [video]) for n, video in enumerate(videos)), [DistributionScore(frames=4, **score)])[0]


def windows(folder, **changes):
    return VideoDataset(folder / "set", **{"frames": 4, "size": 32, "short": "skip"} | changes)


def test_fvd_and_inception_score_are_those_of_the_features(folder):
    dataset, detector, classifier = (
        windows(folder),
        Detector(folder / "i3d.pt", "features"),
        Detector(folder / "c3d.pt", "classes"),
    )
    videos = torch.randint(256, (21, 3, 8, 32, 32), dtype=torch.uint8)
    real = real_statistics(dataset, detector, count=None, batch=5)
    found = scored(videos, batch=4, real=RealFeatures(detector, [real]), classifier=classifier)
    first = videos[:, :, :4]
    made = detector(first).double().numpy()
    clips = detector(torch.stack([dataset[i]["video"] for i in range(len(dataset))])).double().numpy()
    gaussians = [f(rows) for rows in (made, clips) for f in (lambda r: r.mean(0), lambda r: np.cov(r.T, bias=True))]
    assert found["fvd"]["value"] == pytest.approx(frechet_distance(*gaussians), rel=1e-5)
    assert (found["fvd"]["real"], found["fvd"]["left_out"], found["generated"]) == (12, 0, 21)
    expected = inception_score(classifier(first).numpy(), 10, shuffle=42)
    assert (found["is"]["mean"], found["is"]["std"]) == pytest.approx(expected, rel=1e-6)
    clips = (dataset[i]["video"] for i in range(len(dataset)))
    same = scored(clips, batch=12, real=RealFeatures(detector, [real]))
    assert same["fvd"]["value"] < 1e-9 * found["fvd"]["value"]


def test_fvd_grows_with_noise(folder):
    detector, dataset = Detector(folder / "i3d.pt", "features"), windows(folder)
    real = RealFeatures(detector, [real_statistics(dataset, detector, count=None, batch=12)])
    clips = torch.stack([dataset[i]["video"] for i in range(len(dataset))]).float()
    noise = torch.randn_like(clips)
    spoilt = ((clips + sigma * noise).clamp(0, 255).to(torch.uint8) for sigma in (5, 20, 80))
    values = [scored(videos, batch=12, real=real)["fvd"]["value"] for videos in spoilt]
    assert values[0] < values[1] < values[2]


def test_short_clips_are_left_out_and_each_other_comes_once(folder, tmp_path, caplog):
    render_synthetic(tmp_path / "long", clips=3, frames=9, size=(32, 32), classes=["RedDisc"])
    render_synthetic(tmp_path / "short", clips=3, frames=3, size=(32, 32), classes=["RedDisc"])
    clips = tmp_path / "clips"
    clips.mkdir()
    for kind in ("long", "short"):
        for path in (tmp_path / kind / "RedDisc").iterdir():
            path.rename(clips / f"{kind}_{path.name}")
    detector = Detector(folder / "i3d.pt", "features")
    mixed = real_statistics(VideoDataset(clips, frames=8, size=32, short="skip", train=False), detector,
                            count=None, batch=2)  # fmt: skip
    assert "got 3 frames" in caplog.text
    assert (mixed.features.count, mixed.left_out) == (3, 3)
    for path in clips.glob("short_*"):
        path.unlink()
    alone = real_statistics(VideoDataset(clips, frames=8, size=32, short="skip", train=False), detector,
                            count=None, batch=3)  # fmt: skip
    assert mixed.features.mean == pytest.approx(alone.features.mean, rel=1e-6)
    some = real_statistics(VideoDataset(clips, frames=8, size=32, short="skip"), detector, count=2, batch=3)
    assert (some.features.count, some.left_out) == (2, 0)


def test_statistics_are_kept_and_checked(folder, tmp_path, monkeypatch):
    detector = Detector(folder / "i3d.pt", "features")
    first = real_statistics(windows(folder), detector, count=8, batch=5, folder=tmp_path / "kept")
    (path,) = (tmp_path / "kept").iterdir()

    def not_again(*_):
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(Detector, "__call__", not_again)
        again = real_statistics(windows(folder), detector, count=8, batch=3, folder=tmp_path / "kept")
    assert again.features.count == first.features.count == 8
    assert np.array_equal(again.features.mean, first.features.mean)
    assert np.allclose(again.features.covariance(), first.features.covariance(), rtol=1e-12)
    for change in ({"seed": 1}, {"frames": 5}, {"stride": 2}):
        real_statistics(windows(folder, **change), detector, count=8, batch=5, folder=tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 4
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"npz is damaged .* delete it"):
        real_statistics(windows(folder), detector, count=8, batch=5, folder=tmp_path / "kept")
    path.write_bytes(next(p for p in (tmp_path / "kept").iterdir() if p != path).read_bytes())
    with pytest.raises(ValueError, match="is of other clips or another detector"):
        real_statistics(windows(folder), detector, count=8, batch=5, folder=tmp_path / "kept")


def test_classes_are_as_frequent_as_in_the_set():
    labels = [0] * 30 + [1] * 10
    drawn = draw_labels(labels, 2000, seed=3)
    assert np.mean(drawn) == pytest.approx(0.25, abs=0.05)
    assert draw_labels(labels, 10, seed=3) == drawn[:10]
    assert draw_labels(labels, 10, seed=4) != drawn[:10]
    assert draw_labels(None, 5, seed=0) is None


def test_the_command_reports_all_that_the_number_depends_on(folder, tmp_path, capsys):
    command = options(folder, metrics=("fvd", "is"), samples=11, split="train", detector=folder / "i3d.pt",
                      classifier=folder / "c3d.pt", json=tmp_path / "out.json", statistics=tmp_path,
                      seed=5)  # fmt: skip
    assert run(command) == 0
    result = json.loads((tmp_path / "out.json").read_text())["distribution"]
    assert (result["generated"], result["protocol"], result["split"], result["frames"]) == (11, "paper", "train", 4)
    printed = capsys.readouterr().out
    for part in (result["fvd"]["detector"]["sha256"], "11 generated against 8 real", "split train", "protocol paper",
                 "first 4 of 8 frames at 32x32", "seed 5", "Inception score"):  # fmt: skip
        assert part in printed
    assert evaluate(command)["distribution"]["fvd"]["value"] == pytest.approx(result["fvd"]["value"], rel=1e-9)


def test_processes_share_the_clips(folder, tmp_path):
    """Eleven videos in batches of 3: shares are unequal, the last batch is short, and nothing changes."""
    common = {"samples": 11, "batch": 3, "split": "train", "clips": 5}
    command = options(folder, metrics=("denoising", "motion", "fvd", "kvd", "is"), detector=folder / "i3d.pt",
                      classifier=folder / "c3d.pt", **common)  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = json.loads(json.dumps(evaluate(command)))
    finally:
        torch.set_num_threads(threads)
    arguments = ["evaluate", "--run", folder / "run", "--data", folder / "set", "--metrics", *command.metrics,
                 "--detector", command.detector, "--classifier", command.classifier, "--steps", 1, "--overlap", "none",
                 "--frames", 4, "--json", tmp_path / "two.json", "--statistics", tmp_path / "kept"]  # fmt: skip
    arguments += [part for name, value in common.items() for part in (f"--{name}", value)]
    printed = run_ranks(["-m", "hpdm", *arguments], 2, TRITON_INTERPRET="0")
    assert [text.count("Inception score") for text in printed] == [1, 0]
    assert alone["distribution"]["kvd"]["real"] == 8
    assert json.loads((tmp_path / "two.json").read_text()) == alone
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_too_few_videos_for_the_features_are_told(folder, caplog):
    detector = Detector(folder / "i3d.pt", "features")
    videos = torch.randint(256, (3, 3, 4, 32, 32), dtype=torch.uint8)
    with caplog.at_level(logging.WARNING, logger=feature_distances.__name__):
        real = RealFeatures(detector, [real_statistics(windows(folder), detector, count=2, batch=5)])
        scored(videos, batch=2, real=real)
    assert "2 real videos give a covariance of rank 1 for 3 features" in caplog.text
    assert "3 generated videos give a covariance of rank 2 for 3 features" in caplog.text


def test_motion_of_sampled_clips_stands_beside_that_of_real_ones(folder, capsys):
    command = options(folder, metrics=("motion",), samples=2, split="test")
    assert run(command) == 0
    printed = capsys.readouterr().out
    assert "motion residual" in printed
    result = evaluate(command)["motion"]
    assert (result["real"]["clips"], result["generated"]["clips"]) == (2, 2)
    assert [row["asked"] for row in result["clips"]] == ["RedDisc", "GreenSquare"]
    assert result["real"]["shape_overlap"] > 0.8 > result["generated"]["shape_overlap"]
    assert result["origin"] == {"first_seed": 0, "sampler": asdict(SAMPLER)}


def test_generated_files_stand_in_for_sampling(folder, tmp_path):
    for seed in range(10):
        name = CLASSES[seed % 2]
        frames = render_clip(name, frames=8, size=(32, 32), rng=np.random.default_rng(seed)).frames
        write_video(tmp_path / f"{name}_seed{seed}.mp4", frames, crf=4)
    motion = options(folder, metrics=("motion",), samples=3, generated=tmp_path)
    made = evaluate(motion)["motion"]
    assert [row["asked"] for row in made["clips"]] == ["GreenSquare", "GreenSquare", "RedDisc"]
    assert made["generated"]["all_right"] == 1
    score = options(folder, metrics=("is",), samples=10, generated=tmp_path, classifier=folder / "c3d.pt")
    assert evaluate(score)["distribution"]["is"]["mean"] >= 1
    with pytest.raises(ValueError, match="holds 10 videos, expected at least the 11 samples"):
        evaluate(replace(score, samples=11))
    (tmp_path / "GreenSquare_seed0.mp4").rename(tmp_path / "Other_seed0.mp4")
    with pytest.raises(ValueError, match=r"got file Other_seed0.mp4, expected CLASS_seedNUMBER.mp4 with one of Red"):
        evaluate(replace(motion, samples=10))
    write_video(tmp_path / "RedDisc_seed0.mp4", np.zeros((5, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match=r"RedDisc_seed0.mp4 has 5 frames of 32x32, expected at least 6 of 32x32"):
        evaluate(replace(score, samples=11, frames=6))


def test_denoising_of_a_run_with_text_depends_on_its_captions(folder, tmp_path):
    config = presets.tiny().with_pyramid((2, 8, 8), (8, 32, 32))
    config = config.replace(conditioning="text", text_width=8, width=16, latents=4, latent_width=16, head_width=16,
                            conditioning_width=16)  # fmt: skip
    model = HPDM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    save_as_run(model, tmp_path / "run", CLASSES[::-1], {"stride": 1, "short": "error"})
    captions = [file.caption for file in VideoDataset(folder / "set", frames=4, size=32, captions=True).files]
    errors = []
    for n in range(2):
        store = EmbeddingStore.create(tmp_path / str(n), EmbeddingInfo("random", 8, 4, "fp32"))
        texts = list(dict.fromkeys(captions))
        store.add(texts, [torch.randn(3, 8) * 5 for _ in texts])
        command = options(folder, run_folder=tmp_path / "run", clips=2, bins=1, embeddings=tmp_path / str(n))
        errors.append(evaluate(command)["error"])
    assert errors[0] != errors[1]
    with pytest.raises(ValueError, match="embeddings: got none, expected the folder that `hpdm data embed` wrote"):
        evaluate(replace(command, embeddings=None))
    with pytest.raises(ValueError, match="run: it is conditioned on text, expected --generated"):
        evaluate(replace(command, metrics=("motion",)))
    with pytest.raises(ValueError, match=r"embeddings: got .*, expected none for conditioning='class'"):
        evaluate(replace(command, run_folder=folder / "run"))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"metrics": ("fvd",)}, ValueError, "detector: got none"),
        ({"metrics": ("is",)}, ValueError, "classifier: got none"),
        ({"metrics": ()}, ValueError, "metrics: got"),
        ({"samples": 0}, ValueError, "samples: got 0"),
        ({"seed": -1}, ValueError, "seed: got -1"),
        ({"metrics": ("is",), "classifier": "c3d.pt", "frames": 64}, ValueError, "C3D takes 16 frames"),
        ({"metrics": ("is",), "classifier": "c3d.pt", "samples": 9}, ValueError, "at least 10"),
        ({"metrics": ("fvd",), "detector": "i3d.pt", "samples": 1}, ValueError, "samples: got 1"),
        (
            {"metrics": ("fvd",), "detector": "i3d.pt", "split": "train", "frames": 16},
            ValueError,
            "frames: got 16, exp",
        ),
        ({"metrics": ("fvd",), "detector": "i3d.pt"}, ValueError, "split: got none, but .* has split lists"),
        ({"metrics": ("fvd",), "detector": "no.pt", "split": "train"}, FileNotFoundError, "no.pt does not exist"),
        ({"metrics": ("fvd",), "detector": "c3d.pt", "split": "train", "samples": 4}, ValueError, "c3d.pt failed on"),
        ({"data": "set/RedDisc"}, ValueError, "data: got classes"),
        ({"json": "nowhere/out.json"}, FileNotFoundError, "json: folder"),
    ],
)
def test_what_a_user_can_get_wrong_is_named(folder, changes, error, match):
    paths = {
        name: folder / value for name, value in changes.items() if name in {"detector", "classifier", "data", "json"}
    }
    with pytest.raises(error, match=match):
        evaluate(options(folder, **(changes | paths)))


def test_motion_needs_the_synthetic_set(folder, tmp_path):
    data = tmp_path / "set"
    for name in CLASSES:
        (data / name).mkdir(parents=True)
        for path in (folder / "set" / name).iterdir():
            (data / name / path.name).write_bytes(path.read_bytes())
    (data / "classInd.txt").write_text("1 RedDisc\n2 GreenSquare\n")
    with pytest.raises(
        ValueError, match=r"set has no metadata.jsonl, expected a set that `hpdm data synthetic` rendered"
    ):
        evaluate(options(folder, data=data, metrics=("motion",)))
    (data / "metadata.jsonl").write_text('{"file": "a.mp4"}\n')
    with pytest.raises(ValueError, match=r"damaged metadata: .*metadata.jsonl:1: got no 'position'"):
        evaluate(options(folder, data=data, metrics=("motion",)))
