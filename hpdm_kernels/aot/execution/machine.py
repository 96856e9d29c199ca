"""Executes a kernel for all blocks of a launch, many blocks at a time.

All lanes whose next instruction is the same execute it together. Where they part, those with the lowest address go
first, until all have met again. Barriers make a block's lanes wait for each other; what an order of execution could
hide is found by :mod:`hpdm_kernels.aot.execution.shared_memory`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hpdm_kernels.aot.execution.arithmetic import DTYPES
from hpdm_kernels.aot.execution.counts import Counts
from hpdm_kernels.aot.execution.global_memory import GlobalMemory
from hpdm_kernels.aot.execution.instructions import UINTS, Step, decode, size_of
from hpdm_kernels.aot.execution.origins import origins
from hpdm_kernels.aot.execution.program import Instruction, Program, UnsupportedInstruction
from hpdm_kernels.aot.execution.wave import ExecutionError, Wave

LANES = 8192
"""How many lanes are executed together: enough to make the cost of numpy's calls small, few enough for the caches."""


class Machine:
    """A kernel that is ready to be executed.

    Args:
        program: the kernel.
        shared: bytes of shared memory per block.

    Raises:
        UnsupportedInstruction: an instruction that is not known; the message names it.
    """

    def __init__(self, program: Program, shared: int) -> None:
        self.program = program
        self._shared = max(16, -(-shared // 16) * 16)
        self._unit = min([4, *(_shared_access(i) for i in program.instructions)])
        self._origins = origins(program)
        self._branches = {"bra", "ret", "bar"}
        self._steps = [None if self._is_control(i) else decode(i) for i in program.instructions]
        self._targets = [self._target(i) for i in program.instructions]

    def run(
        self, arguments: Sequence[float], grid: tuple[int, int, int], memory: GlobalMemory
    ) -> tuple[Counts, list[str]]:
        """Executes all blocks of ``grid``; returns what was counted, and what is wrong.

        Args:
            arguments: numbers and addresses; the parameters behind them, which Triton adds, are 0.
            grid: programs per axis.
            memory: the memory that the kernel may access.

        Raises:
            ExecutionError: the execution cannot go on.
        """
        parameters = self._parameters(arguments)
        counts, findings = Counts(), Counter[tuple[int, str]]()
        total, per_wave = int(np.prod(grid)), max(1, LANES // self.program.threads)
        counts.warps = total * self.program.threads // 32
        with np.errstate(all="ignore"):
            for first in range(0, total, per_wave):
                blocks = np.arange(first, min(total, first + per_wave))
                wave = Wave(self.program, blocks, grid, parameters, memory, self._shared, self._unit, counts, findings)
                self._run_wave(wave)
        instructions = self.program.instructions
        counts.texts = {i: f"{instructions[i].opcode} {instructions[i].source}" for i in counts.issued}
        return counts, [
            f"{what} ({n} lanes): {instructions[i].text}  [{instructions[i].source}]"
            for (i, what), n in findings.items()
        ]

    def _parameters(self, arguments: Sequence[float]) -> NDArray:
        """The memory of parameters, uint8."""
        places = self.program.parameters
        if len(arguments) > len(places):
            raise ValueError(f"arguments: got {len(arguments)}, expected at most {len(places)} for {self.program.name}")
        memory = np.zeros(8 * max(1, len(places)), np.uint8)
        for value, (kind, start) in zip(arguments, places):
            size = size_of(kind)
            if kind[0] == "f":
                bits = np.array([value], DTYPES[kind])
            else:
                bits = np.array([int(value) & (1 << 8 * size) - 1], UINTS[size])
            memory[start : start + size] = bits.view(np.uint8)
        return memory

    def _is_control(self, instruction: Instruction) -> bool:
        return instruction.parts[0] in self._branches and instruction.opcode != "bar.warp.sync"

    def _target(self, instruction: Instruction) -> int:
        """Where a branch goes; behind the last instruction for ``ret``, -1 for a barrier and for other instructions."""
        if instruction.parts[0] == "ret":
            return len(self.program.instructions)
        if instruction.parts[0] == "bra":
            return self.program.labels[str(instruction.operands[0])]
        if instruction.parts[0] == "bar" and self._is_control(instruction) and instruction.operands != ("0",):
            raise UnsupportedInstruction(f"{instruction.text}: a barrier of a part of the block")
        return -1

    def _run_wave(self, wave: Wave) -> None:
        end = len(self.program.instructions)
        pc = 0
        while pc < end:
            wave.index = pc
            wave.counts.issued[pc] += wave.lanes // 32
            step, target = self._steps[pc], self._targets[pc]
            if step is not None:
                self._execute(step, wave, None)
                pc += 1
            elif target < 0:
                wave.shared.barrier(np.ones(wave.blocks, bool))
                pc += 1
            else:
                taken = self._taken(wave, pc)
                if taken.all():
                    pc = target
                elif not taken.any():
                    pc += 1
                else:
                    pc = self._run_divergent(wave, np.where(taken, target, pc + 1))

    def _run_divergent(self, wave: Wave, pcs: NDArray) -> int:
        """Executes lanes at different instructions until all are at the same one, and returns which."""
        end = len(self.program.instructions)
        waiting = np.zeros(wave.lanes, bool)
        while True:
            ready = (pcs < end) & ~waiting
            if not ready.any():
                return end
            pc = int(pcs[ready].min())
            mask = ready & (pcs == pc)
            if mask.all():
                return pc
            wave.index = pc
            wave.counts.issued[pc] += int(mask.reshape(-1, 32).any(1).sum())
            step, target = self._steps[pc], self._targets[pc]
            if step is not None:
                self._execute(step, wave, mask)
                pcs[mask] += 1
            elif target < 0:
                waiting |= mask
                self._release(wave, pcs, waiting)
            else:
                taken = mask & self._taken(wave, pc)
                pcs[mask] += 1
                pcs[taken] = target
                if target == end:
                    self._release(wave, pcs, waiting)

    def _release(self, wave: Wave, pcs: NDArray, waiting: NDArray) -> None:
        """Lets the blocks go on all of whose lanes are at a barrier or have ended; changes ``pcs`` and ``waiting``."""
        end = len(self.program.instructions)
        by_block = (wave.blocks, wave.threads)
        ended = (pcs >= end).reshape(by_block)
        there = waiting.reshape(by_block)
        met = np.all(there | ended, axis=1) & np.any(there, axis=1)
        for block in np.flatnonzero(met):
            if ended[block].any():
                wave.report("barrier that some threads of the block never reach", int(ended[block].sum()))
            places = pcs.reshape(by_block)[block][there[block]]
            if (places != places[0]).any():
                wave.report("divergent barrier: threads of a block wait at different ones", len(places))
        released = waiting & np.repeat(met, wave.threads)
        pcs[released] += 1
        waiting &= ~released
        wave.shared.barrier(met)

    def _taken(self, wave: Wave, pc: int) -> NDArray:
        instruction = self.program.instructions[pc]
        if not instruction.guard:
            return wave.everyone
        return wave.registers[instruction.guard] != instruction.negated

    def _execute(self, step: Step, wave: Wave, mask: NDArray | None) -> None:
        instruction = self.program.instructions[wave.index]
        wave.origin = self._origins[wave.index]
        is_product = instruction.opcode.startswith("wgmma.")
        if wave.products and not is_product:
            wave.check_registers(instruction.registers, instruction.written, mask)
        try:
            step(wave, mask)
        except KeyError as error:
            raise ExecutionError(f"{instruction.text} [{instruction.source}]: {error} was never set") from error
        if wave.unfenced_registers is not None and not is_product:
            wave.unfenced_registers |= instruction.registers


def _shared_access(instruction: Instruction) -> int:
    """Bytes of the elements of an access to shared memory; 4 for other instructions."""
    if instruction.parts[0] in ("ld", "st") and "shared" in instruction.parts:
        return size_of(instruction.parts[-1])
    return 2 if instruction.parts[0] == "wgmma" else 4
