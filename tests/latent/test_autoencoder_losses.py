"""What an autoencoder is trained on: draws, crops, losses against plain formulas, perceptual networks from files."""

import pytest
import torch
from torch import nn

from hpdm.evaluation.reconstruction import chunk_borders, pooled
from hpdm.integrity import hash_of_file
from hpdm.latent.autoencoder_system import Autoencoding
from hpdm.latent.losses import AutoencoderDraws, crop, draw, reconstruction_losses, shown_clips
from hpdm.latent.perceptual import PerceptualNetwork, checked_file, perceptual_network
from hpdm.latent.statistics import measure_latents
from hpdm.objective import Objective
from hpdm.psnr import psnr
from hpdm.system import Architecture
from tests.latent.small_autoencoder import random_autoencoder, small_config


class Distance(nn.Module):
    """Mean squared difference of a random projection of the channels, one number per image."""

    def __init__(self):
        super().__init__()
        self.map = nn.Conv2d(3, 5, 1)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (self.map(a) - self.map(b)).square().mean((1, 2, 3), keepdim=True)


class Whole(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).square().mean()


class OneImage(nn.Module):
    def forward(self, a: torch.Tensor) -> torch.Tensor:
        return a.mean((1, 2, 3))


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "distance.pt"
    torch.jit.script(Distance()).save(str(path))
    return path


def test_losses_are_the_plain_formulas(generator):
    x, out = (torch.randn(2, 3, 4, 6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    losses = reconstruction_losses(small_config(edge_weight=0.5), out, x)
    absolute = reconstruction_losses(small_config(pixel_loss="l1", edge_weight=0.0), out, x)
    assert list(losses) == ["pixel", "edges"]
    assert list(absolute) == ["pixel"]
    for b in range(2):
        error = out[b] - x[b]
        assert losses["pixel"][b] == pytest.approx(float((error**2).mean()))
        assert absolute["pixel"][b] == pytest.approx(float(error.abs().mean()))
        rows = (out[b, :, :, 1:] - out[b, :, :, :-1]) - (x[b, :, :, 1:] - x[b, :, :, :-1])
        columns = (out[b, ..., 1:] - out[b, ..., :-1]) - (x[b, ..., 1:] - x[b, ..., :-1])
        assert losses["edges"][b] == pytest.approx(0.5 * float(rows.abs().mean() + columns.abs().mean()))


def test_a_perceptual_network_takes_the_place_of_the_substitute(file, generator):
    config = small_config(perceptual_file=str(file), perceptual_sha256=hash_of_file(file), perceptual_weight=2.0)
    x = torch.randn(2, 3, 4, 6, 5, generator=generator)
    out = torch.randn(x.shape, generator=generator).requires_grad_()
    losses = reconstruction_losses(config, out, x)
    assert list(losses) == ["pixel", "perceptual"]
    network = torch.jit.load(str(file))
    for b in range(2):
        distances = [network(out[b, None, :, f], x[b, None, :, f]).item() for f in range(4)]
        assert losses["perceptual"][b].item() == pytest.approx(2 * sum(distances) / 4, rel=1e-5)
    losses["perceptual"].sum().backward()
    assert out.grad.abs().min() > 0
    assert all(
        not p.requires_grad for p in perceptual_network(str(file), hash_of_file(file), x.device)._module.parameters()
    )


def test_files_that_are_no_perceptual_networks_are_refused(tmp_path, file):
    with pytest.raises(FileNotFoundError, match=r"perceptual: .*nothing.pt does not exist.*none is downloaded"):
        checked_file(tmp_path / "nothing.pt")
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(ValueError, match=r"perceptual: .*text.pt cannot be read as TorchScript"):
        PerceptualNetwork(tmp_path / "text.pt")
    for kind, message in (
        (Whole, r"returned shape \[\], torch.float32, expected 2 floating"),
        (OneImage, "failed on two"),
    ):
        torch.jit.script(kind()).save(str(tmp_path / "other.pt"))
        with pytest.raises(ValueError, match=rf"perceptual: .*other.pt {message}"):
            checked_file(tmp_path / "other.pt")
    assert checked_file(file) == hash_of_file(file)
    with pytest.raises(ValueError, match=r"perceptual: .*has the hash .*expected 00 as in the run's config"):
        perceptual_network(str(file), "00", torch.device("cpu"))


def test_crops_are_slices(generator):
    video = torch.randint(256, (3, 3, 8, 12, 10), generator=generator, dtype=torch.uint8)
    corner = torch.tensor([[0, 0, 0], [4, 8, 2], [1, 3, 2]])
    found = crop(video, corner, (4, 4, 8))
    for b, (f, h, w) in enumerate(corner.tolist()):
        assert torch.equal(found[b], video[b, :, f : f + 4, h : h + 4, w : w + 8])


def test_draws_of_rows_are_those_of_the_batch():
    config = small_config(crop=(4, 16, 16))
    whole = draw(config, 6, torch.Generator().manual_seed(3), Objective(flip=True), 0.5)
    assert all(t is not None for t in whole)
    assert whole.corner.amin() >= 0
    assert (whole.corner.amax(0) <= torch.tensor([4, 16, 16])).all()
    part = draw(config, 6, torch.Generator().manual_seed(3), Objective(flip=True), 0.5, range(2, 5))
    assert all(torch.equal(a, b[2:5]) for a, b in zip(part, whole))
    assert draw(small_config(), 6, torch.Generator()) == AutoencoderDraws(None, None, None)


def test_training_shows_stills_mirrored_and_cropped(generator):
    video = torch.randint(256, (2, 3, 8, 32, 32), generator=generator, dtype=torch.uint8)
    stills = torch.stack((torch.full((8,), 5), torch.arange(8)))
    draws = AutoencoderDraws(stills, torch.tensor([False, True]), torch.tensor([[4, 0, 16], [0, 16, 0]]))
    shown = shown_clips(small_config(crop=(4, 16, 16)), video, draws)
    assert torch.equal(shown[0], (video[0, :, [5] * 4, :16, 16:] / 127.5 - 1))
    assert torch.equal(shown[1], (video[1, :, :4, 16:].flip(-1)[..., :16] / 127.5 - 1))


def test_psnr_of_known_errors():
    torch.testing.assert_close(psnr(torch.tensor([4.0, 0.04, 0.0])), torch.tensor([0.0, 20.0, 126.0206]))


def test_statistics_are_those_of_all_latents_together(generator):
    model = random_autoencoder(small_config())
    parts = [torch.randint(256, (n, 3, 8, 16, 16), generator=generator, dtype=torch.uint8) for n in (3, 1, 2)]
    measure_latents(model, iter(parts))
    with torch.no_grad():
        z = model.moments(torch.cat(parts) / 127.5 - 1)[0].double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(model.latent_mean.double(), z.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.latent_std.double(), z.std(1, correction=0), rtol=1e-5, atol=1e-6)


def test_a_constant_channel_is_left_as_it_is(generator):
    model = random_autoencoder(small_config())
    with torch.no_grad():
        model.to_moments.weight[2] = 0
        model.to_moments.bias[2] = 0.3
    measure_latents(model, [torch.randint(256, (2, 3, 8, 16, 16), generator=generator, dtype=torch.uint8)])
    assert float(model.latent_std[2]) == 1
    assert float(model.latent_mean[2]) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="clips: got none, expected at least one"):
        measure_latents(model, [])


def test_the_baseline_averages_blocks_and_interpolates():
    x = torch.arange(8.0).view(1, 1, 8, 1, 1).expand(1, 1, 8, 16, 16)
    out = pooled(x, (4, 8, 8))
    # Averages 1.5 and 5.5 at frames 1.5 and 5.5, a line between them, constant outside.
    expected = torch.tensor([1.5, 1.5, 2.0, 3.0, 4.0, 5.0, 5.5, 5.5])
    torch.testing.assert_close(out[0, 0, :, 3, 5], expected)
    assert pooled(torch.zeros(1, 3, 7, 9, 31), (4, 8, 8)).shape == (1, 3, 7, 9, 31)


def test_frames_on_both_sides_of_a_border_are_at_it():
    assert chunk_borders(12, 2, 2).nonzero()[:, 0].tolist() == [3, 4, 7, 8]
    assert chunk_borders(9, 4, 1).nonzero()[:, 0].tolist() == [3, 4, 7, 8]
    assert not chunk_borders(12, 4, None).any()
    assert not chunk_borders(8, 4, 2).any()


def test_a_run_keeps_the_file_and_its_hash(file):
    system = Autoencoding()
    config = system.configure(small_config(), Architecture(perceptual=file, perceptual_weight=0.5))
    assert (config.perceptual_file, config.perceptual_sha256) == (str(file), hash_of_file(file))
    assert config.perceptual_weight == 0.5
    with pytest.raises(ValueError, match=r"edge_weight: got 0.1 with perceptual, expected none"):
        system.configure(small_config(), Architecture(perceptual=file, edge_weight=0.1))
