"""A bounded cache of whole clips at the output size, without eviction."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from hpdm.data.decode import Decoder, Source, read_clip
from hpdm.data.resize import resize_and_crop

_CHUNK = 64  # frames decoded at a time, so that only these are in memory at their stored size


class ClipCache:
    """Clips as uint8 ``[F, H, W, 3]``, by their numbers in the set, with the decoder that read them.

    No clip is evicted: all clips are read equally often, so eviction would only replace one clip by another. The cache
    changes how long a read takes, never its result.

    Args:
        capacity: bytes, shared equally between the worker processes of a DataLoader; 0 for no cache.
        size: (height, width) of the clips.
    """

    def __init__(self, capacity: int, size: tuple[int, int]) -> None:
        self.capacity, self.size = capacity, size
        self.clips: dict[int, tuple[Tensor, str]] = {}
        self.used = 0  # bytes

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "clips": {}, "used": 0}  # a spawned worker process fills its own cache

    def get(self, number: int) -> tuple[Tensor, str] | None:
        """Clip ``number`` and its decoder, if the cache has it."""
        return self.clips.get(number)

    def has_room(self, frames: int) -> bool:
        """Whether a clip of that many frames fits."""
        worker = get_worker_info()
        share = self.capacity // (worker.num_workers if worker else 1)
        return self.used + self._bytes(frames) <= share

    def read(self, number: int, source: Source, frames: int, decoder: Decoder, timeout: float) -> tuple[Tensor, str]:
        """Decodes a whole clip, adds it to the cache and returns it with its decoder.

        Args:
            number: number of the clip in the set.
            source: the clip's file, or the member of a shard.
            frames: number of frames in the clip.
            decoder, timeout: as for :func:`~hpdm.data.decode.read_clip`, which also says what is raised.
        """
        parts, used_decoder = [], ""
        for first in range(0, frames, _CHUNK):
            indices = range(first, min(first + _CHUNK, frames))
            clip = read_clip(source, indices, decoder=decoder, timeout=timeout)
            parts.append(resize_and_crop(torch.from_numpy(clip.frames), self.size))
            used_decoder = clip.decoder
        self.clips[number] = torch.cat(parts), used_decoder
        self.used += self._bytes(frames)
        return self.clips[number]

    def _bytes(self, frames: int) -> int:
        return frames * self.size[0] * self.size[1] * 3
