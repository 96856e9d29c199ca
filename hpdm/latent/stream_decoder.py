"""Decodes latents that come window by window, and can go on in another process.

A frame is decoded as soon as the latents are there that it depends on (:mod:`hpdm.latent.reach`), so that the frames of
all calls are those of the whole video. What is kept for the next call does not depend on the length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hpdm.latent.coding import CHUNK
from hpdm.latent.config import AutoencoderConfig
from hpdm.latent.reach import Reach, decoder_reach
from hpdm.long_video import State

EVERYTHING = 2**31
"""More latents than a video has."""


class Span(NamedTuple):
    """Latents that are decoded at once; numbers of latents of the whole video."""

    start: int
    stop: int
    """The frames of latents from ``start`` to before ``stop`` are kept."""
    first: int
    last: int
    """Latents from ``first`` to before ``last`` are decoded."""


def spans(config: AutoencoderConfig, done: int, there: int, ends: bool) -> Iterator[Span]:
    """What is decoded of the latents that are there.

    With normalization over the clip a frame depends on all latents, so that there is nothing before the end.

    Args:
        config: the autoencoder's.
        done: latents that are decoded.
        there: latents that are there.
        ends: whether the video has no more.
    """
    by_frame = config.norm == "frame"
    reach, chunk = (decoder_reach(config), CHUNK) if by_frame else (Reach(EVERYTHING, EVERYTHING), EVERYTHING)
    end = there if ends else there - reach.future
    for start in range(done, end, chunk):
        stop = min(start + chunk, end)
        yield Span(start, stop, max(0, start - reach.past), min(there, stop + reach.future))


class StreamDecoder:
    """The decoder of B videos whose latents are still to come.

    Args:
        config: the autoencoder's.
        decode: decodes latents ``[B, z, n, h, w]`` at once and returns some of the frames, ``[B, C, m, H, W]``.
    """

    def __init__(self, config: AutoencoderConfig, decode: Callable[[Tensor, slice], Tensor]) -> None:
        self.config, self.decode = config, decode
        self.done = 0
        """Latents whose frames are decoded."""
        self._first = 0  # number of the first latent that is kept
        self._latents: Tensor | None = None  # [B, z, n, h, w]

    def push(self, latents: Tensor, ends: bool = False) -> Tensor:
        """Takes the next latents and decodes what can be decoded.

        Args:
            latents: ``[B, z, m, h, w]`` with any number ``m``.
            ends: whether there are no more.

        Returns:
            The next frames, ``[B, C, n, H, W]`` in [-1, 1]; perhaps none.
        """
        kept = latents if self._latents is None else torch.cat((self._latents, latents), dim=2)
        factor, there, frames = self.config.factors[0], self._first + kept.shape[2], []
        for span in spans(self.config, self.done, there, ends):
            content = kept[:, :, span.first - self._first : span.last - self._first]
            shown = slice((span.start - span.first) * factor, (span.stop - span.first) * factor)
            frames.append(self.decode(content, shown))
            self.done = span.stop
        forgotten = max(0, self.done - decoder_reach(self.config).past - self._first)
        self._latents, self._first = kept[:, :, forgotten:].clone(), self._first + forgotten
        if frames:
            return torch.cat(frames, dim=2)
        height, width = (n * factor for n, factor in zip(latents.shape[3:], self.config.factors[1:]))
        return latents.new_zeros(len(latents), self.config.channels, 0, height, width)

    def state(self) -> State:
        """What is needed to go on; there must have been latents."""
        if self._latents is None:
            raise RuntimeError("state: there are no latents yet")
        return {
            "latents": self._latents, "first_latent": torch.tensor(self._first), "decoded": torch.tensor(self.done)
        }  # fmt: skip

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what :meth:`state` returned."""
        self._latents = state["latents"]
        self._first, self.done = int(state["first_latent"]), int(state["decoded"])
