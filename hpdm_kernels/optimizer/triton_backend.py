"""Launches the kernels of the optimizers: one for AdamW, three for LAMB, whatever the number of tensors.

The tables of chunks depend on sizes alone and are made once. Addresses go to the GPU in one copy from pinned memory,
which nothing waits for, and only where one has changed since the last steps: gradients may lie elsewhere each time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from hpdm_kernels._triton import INTERPRETED, cdiv, launch_grid
from hpdm_kernels.optimizer import triton_kernels as kernels
from hpdm_kernels.optimizer.lists import Adam, Lists

GPU_BLOCK, INTERPRETED_BLOCK = 2048, 4096
"""Elements of a chunk."""
SUM_BLOCK = 1024
NUM_WARPS = 8


class _Chunks(NamedTuple):
    """See ``triton_kernels``."""

    chunks: Tensor
    sizes: Tensor
    begins: Tensor


def _block() -> int:
    return INTERPRETED_BLOCK if INTERPRETED else GPU_BLOCK


@functools.lru_cache(maxsize=64)
def _chunks(sizes: tuple[int, ...], block: int, device: torch.device) -> _Chunks:
    counts = [cdiv(size, block) for size in sizes]
    rows = torch.tensor([(i, c) for i, count in enumerate(counts) for c in range(count)], dtype=torch.int32)
    begins = torch.tensor(list(accumulate(counts, initial=0)), dtype=torch.int32)
    return _Chunks(rows.to(device), torch.tensor(sizes).to(device), begins.to(device))


@functools.lru_cache(maxsize=64)
def _on_device(addresses: tuple[int, ...], device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    """Addresses on the device, for launches on the stream, and in host memory, which a graph would copy again."""
    host = torch.tensor(addresses, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True), host


class _Tables(NamedTuple):
    """Tables of a launch."""

    addresses: Tensor
    chunks: _Chunks
    aligned: bool
    """Whether every tensor begins at a multiple of 16 bytes."""

    @property
    def grid(self) -> tuple[int]:
        return launch_grid(self.chunks.chunks.shape[0])


def _tables(lists: Lists) -> _Tables:
    columns = [
        lists.params,
        lists.exp_avgs,
        lists.exp_avg_sqs,
        *lists.averages,
        *([lists.grads] if lists.grads else []),
    ]
    addresses = tuple([t.data_ptr() for t in chain.from_iterable(columns)])
    device = lists.params[0].device
    chunks = _chunks(tuple([p.numel() for p in lists.params]), _block(), device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _Tables(_on_device(addresses, device, stream)[0], chunks, not any(address % 16 for address in addresses))


def _corrections(steps: Tensor, adam: Adam) -> Tensor:
    """``[n, 2]`` fp32: what the moments are multiplied by, see ``triton_kernels``."""
    counts = steps.double()
    return torch.stack((1 / (1 - adam.beta1**counts), (1 - adam.beta2**counts).rsqrt()), dim=1).float()


def _numbers(adam: Adam) -> Sequence[float]:
    return 1 - adam.beta1, adam.beta2, 1 - adam.beta2, adam.eps, adam.weight_decay


def adamw(lists: Lists, steps: Tensor, rates: Tensor, scale: Tensor, apply: Tensor, lr: float, adam: Adam) -> None:
    """A step of AdamW and of the averages, in place, where ``apply`` holds."""
    steps.add_(apply)
    with torch.cuda.device_of(steps):
        tables = _tables(lists)
        if tables.grid[0]:
            kernels.adamw_kernel[tables.grid](
                tables.addresses, tables.chunks.chunks, tables.chunks.sizes, _corrections(steps, adam), rates.float(),
                scale.float(), apply, lists.grads[0], len(lists.params), len(lists.averages), lr, *_numbers(adam),
                ALIGNED=tables.aligned, BLOCK=_block(), num_warps=NUM_WARPS,
            )  # fmt: skip


def lamb_moments(lists: Lists, steps: Tensor, scale: Tensor, apply: Tensor, adam: Adam) -> Tensor:
    """New moments in place; squared norms ``[2, n]`` of the weights and of the Adam steps, zeros if not applied."""
    n = len(lists.params)
    steps.add_(apply)
    squares = torch.zeros(2, n, dtype=torch.float32, device=steps.device)
    with torch.cuda.device_of(steps):
        tables = _tables(lists)
        (programs,) = tables.grid
        if programs:
            sums = torch.empty(2, programs, dtype=torch.float32, device=steps.device)
            kernels.lamb_moments_kernel[tables.grid](
                tables.addresses, tables.chunks.chunks, tables.chunks.sizes, _corrections(steps, adam), scale.float(),
                apply, lists.grads[0], sums, n, 3 + len(lists.averages), *_numbers(adam),
                ALIGNED=tables.aligned, BLOCK=_block(), num_warps=NUM_WARPS,
            )  # fmt: skip
            kernels.sum_chunks_kernel[launch_grid(2, n)](
                sums, tables.chunks.begins, apply, squares, n, programs, BLOCK=SUM_BLOCK, num_warps=NUM_WARPS
            )
    return squares


def lamb_apply(lists: Lists, steps: Tensor, trust: Tensor, rates: Tensor, apply: Tensor, lr: float, adam: Adam) -> None:
    """The weights' step, ``trust [n]`` times the Adam steps, and that of the averages, in place."""
    with torch.cuda.device_of(steps):
        tables = _tables(lists)
        if tables.grid[0]:
            kernels.lamb_apply_kernel[tables.grid](
                tables.addresses, tables.chunks.chunks, tables.chunks.sizes, _corrections(steps, adam), rates.float(),
                apply, trust.float(), len(lists.params), len(lists.averages), lr, adam.eps, adam.weight_decay,
                ALIGNED=tables.aligned, BLOCK=_block(), num_warps=NUM_WARPS,
            )  # fmt: skip
