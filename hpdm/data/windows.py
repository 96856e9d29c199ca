"""Which frames of a clip a training window shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hpdm.data.decode import VideoInfo


def all_frames(clip: VideoInfo, stride: int, fps: float | None) -> list[int]:
    """The frames of a clip's longest window: all of it at this stride and rate, from its first frame on."""
    longest, beyond = 1, 2  # one frame always fits
    while Window(beyond, stride, fps).starts(clip):
        longest, beyond = beyond, 2 * beyond
    while beyond - longest > 1:
        middle = (longest + beyond) // 2
        longest, beyond = (middle, beyond) if Window(middle, stride, fps).starts(clip) else (longest, middle)
    return Window(longest, stride, fps).numbers(clip, 0)


@dataclass(frozen=True)
class Window:
    """Frames of equal distance, counted in frames of the clip or, with ``fps``, in time."""

    frames: int
    stride: int
    fps: float | None
    """Frames per second before ``stride`` counts; ``None`` to count frames as they are stored."""

    def offsets(self, fps: float) -> np.ndarray:
        """The frames of a window, from its first, in a clip of evenly spaced frames, ``fps`` a second: int64 [F]."""
        steps = np.arange(self.frames) * self.stride
        return steps if self.fps is None else np.floor(steps * (fps / self.fps) + 0.5).astype(np.int64)

    def starts(self, clip: VideoInfo) -> int:
        """The number of frames at which a window can start; 0 for a clip that is too short."""
        if self.fps is None or clip.times is None:
            return max(0, clip.frames - int(self.offsets(clip.fps)[-1]))
        # The last frame may be farther away by half a frame's time, as where frames are evenly spaced.
        latest = clip.times[-1] + 0.5 / clip.fps - float(self._seconds()[-1])
        return int(np.searchsorted(np.array(clip.times), latest, side="right"))

    def numbers(self, clip: VideoInfo, start: int) -> list[int]:
        """The frames of the window that starts at frame ``start``: with ``fps``, those nearest in time.

        A window that is longer than the clip goes on from the clip's first frame.
        """
        if self.fps is None or clip.times is None:
            return ((start + self.offsets(clip.fps)) % clip.frames).tolist()
        times = np.array(clip.times)
        length = times[-1] + 1 / clip.fps
        wanted = times[start] + self._seconds()
        wanted = np.where(wanted > length - 0.5 / clip.fps, wanted % length, wanted)
        right = np.searchsorted(times, wanted).clip(1, len(times) - 1)
        nearer = wanted - times[right - 1] <= times[right] - wanted
        return (right - nearer).tolist()

    def too_short(self, clip: VideoInfo) -> str:
        """What a clip without a start lacks, for messages."""
        options = f"frames={self.frames}, stride={self.stride}"
        if self.fps is None:
            return f"got {clip.frames} frames, expected >= {int(self.offsets(clip.fps)[-1]) + 1} ({options})"
        if clip.times is None:
            needed = int(self.offsets(clip.fps)[-1]) + 1
            return f"got {clip.frames} frames, expected >= {needed} ({options}, fps={self.fps:g} of {clip.fps:g})"
        needed_s = float(self._seconds()[-1])
        return f"got {clip.times[-1]:.2f} s, expected >= {needed_s:.2f} s ({options}, fps={self.fps:g})"

    def _seconds(self) -> np.ndarray:
        """Seconds from the first frame of a window to each, float64 ``[F]``; there must be an ``fps``."""
        return np.arange(self.frames) * (self.stride / (self.fps or 1.0))
