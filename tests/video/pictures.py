"""Pictures that carry their own number: a frame in another's place is seen by a computer and by a person.

The top rows hold the number in binary, as black and white blocks. Below, a texture moves by a few pixels per picture,
so that an encoder must predict motion. Some stretches stand still, which encoders store as frames without content.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

HEIGHT, WIDTH = 96, 160
BITS = 7
STILL = ((13, 16), (30, 32))
"""Pictures of these ranges (the end excluded) show what the first of the range shows."""


def shown_number(number: int) -> int:
    """The number that picture ``number`` shows, which is another than its own where the picture stands still."""
    for first, end in STILL:
        if first <= number < end:
            return first
    return number


def picture(number: int, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """Picture ``number`` of a video: uint8 RGB ``[height, width, 3]``. Another ``seed`` has another texture."""
    number = shown_number(number)
    image = np.roll(_texture(height, width, seed), (2 * number, 5 * number), axis=(0, 1))
    block, rows = max(1, width // (BITS + 1)), max(1, height // 4)
    for bit in range(BITS):
        image[:rows, bit * block : (bit + 1) * block] = 235 if number >> bit & 1 else 20
    image[-max(1, height // 6) :, : max(1, width // 6)] = (40, 60, 220)  # tells up from down and left from right
    return image


def pictures(count: int, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> list[np.ndarray]:
    """Pictures 0 to ``count - 1``."""
    return [picture(number, height, width, seed) for number in range(count)]


def number_in(image: np.ndarray) -> int:
    """The number that a decoded picture shows, -1 where a block is neither black nor white."""
    height, width = image.shape[:2]
    block, rows = max(1, width // (BITS + 1)), max(1, height // 4)
    inside = [
        image[rows // 4 : rows - rows // 4, b * block + block // 4 : (b + 1) * block - block // 4] for b in range(BITS)
    ]
    means = [float(part.mean()) for part in inside]
    if any(70 < mean < 185 for mean in means):
        return -1
    return sum(1 << bit for bit, mean in enumerate(means) if mean > 128)


@lru_cache(maxsize=16)
def _texture(height: int, width: int, seed: int) -> np.ndarray:
    """Colored patches of 8 pixels, smoothed a little: uint8 ``[height, width, 3]``."""
    patches = np.random.default_rng(seed).integers(30, 226, (height // 8 + 1, width // 8 + 1, 3))
    image = patches.repeat(8, axis=0).repeat(8, axis=1)[:height, :width].astype(float)
    for axis in (0, 1):
        image = sum(np.roll(image, shift, axis) for shift in (-2, -1, 0, 1, 2)) / 5
    return image.astype(np.uint8)
