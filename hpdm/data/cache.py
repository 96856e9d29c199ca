"""A bounded cache of whole clips at the output size, without eviction."""

from __future__ import annotations

from torch import Tensor
from torch.utils.data import get_worker_info


class ClipCache:
    """Clips as uint8 ``[F, H, W, 3]``, by their numbers in the set, with the decoder that read them.

    No clip is evicted: all clips are read equally often, so eviction would only replace one clip by another. The cache
    changes how long a read takes, never its result.

    Args:
        capacity: bytes, for clips and what decodes them, shared equally between the worker processes of a DataLoader;
            0 for no cache.
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

    def has_room(self, frames: int, decoder: int) -> bool:
        """Whether a clip of that many frames fits, beside a decoding process of ``decoder`` bytes."""
        worker = get_worker_info()
        share = self.capacity // (worker.num_workers if worker else 1)
        return self.used + self._bytes(frames) + decoder <= share

    def add(self, number: int, clip: Tensor, decoder: str) -> None:
        """Keeps a whole clip, uint8 ``[F, H, W, 3]``, for which there must be room."""
        self.clips[number] = clip, decoder
        self.used += self._bytes(len(clip))

    def _bytes(self, frames: int) -> int:
        return frames * self.size[0] * self.size[1] * 3
