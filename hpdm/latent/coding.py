"""Encoding and decoding videos of any length and size with an autoencoder that was trained on clips.

A video is coded in chunks along time. Each is run together with as many latents on both sides as the network sees
(:mod:`hpdm.latent.reach`), of which the results are dropped. With normalization per frame this is exact: the result is
that of the whole video up to rounding, and memory does not depend on the length. With normalization over the clip every
frame depends on all others, so a video is coded whole, or refused.

Lengths and sizes that are no multiples of the factors are padded by repeating the last frame, row or column.

Along height and width a frame is coded whole, or in tiles that are blended (:mod:`hpdm.latent.spatial_tiles`). Tiles
are an approximation, since every pixel of a frame is in its statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from hpdm.checks import Triple
from hpdm.latent.autoencoder import VideoAutoencoder
from hpdm.latent.reach import Reach, decoder_reach, encoder_reach
from hpdm.latent.spatial_tiles import SpatialTiles, code_in_tiles

CHUNK = 8
"""Latents along time that are coded at once where nothing else is said."""


def latent_size(model: VideoAutoencoder, size: Triple) -> Triple:
    """Latents per axis of a video of any size, frames, height and width."""
    f, h, w = (-(-n // factor) for n, factor in zip(size, model.config.factors))
    return (f, h, w)


def encode(
    model: VideoAutoencoder,
    video: Tensor,
    chunk: int | None = CHUNK,
    *,
    tile: tuple[int, int] | None = None,
    overlap: int | None = None,
) -> Tensor:
    """Normalized latents of whole videos.

    Args:
        model: the autoencoder.
        video: ``[B, C, F, H, W]`` of any size, uint8 in 0..255 or float in [-1, 1], on the model's device.
        chunk: latents along time that are coded at once, at least 1; ``None`` for all.
        tile: height and width in latents of tiles that are coded one by one and blended, an approximation for frames
            that do not fit in memory; ``None`` for whole frames.
        overlap: of neighboring tiles in latents; ``None`` for a quarter of a tile's shorter side, rounded down.

    Returns:
        ``[B, z, f, h, w]``, of the size that :func:`latent_size` says.

    Raises:
        TypeError, ValueError: another shape or dtype, or a chunk, tile or overlap that is out of range; or with
            normalization over the clip more than one chunk.
    """
    tiles = SpatialTiles.checked(tile, overlap)
    if chunk is None:
        _check_part("video", video, model.config.channels)
        padded = _padded(_padded_frames(video, model.config.factors[0]), model.config.factors)
        return _encoded(model, padded, slice(None), tiles)
    if video.ndim == 5:
        _check_exact(model, "video", -(-video.shape[2] // model.config.factors[0]), chunk)
    return torch.cat(list(_encode(model, [video], chunk, tiles)), dim=2)


def decode(
    model: VideoAutoencoder,
    latents: Tensor,
    size: Triple | None = None,
    chunk: int | None = CHUNK,
    *,
    tile: tuple[int, int] | None = None,
    overlap: int | None = None,
) -> Tensor:
    """Videos of normalized latents.

    Args:
        model: the autoencoder.
        latents: ``[B, z, f, h, w]`` float, on the model's device.
        size: frames, height and width to crop to, those of the encoded video; ``None`` for all that is decoded.
        chunk, tile, overlap: as of :func:`encode`.

    Returns:
        ``[B, C, F, H, W]`` in [-1, 1].

    Raises:
        TypeError, ValueError: as :func:`encode`; or a size whose latents these are not.
    """
    tiles = SpatialTiles.checked(tile, overlap)
    _check_part("latents", latents, model.config.latent_channels)
    frames, height, width = size or _decoded_size(model, latents)
    if latent_size(model, (frames, height, width)) != tuple(latents.shape[2:]):
        raise ValueError(
            f"size: got {(frames, height, width)}, whose latents are {latent_size(model, (frames, height, width))}, "
            f"expected one for latents of {tuple(latents.shape[2:])}"
        )
    if chunk is None:
        return _decoded(model, latents, slice(None), tiles)[:, :, :frames, :height, :width]
    _check_exact(model, "latents", latents.shape[2], chunk)
    parts = list(_decode(model, [latents], (height, width), chunk, tiles))
    return torch.cat(parts, dim=2)[:, :, :frames]


def reconstruct(
    model: VideoAutoencoder,
    video: Tensor,
    chunk: int | None = CHUNK,
    *,
    tile: tuple[int, int] | None = None,
    overlap: int | None = None,
) -> Tensor:
    """Videos, encoded and decoded: ``[B, C, F, H, W]`` in [-1, 1], of the size of ``video``.

    Args and errors: as of :func:`encode`.
    """
    latents = encode(model, video, chunk, tile=tile, overlap=overlap)
    f, h, w = video.shape[2:]
    return decode(model, latents, (f, h, w), chunk, tile=tile, overlap=overlap)


def encode_stream(
    model: VideoAutoencoder,
    parts: Iterable[Tensor],
    chunk: int = CHUNK,
    *,
    tile: tuple[int, int] | None = None,
    overlap: int | None = None,
) -> Iterator[Tensor]:
    """Encodes a video that comes part by part, in memory that does not depend on its length.

    Args:
        model: the autoencoder.
        parts: of the video, in order: ``[B, C, n, H, W]`` with any number of frames ``n``, as ``video`` of
            :func:`encode`.
        chunk: latents along time that are coded at once.
        tile, overlap: as of :func:`encode`.

    Yields:
        Latents ``[B, z, m, h, w]``, up to ``chunk`` at a time. All of them together are :func:`encode` of the video.

    Raises:
        TypeError, ValueError: as :func:`encode`; normalization over the clip, whatever the length.
    """
    _check_streamable(model, "parts")
    return _encode(model, parts, chunk, SpatialTiles.checked(tile, overlap))


def decode_stream(
    model: VideoAutoencoder,
    parts: Iterable[Tensor],
    size: tuple[int, int] | None = None,
    chunk: int = CHUNK,
    *,
    tile: tuple[int, int] | None = None,
    overlap: int | None = None,
) -> Iterator[Tensor]:
    """Decodes latents that come part by part, in memory that does not depend on their number.

    Args:
        model: the autoencoder.
        parts: of the latents, in order: ``[B, z, m, h, w]`` with any number ``m``.
        size: height and width to crop to; ``None`` for all that is decoded.
        chunk: latents along time that are coded at once.
        tile, overlap: as of :func:`encode`.

    Yields:
        Frames ``[B, C, n, H, W]`` in [-1, 1] as soon as the latents are there that they depend on. They are as many as
        the latents stand for; of a video whose length is no multiple of the factor, drop the last ones.

    Raises:
        TypeError, ValueError: as :func:`decode`; normalization over the clip, whatever the length.
    """
    _check_streamable(model, "parts")
    return _decode(model, parts, size, chunk, SpatialTiles.checked(tile, overlap))


def _encode(
    model: VideoAutoencoder, parts: Iterable[Tensor], chunk: int, tiles: SpatialTiles | None
) -> Iterator[Tensor]:
    factor = model.config.factors[0]
    checked = _checked_parts("video", parts, model.config.channels)
    for window in _windows(checked, factor, chunk, encoder_reach(model.config)):
        kept = slice(window.skipped, window.skipped + window.length)
        yield _encoded(model, _padded(window.content, model.config.factors), kept, tiles).clone()


def _decode(
    model: VideoAutoencoder,
    parts: Iterable[Tensor],
    size: tuple[int, int] | None,
    chunk: int,
    tiles: SpatialTiles | None,
) -> Iterator[Tensor]:
    factor = model.config.factors[0]
    checked = _checked_parts("latents", parts, model.config.latent_channels)
    for window in _windows(checked, 1, chunk, decoder_reach(model.config)):
        _, height, width = _decoded_size(model, window.content)
        h, w = size or (height, width)
        if latent_size(model, (1, h, w))[1:] != tuple(window.content.shape[3:]):
            raise ValueError(f"size: got {(h, w)}, expected one for latents of {tuple(window.content.shape[3:])}")
        kept = slice(window.skipped * factor, (window.skipped + window.length) * factor)
        yield _decoded(model, window.content, kept, tiles)[:, :, :, :h, :w].clone()


class _Window(NamedTuple):
    """A chunk of a stream with what it depends on."""

    content: Tensor
    skipped: int
    """Latents before the chunk."""
    length: int
    """Latents of the chunk."""


def _windows(parts: Iterable[Tensor], unit: int, chunk: int, reach: Reach) -> Iterator[_Window]:
    """Cuts a stream into chunks, each with its surroundings as soon as they are there.

    Args:
        parts: ``[B, C, n, H, W]``.
        unit: positions of the stream along time per latent.
        chunk: latents of a chunk.
        reach: latents around it.
    """
    if chunk < 1:
        raise ValueError(f"chunk: got {chunk}, expected at least 1")
    past, future, step = (n * unit for n in (*reach, chunk))
    buffer: Tensor | None = None
    first = done = 0  # the stream's position at which the buffer starts, and that up to which it has been yielded
    for part in chain(parts, [None]):
        if part is not None:
            buffer = part if buffer is None else torch.cat((buffer, part), dim=2)
        elif buffer is not None:
            buffer = _padded_frames(buffer, unit)  # starts at a multiple of it
        if buffer is None:
            continue
        end = first + buffer.shape[2]
        while done + step + future <= end or (part is None and done < end):
            start, stop = max(0, done - past), min(done + step, end)
            content = buffer[:, :, start - first : min(end, stop + future) - first]
            yield _Window(content, (done - start) // unit, (stop - done) // unit)
            done = stop
        kept = max(0, done - past)
        if kept > first:
            buffer, first = buffer[:, :, kept - first :].clone(), kept  # a view would keep all of it in memory


@torch.no_grad()
def _encoded(model: VideoAutoencoder, video: Tensor, kept: slice, tiles: SpatialTiles | None) -> Tensor:
    """The latents ``kept`` along time."""

    def code(part: Tensor) -> Tensor:
        return model.encode(part.float() / 127.5 - 1 if part.dtype == torch.uint8 else part)[:, :, kept]

    return code(video) if tiles is None else code_in_tiles(code, video, tiles, model.config.factors[1:], (1, 1))


@torch.no_grad()
def _decoded(model: VideoAutoencoder, latents: Tensor, kept: slice, tiles: SpatialTiles | None) -> Tensor:
    """The frames ``kept``."""

    def code(part: Tensor) -> Tensor:
        return model.decode(part).clamp(-1, 1)[:, :, kept]

    return code(latents) if tiles is None else code_in_tiles(code, latents, tiles, (1, 1), model.config.factors[1:])


def _decoded_size(model: VideoAutoencoder, latents: Tensor) -> Triple:
    f, h, w = (n * factor for n, factor in zip(latents.shape[2:], model.config.factors))
    return (f, h, w)


def _padded_frames(video: Tensor, unit: int) -> Tensor:
    """Repeats the last frame until their number is a multiple of ``unit``."""
    missing = -video.shape[2] % unit
    return torch.cat((video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)), dim=2) if missing else video


def _padded(video: Tensor, factors: Triple) -> Tensor:
    """Repeats the last row and column until height and width are multiples of the factors."""
    bottom, right = (-n % factor for n, factor in zip(video.shape[3:], factors[1:]))
    if not bottom and not right:
        return video
    rows = torch.arange(video.shape[3] + bottom, device=video.device).clamp(max=video.shape[3] - 1)
    columns = torch.arange(video.shape[4] + right, device=video.device).clamp(max=video.shape[4] - 1)
    return video.index_select(3, rows).index_select(4, columns)


def _checked_parts(name: str, parts: Iterable[Tensor], channels: int) -> Iterator[Tensor]:
    """The parts of a stream, each checked against the first one."""
    first: Tensor | None = None
    for number, part in enumerate(parts):
        _check_part(name, part, channels)
        first = part if first is None else first
        if _without_frames(part) != _without_frames(first):
            raise ValueError(
                f"{name}: part {number} has shape {tuple(part.shape)} and dtype {part.dtype}, expected those of the "
                f"first, {tuple(first.shape)} and {first.dtype}, but for the frames"
            )
        yield part


def _without_frames(part: Tensor) -> tuple[object, ...]:
    batch, channels, _, height, width = part.shape
    return batch, channels, height, width, part.dtype


def _check_part(name: str, part: Tensor, channels: int) -> None:
    if part.ndim != 5 or part.shape[1] != channels or 0 in part.shape:
        raise ValueError(f"{name}: got shape {tuple(part.shape)}, expected [B, {channels}, F, H, W], none of them 0")
    integers = "uint8 or float" if name == "video" else "float"
    if not part.is_floating_point() and (name != "video" or part.dtype != torch.uint8):
        raise TypeError(f"{name}: got {part.dtype}, expected {integers}")


def _check_streamable(model: VideoAutoencoder, name: str) -> None:
    if model.config.norm != "frame":
        raise ValueError(
            f"{name}: got a stream for a model with norm={model.config.norm!r}, expected norm='frame': with statistics "
            "over the clip every frame depends on all others"
        )


def _check_exact(model: VideoAutoencoder, name: str, latents: int, chunk: int) -> None:
    """Raises ValueError for more than one chunk with normalization over the clip."""
    if model.config.norm != "frame" and latents > chunk:
        raise ValueError(
            f"{name}: got {latents} latents along time in chunks of {chunk} for a model with "
            f"norm={model.config.norm!r}, expected chunk=None, or norm='frame': with statistics over the clip every "
            "frame depends on all others"
        )
