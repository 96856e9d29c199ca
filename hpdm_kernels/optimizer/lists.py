"""The lists of tensors that an optimizer steps together, and the numbers of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor


class Lists(NamedTuple):
    """Tensors of ``n`` parameters: entry i of every list has the shape and the strides of parameter i, and is dense."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    """Of their dtype, or of 16 bits; none where only moments are needed."""
    exp_avgs: Sequence[Tensor]
    """First moments."""
    exp_avg_sqs: Sequence[Tensor]
    """Second moments."""
    averages: Sequence[Sequence[Tensor]]
    """Moving averages of the parameters: a list of ``n`` for each length."""

    @property
    def columns(self) -> list[Sequence[Tensor]]:
        """All lists that have entries, in this order."""
        return [self.params, *([self.grads] if self.grads else []), self.exp_avgs, self.exp_avg_sqs, *self.averages]


class Adam(NamedTuple):
    """The numbers of an Adam step that are the same for all of a group's parameters."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def grouped(averages: Sequence[Tensor], n: int) -> list[Sequence[Tensor]]:
    """Averages that were concatenated for a registered op, whose schema has no nested lists, ``n`` at a time."""
    return [averages[first : first + n] for first in range(0, len(averages), n)] if n else []


def flat(t: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of memory."""
    return t.view(-1) if t.is_contiguous() else t.as_strided((t.numel(),), (1,))


def is_dense(t: Tensor) -> bool:
    """Whether a tensor's elements fill one piece of memory, each place once, in any order of the axes."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(t.shape, t.stride()) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def pieces(columns: Sequence[Sequence[Tensor]], most: int) -> Iterator[tuple[list[int], list[list[Tensor]]]]:
    """Parts of the tensors of all lists, about ``most`` elements of each list at a time.

    Yields:
        The number of the parameter that each part is of, and for every list the parts. Small tensors are whole.
    """
    owners: list[int] = []
    parts: list[list[Tensor]] = [[] for _ in columns]
    left = most
    for i, rows in enumerate(zip(*columns, strict=True)):
        size = rows[0].numel()
        if size <= most:
            split: list[Sequence[Tensor]] = [[t] for t in rows] if size else [[] for _ in rows]
        else:
            split = [flat(t).split(most) for t in rows]
        for row in zip(*split, strict=True):
            if owners and row[0].numel() > left:
                yield owners, parts
                owners, parts, left = [], [[] for _ in columns], most
            owners.append(i)
            for part, t in zip(parts, row, strict=True):
                part.append(t)
            left -= row[0].numel()
    if owners:
        yield owners, parts
