"""Videos of any length: how they are sampled, and what is yielded of them. Memory does not grow with the length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from hpdm.checks import check_choice
from hpdm.windows import Windows

Scheme = Literal["autoregressive", "joint", "hierarchical", "rolling"]
""""autoregressive": each window knows the last frames of the one before. "joint": a few overlapping windows at a time
are sampled together and averaged (Wang et al. 2023), from noise that they share (Qiu et al. 2024). "hierarchical":
first frames of level 0 that are far apart, then those between (He et al. 2022). "rolling": one frame of level 0 after
another, with noise that rises along the window (Ruhe et al. 2024)."""

LongProgress = Callable[[int, int, int, int], None]
"""Called as (window, part, network calls done, network calls in all) after every network call."""


@dataclass(frozen=True)
class LongOptions:
    """How a video that is longer than a clip is sampled.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    scheme: Scheme = "autoregressive"
    """How level 0 goes on from window to window."""
    known: int | None = None
    """Frames of level 0 (latents) that a window knows of the one before. Default: half of the window. Latent diffusion
    with the scheme "hierarchical": sparse latents that a prediction knows."""
    remember: bool = True
    """Start the latents of a window from those of the window before, if the run was trained with --memory."""
    together: int = 4
    """Windows that the scheme "joint" samples together."""

    def __post_init__(self) -> None:
        check_choice("scheme", self.scheme, Scheme)
        for name, lowest in (("known", 1), ("together", 2)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"{name}: got {value}, expected at least {lowest}")


State = dict[str, Tensor]
"""All that the rest of a video depends on; its size does not depend on the length."""


class Segment(NamedTuple):
    """The next frames of B videos, finished."""

    number: int
    """Number of the last window that is finished."""
    frames: Tensor
    """``[B, C, n, H, W]`` float32 in [-1, 1]."""
    state: State
    """From which the video can go on after this segment."""


class LongSampler(Protocol):
    """Samples videos of any length, segment by segment.

    A collective: under ``torch.distributed`` every rank makes the same call and gets the same videos.
    """

    windows: Windows
    """How windows follow each other; a segment is what is new of one, or of several at once."""

    def __init__(self, model: Any, options: Any, long: LongOptions) -> None:
        """``model`` is in eval mode, on the device to sample on."""

    def check(self, frames: int, first: Sequence[Tensor] = (), last: Sequence[Tensor] = ()) -> None:
        """Checks the arguments of :meth:`segments`, which have the same names.

        Raises:
            ValueError: no frames, or fewer than are given; frames that the scheme cannot start from or end with; or
                more than one window for a model without known frames.
        """
        ...

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
        """Yields the segments of one video per seed as they are finished.

        The first frames of a video do not depend on how many are asked for.

        Args:
            seeds: B seeds, one per video.
            frames: frames N of the videos.
            labels, text, text_mask: as of :class:`hpdm.sampling.Sampler`.
            first: for each part, its first frames, which are given: ``[B, C, n, h, w]`` in [-1, 1].
            last: for each part, its last frames.
            levels: called with the number of a window: its lowest parts, all of whose frames are given.
            state: of an interrupted call with the same arguments, after ``done`` windows.
            done: windows whose segments are not yielded again.
            progress: called after every network call.

        Raises:
            ValueError: as :meth:`check`.
        """
        ...
