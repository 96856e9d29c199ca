"""Videos of any length from the pyramid: level 0 window by window, and the levels above on what is new of each.

A window is an ordinary video of the model, some of whose frames are known on every level: those of the windows before.
They are never written again. What a level has finished of a window is the context of the levels above, as in any
video, so known frames have the context of the window that they are known in, as in training.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hpdm.frames import NOT_TRAINED, Known
from hpdm.long_video import LongOptions, LongProgress, Segment, State
from hpdm.patch.config import HPDMConfig
from hpdm.patch.model import HPDM
from hpdm.patch.sampler import Sampler
from hpdm.patch.storyline import Autoregressive
from hpdm.patch.storyline_hierarchical import Hierarchical
from hpdm.patch.storyline_joint import Joint
from hpdm.patch.storyline_rolling import Rolling
from hpdm.sampling import Progress, SamplerOptions
from hpdm.windows import Window, Windows


class LongSampler:
    """Samples videos of any length from a model; see :class:`hpdm.long_video.LongSampler`. Segments are windows.

    Args:
        model: in eval mode, on the device to sample on.
        options: see :class:`hpdm.sampling.SamplerOptions`.
        long: see :class:`hpdm.long_video.LongOptions`.

    Raises:
        ValueError: as :class:`hpdm.patch.sampler.Sampler`, or more known frames than a window has.
    """

    def __init__(self, model: HPDM, options: SamplerOptions | None = None, long: LongOptions | None = None) -> None:
        self.model, self.config, self.long = model, model.config, long or LongOptions()
        self.sampler = Sampler(model, options)
        self.windows = windows_of(self.config, self.long)
        self.remembers = self.config.memory and self.long.remember

    def check(self, frames: int, first: Sequence[Tensor] = (), last: Sequence[Tensor] = ()) -> None:
        """As :meth:`hpdm.long_video.LongSampler.check`."""
        if frames < 1:
            raise ValueError(f"frames: got {frames}, expected at least 1")
        given = sum(part[-1].shape[2] for part in (first, last) if part)
        if given and frames <= given:
            raise ValueError(f"frames: got {frames}, expected more than the {given} that are given")
        if first and first[-1].shape[2] >= self.windows.whole:
            raise ValueError(
                f"first: got {first[-1].shape[2]} frames, expected fewer than the {self.windows.whole} of a window"
            )
        if last and self.long.scheme != "autoregressive":
            raise ValueError(f"scheme: got {self.long.scheme!r} with a last frame, expected 'autoregressive'")
        if last:
            self.windows.check_end(frames)
        if first and self.long.scheme == "hierarchical":
            raise ValueError("scheme: got 'hierarchical' with first frames, expected another one")
        if self.windows.count(frames) > 1 and not self.config.known_frames:
            raise ValueError(
                f"frames: got {frames}, expected at most {self.windows.whole}, the length of a clip: {NOT_TRAINED}"
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
        """As :meth:`hpdm.long_video.LongSampler.segments`; parts are levels, from level 0 up.

        Raises:
            ValueError: as :meth:`check`.
        """
        self.check(frames, first, last)
        windows, count = self.windows.up_to(frames) if last else self.windows.until(frames), self.windows.count(frames)
        conditions: dict[str, Any] = {"labels": labels, "text": text, "text_mask": text_mask}
        story = self._storyline(seeds, conditions)
        videos: list[Tensor] = []
        if state is not None:
            videos = [state[f"level_{level}"] for level in range(self.config.levels)]
            story.restore(state)
        for window in itertools.islice(windows, done, None):
            known = self._known(window, videos, first, last if window.number == count - 1 else ())
            given = story.window(window, known[0]) if levels is None else list(levels(window.number))
            before = videos[0] if self.remembers and window.number and not given else None
            videos = self.sampler(
                seeds, **conditions, finished=given, known=known, window=window.number, before=before,
                progress=_of_window(progress, window.number),
            )  # fmt: skip
            story.finished(window, videos[0])
            start = (window.start + window.known) * self.windows.scale
            new = videos[-1][:, :, window.known * self.windows.scale :][:, :, : frames - start]
            yield Segment(window.number, new, self._state(videos, story))

    def _storyline(self, seeds: Sequence[int], conditions: Mapping[str, Any]) -> Autoregressive:
        """What samples level 0 by the scheme."""
        if self.long.scheme == "joint":
            return Joint(self.sampler, self.windows, seeds, conditions, self.long.together)
        if self.long.scheme == "hierarchical":
            return Hierarchical(self.sampler, self.windows, seeds, conditions)
        kind = Rolling if self.long.scheme == "rolling" else Autoregressive
        return kind(self.sampler, self.windows, seeds, conditions)

    def _state(self, videos: Sequence[Tensor], story: Autoregressive) -> State:
        return {f"level_{level}": video for level, video in enumerate(videos)} | story.state()

    def _known(
        self, window: Window, before: Sequence[Tensor], first: Sequence[Tensor], last: Sequence[Tensor]
    ) -> list[Known | None]:
        """The known frames of every level of a window, given the videos of the window before."""
        known: list[Known | None] = []
        for level in range(self.config.levels):
            size = self.config.level_resolution(level)
            start = first[level] if first and window.number == 0 else None
            if window.known:
                start = before[level][:, :, size[0] - window.known * self.config.ratio[0] ** level :]
            end = last[level] if last else None
            known.append(None if start is None and end is None else Known.ends(start, end, size))
        return known


def windows_of(config: HPDMConfig, long: LongOptions) -> Windows:
    """The windows of long videos.

    Raises:
        ValueError: more known frames than a window has, or a model without the scheme.
    """
    frames, known = config.patch[0], long.known
    if frames == 1:
        raise ValueError("frames: got a model of patches of one frame, expected at least two")
    if long.scheme == "hierarchical":
        if config.spacing == 1:
            raise ValueError(
                "scheme: got 'hierarchical' for a model that was trained without --spacing, expected another"
            )
        if known not in (None, 1):
            raise ValueError(f"known: got {known} with scheme 'hierarchical', expected 1: windows share a frame")
        known = 1
    per_token, scale = config.tokenizer[0], config.resolution[0] // frames
    if known is None:
        known = max(1, frames // 2 // per_token * per_token)
    elif known % per_token:
        raise ValueError(f"known: got {known}, expected a multiple of {per_token}, the frames of a token")
    return Windows(frames, known, scale)


def _of_window(progress: LongProgress | None, window: int) -> Progress | None:
    """Reports the network calls of one window."""
    return None if progress is None else lambda level, done, calls: progress(window, level, done, calls)
