"""Shared memory of many blocks, with the hazards between warps and with copies that are still under way.

Execution in lock-step would hide a missing barrier or wait: values come out right by luck. So every byte remembers, in
units of the smallest access of the kernel, who wrote and read it since the last barrier of its block.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hpdm_kernels.aot.execution.counts import Traffic

Report = Callable[[str, int], None]
_UINTS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_WARPS = 64
_SEVERAL = _WARPS - 1
"""In place of a warp's number: several warps."""
_NEVER = -_WARPS


class SharedMemory:
    """Shared memory of ``blocks`` blocks of ``threads`` threads.

    Args:
        blocks: number of blocks.
        threads: threads per block.
        size: bytes per block, a multiple of 16.
        unit: bytes of the smallest access, 1, 2 or 4.
    """

    def __init__(self, blocks: int, threads: int, size: int, unit: int) -> None:
        self.size, self.unit = size, unit
        self.block = np.repeat(np.arange(blocks), threads)
        """Block of each lane."""
        self._warp = np.tile(np.arange(threads) // 32, blocks)
        self._epoch = np.zeros(blocks, np.int64)
        self.bytes = np.full(blocks * size, 0xCB, np.uint8)
        units = blocks * size // unit
        self._written = np.zeros(units, bool)
        self._copied_to = np.zeros(units, bool)  # by a cp.async in flight
        self._multiplied = np.zeros(units, bool)  # read by a wgmma in flight
        self._unfenced = np.zeros(units, bool)  # written, but not yet visible to wgmma
        # Who wrote and read each unit last: epoch * _WARPS + warp.
        self._writer = np.full(units, _NEVER, np.int64)
        self._reader = np.full(units, _NEVER, np.int64)

    @property
    def barriers(self) -> NDArray:
        """How many times the threads of each lane's block have met."""
        return self._epoch[self.block]

    def barrier(self, blocks: NDArray) -> None:
        """All warps of ``blocks`` (indices or bool) have met."""
        self._epoch[blocks] += 1

    def fence(self, lanes: NDArray) -> None:
        """Makes earlier writes of the blocks of ``lanes`` visible to wgmma."""
        units = self.size // self.unit
        for block in np.unique(self.block[lanes]):
            self._unfenced[block * units : (block + 1) * units] = False

    def check(
        self, addresses: NDArray, size: int, lanes: NDArray, report: Report, traffic: Traffic, *, write: bool
    ) -> NDArray:
        """The lanes whose access of ``size`` bytes is allowed; reports the others and hazards, counts wavefronts."""
        bad = lanes & ((addresses < 0) | (addresses + size > self.size) | (addresses % size != 0))
        if bad.any():
            report(f"access of {size} bytes outside of shared memory or misaligned", int(bad.sum()))
        allowed = lanes & ~bad
        _count_wavefronts(addresses, size, allowed, traffic)
        units, mark = self._units(addresses, size, allowed)
        if write:
            self._note_write(units, mark, report)
        else:
            self._note_read(units, mark, report)
        return allowed

    def load(self, addresses: NDArray, width: int, count: int, lanes: NDArray) -> NDArray:
        """``[lanes, count]`` numbers of ``width`` bytes; 0 in lanes that load nothing."""
        values = np.zeros((len(addresses), count), _UINTS[width])
        values[lanes] = self.bytes.view(_UINTS[width])[self._places(addresses, lanes, width, count)]
        return values

    def store(self, addresses: NDArray, values: NDArray, lanes: NDArray, report: Report) -> None:
        """Stores ``values [lanes, count]``, unsigned."""
        memory = self.bytes.view(values.dtype)
        at = self._places(addresses, lanes, values.dtype.itemsize, values.shape[1])
        memory[at] = values[lanes]
        lost = (memory[at] != values[lanes]).any(1)
        if lost.any():
            report("race: lanes write different values to one place of shared memory", int(lost.sum()))

    def begin_copy(self, addresses: NDArray, size: int, lanes: NDArray) -> None:
        """A cp.async to ``addresses`` is under way."""
        units, _ = self._units(addresses, size, lanes)
        self._copied_to[units] = True

    def finish_copy(self, addresses: NDArray, values: NDArray, lanes: NDArray) -> None:
        """The bytes ``values [lanes, size]`` of a cp.async have arrived, for the lanes that waited for them."""
        self.bytes[self._places(addresses, lanes, 1, values.shape[1])] = values[lanes]
        units, mark = self._units(addresses, values.shape[1], lanes)
        self._copied_to[units] = False
        self._written[units] = self._unfenced[units] = True
        self._writer[units] = mark

    def begin_product(self, places: NDArray, size: int, block: NDArray, warp: NDArray, report: Report) -> NDArray:
        """A wgmma reads elements of ``size`` bytes; returns the units that it reads.

        Args:
            places: int64 ``[warpgroups, n]``, bytes within the block's shared memory.
            block: int64 ``[warpgroups]``.
            warp: int64 ``[warpgroups]``, the first warp of each group.
        """
        outside = (places < 0) | (places + size > self.size)
        if outside.any():
            report("wgmma reads outside of shared memory", int(outside.any(1).sum()))
            places = np.where(outside, 0, places)
        at = (block[:, None] * self.size + places) // self.unit
        units = (at[..., None] + np.arange(max(1, size // self.unit))).reshape(len(places), -1)
        mark = np.broadcast_to((self._epoch[block] * _WARPS + warp)[:, None], units.shape)
        # The four warps of the group read together, so that what one of them has written is as much another's.
        self._note_read(units.ravel(), mark.ravel(), report)
        if self._unfenced[units].any():
            report("wgmma reads what was written without fence.proxy.async", int(self._unfenced[units].any(1).sum()))
        self._multiplied[units] = True
        return units

    def finish_product(self, units: NDArray, block: int) -> None:
        """A wgmma of ``block`` has read ``units`` and was waited for."""
        self._multiplied[units] = False
        self._reader[units] = self._epoch[block] * _WARPS + _SEVERAL

    def _places(self, addresses: NDArray, lanes: NDArray, width: int, count: int) -> NDArray:
        return ((self.block * self.size + addresses)[lanes] // width)[:, None] + np.arange(count)

    def _units(self, addresses: NDArray, size: int, lanes: NDArray) -> tuple[NDArray, NDArray]:
        """The units that lanes access, and the mark of the accessing warp for each."""
        units = self._places(addresses, lanes, self.unit, max(1, size // self.unit))
        mark = (self._epoch[self.block] * _WARPS + self._warp)[lanes]
        return units.ravel(), np.broadcast_to(mark[:, None], units.shape).ravel()

    def _note_read(self, units: NDArray, mark: NDArray, report: Report) -> None:
        unwritten = ~self._written[units] & ~self._copied_to[units]
        if unwritten.any():
            report("read of shared memory that nothing has written", int(unwritten.sum()))
        if self._copied_to[units].any():
            report("race: read of shared memory that a cp.async may still write", int(self._copied_to[units].sum()))
        racing = _other_warp(self._writer[units], mark)
        if racing.any():
            report("race: read after another warp's write without a barrier", int(racing.sum()))
        several = _other_warp(self._reader[units], mark)
        self._reader[units] = mark
        several |= self._reader[units] != mark  # several warps in this very instruction
        self._reader[units[several]] |= _SEVERAL

    def _note_write(self, units: NDArray, mark: NDArray, report: Report) -> None:
        for state, what in (
            (self._copied_to, "race: write over a cp.async in flight"),
            (self._multiplied, "race: write over what a wgmma may still read"),
        ):
            if state[units].any():
                report(what, int(state[units].sum()))
        for last, what in ((self._writer, "write"), (self._reader, "read")):
            racing = _other_warp(last[units], mark)
            if racing.any():
                report(f"race: write after another warp's {what} without a barrier", int(racing.sum()))
        self._written[units] = self._unfenced[units] = True
        self._writer[units] = mark


def _other_warp(last: NDArray, mark: NDArray) -> NDArray:
    """Whether the last access was in the same epoch, by another warp."""
    return (last // _WARPS == mark // _WARPS) & (last != mark)


def _count_wavefronts(addresses: NDArray, size: int, lanes: NDArray, traffic: Traffic) -> None:
    """Words of different rows in one of the 32 banks take turns; accesses of 8 and 16 bytes go in parts of a warp."""
    lanes_per_part = 32 if size <= 4 else 128 // size
    active = lanes.reshape(-1, lanes_per_part)
    words = (addresses // 4).reshape(-1, lanes_per_part)[..., None] + np.arange(max(1, size // 4))
    words = np.sort(np.where(active[..., None], words, -1).reshape(len(active), -1), axis=1)
    distinct = (words >= 0) & (np.diff(words, axis=1, prepend=-2) != 0)
    bank = np.arange(len(words))[:, None] * 32 + words % 32
    per_bank = np.bincount(bank[distinct], minlength=len(words) * 32).reshape(-1, 32)
    requests = int(lanes.reshape(-1, 32).any(1).sum())
    traffic.add(requests, int(per_bank.max(1).sum()), int(active.any(1).sum()))
