"""Counts memory, FLOPs and memory traffic of PyTorch code, on real or fake tensors.

Fake tensors have shapes and storages but no data, so every operation runs through PyTorch at any size in seconds. Each
storage is counted when it is allocated and when it is freed. An op of :mod:`hpdm_kernels` with matrix products is
counted as its portable implementation in PyTorch's own operations, or as the host code of its Triton kernels, whose
launches are left out; workspace is included either way. Not counted: what PyTorch's own operations allocate inside, the
allocator's rounding and fragmentation, the CUDA context.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

import hpdm_kernels  # registers the ops, which fills these tables  # noqa: F401
from hpdm.planning.groups import GROUPS, group_of
from hpdm_kernels._backend import IMPLEMENTATIONS, PORTABLE

OPENED = ("fuse_context_fwd", "fuse_context_bwd", "read_tokens_fwd", "read_tokens_bwd")
"""Registered ops with matrix products, whose portable implementations are run and counted. Those of the other ops read
values of tensors, which fake tensors do not have."""


@contextmanager
def fake_fp32() -> Iterator[None]:
    """Within the block new tensors have no data, and are fp32 unless another dtype is requested."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with FakeTensorMode():
            yield
    finally:
        torch.set_default_dtype(before)


class Ledger(TorchDispatchMode):
    """Counts what runs within the block: storages allocated and freed, FLOPs, memory traffic.

    Attributes:
        flops: of matrix products and attention; a multiply-add is two.
        moved: bytes, if every operation reads each input and writes each result once, and what it changes in place;
            views move nothing. An op of :mod:`hpdm_kernels` moves what its portable implementation does, or with
            Triton's kernels its inputs, its results, and what it allocates for itself twice.
        moved_by_group: the same by :data:`hpdm.planning.groups.GROUPS`.
        group: where all operations from here on belong, whatever their names; ``None``: by their names.
        operations: FLOPs and bytes of each operation but views. Here an op of :mod:`hpdm_kernels` is one operation,
            which reads its inputs and writes its results and what it changes, as its kernels do but for workspace.

    Args:
        kernels: ``"triton"`` to count the ops as the host code of their Triton kernels, to be used inside of
            :func:`hpdm_kernels.dry_run.launches_left_out`; else their portable implementations are counted.
    """

    def __init__(self, kernels: str = "torch") -> None:
        super().__init__()
        self.flops = 0
        self.moved_by_group = dict.fromkeys(GROUPS, 0)
        self.group: str | None = None
        self.operations: list[tuple[int, int]] = []
        self._inside: str | None = None
        """The group of the op whose implementation runs, if one does."""
        self._kernels = kernels == "triton"
        self._changes: list[tuple[int, int]] = []  # (number of the storage, its bytes; negative when it is freed)
        self._labels: dict[int, str] = {}  # by number of the storage
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}  # by address: the storage and its number
        portable = {getattr(torch.ops.hpdm, name): PORTABLE[getattr(torch.ops.hpdm, name)] for name in OPENED}
        self._opened = IMPLEMENTATIONS if self._kernels else portable
        self._formulas: dict[Any, Callable[..., int]] = _further_formulas() | flop_registry

    def label(self, tensors: Iterable[Tensor], category: str) -> None:
        """Puts the storages of ``tensors`` into a category."""
        for tensor in tensors:
            self._labels[self._number(tensor)] = category

    def label_living(self, category: str) -> None:
        """Puts every storage that is alive and has no category into one."""
        for _, number in self._alive.values():
            self._labels.setdefault(number, category)

    def at_peak(self, leaving_out: Collection[str] = ()) -> dict[str, int]:
        """Bytes per category at the peak, when most bytes are alive; ``"temporaries"`` have no other category.

        Args:
            leaving_out: categories that do not count.
        """
        changes = [(n, size) for n, size in self._changes if self._labels.get(n, "temporaries") not in leaving_out]
        alive = list(accumulate(size for _, size in changes))
        peak = max(range(len(alive)), key=alive.__getitem__, default=-1)
        out: dict[str, int] = {}
        for number, size in changes[: peak + 1]:
            category = self._labels.get(number, "temporaries")
            out[category] = out.get(category, 0) + size
        return out

    @property
    def moved(self) -> int:
        """Bytes of all groups."""
        return sum(self.moved_by_group.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # the most frequent call by far; it only reads an attribute
            return args[0].fake_device
        kwargs = kwargs or {}
        opened = self._opened.get(func._overloadpacket)
        formula = self._formulas.get(func._overloadpacket)
        if opened is None and formula is None and _is_composite(func):
            # Below autograd, where the implementations of ops run, linear is not a product yet.
            with self:
                return func.decompose(*args, **kwargs)
        before, group = self.flops, self._inside or self.group or group_of(func.name())
        # Collect the inputs before the call, which may free some of them.
        inputs = {t.untyped_storage()._cdata: t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        bytes_read = sum(t.numel() * t.element_size() for t in inputs.values())
        first = len(self._changes)
        if opened is not None:
            with self, self._one_operation(group):
                out = opened(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in results:
            self._number(tensor)
        # What is changed in place may be returned as well, or not, as by operations on lists.
        written = {t.untyped_storage()._cdata: t for t in [*results, *_changed(func, args, kwargs)]}
        in_kernels = self._kernels and self._inside is not None
        if formula is not None and not in_kernels and (opened is None or self._kernels):
            self.flops += int(formula(*args, **kwargs, out_val=out))
        if not _is_view(func):
            moved = bytes_read + sum(t.numel() * t.element_size() for t in written.values())
            if opened is None and not in_kernels:
                self.moved_by_group[group] += moved
            elif opened is not None and self._kernels:
                self.moved_by_group[group] += moved + 2 * self._workspace(first, results)
            if self._inside is None:
                self.operations.append((self.flops - before, moved))
        return out

    @contextmanager
    def _one_operation(self, group: str) -> Iterator[None]:
        """Within the block operations are parts of the one that began it, which belongs to ``group``."""
        outside, self._inside = self._inside, group
        try:
            yield
        finally:
            self._inside = outside

    def _workspace(self, first: int, results: Iterable[Tensor]) -> int:
        """Bytes allocated since change number ``first``, without those of ``results``."""
        of_results = {self._number(t): t.untyped_storage().nbytes() for t in results}
        kept = sum(size for number, size in of_results.items() if number >= first)
        return sum(size for _, size in self._changes[first:] if size > 0) - kept

    def _number(self, tensor: Tensor) -> int:
        """The number of a tensor's storage, which is counted as allocated if it is new."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._alive:
            return self._alive[address][1]
        number, size = len(self._changes), storage.nbytes()

        def freed(_: Any) -> None:
            del self._alive[address]
            self._changes.append((number, -size))

        self._alive[address] = weakref.ref(storage, freed), number
        self._changes.append((number, size))
        return number


def _further_formulas() -> dict[Any, Callable[..., int]]:
    """FLOPs of operations for which PyTorch has no formulas: its attention on the CPU, and a product in place."""

    def forward(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(q.shape, k.shape, v.shape)

    def backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
        # Two products forward; five backward, where the scores are computed again.
        return sdpa_flop_count(q.shape, k.shape, v.shape) * 5 // 2

    aten = torch.ops.aten
    return {
        aten.baddbmm_: flop_registry[aten.baddbmm],
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def _changed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among an operation's arguments that it writes to."""
    names = _changed_arguments(func)
    values = [args[place] if place < len(args) else kwargs.get(name) for place, name in names]
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


@functools.cache
def _changed_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Places and names of the arguments that an operation writes to, by its schema."""
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


@functools.cache
def _is_composite(func: Any) -> bool:
    """Whether an operation is made of others, whose FLOPs count."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


@functools.cache
def _is_view(func: Any) -> bool:
    """Whether an operation returns its input in another shape, without a copy."""
    # Matmul folds axes by this one, whose schema does not say that the result is its input.
    if func is torch.ops.aten._unsafe_view.default:
        return True
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
