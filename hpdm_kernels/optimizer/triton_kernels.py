"""Kernels of the optimizers: one pass over chunks of many tensors, launched by ``triton_backend``.

A program works on a chunk: ``BLOCK`` neighboring elements of one parameter and of what belongs to it. Which one, tables
in global memory say, so that a launch takes any number of tensors:

    chunks       [C, 2] int32    number of the parameter, and of the chunk in it
    sizes        [n] int64       elements of the parameters
    addresses    [A, n] int64    addresses of the parameters (row 0), of their moments (1, 2), averages (3, ...) and,
                                 where a kernel reads them, of the gradients, in the last row
    corrections  [n, 2] fp32     ``1 / (1 - beta1^t)`` and ``1 / sqrt(1 - beta2^t)`` at step t
    rates        [K] fp32        how much of the new weights the K averages take on
    apply        bool            where it is false nothing is read or written

Parameters, moments and averages are fp32. Offsets in bytes are int64. Sums have a fixed order: there are no atomics.
"""

# Kernels' arguments have Triton's types, not Python's.
# mypy: allow-untyped-defs

from __future__ import annotations

from hpdm_kernels._triton import jit, kernel, tl


@jit
def _chunk_of_program(chunks_ptr, sizes_ptr, BLOCK: tl.constexpr):
    """The parameter of this program's chunk, the chunk's first element, and the number of elements from there on."""
    row = chunks_ptr + tl.program_id(0).to(tl.int64) * 2
    i = tl.load(row)
    first = tl.load(row + 1).to(tl.int64) * BLOCK
    return i, first, tl.load(sizes_ptr + i) - first


@jit
def _elements(addresses_ptr, n, row, i, first, element: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to a chunk's elements of the tensor whose address is in row ``row`` of the table."""
    address = tl.load(addresses_ptr + tl.cast(row, tl.int64) * n + i) + first * (element.primitive_bitwidth // 8)
    origin = address.to(tl.pointer_type(element))
    if ALIGNED:
        # Tells the compiler what it cannot know of a number from memory: a thread then accesses four neighbors at a
        # time, 16 bytes of fp32. With eight neighbors of 16 bits it would take 32 bytes of fp32, in two requests.
        origin = tl.multiple_of(origin, 4 * (element.primitive_bitwidth // 8))
    return origin + tl.arange(0, BLOCK)


@jit
def _read(pointers, left, FULL: tl.constexpr, BLOCK: tl.constexpr):
    """A chunk's elements in fp32, zeros beyond its end. A mask would keep a full chunk from wide accesses."""
    if FULL:
        return tl.load(pointers).to(tl.float32)
    return tl.load(pointers, mask=tl.arange(0, BLOCK) < left, other=0.0).to(tl.float32)


@jit
def _write(pointers, value, left, FULL: tl.constexpr, BLOCK: tl.constexpr):
    if FULL:
        tl.store(pointers, value)
    else:
        tl.store(pointers, value, mask=tl.arange(0, BLOCK) < left)


@jit
def _adam(param, first_moment, second_moment, corrections_ptr, i, eps, weight_decay):
    """The step of Adam with the decay inside, before the learning rate."""
    mean = first_moment * tl.load(corrections_ptr + 2 * i)
    root = tl.sqrt_rn(second_moment) * tl.load(corrections_ptr + 2 * i + 1)
    return tl.div_rn(mean, root + eps) + weight_decay * param


@jit
def _new_moments(
    addresses_ptr, scale_ptr, grad_ptr, n, grad_row, i, first, left, rate1, beta2, rate2,
    FULL: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Reads and writes both moments, and returns them."""
    grads = _elements(addresses_ptr, n, grad_row, i, first, grad_ptr.dtype.element_ty, ALIGNED, BLOCK)
    means = _elements(addresses_ptr, n, 1, i, first, tl.float32, ALIGNED, BLOCK)
    squares = _elements(addresses_ptr, n, 2, i, first, tl.float32, ALIGNED, BLOCK)
    grad = _read(grads, left, FULL, BLOCK) * tl.load(scale_ptr)
    mean = _read(means, left, FULL, BLOCK)
    mean += rate1 * (grad - mean)
    square = beta2 * _read(squares, left, FULL, BLOCK) + rate2 * grad * grad
    _write(means, mean, left, FULL, BLOCK)
    _write(squares, square, left, FULL, BLOCK)
    return mean, square


@jit
def _average(
    addresses_ptr, rates_ptr, n, K, i, first, left, param,
    FULL: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Moves the averages towards the new weights; a rate of 1 copies them exactly."""
    for k in range(K):
        averages = _elements(addresses_ptr, n, 3 + k, i, first, tl.float32, ALIGNED, BLOCK)
        average, rate = _read(averages, left, FULL, BLOCK), tl.load(rates_ptr + k)
        step = param - average
        moved = tl.where(rate < 0.5, average + rate * step, param - (1.0 - rate) * step)
        _write(averages, moved, left, FULL, BLOCK)


@jit
def _adamw_chunk(
    addresses_ptr, corrections_ptr, rates_ptr, scale_ptr, grad_ptr, n, K, i, first, left,
    lr, rate1, beta2, rate2, eps, weight_decay, FULL: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    params = _elements(addresses_ptr, n, 0, i, first, tl.float32, ALIGNED, BLOCK)
    mean, square = _new_moments(
        addresses_ptr, scale_ptr, grad_ptr, n, 3 + K, i, first, left, rate1, beta2, rate2, FULL, ALIGNED, BLOCK
    )
    param = _read(params, left, FULL, BLOCK)
    param -= lr * _adam(param, mean, square, corrections_ptr, i, eps, weight_decay)
    _write(params, param, left, FULL, BLOCK)
    _average(addresses_ptr, rates_ptr, n, K, i, first, left, param, FULL, ALIGNED, BLOCK)


@kernel()
def adamw_kernel(
    addresses_ptr, chunks_ptr, sizes_ptr, corrections_ptr, rates_ptr, scale_ptr, apply_ptr,
    grad_ptr,  # any of the gradients: it tells their dtype and is not read
    n, K, lr, rate1, beta2, rate2, eps, weight_decay,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A chunk's whole step: reads its gradient, and reads and writes its weights, moments and averages once.

    ``rate1`` is ``1 - beta1`` and ``rate2`` is ``1 - beta2``, which fp32 betas would give with few digits.
    """
    if tl.load(apply_ptr) != 0:
        i, first, left = _chunk_of_program(chunks_ptr, sizes_ptr, BLOCK)
        if left >= BLOCK:
            _adamw_chunk(
                addresses_ptr, corrections_ptr, rates_ptr, scale_ptr, grad_ptr, n, K, i, first, left,
                lr, rate1, beta2, rate2, eps, weight_decay, True, ALIGNED, BLOCK,
            )  # fmt: skip
        else:
            _adamw_chunk(
                addresses_ptr, corrections_ptr, rates_ptr, scale_ptr, grad_ptr, n, K, i, first, left,
                lr, rate1, beta2, rate2, eps, weight_decay, False, ALIGNED, BLOCK,
            )  # fmt: skip


@jit
def _lamb_moments_chunk(
    addresses_ptr, corrections_ptr, scale_ptr, grad_ptr, sums_ptr, n, grad_row, i, first, left,
    rate1, beta2, rate2, eps, weight_decay, FULL: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    mean, square = _new_moments(
        addresses_ptr, scale_ptr, grad_ptr, n, grad_row, i, first, left, rate1, beta2, rate2, FULL, ALIGNED, BLOCK
    )
    param = _read(_elements(addresses_ptr, n, 0, i, first, tl.float32, ALIGNED, BLOCK), left, FULL, BLOCK)
    update = _adam(param, mean, square, corrections_ptr, i, eps, weight_decay)
    sums = sums_ptr + tl.program_id(0).to(tl.int64)
    tl.store(sums, tl.sum(param * param, axis=0))
    tl.store(sums + tl.num_programs(0), tl.sum(update * update, axis=0))


@kernel()
def lamb_moments_kernel(
    addresses_ptr, chunks_ptr, sizes_ptr, corrections_ptr, scale_ptr, apply_ptr, grad_ptr,
    sums_ptr,  # [2, C] fp32, written: of the squares of a chunk's weights, and of its Adam step
    n, grad_row, rate1, beta2, rate2, eps, weight_decay,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """LAMB's first pass over a chunk: reads its gradient and weights, reads and writes its moments."""
    if tl.load(apply_ptr) != 0:
        i, first, left = _chunk_of_program(chunks_ptr, sizes_ptr, BLOCK)
        if left >= BLOCK:
            _lamb_moments_chunk(
                addresses_ptr, corrections_ptr, scale_ptr, grad_ptr, sums_ptr, n, grad_row, i, first, left,
                rate1, beta2, rate2, eps, weight_decay, True, ALIGNED, BLOCK,
            )  # fmt: skip
        else:
            _lamb_moments_chunk(
                addresses_ptr, corrections_ptr, scale_ptr, grad_ptr, sums_ptr, n, grad_row, i, first, left,
                rate1, beta2, rate2, eps, weight_decay, False, ALIGNED, BLOCK,
            )  # fmt: skip


@kernel()
def sum_chunks_kernel(
    sums_ptr,  # [2, C] fp32
    begins_ptr,  # [n + 1] int32: a parameter's first chunk, and the one behind its last
    apply_ptr,
    out_ptr,  # [2, n] fp32, written
    n, C, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the chunks of one parameter, in a fixed order; zeros where nothing is applied."""
    i, which = tl.program_id(0) % n, tl.program_id(0) // n
    begin, end = tl.load(begins_ptr + i), tl.load(begins_ptr + i + 1)
    end = tl.where(tl.load(apply_ptr) != 0, end, begin)
    sums = sums_ptr + which.to(tl.int64) * C
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(begin, end, BLOCK):
        chunk = first + tl.arange(0, BLOCK)
        total += tl.load(sums + chunk, mask=chunk < end, other=0.0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, axis=0))


@jit
def _lamb_apply_chunk(
    addresses_ptr, corrections_ptr, rates_ptr, trust_ptr, n, K, i, first, left, lr, eps, weight_decay,
    FULL: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    params = _elements(addresses_ptr, n, 0, i, first, tl.float32, ALIGNED, BLOCK)
    mean = _read(_elements(addresses_ptr, n, 1, i, first, tl.float32, ALIGNED, BLOCK), left, FULL, BLOCK)
    square = _read(_elements(addresses_ptr, n, 2, i, first, tl.float32, ALIGNED, BLOCK), left, FULL, BLOCK)
    param = _read(params, left, FULL, BLOCK)
    update = _adam(param, mean, square, corrections_ptr, i, eps, weight_decay)
    param -= lr * tl.load(trust_ptr + i) * update
    _write(params, param, left, FULL, BLOCK)
    _average(addresses_ptr, rates_ptr, n, K, i, first, left, param, FULL, ALIGNED, BLOCK)


@kernel()
def lamb_apply_kernel(
    addresses_ptr, chunks_ptr, sizes_ptr, corrections_ptr, rates_ptr, apply_ptr,
    trust_ptr,  # [n] fp32
    n, K, lr, eps, weight_decay,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """LAMB's second pass over a chunk: reads its moments, reads and writes its weights and averages.

    The Adam step is computed again: to read the moments moves as much as to write it in the first pass and read it.
    """
    if tl.load(apply_ptr) != 0:
        i, first, left = _chunk_of_program(chunks_ptr, sizes_ptr, BLOCK)
        if left >= BLOCK:
            _lamb_apply_chunk(
                addresses_ptr, corrections_ptr, rates_ptr, trust_ptr, n, K, i, first, left, lr, eps, weight_decay,
                True, ALIGNED, BLOCK,
            )  # fmt: skip
        else:
            _lamb_apply_chunk(
                addresses_ptr, corrections_ptr, rates_ptr, trust_ptr, n, K, i, first, left, lr, eps, weight_decay,
                False, ALIGNED, BLOCK,
            )  # fmt: skip
