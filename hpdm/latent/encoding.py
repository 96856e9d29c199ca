"""Encodes whole clips, once, into a :class:`hpdm.data.latent_store.LatentStore`.

A clip is encoded with all its frames, at the stride and rate of training, chunk by chunk as any long video
(:mod:`hpdm.latent.coding`). So a latent sees the frames around it whether or not they are in the window that training
takes later.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hpdm.data.clips import VideoDataset
from hpdm.data.decode import DecodeError, VideoInfo, probe, read_clip
from hpdm.data.latent_store import Entry, LatentInfo, LatentStore, clip_keys, identity_of
from hpdm.data.resize import resizing
from hpdm.data.suffixes import is_image
from hpdm.data.windows import all_frames
from hpdm.latent.autoencoder import VideoAutoencoder
from hpdm.latent.coding import CHUNK, encode_stream
from hpdm.latent.latent_model import hash_of_autoencoder

logger = logging.getLogger(__name__)

PART_BYTES = 64 * 2**20
"""Decoded frames of a clip that are in memory at once, beside those that a chunk needs."""
FILE_BYTES = 64 * 2**20
"""Latents to collect in memory before writing them to a file."""
FILE_S = 60.0
"""Seconds after which they are written in any case, so that a killed process has lost no more."""


def describe(model: VideoAutoencoder, clips: VideoDataset) -> LatentInfo:
    """What a store of the latents of ``clips`` by ``model`` is.

    Raises:
        OSError: a clip is gone.
        ValueError: a model with normalization over the clip, or a size that is no multiple of the factors.
    """
    config = model.config
    if config.norm != "frame":
        raise ValueError(
            f"autoencoder: got one with norm={config.norm!r}, expected norm='frame': with statistics over the clip the "
            "latents of a window are others than those of the whole clip"
        )
    if any(n % factor for n, factor in zip(clips.size, config.factors[1:])):
        raise ValueError(f"size: got {clips.size}, expected multiples of {config.factors[1:]}, the pixels per latent")
    keys = clip_keys(clips)
    return LatentInfo(
        autoencoder=hash_of_autoencoder(model),
        channels=config.latent_channels,
        factors=config.factors,
        size=clips.size,
        stride=clips.stride,
        fps=None if clips.fps is None else float(clips.fps),
        clips=len(keys),
        identity=identity_of(keys),
    )


def encode_clips(
    model: VideoAutoencoder,
    clips: VideoDataset,
    store: LatentStore,
    numbers: Sequence[int],
    chunk: int = CHUNK,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Encodes clips of a set and adds them to a store.

    A clip that cannot be read is stored as one without latents, which the log tells. When this is interrupted or fails,
    all clips that are complete are stored; a killed process loses those of the last minute. What is in memory does not
    depend on the length of a clip, but for its latents.

    Args:
        model: in eval mode, on the device to encode on.
        clips: the set that the store is of.
        store: the store to extend.
        numbers: of the clips.
        chunk: latents along time that are encoded at once, at least 1.
        progress: called after every clip with the number of clips done.

    Raises:
        FloatingPointError: latents that are not finite, or too large for float16.
        OSError: a clip is gone, or a file cannot be written.
        StalledError: no answer about a clip.
    """
    keys = clip_keys(clips)
    pending: list[Entry] = []
    written = time.monotonic()
    try:
        for done, number in enumerate(numbers, start=1):
            frames, latents = _of_clip(model, clips, number, chunk)
            pending.append(Entry(number, keys[number], frames, latents))
            waiting = sum(entry.latents.nbytes for entry in pending)
            if waiting >= FILE_BYTES or time.monotonic() - written >= FILE_S:
                store.add(pending)
                pending, written = [], time.monotonic()
            if progress is not None:
                progress(done)
    finally:
        if pending:
            store.add(pending)


def _of_clip(model: VideoAutoencoder, clips: VideoDataset, number: int, chunk: int) -> tuple[int, Tensor]:
    """The frames of a clip, and its latents ``[f, z, h, w]``, float16 on the CPU; 0 and none if it cannot be read."""
    file, factors = clips.files[number], model.config.factors
    try:
        info = probe(file.source, timeout=clips.timeout)
        if clips.fps is not None and not info.fps and not is_image(file.path):
            raise DecodeError(f"{file.path}: nothing tells its frame rate, which fps={clips.fps:g} needs")
        shown = [0] if is_image(file.path) else all_frames(info, clips.stride, clips.fps)
        parts = list(encode_stream(model, _parts(model, clips, number, info, shown), chunk))
    except (DecodeError, IndexError) as error:
        logger.warning("clip left out: %s", error)
        height, width = (n // factor for n, factor in zip(clips.size, factors[1:]))
        return 0, torch.empty(0, model.config.latent_channels, height, width, dtype=torch.float16)
    latents = torch.cat([part.half().cpu() for part in parts], dim=2)[0].transpose(0, 1).contiguous()
    if not latents.isfinite().all():
        raise FloatingPointError(
            f"latents: {file.path}: got NaN or numbers too large for float16, expected finite ones"
        )
    return len(shown), latents


def _parts(
    model: VideoAutoencoder, clips: VideoDataset, number: int, info: VideoInfo, shown: Sequence[int]
) -> Iterator[Tensor]:
    """The frames of a clip, as many at a time as memory allows, uint8 ``[1, 3, n, H, W]`` on the model's device."""
    height, width = clips.size
    step = max(1, PART_BYTES // (3 * height * width))
    transform = resizing(clips.size, info.pixel_aspect)
    for first in range(0, len(shown), step):
        read = read_clip(
            clips.files[number].source, shown[first : first + step], decoder=clips.decoder, timeout=clips.timeout,
            transform=transform,
        )  # fmt: skip
        yield torch.from_numpy(read.frames).permute(3, 0, 1, 2)[None].to(model.latent_mean.device)
