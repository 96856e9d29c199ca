"""``--micro-batch auto``: as many clips at a time as fit into the memory of a device, by prediction."""

from __future__ import annotations

from collections.abc import Callable

from hpdm.planning.training_cost import StepCost


def fitting_micro_batch(share: int, memory: int, cost: Callable[[int], StepCost], sharded_over: int = 1) -> int:
    """The largest micro-batch that fits and divides a process's share of the batch.

    The same as the largest such divisor of ``share`` up to :func:`hpdm.planning.training_cost.largest_batch`, found by
    bisecting the divisors alone, as each prediction takes seconds.

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

    smallest = peak(1)
    if smallest > memory:
        raise ValueError(
            f"micro_batch: got auto with {memory / 1e9:.2f} GB, but one clip needs {smallest / 1e9:.2f} GB; expected "
            "more memory, --recompute block, --precision bf16, or --parallel fsdp over more processes"
        )
    if share > 1 and peak(share) <= memory:
        return share
    fits, fails = 0, len(sizes) - 1  # indices into sizes
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if peak(sizes[middle]) <= memory:
            fits = middle
        else:
            fails = middle
    return sizes[fits]
