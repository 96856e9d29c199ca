"""Detectors in TorchScript files: the published call, and what a wrong file or output is answered with."""

import hashlib

import pytest
import torch
from torch import Tensor, nn

from hpdm.evaluation.detector import Detector


class Features(nn.Module):
    """A 3D convolution called as StyleGAN-V's I3D is."""

    def __init__(self, mode: str = "right") -> None:
        super().__init__()
        self.mode = mode
        self.conv = nn.Conv3d(3, 5, 3)

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        if not (rescale and resize and return_features):
            raise ValueError("another call")
        out = self.conv(x.float() / 127.5 - 1).mean([2, 3, 4])
        if self.mode == "four-dimensional":
            return self.conv(x.float())
        if self.mode == "one row":
            return out[:1]
        if self.mode == "nan":
            return out * float("nan")
        if self.mode == "integers":
            return out.long()
        if self.mode == "width of the batch":
            return out[:, : len(out)]
        return out


class Tuple(nn.Module):
    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> tuple[Tensor, Tensor]:
        return x, x


class Classes(nn.Module):
    def __init__(self, softmax: bool = True) -> None:
        super().__init__()
        self.softmax = softmax

    def forward(self, x: Tensor) -> Tensor:
        out = x.float().mean([3, 4]).flatten(1)
        return out.softmax(1) if self.softmax else out


def save(module, path):
    torch.jit.script(module.eval()).save(str(path))
    return path


def videos(count=2):
    return torch.randint(256, (count, 3, 4, 8, 8), dtype=torch.uint8)


def test_features_come_from_the_published_call(tmp_path):
    module = Features()
    path = save(module, tmp_path / "i3d.pt")
    detector = Detector(path, "features")
    batch = videos(3)
    with torch.no_grad():
        assert torch.equal(detector(batch), module(batch, True, True, True))
    assert detector.width == 5
    assert detector.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_classes_are_called_without_keywords(tmp_path):
    out = Detector(save(Classes(), tmp_path / "c3d.pt"), "classes")(videos())
    assert out.shape == (2, 12)
    assert torch.allclose(out.sum(1), torch.ones(2))


@pytest.mark.parametrize(
    ("mode", "match"),
    [
        ("four-dimensional", r"returned shape \[2, 5, 2, 6, 6\], expected a floating-point tensor \[2, W\]"),
        ("one row", r"returned shape \[1, 5\], expected a floating-point tensor \[2, W\]"),
        ("nan", "returned NaN or infinity"),
        ("integers", r"returned torch.int64, expected a floating-point tensor \[2, W\]"),
    ],
)
def test_wrong_features_are_named(tmp_path, mode, match):
    detector = Detector(save(Features(mode), tmp_path / "bad.pt"), "features")
    with pytest.raises(ValueError, match=rf"bad.pt {match}"):
        detector(videos())


def test_a_width_that_changes_is_named(tmp_path):
    detector = Detector(save(Features("width of the batch"), tmp_path / "bad.pt"), "features")
    detector(videos(3))
    with pytest.raises(ValueError, match=r"returned shape \[2, 2\], expected a floating-point tensor \[2, 3\]"):
        detector(videos(2))


def test_a_tuple_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"tuple.pt returned tuple, expected a floating-point tensor"):
        Detector(save(Tuple(), tmp_path / "tuple.pt"), "features")(videos())


def test_logits_are_no_probabilities(tmp_path):
    with pytest.raises(ValueError, match=r"logits.pt returned rows .* that sum to 1"):
        Detector(save(Classes(softmax=False), tmp_path / "logits.pt"), "classes")(videos())


def test_a_detector_of_the_other_kind_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"c3d.pt failed on uint8 \[2, 3, 4, 8, 8\] when called as f\(video, rescale"):
        Detector(save(Classes(), tmp_path / "c3d.pt"), "features")(videos())


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nothing.pt does not exist, expected a TorchScript file; none is down"
    ):
        Detector(tmp_path / "nothing.pt", "features")
    torch.save({"weights": torch.ones(2)}, tmp_path / "weights.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name in ("weights.pt", "text.pt"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as TorchScript"):
            Detector(tmp_path / name, "features")
