"""What a launch executed: instructions, memory transactions, matrix products."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

SPECIAL_FUNCTIONS = frozenset({"ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"})
"""Instructions of the special-function unit, which has a quarter of the throughput of the others or less."""


@dataclass
class Traffic:
    """Transactions of the requests of one instruction, or of several; a request is one warp's."""

    requests: int = 0
    moved: int = 0
    """32-byte sectors of global memory, or wavefronts of shared memory."""
    ideal: int = 0
    """How many would do: sectors for the distinct bytes, wavefronts without bank conflicts."""

    def add(self, requests: int, moved: int, ideal: int) -> None:
        """Adds the transactions of more requests."""
        self.requests, self.moved, self.ideal = self.requests + requests, self.moved + moved, self.ideal + ideal

    @property
    def ratio(self) -> float:
        """``moved / ideal``; 1 if nothing was moved."""
        return self.moved / self.ideal if self.ideal else 1.0


@dataclass
class Counts:
    """Counts of one launch; the keys are indices of instructions, which ``texts`` names."""

    texts: dict[int, str] = field(default_factory=dict)
    """Opcode and source line of each executed instruction."""
    issued: Counter[int] = field(default_factory=Counter)
    """Warps that issued each instruction."""
    warps: int = 0
    """Warps of the launch."""
    sectors: dict[int, Traffic] = field(default_factory=dict)
    wavefronts: dict[int, Traffic] = field(default_factory=dict)
    flops: int = 0
    """Of matrix instructions, two per product."""

    def by_kind(self) -> Counter[str]:
        """Warp instructions by the first part of the opcode: ``fma``, ``ld.global``."""
        kinds: Counter[str] = Counter()
        for index, count in self.issued.items():
            parts = self.texts[index].split()[0].split(".")
            kinds[".".join(parts[:2]) if parts[0] in ("ld", "st") else parts[0]] += count
        return kinds

    @property
    def instructions_per_warp(self) -> float:
        """Executed instructions of an average warp."""
        return sum(self.issued.values()) / max(1, self.warps)

    @property
    def special_functions(self) -> int:
        """Calls of the special-function unit, of whole warps."""
        return sum(n for kind, n in self.by_kind().items() if kind in SPECIAL_FUNCTIONS)

    @property
    def barriers(self) -> int:
        """Barriers of the block that warps waited at."""
        return self.by_kind()["bar"]

    @staticmethod
    def total(traffic: dict[int, Traffic]) -> Traffic:
        """The sum over all instructions."""
        result = Traffic()
        for part in traffic.values():
            result.add(part.requests, part.moved, part.ideal)
        return result

    def worst(self, traffic: dict[int, Traffic]) -> str:
        """The instruction with the most transactions that are not needed, empty if there are none."""
        index = max(traffic, key=lambda i: traffic[i].moved - traffic[i].ideal, default=None)
        if index is None or traffic[index].moved <= traffic[index].ideal:
            return ""
        return f"{self.texts[index]}: {traffic[index].moved} for {traffic[index].ideal}"
