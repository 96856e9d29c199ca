"""Videos of any length and size: coded in chunks they are what they are as a whole, and memory does not grow."""

import itertools

import pytest
import torch

from hpdm import presets
from hpdm.latent import coding
from hpdm.latent.coding import decode, decode_stream, encode, encode_stream, latent_size, reconstruct
from hpdm.latent.reach import decoder_reach, encoder_reach
from tests.latent.small_autoencoder import random_autoencoder, small_config

CONFIGS = {
    "tiny": {},
    "published": {"stem": (1, 1, 1), "width": 2},
    "still": {"factors": (1, 4, 4), "stem": (1, 1, 1), "width": 2, "resolution": (8, 16, 16)},
    "stem in time": {"factors": (8, 4, 4), "stem": (2, 1, 1), "width": 2, "resolution": (8, 16, 16)},
}


def measured(model):
    """The model with latents that are normalized by something."""
    model.latent_mean.copy_(torch.linspace(-1, 1, 4))
    model.latent_std.copy_(torch.linspace(0.5, 2, 4))
    return model


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS.keys())
def model(request):
    return measured(random_autoencoder(small_config(**request.param)))


def test_the_reach_is_what_gradients_reach(model):
    """Of the latent in the middle of a long clip, and of its decoded frames: neither more nor less."""
    factor, count = model.config.factors[0], 41
    middle = count // 2
    x = torch.randn(1, 3, count * factor, 8, 8, requires_grad=True)
    (of_frames,) = torch.autograd.grad(model.encode(x)[:, :, middle].sum(), x)
    frames = of_frames.abs().sum((0, 1, 3, 4)).nonzero()[:, 0]
    past, future = encoder_reach(model.config)
    assert -(-(middle * factor - int(frames.min())) // factor) == past
    assert -(-(int(frames.max()) - middle * factor - factor + 1) // factor) == future
    z = torch.randn(1, 4, count, 2, 2, requires_grad=True)
    (of_latents,) = torch.autograd.grad(model.decode(z)[:, :, middle * factor : (middle + 1) * factor].sum(), z)
    latents = of_latents.abs().sum((0, 1, 3, 4)).nonzero()[:, 0]
    assert (middle - int(latents.min()), int(latents.max()) - middle) == tuple(decoder_reach(model.config))


def test_the_reach_of_the_presets():
    """The figures of docs/latent.md."""
    reaches = {name: presets.get(name) for name in ("lvdm_ae", "lvdm_ae_tiny")}
    assert {name: (*encoder_reach(c), *decoder_reach(c)) for name, c in reaches.items()} == {
        "lvdm_ae": (9, 8, 6, 6),
        "lvdm_ae_tiny": (5, 5, 4, 4),
    }


@pytest.mark.parametrize("frames", [1, 4, 7, 16, 57])
def test_chunks_give_what_the_whole_video_gives(model, frames, generator):
    video = torch.rand(1, 3, frames, 16, 16, generator=generator) * 2 - 1
    z = encode(model, video, chunk=None)
    out = decode(model, z, (frames, 16, 16), chunk=None)
    for chunk in (1, 3, 8, 100):
        torch.testing.assert_close(encode(model, video, chunk), z, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(decode(model, z, (frames, 16, 16), chunk), out, atol=1e-5, rtol=1e-5)


def test_streams_give_what_the_whole_video_gives_however_it_is_cut(generator):
    model = measured(random_autoencoder(small_config()))
    video = torch.rand(2, 3, 53, 20, 28, generator=generator) * 2 - 1
    z = encode(model, video, chunk=None)
    out = decode(model, z, (53, 20, 28), chunk=None)
    for sizes in ([53], [1] * 53, [5, 13, 2, 33], [16, 16, 16, 5]):
        latents = list(encode_stream(model, iter(video.split(sizes, dim=2)), chunk=3))
        assert {len(part[0, 0]) for part in latents[:-1]} == {3}
        torch.testing.assert_close(torch.cat(latents, dim=2), z, atol=1e-5, rtol=1e-5)
        frames = torch.cat(list(decode_stream(model, iter(latents), (20, 28), chunk=2)), dim=2)
        assert frames.shape[2] == 56  # the last latent stands for four frames
        torch.testing.assert_close(frames[:, :, :53], out, atol=1e-5, rtol=1e-5)
    assert list(encode_stream(model, [])) == []
    assert list(decode_stream(model, [])) == []


def test_a_stream_is_decoded_as_it_comes_and_holds_a_bounded_part(monkeypatch):
    """Frames appear once the latents of their surroundings are there, and windows do not grow."""
    model = random_autoencoder(small_config())
    past, future = decoder_reach(model.config)
    asked, windows = 0, []
    real = model.decode
    monkeypatch.setattr(model, "decode", lambda z: windows.append(z.shape[2]) or real(z))

    def latents():
        nonlocal asked
        while True:  # a stream without end
            asked += 1
            yield torch.zeros(1, 4, 1, 2, 2)

    frames = decode_stream(model, latents(), chunk=2)
    for number, part in enumerate(itertools.islice(frames, 50), start=1):
        assert part.shape[2] == 8
        assert asked == 2 * number + future
    assert max(windows) == past + 2 + future


def test_the_first_frames_do_not_depend_on_how_many_follow(generator):
    model = random_autoencoder(small_config())
    video = torch.rand(1, 3, 96, 16, 16, generator=generator) * 2 - 1
    short = reconstruct(model, video[:, :, :48], chunk=2)
    far = 48 - 4 * sum(encoder_reach(model.config)[1:] + decoder_reach(model.config)[1:])
    torch.testing.assert_close(reconstruct(model, video, chunk=2)[:, :, :far], short[:, :, :far], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(3, 17, 9), (5, 8, 31), (1, 1, 1)])
@pytest.mark.parametrize("chunk", [None, 1])
def test_sizes_that_are_no_multiples_are_padded_with_the_edge_and_cropped_back(size, chunk, generator):
    model = random_autoencoder(small_config())
    video = torch.rand(1, 3, *size, generator=generator) * 2 - 1
    z = encode(model, video, chunk)
    assert tuple(z.shape[2:]) == latent_size(model, size)
    index = [torch.arange(-(-n // f) * f).clamp(max=n - 1) for n, f in zip(size, model.config.factors)]
    padded = video[:, :, index[0]][:, :, :, index[1]][..., index[2]]
    torch.testing.assert_close(z, model.encode(padded), atol=1e-5, rtol=1e-5)
    out = reconstruct(model, video, chunk)
    assert out.shape == video.shape
    assert out.abs().max() <= 1
    expected = model(padded).clamp(-1, 1)[:, :, : size[0], : size[1], : size[2]]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_bytes_are_read_as_pixels(generator):
    model = random_autoencoder(small_config())
    video = torch.randint(256, (1, 3, 9, 16, 16), generator=generator, dtype=torch.uint8)
    torch.testing.assert_close(encode(model, video), encode(model, video / 127.5 - 1))


def test_normalization_over_the_clip_is_coded_whole_or_refused():
    model = random_autoencoder(small_config(norm="clip"))
    video = torch.rand(1, 3, 32, 16, 16)
    z = encode(model, video, chunk=None)
    assert torch.equal(encode(model, video, chunk=8), z)  # one chunk
    assert decode(model, z, chunk=8).shape == video.shape
    with pytest.raises(ValueError, match=r"video: got 8 latents along time in chunks of 7 .* norm='clip', expected"):
        encode(model, video, chunk=7)
    with pytest.raises(ValueError, match=r"latents: got 8 latents along time in chunks of 2 .* norm='clip', expected"):
        decode(model, z, chunk=2)
    for stream in (encode_stream, decode_stream):
        with pytest.raises(ValueError, match="parts: got a stream for a model with norm='clip'"):
            stream(model, [])


def test_with_normalization_over_the_clip_pieces_differ():
    """Why it is refused: the same frames within a longer video have other latents."""
    model = random_autoencoder(small_config(norm="clip"))
    video = torch.rand(1, 3, 96, 16, 16)
    video[:, :, 48:] *= 0.1
    whole, piece = encode(model, video, chunk=None), encode(model, video[:, :, :48], chunk=None)
    assert (whole[:, :, :2] - piece[:, :, :2]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: encode(m, torch.zeros(3, 8, 16, 16)), ValueError, r"video: got shape \(3, 8, 16, 16\), expected"),
        (lambda m: encode(m, torch.zeros(1, 3, 0, 16, 16)), ValueError, r"video: got shape .*none of them 0"),
        (lambda m: encode(m, torch.zeros(1, 3, 8, 16, 16).int()), TypeError, "video: got torch.int32, expected"),
        (lambda m: encode(m, torch.zeros(1, 3, 8, 16, 16), 0), ValueError, "chunk: got 0, expected at least 1"),
        (lambda m: decode(m, torch.zeros(1, 3, 2, 2, 2)), ValueError, r"latents: got .*expected \[B, 4, F, H, W\]"),
        (
            lambda m: decode(m, torch.zeros(1, 4, 2, 2, 2).to(torch.uint8)), TypeError,
            "latents: got torch.uint8, expected float",
        ),
        (
            lambda m: decode(m, torch.zeros(1, 4, 2, 2, 2), (9, 16, 16)), ValueError,
            r"size: got \(9, 16, 16\), whose latents are \(3, 2, 2\), expected one for latents of \(2, 2, 2\)",
        ),
        (
            lambda m: list(decode_stream(m, [torch.zeros(1, 4, 2, 2, 2)], (17, 16))), ValueError,
            r"size: got \(17, 16\), expected one for latents of \(2, 2\)",
        ),
        (
            lambda m: list(encode_stream(m, [torch.zeros(1, 3, 9, 16, 16), torch.zeros(1, 3, 9, 16, 24)])), ValueError,
            r"video: part 1 has shape \(1, 3, 9, 16, 24\).*expected those of the first",
        ),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(random_autoencoder(small_config()))


def test_a_window_frees_what_it_no_longer_needs():
    """What is kept between two windows is a copy: a view would keep the storage of all frames before it."""
    kept = []
    for window in coding._windows(
        iter(torch.zeros(1, 3, 4000, 1, 1).split(8, dim=2)), 4, 2, encoder_reach(small_config())
    ):
        kept.append(window.content.untyped_storage().nbytes())
    assert max(kept[5:]) < 4 * 3 * (8 + 8 + 4 * sum(encoder_reach(small_config())) + 8)
