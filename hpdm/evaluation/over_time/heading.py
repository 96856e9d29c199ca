"""Turns of an object that no wall explains."""

from __future__ import annotations

import math

import numpy as np

from hpdm.data.synthetic import bounce
from hpdm.evaluation.synthetic_score import Motion, walls

_NEAR = 2 / 64  # share of the shorter side: so near a wall, an object may have met it or not
_SLOW = 0.2 / 64  # share of the shorter side per frame: what is slower has no heading


def unexplained_turn(before: Motion, after: Motion, elapsed: float, radius: float, size: tuple[int, int]) -> float:
    """The angle between the heading of a clip and the one that the motion of the clip before leads to.

    The motion before is continued straight on, reflected by the walls. Along an axis on which the object is near a wall
    at the time, it may move to either side.

    Args:
        before: the motion of the clip before.
        after: the motion of the clip.
        elapsed: frames from the first frame of the clip before to that of the clip.
        radius: half of the object's extent in pixels.
        size: (height, width) of the picture.

    Returns:
        Degrees, 0 to 180; NaN where the object does not move enough in one of the clips.
    """
    unit = min(size)
    if min(before.speed, after.speed) < _SLOW * unit:
        return math.nan
    ahead = np.zeros(2)
    for axis, extent in enumerate((size[1], size[0])):
        low, high = walls(radius, extent)
        where, velocity = bounce(before.position[axis], before.velocity[axis], low, high, np.array(elapsed))
        at = np.array([where, after.position[axis]])
        near_wall = min((at - low).min(), (high - at).min()) < _NEAR * unit
        ahead[axis] = math.copysign(velocity, after.velocity[axis]) if near_wall else velocity
    cosine = ahead @ after.velocity / (before.speed * after.speed)
    return math.degrees(math.acos(min(1.0, max(-1.0, cosine))))
