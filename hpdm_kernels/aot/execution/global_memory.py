"""Global memory: the process's own memory where the tensors lie, with checked accesses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hpdm_kernels.aot.execution.counts import Traffic
from hpdm_kernels.aot.execution.origins import Origin

Report = Callable[[str, int], None]
"""Takes a finding and the number of its lanes."""
SECTOR = 32
UNWRITTEN = 0xFFFB
"""16-bit pattern of memory that nothing has written yet, a NaN with an unusual payload in every dtype.

PyTorch and the kernels make other NaNs, and copies of unwritten memory keep the pattern, so that reading a copy is
found, too.
"""
_BASE = 4096
_UINTS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class _AddressSpace:
    """All of the process's address space as one array of bytes, of which only tensors are ever touched."""

    @property
    def __array_interface__(self) -> dict[str, object]:
        return {"shape": ((1 << 47) - 2 * _BASE,), "typestr": "|u1", "data": (_BASE, False), "version": 3}


_VIEWS = {size: np.asarray(_AddressSpace()).view(uint) for size, uint in _UINTS.items()}


def fill_unwritten(address: int, size: int) -> None:
    """Marks ``size`` bytes at ``address``, an even number, as never written."""
    start = (address - _BASE) // 2
    _VIEWS[2][start : start + size // 2] = UNWRITTEN


class Threads(NamedTuple):
    """The thread of each lane, and how far it is."""

    numbers: NDArray
    """Of the threads in the grid, ``[lanes]``."""
    barriers: NDArray
    """How many times the threads of a lane's block have met so far, ``[lanes]``."""
    per_block: int


class GlobalMemory:
    """Loads and stores of all lanes at once, within the extents of tensors.

    An access outside of all tensors, or at an address that is no multiple of its size, is reported and not done.
    Reported, too: a load of bytes that nothing has written, or that another thread stored in this launch, and two
    threads that store different values to one place, whose order nothing defines. Threads of one block may do so if
    they met at a barrier in between. One object serves one launch.

    Args:
        arguments: of the kernel; a pointer may reach its own tensor alone, and so may an address given as a number.
        exposed: tensors that addresses read from memory may reach.
    """

    def __init__(self, arguments: Sequence[object], exposed: Iterable[Tensor] = ()) -> None:
        self._arguments, self._exposed = arguments, list(exposed)
        everything = [value for value in arguments if isinstance(value, Tensor)] + self._exposed
        self._starts, self._stops = _spans(everything)
        self._of_origin: dict[Origin, tuple[NDArray, NDArray]] = {}
        self._storing: dict[int, NDArray] = {}
        """Span -> the thread that stored each 2 bytes, -1 for none, and how many barriers it had passed."""

    def check(
        self, addresses: NDArray, size: int, lanes: NDArray, origin: Origin, report: Report, traffic: Traffic
    ) -> NDArray:
        """The lanes whose access of ``size`` bytes is allowed; reports the others and counts the sectors.

        Args:
            addresses: int64 ``[lanes]``.
            size: bytes per lane.
            lanes: bool ``[lanes]``, which lanes access memory.
            origin: the arguments that the addresses come from.
            report: takes the findings.
            traffic: gets the transactions.
        """
        misaligned = lanes & (addresses % size != 0)
        if misaligned.any():
            report(f"misaligned access of {size} bytes to global memory", int(misaligned.sum()))
        if origin not in self._of_origin:
            self._of_origin[origin] = _spans(self._reachable(origin) if origin else self._exposed)
        starts, stops = self._of_origin[origin]
        span = np.searchsorted(starts, addresses, "right") - 1
        outside = lanes & ((span < 0) | (addresses + size > stops[span]))
        if outside.any():
            report(f"access of {size} bytes of global memory outside of its tensor", int(outside.sum()))
        allowed = lanes & ~misaligned & ~outside
        _count_sectors(addresses, size, allowed, traffic)
        return allowed

    def _reachable(self, origin: Origin) -> list[Tensor]:
        """The tensors of some arguments: pointers, and numbers that are the address of an exposed tensor."""
        arguments = [self._arguments[i] for i in origin if i < len(self._arguments)]
        numbers = [value for value in arguments if isinstance(value, int)]
        named = [t for t in self._exposed if any(t.data_ptr() == number for number in numbers)]
        return [value for value in arguments if isinstance(value, Tensor)] + named

    def load(
        self, addresses: NDArray, width: int, count: int, lanes: NDArray, threads: Threads, report: Report
    ) -> NDArray:
        """``[lanes, count]`` numbers of ``width`` bytes; 0 in lanes that load nothing."""
        values = np.zeros((len(addresses), count), _UINTS[width])
        at = (addresses[lanes] - _BASE)[:, None] // width + np.arange(count)
        values[lanes] = loaded = _VIEWS[width][at]
        if width > 1:
            unwritten = loaded == loaded.dtype.type(int(f"{UNWRITTEN:x}" * (width // 2), 16))
            if unwritten.any():
                report("load of global memory that nothing has written", int(unwritten.any(1).sum()))
        if self._storing:
            others, _ = self._other_threads(addresses, width * count, lanes, threads)
            if others.any():
                report("race: load of global memory that another thread stores", int(others.sum()))
        return values

    def store(self, addresses: NDArray, values: NDArray, lanes: NDArray, threads: Threads, report: Report) -> None:
        """Stores ``values [lanes, count]``, unsigned."""
        width, count = values.dtype.itemsize, values.shape[1]
        at = (addresses[lanes] - _BASE)[:, None] // width + np.arange(count)
        for span in np.unique(self._span(addresses[lanes])):
            size = int(self._stops[span] - self._starts[span])
            self._storing.setdefault(int(span), np.full((-(-size // 2), 2), -1, np.int64))
        others, places = self._other_threads(addresses, width * count, lanes, threads)
        different = others & (_VIEWS[width][at] != values[lanes]).any(1)
        _VIEWS[width][at] = values[lanes]
        different |= (_VIEWS[width][at] != values[lanes]).any(1)  # in this very instruction
        if different.any():
            report("race: threads store different values to one place of global memory", int(different.sum()))
        here = np.stack((threads.numbers[lanes], threads.barriers[lanes]), axis=-1)
        for span, (chosen, units) in places.items():
            self._storing[span][units] = here[chosen][:, None]

    def _span(self, addresses: NDArray) -> NDArray:
        return np.searchsorted(self._starts, addresses, "right") - 1

    def _other_threads(
        self, addresses: NDArray, size: int, lanes: NDArray, threads: Threads
    ) -> tuple[NDArray, dict[int, tuple[NDArray, NDArray]]]:
        """Which of the active lanes access what another thread stored; and where, by span: lanes and units."""
        addresses, numbers, barriers = (a[lanes] for a in (addresses, threads.numbers, threads.barriers))
        others, places = np.zeros(len(addresses), bool), {}
        spans = self._span(addresses)
        for span, storing in self._storing.items():
            chosen = np.flatnonzero(spans == span)
            if len(chosen):
                units = (addresses[chosen] - self._starts[span])[:, None] // 2 + np.arange(max(1, size // 2))
                thread, before = storing[units, 0], storing[units, 1]
                number = numbers[chosen][:, None]
                met = (thread // threads.per_block == number // threads.per_block) & (
                    before < barriers[chosen][:, None]
                )
                others[chosen] = ((thread >= 0) & (thread != number) & ~met).any(1)
                places[span] = chosen, units
        return others, places


def _spans(tensors: Iterable[Tensor]) -> tuple[NDArray, NDArray]:
    """First bytes and ends of the memory of some tensors, ascending and apart."""
    merged: list[list[int]] = []
    for start, stop in sorted(_extent(t) for t in tensors if t.numel()):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], stop)
        else:
            merged.append([start, stop])
    starts, stops = zip(*merged) if merged else ((1 << 47,), (0,))
    return np.array(starts, np.int64), np.array(stops, np.int64)


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte of a tensor, and the byte behind its last one."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _count_sectors(addresses: NDArray, size: int, lanes: NDArray, traffic: Traffic) -> None:
    by_warp = np.sort(np.where(lanes, addresses, -1).reshape(-1, 32), axis=1)
    active = by_warp >= 0
    new = np.diff(by_warp, axis=1, prepend=-2) != 0
    places = (new & active).sum(1)
    # An access is aligned to its size and at most 16 bytes, so it is inside of one sector.
    sectors = ((np.diff(by_warp // SECTOR, axis=1, prepend=-2) != 0) & active).sum(1)
    traffic.add(int(active.any(1).sum()), int(sectors.sum()), int((-(-places * size // SECTOR)).sum()))
