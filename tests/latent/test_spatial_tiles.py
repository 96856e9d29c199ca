"""Frames coded in tiles: how tiles are cut and blended, what they leave as it is, what is refused."""

import pytest
import torch

from hpdm.commands.reconstruction_options import ReconstructionOptions
from hpdm.latent.coding import decode, decode_stream, encode, encode_stream, reconstruct
from hpdm.latent.spatial_tiles import SpatialTiles, code_in_tiles
from tests.latent.small_autoencoder import random_autoencoder, small_config


@pytest.fixture(scope="module")
def model():
    return random_autoencoder(small_config())


@pytest.mark.parametrize("overlap", [0, 1, 2, 4])
@pytest.mark.parametrize("size", [(1, 3), (5, 13), (11, 5), (6, 9)])
def test_what_sees_one_latent_alone_is_coded_as_a_whole(size, overlap, generator):
    """Any sizes: tiles are put where they were cut out, and weights add up to 1."""
    up = lambda z: z.repeat_interleave(2, dim=2).repeat_interleave(4, dim=3).repeat_interleave(3, dim=4)
    z = torch.randn(2, 3, 2, *size, generator=generator)
    out = code_in_tiles(up, z, SpatialTiles(5, 6, overlap), (1, 1), (4, 3))
    torch.testing.assert_close(out, up(z))
    torch.testing.assert_close(
        code_in_tiles(lambda x: x[:, :, ::2, ::4, ::3], up(z), SpatialTiles(5, 6, overlap), (4, 3), (1, 1)), z
    )


def test_the_blend_is_linear_over_the_overlap():
    numbers = iter(range(6))
    code = lambda z: torch.full((1, 1, 1, z.shape[3] * 2, z.shape[4] * 4), float(next(numbers)))
    out = code_in_tiles(code, torch.zeros(1, 1, 1, 7, 10), SpatialTiles(4, 4, 1), (1, 1), (2, 4))
    ramp = (torch.arange(4) + 0.5) / 4
    across = torch.cat((torch.zeros(12), ramp, torch.ones(8), 1 + ramp, torch.full((12,), 2.0)))
    down = torch.cat((torch.zeros(6), torch.tensor([0.25, 0.75]), torch.ones(6))) * 3
    torch.testing.assert_close(out[0, 0, 0], across + down[:, None])


def test_a_picture_of_one_color_has_no_seams_and_one_tile_changes_no_bit(model, generator):
    video = torch.full((1, 3, 5, 70, 52), 0.3)
    z = encode(model, video)
    torch.testing.assert_close(encode(model, video, tile=(4, 3), overlap=1), z, atol=2e-5, rtol=0)
    video = torch.rand(1, 3, 5, 20, 28, generator=generator) * 2 - 1
    assert torch.equal(reconstruct(model, video, tile=(9, 4)), reconstruct(model, video))


def test_streams_and_bytes_in_tiles(model, generator, monkeypatch):
    """Chunks along time stay exact; no part is larger than a tile, and of its frames only the chunk's are blended."""
    video = torch.randint(0, 256, (1, 3, 50, 44, 36), generator=generator, dtype=torch.uint8)
    tiles = {"tile": (3, 4), "overlap": 2}
    z = encode(model, video, chunk=None, **tiles)
    out = decode(model, z, (50, 44, 36), chunk=None, **tiles)
    assert out.abs().max() <= 1
    seen, real = set(), model.decode
    monkeypatch.setattr(model, "decode", lambda z: seen.add(tuple(z.shape[3:])) or real(z))
    latents = list(encode_stream(model, video.split(7, dim=2), chunk=3, **tiles))
    torch.testing.assert_close(torch.cat(latents, dim=2), z, atol=1e-5, rtol=1e-5)
    frames = torch.cat(list(decode_stream(model, latents, (44, 36), chunk=3, **tiles)), dim=2)
    torch.testing.assert_close(frames[:, :, :50], out, atol=1e-5, rtol=1e-5)
    assert seen == {(3, 4)}


BAD = {
    r"tile: got 3, expected two ints": (TypeError, {"tile": 3}),
    r"tile: got \(3, 2.0\), expected two ints": (TypeError, {"tile": (3, 2.0)}),
    r"tile: got \(0, 2\), expected at least 1": (ValueError, {"tile": (0, 2)}),
    r"overlap: got 2, expected 0 to 1": (ValueError, {"tile": (3, 2), "overlap": 2}),
    r"overlap: got -1, expected 0 to 1": (ValueError, {"tile": (3, 2), "overlap": -1}),
    r"overlap: got 1.5, expected an int": (TypeError, {"tile": (3, 2), "overlap": 1.5}),
    r"overlap: got 1 without a tile": (ValueError, {"overlap": 1}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_tiles_are_refused_before_work_starts(message, model):
    error, tiles = BAD[message]
    never = iter([lambda: pytest.fail("it was asked for")])
    for call in (
        lambda: encode(model, torch.zeros(1, 3, 4, 16, 16), **tiles),
        lambda: decode(model, torch.zeros(1, 4, 1, 2, 2), **tiles),
        lambda: encode_stream(model, never, **tiles),
        lambda: decode_stream(model, never, **tiles),
    ):
        with pytest.raises(error, match=message):
            call()


def test_options_of_the_command_are_checked():
    assert ReconstructionOptions(tile=(4, 4), tile_overlap=0).tile == (4, 4)
    with pytest.raises(ValueError, match=r"tile: got \(4, 0\), expected at least 1"):
        ReconstructionOptions(tile=(4, 0))
    for changes in ({"tile_overlap": 1}, {"tile": (4, 4), "tile_overlap": 4}):
        with pytest.raises(ValueError, match="tile_overlap: got"):
            ReconstructionOptions(**changes)
