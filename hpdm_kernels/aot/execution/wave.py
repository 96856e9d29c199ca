"""The state of the blocks that are executed together: registers, memory, copies and products that are under way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpdm_kernels.aot.execution.counts import Counts
from hpdm_kernels.aot.execution.global_memory import GlobalMemory, Threads
from hpdm_kernels.aot.execution.origins import Origin
from hpdm_kernels.aot.execution.program import Program
from hpdm_kernels.aot.execution.shared_memory import SharedMemory

WARPGROUP = 128
"""Lanes of the four warps that execute a wgmma together."""


class ExecutionError(Exception):
    """The execution cannot go on."""


@dataclass
class Copy:
    """A cp.async under way."""

    addresses: NDArray
    values: NDArray
    """uint8 ``[lanes, size]``."""
    lanes: NDArray
    """Lanes whose copy has not been waited for, bool."""
    group: NDArray
    """Number of the group that each block commits it with, ``[blocks]``."""


@dataclass
class PendingProduct:
    """A wgmma under way."""

    accumulator: frozenset[str]
    """Registers that must not be read or written yet."""
    operand: frozenset[str]
    """Registers that must not be written yet."""
    units: Mapping[int, Sequence[NDArray]]
    """Units of shared memory that it reads, by number of the warpgroup."""
    waiting: NDArray
    """Warpgroups that have not waited for it, bool."""
    group: NDArray
    """Number of the group that each warpgroup commits it with."""


class Wave:
    """Blocks ``blocks`` of a launch; all arrays have one entry per lane, a thread of one of the blocks.

    Args:
        program: the kernel.
        blocks: numbers of the blocks in the grid.
        grid: programs per axis.
        parameters: the memory of parameters, uint8.
        memory: global memory.
        shared_size: bytes of shared memory per block.
        unit: bytes of the smallest access to shared memory.
        counts: gets the counts.
        findings: gets what is wrong, by instruction and description.
    """

    def __init__(
        self,
        program: Program,
        blocks: NDArray,
        grid: tuple[int, int, int],
        parameters: NDArray,
        memory: GlobalMemory,
        shared_size: int,
        unit: int,
        counts: Counts,
        findings: Counter[tuple[int, str]],
    ) -> None:
        self.threads, self.parameters, self.memory = program.threads, parameters, memory
        self.counts, self._findings = counts, findings
        self.blocks, self.lanes = len(blocks), len(blocks) * program.threads
        self.everyone = np.ones(self.lanes, bool)
        self._numbers = (blocks[:, None] * program.threads + np.arange(program.threads)).ravel()
        self.shared = SharedMemory(len(blocks), program.threads, shared_size, unit)
        self.index = 0
        """Of the instruction that is executed."""
        self.origin: Origin = frozenset()
        """Of its global address."""
        self.registers: dict[str, NDArray] = {}
        """Bits of each register, unsigned, or bool for predicates."""
        thread = np.tile(np.arange(program.threads, dtype=np.uint32), len(blocks))
        number = np.repeat(blocks, program.threads)
        special = {"%tid.x": thread, "%ntid.x": np.full(self.lanes, program.threads), "%laneid": thread % 32}
        special |= {"%tid.y": 0 * thread, "%tid.z": 0 * thread, "%warpid": thread // 32}
        for axis, size, place in zip("xyz", grid, (number % grid[0], number // grid[0] % grid[1], number // grid[0])):
            special[f"%ctaid.{axis}"] = place if axis != "z" else place // grid[1]
            special[f"%nctaid.{axis}"] = np.full(self.lanes, size)
        self.registers.update((name, values.astype(np.uint32)) for name, values in special.items())
        self._copies: list[Copy] = []
        self._copy_group = np.zeros(len(blocks), np.int64)
        self.products: list[PendingProduct] = []
        self._product_group = np.zeros(max(1, self.lanes // WARPGROUP), np.int64)
        self.unfenced_registers: set[str] | None = None
        """Read or written since the last wgmma.fence; ``None`` before the first one."""

    @property
    def thread(self) -> Threads:
        """The thread of each lane, and the barriers that it has passed."""
        return Threads(self._numbers, self.shared.barriers, self.threads)

    def report(self, what: str, lanes: int = 1) -> None:
        """Records a finding of the current instruction."""
        self._findings[self.index, what] += lanes

    def active(self, mask: NDArray | None) -> NDArray:
        """The lanes of a mask; ``None`` stands for all."""
        return self.everyone if mask is None else mask

    def whole(self, mask: NDArray | None, size: int, what: str) -> NDArray:
        """Which groups of ``size`` lanes are active; reports groups of which only a part is."""
        groups = self.active(mask).reshape(-1, size)
        active = np.any(groups, axis=1)
        partial = active & ~np.all(groups, axis=1)
        if partial.any():
            report = f"{what} executed by a part of its {'warp' if size == 32 else 'threads'}"
            self.report(report, int(groups[partial].sum()))
        return active

    # ---- copies to shared memory ----

    def begin_copy(self, addresses: NDArray, values: NDArray, lanes: NDArray) -> None:
        """A copy of ``values [lanes, size]`` begins; it is seen only when it was waited for."""
        self.shared.begin_copy(addresses, values.shape[1], lanes)
        self._copies.append(Copy(addresses, values, lanes.copy(), self._copy_group.copy()))

    def commit_copies(self, mask: NDArray | None) -> None:
        """Ends the current group of copies of the active blocks."""
        self._copy_group[self.whole(mask, self.threads, "cp.async.commit_group")] += 1

    def wait_copies(self, mask: NDArray | None, pending: int) -> None:
        """Finishes the copies of the active blocks, but for the last ``pending`` groups."""
        active = self.whole(mask, self.threads, "cp.async.wait_group")
        for copy in self._copies:
            done = active & (copy.group < self._copy_group - pending)
            if done.any():
                lanes = copy.lanes & np.repeat(done, self.threads)
                self.shared.finish_copy(copy.addresses, copy.values, lanes)
                copy.lanes &= ~lanes
        self._copies = [copy for copy in self._copies if copy.lanes.any()]

    # ---- products of wgmma ----

    def begin_product(
        self,
        accumulator: frozenset[str],
        operand: frozenset[str],
        units: Mapping[int, Sequence[NDArray]],
        active: NDArray,
    ) -> None:
        """A product of the ``active`` warpgroups begins."""
        product = PendingProduct(accumulator, operand, units, active.copy(), self._product_group.copy())
        self.products.append(product)

    def commit_products(self, mask: NDArray | None) -> None:
        """Ends the current group of products of the active warpgroups."""
        self._product_group[self.whole(mask, WARPGROUP, "wgmma.commit_group")] += 1

    def wait_products(self, mask: NDArray | None, pending: int) -> None:
        """Finishes the products of the active warpgroups, but for the last ``pending`` groups."""
        active = self.whole(mask, WARPGROUP, "wgmma.wait_group")
        for product in self.products:
            done = active & product.waiting & (product.group < self._product_group - pending)
            for group in np.flatnonzero(done):
                for units in product.units[int(group)]:
                    self.shared.finish_product(units, int(group) * WARPGROUP // self.threads)
            product.waiting &= ~done
        self.products = [product for product in self.products if product.waiting.any()]

    def check_registers(self, used: frozenset[str], written: frozenset[str], mask: NDArray | None) -> None:
        """Reports registers of products that are still computed: results that are used, operands that are changed."""
        for product in self.products:
            if used.isdisjoint(product.accumulator) and written.isdisjoint(product.operand):
                continue
            if (self.active(mask).reshape(-1, WARPGROUP).any(1) & product.waiting).any():
                self.report("race: registers of a wgmma in flight are used before wgmma.wait_group")
