"""The latents of long videos, some after others: each window from the one before, or sparse ones first."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hpdm.frames import Known
from hpdm.latent.denoiser import Conditions
from hpdm.latent.hierarchy import Hierarchy, Step
from hpdm.latent.sampler import LatentSampler
from hpdm.long_video import LongProgress, State
from hpdm.sampling import Progress
from hpdm.windows import Window


class Part(NamedTuple):
    """The next latents of B videos."""

    number: int
    """Number of the last window that is finished."""
    latents: Tensor
    """``[B, z, n, h, w]``."""


class Videos(NamedTuple):
    """Of what a storyline samples the latents."""

    sampler: LatentSampler
    seeds: Sequence[int]
    conditions: Conditions
    progress: LongProgress | None


class Storyline(Protocol):
    """Samples the latents of B videos."""

    def parts(self, done: int) -> Iterator[Part]:
        """Yields the latents as they are finished, those of the first ``done`` windows left out."""
        ...

    def state(self) -> State:
        """What is needed to go on; its size does not depend on the length."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what :meth:`state` returned."""
        ...


class Autoregressive:
    """Each window knows the last latents of the one before (LVDM section 3.3).

    Args:
        videos: what is sampled.
        windows: one after another.
        first: the first latents, which are given: ``[B, z, n, h, w]``; ``None`` for none.
        last: the last latents of the last window.
    """

    def __init__(
        self, videos: Videos, windows: Iterable[Window], first: Tensor | None = None, last: Tensor | None = None
    ) -> None:
        self.videos, self.windows, self.first, self.last = videos, with_end(windows), first, last
        self._window: Tensor | None = None  # the latents of the newest window [B, z, T, h, w]

    def parts(self, done: int) -> Iterator[Part]:
        sampler, seeds, conditions, progress = self.videos
        for window, ends in itertools.islice(self.windows, done, None):
            known = self._known(window, self.last if ends else None)
            if known is not None and known.all:
                latents = known.video
            else:
                latents = sampler.latents(
                    seeds, conditions, known=None if known is None else sampler.known(seeds, known, window.number),
                    window=window.number, progress=of_window(progress, window.number),
                )  # fmt: skip
            self._window = latents
            yield Part(window.number, latents[:, :, window.known :])

    def state(self) -> State:
        return {} if self._window is None else {"window": self._window}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._window = state["window"]

    def _known(self, window: Window, last: Tensor | None) -> Known | None:
        """The latents that a window knows; ``None`` for none."""
        size = self.videos.sampler.config.unet.latent
        first = None if window.number else self.first
        if self._window is not None:
            first = self._window[:, :, size[0] - window.known :]
        return None if first is None and last is None else Known.ends(first, last, size)


class Hierarchical:
    """Latents that are far apart, then those between (LVDM section 3.4).

    Args:
        videos: what is sampled.
        hierarchy: the sizes.
        latents: of a video.
    """

    def __init__(self, videos: Videos, hierarchy: Hierarchy, latents: int) -> None:
        self.videos, self.hierarchy, self.latents = videos, hierarchy, latents
        self._predictions = 0
        self._sparse: Tensor | None = None  # the newest sparse latents [B, z, n, h, w], those that are still needed

    def parts(self, done: int) -> Iterator[Part]:
        for step in self.hierarchy.steps(self.latents):
            if step.windows.start >= done:
                for number in step.predictions:
                    self._predict(number, step)
                yield Part(step.windows[-1], self._between(step.windows))

    def state(self) -> State:
        if self._sparse is None:
            return {}
        return {"sparse": self._sparse, "predictions": torch.tensor(self._predictions)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._sparse, self._predictions = state["sparse"], int(state["predictions"])

    def _predict(self, number: int, step: Step) -> None:
        """Samples the next window of sparse latents."""
        sampler, seeds, conditions, progress = self.videos
        known, size, new = None, sampler.config.unet.latent, 0
        if self._sparse is not None:
            new = self.hierarchy.known
            ends = Known.ends(self._sparse[:, :, self._sparse.shape[2] - new :], None, size)
            known = sampler.known(seeds, ends, number, sparse=True)
        latents = sampler.latents(
            seeds, conditions, known=known, window=number, sparse=True,
            progress=of_window(progress, step.windows.start),
        )  # fmt: skip
        kept = [] if self._sparse is None else [self._sparse]
        self._sparse, self._predictions = torch.cat((*kept, latents[:, :, new:]), dim=2), number + 1

    def _between(self, windows: range) -> Tensor:
        """Samples windows of consecutive latents at once; returns what is new of them, ``[B, z, n, h, w]``."""
        sampler, seeds, conditions, progress = self.videos
        sparse = self._sparse
        if sparse is None:
            raise RuntimeError("windows: there are no sparse latents yet")
        (frames, height, width), videos, pairs = sampler.config.unet.latent, len(seeds), self.hierarchy.pairs
        before = self.hierarchy.sparse(self._predictions) - sparse.shape[2]  # those that are forgotten
        mask = torch.arange(frames) % self.hierarchy.spacing == 0
        # One row per window and video, window after window.
        clips = sparse.new_zeros(len(windows) * videos, sparse.shape[1], frames, height, width)
        for row, number in enumerate(windows):
            start = number * pairs - before
            clips[row * videos : (row + 1) * videos, :, mask] = sparse[:, :, start : start + pairs + 1]
        row_seeds = list(seeds) * len(windows)
        numbers = [number for number in windows for _ in seeds]
        row_conditions = Conditions(*(None if t is None else torch.cat([t] * len(windows)) for t in conditions))
        known = sampler.known(row_seeds, Known(clips, mask), numbers)
        latents = sampler.latents(
            row_seeds, row_conditions, known=known, window=numbers, progress=of_window(progress, windows[-1])
        )
        self._sparse = sparse[:, :, -frames:].clone()  # more than what a later window or prediction needs
        parts = [latents[:videos, :, :1]] if windows.start == 0 else []  # windows share a latent
        return torch.cat((*parts, *(window[:, :, 1:] for window in latents.split(videos))), dim=2)


def with_end(windows: Iterable[Window]) -> Iterator[tuple[Window, bool]]:
    """Every window, and whether it is the last one."""
    iterator = iter(windows)
    window = next(iterator, None)
    while window is not None:
        following = next(iterator, None)
        yield window, following is None
        window = following


def of_window(progress: LongProgress | None, window: int) -> Progress | None:
    """Reports the network calls of one window."""
    return None if progress is None else lambda part, done, calls: progress(window, part, done, calls)
