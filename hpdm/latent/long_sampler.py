"""Videos of any length from latent diffusion: latents window by window, decoded as soon as that can be done.

LVDM sections 3.3 and 3.4. Frames are those of all latents decoded as one video, so that windows leave no seams of the
autoencoder's. Frames that the user gives are encoded, known by the first or the last window, and come out as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hpdm.frames import NOT_TRAINED
from hpdm.latent import coding
from hpdm.latent.denoiser import Conditions
from hpdm.latent.latent_model import LVDM
from hpdm.latent.long_windows import LatentWindows, hierarchy_of, windows_of
from hpdm.latent.sampler import LatentSampler
from hpdm.latent.storylines import Autoregressive, Hierarchical, Storyline, Videos
from hpdm.latent.stream_decoder import StreamDecoder
from hpdm.long_video import LongOptions, LongProgress, Segment
from hpdm.sampling import SamplerOptions
from hpdm.windows import Windows


class LatentLongSampler:
    """Samples videos of any length; see :class:`hpdm.long_video.LongSampler`. There is one part, the decoded video.

    Args:
        model: in eval mode, on the device to sample on.
        options: see :class:`hpdm.sampling.SamplerOptions`.
        long: see :class:`hpdm.long_video.LongOptions`.

    Raises:
        ValueError: as :class:`hpdm.latent.sampler.LatentSampler` and :func:`hpdm.latent.long_windows.windows_of`.
    """

    def __init__(self, model: LVDM, options: SamplerOptions | None = None, long: LongOptions | None = None) -> None:
        self.model, self.config, self.long = model, model.config, long or LongOptions()
        self.sampler = LatentSampler(model, options)
        self._windows = windows_of(self.config, self.long)
        self.windows: Windows = self._windows

    def check(self, frames: int, first: Sequence[Tensor] = (), last: Sequence[Tensor] = ()) -> None:
        """As :meth:`hpdm.long_video.LongSampler.check`; given are one frame, or all frames of some latents."""
        whole, scale = self.windows.whole, self.windows.scale
        if frames < 1:
            raise ValueError(f"frames: got {frames}, expected at least 1")
        for name, part in (("first", first), ("last", last)):
            if not part:
                continue
            count = part[-1].shape[2]
            if not self.config.known_frames:
                raise ValueError(f"{name}: got {count} frames, expected none: {NOT_TRAINED}")
            if count != 1 and count % scale:
                raise ValueError(f"{name}: got {count} frames, expected 1 or a multiple of {scale}, those of a latent")
            if count >= whole:
                raise ValueError(f"{name}: got {count} frames, expected fewer than the {whole} of a window")
            if self.long.scheme != "autoregressive":
                raise ValueError(
                    f"scheme: got {self.long.scheme!r} with {name} frames that are given, expected 'autoregressive'"
                )
        given = sum(part[-1].shape[2] for part in (first, last) if part)
        if given and frames <= given:
            raise ValueError(f"frames: got {frames}, expected more than the {given} that are given")
        if last:
            self.windows.check_end(frames)
        if frames > whole and not self.config.known_frames:
            raise ValueError(f"frames: got {frames}, expected at most {whole}, the length of a clip: {NOT_TRAINED}")
        if frames > whole and self.config.autoencoder.norm != "frame":
            raise ValueError(
                f"frames: got {frames}, expected at most {whole}, the length of a clip: the autoencoder has "
                f"norm={self.config.autoencoder.norm!r}, with which every frame depends on all others"
            )

    @torch.no_grad()
    def segments(
        self,
        seeds: Sequence[int],
        frames: int,
        labels: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        *,
        first: Sequence[Tensor] = (),
        last: Sequence[Tensor] = (),
        levels: Callable[[int], Sequence[Tensor]] | None = None,
        state: Mapping[str, Tensor] | None = None,
        done: int = 0,
        progress: LongProgress | None = None,
    ) -> Iterator[Segment]:
        """As :meth:`hpdm.long_video.LongSampler.segments`.

        A segment may be what is new of several windows: frames are finished once the latents after them are there on
        which they depend, and the scheme "hierarchical" samples several windows at once.

        Raises:
            ValueError: as :meth:`check`, or some ``levels``.
        """
        self.check(frames, first, last)
        if levels is not None:
            raise ValueError("levels: got some, expected none: latent diffusion has one part")
        windows = replace(self._windows, ahead=0) if last else self._windows
        videos = Videos(self.sampler, seeds, Conditions(labels, text, text_mask), progress)
        story = self._storyline(videos, windows, frames, first if not done else (), last)
        stream = StreamDecoder(self.config.autoencoder, self.sampler.decoded)
        if state is not None:
            story.restore(state)
            stream.restore(state)
        count = windows.count(frames)
        for part in story.parts(done):
            start = stream.done * windows.scale
            ends = part.number == count - 1 and not windows.ahead
            video = stream.push(part.latents, ends)[:, :, : frames - start]
            if video.shape[2]:
                shown = _with_given(video, start, frames, first, last)
                yield Segment(part.number, shown, {**story.state(), **stream.state()})

    def _storyline(
        self, videos: Videos, windows: LatentWindows, frames: int, first: Sequence[Tensor], last: Sequence[Tensor]
    ) -> Storyline:
        """What samples the latents by the scheme."""
        if self.long.scheme == "hierarchical":
            return Hierarchical(videos, hierarchy_of(self.config, self.long), windows.latents(frames))
        sequence = windows.up_to(frames) if last else windows.until(frames)
        return Autoregressive(videos, sequence, self._encoded(first), self._encoded(last))

    def _encoded(self, given: Sequence[Tensor]) -> Tensor | None:
        """The latents of frames that are given, ``[B, z, n, h, w]``; one frame counts as a still latent."""
        if not given:
            return None
        autoencoder = self.model.autoencoder
        video = given[-1].to(autoencoder.latent_mean.device)
        # One video at a time, so that a video does not depend on those beside it.
        return torch.cat([coding.encode(autoencoder, clip[None], chunk=None) for clip in video])


def _with_given(video: Tensor, start: int, frames: int, first: Sequence[Tensor], last: Sequence[Tensor]) -> Tensor:
    """Frames ``[B, C, n, H, W]`` from frame ``start`` on of a video of ``frames``, with those that are given."""
    for given, begin in ((first, 0), (last, frames - last[-1].shape[2] if last else 0)):
        if given:
            stop = begin + given[-1].shape[2]
            low, high = max(start, begin), min(start + video.shape[2], stop)
            if low < high:
                video = video.clone()
                video[:, :, low - start : high - start] = given[-1][:, :, low - begin : high - begin].to(video)
    return video
