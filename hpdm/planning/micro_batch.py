"""``--micro-batch auto``: as many clips at a time as fit into the memory of a device, by prediction."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

from hpdm.planning.training_cost import StepCost


def fitting_micro_batch(share: int, memory: int, cost: Callable[[int], StepCost], sharded_over: int = 1) -> int:
    """The largest micro-batch that fits and divides a process's share of the batch.

    The same as the largest such divisor of ``share`` up to :func:`hpdm.planning.training_cost.largest_batch`, in fewer
    predictions: of the divisors alone.

    Args:
        share: clips of a step on one process, >= 1.
        memory: bytes of its device.
        cost: the predicted cost of a step on a number of clips, in a process of its own.
        sharded_over: number of processes that share out the optimizer's state and the moving average. Weights and
            gradients are counted whole, as they are whole for a while.

    Raises:
        ValueError: not even one clip fits; the message says how much it needs.
    """
    sizes = [size for size in range(1, share + 1) if share % size == 0]

    def peak(size: int) -> int:
        predicted = cost(size)
        shared_out = predicted.optimizer_state_bytes + predicted.ema_bytes
        return predicted.peak_bytes - shared_out + shared_out // sharded_over

    fits, fits_bytes = 0, peak(1)  # index into sizes
    if fits_bytes > memory:
        raise ValueError(
            f"micro_batch: got auto with {memory / 1e9:.2f} GB, but one clip needs {fits_bytes / 1e9:.2f} GB; expected "
            "more memory, --recompute block, --precision bf16, or --parallel fsdp over more processes"
        )
    if share == 1:
        return 1
    fails, fails_bytes = len(sizes) - 1, peak(share)
    if fails_bytes <= memory:
        return share
    halve = False
    while fails - fits > 1:
        # The peak is linear from some size on. Below it is constant, where interpolation alone would be slow.
        share_of_gap = (memory - fits_bytes) / (fails_bytes - fits_bytes)
        guess = bisect_right(sizes, sizes[fits] + share_of_gap * (sizes[fails] - sizes[fits])) - 1
        number = (fits + fails) // 2 if halve else max(fits + 1, min(guess, fails - 1))
        halve = not halve
        predicted = peak(sizes[number])
        if predicted <= memory:
            fits, fits_bytes = number, predicted
        else:
            fails, fails_bytes = number, predicted
    return sizes[fits]
