"""Turns instructions into functions on a :class:`~hpdm_kernels.aot.execution.wave.Wave`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from hpdm_kernels.aot.execution import matrix
from hpdm_kernels.aot.execution.arithmetic import DTYPES, operation
from hpdm_kernels.aot.execution.counts import Traffic
from hpdm_kernels.aot.execution.matrix import Product
from hpdm_kernels.aot.execution.program import Address, Instruction, Operand, UnsupportedInstruction
from hpdm_kernels.aot.execution.wave import WARPGROUP, Wave

Mask = NDArray | None
"""Active lanes; ``None``: all."""
Step = Callable[[Wave, Mask], None]
Reader = Callable[[Wave], NDArray]

UINTS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_REGISTER_BYTES = {"%rd": 8, "%rs": 2}


def register_bytes(name: str) -> int:
    """Width of a register by its name: ``%rd1`` has 64 bits, ``%rs1`` 16, ``%r1`` 32."""
    return _REGISTER_BYTES.get(name[:3], 4)


def size_of(kind: str) -> int:
    """Bytes of a type."""
    return np.dtype(DTYPES[kind]).itemsize


# ---- operands ----


def _name(operand: Operand) -> str:
    if not isinstance(operand, str):
        raise UnsupportedInstruction(f"operand {operand}: expected a register or a number")
    return operand


def _names(operand: Operand) -> tuple[str, ...]:
    if isinstance(operand, tuple):
        return operand
    return (_name(operand),)


def _number(text: str) -> int:
    """An integer constant."""
    if not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        raise UnsupportedInstruction(f"operand {text}: expected a register or a number")
    return int(text.rstrip("U"), 0)


def reader(operand: Operand, kind: str) -> Reader:
    """Reads an operand as an array of type ``kind``; constants have a single element.

    Of a register that is wider, as those of ``cvt`` and ``st`` may be, the low bits are read.
    """
    name, dtype = _name(operand), DTYPES[kind]
    if name.startswith("%"):
        if kind == "pred":
            return lambda wave: wave.registers[name]
        size = np.dtype(dtype).itemsize
        if register_bytes(name) > size:
            return lambda wave: wave.registers[name].astype(UINTS[size]).view(dtype)
        return lambda wave: wave.registers[name].view(dtype)
    if kind == "pred":
        constant = np.array([_number(name) != 0])
    elif name.startswith(("0f", "0d")):
        bits = np.array([int(name[2:], 16)], UINTS[4 if name[1] == "f" else 8])
        constant = bits.view(np.float32 if name[1] == "f" else np.float64).view(dtype)
    else:
        size = np.dtype(dtype).itemsize
        constant = np.array([_number(name) & (1 << 8 * size) - 1], UINTS[size]).view(dtype)
    return lambda wave: constant


def _spread(read: Reader, wave: Wave) -> NDArray:
    """An operand with an element for every lane."""
    return np.broadcast_to(read(wave), wave.lanes)


def write(wave: Wave, name: str, values: NDArray, mask: Mask) -> None:
    """Sets a register in the active lanes."""
    if name == "_":
        return
    if values.dtype != np.bool_:
        values = np.ascontiguousarray(values).view(UINTS[values.dtype.itemsize])
    if mask is not None:
        old = wave.registers.get(name)
        values = np.where(mask, values, values.dtype.type(0) if old is None else old)
    elif values.shape != (wave.lanes,):
        values = np.broadcast_to(values, wave.lanes).copy()
    wave.registers[name] = values


def _write_loaded(wave: Wave, name: str, values: NDArray, kind: str, mask: Mask) -> None:
    """Sets a register to loaded values of type ``kind``, extended to its width."""
    size = register_bytes(name)
    if name != "_" and size != values.dtype.itemsize:
        values = np.ascontiguousarray(values).view(DTYPES[kind]).astype(f"{'i' if kind[0] == 's' else 'u'}{size}")
    write(wave, name, values, mask)


def _address(operand: Operand, kind: str) -> Reader:
    if not isinstance(operand, Address):
        raise UnsupportedInstruction(f"operand {operand}: expected an address")
    read, offset = reader(operand.base, kind), operand.offset
    return lambda wave: _spread(read, wave).astype(np.int64) + offset


# ---- registers ----


def _move(instruction: Instruction) -> Step:
    """``mov``, which also packs and unpacks pairs."""
    kind = instruction.parts[-1]
    to, source = instruction.operands
    if isinstance(to, tuple):
        width, read = size_of(kind) // len(to), reader(source, kind)

        def unpack(wave: Wave, mask: Mask) -> None:
            parts = np.ascontiguousarray(_spread(read, wave)).view(UINTS[width]).reshape(wave.lanes, len(to))
            for i, name in enumerate(to):
                write(wave, name, parts[:, i], mask)

        return unpack
    name = _name(to)
    if isinstance(source, tuple):
        part = f"b{8 * size_of(kind) // len(source)}"
        reads = [reader(piece, part) for piece in source]

        def pack(wave: Wave, mask: Mask) -> None:
            parts = np.stack([_spread(read, wave) for read in reads], axis=1)
            write(wave, name, parts.view(UINTS[size_of(kind)])[:, 0], mask)

        return pack
    read = reader(source, kind)
    return lambda wave, mask: write(wave, name, read(wave), mask)


def _arithmetic(instruction: Instruction) -> Step | None:
    found = operation(instruction.opcode)
    if found is None:
        return None
    to, *sources = instruction.operands
    name, compute = _name(to), found.compute
    reads = [reader(source, kind) for source, kind in zip(sources, found.inputs, strict=True)]
    return lambda wave, mask: write(wave, name, compute(*(read(wave) for read in reads)), mask)


def _shuffle(instruction: Instruction) -> Step:
    """``shfl.sync``: lanes read a register of other lanes of their warp."""
    mode = instruction.parts[2]
    to, *sources = instruction.operands
    name, *predicate = _name(to).split("|")
    read, by, clamp = (reader(source, kind) for source, kind in zip(sources, ("b32", "u32", "u32")))
    lane = np.arange(32)

    def step(wave: Wave, mask: Mask) -> None:
        wave.whole(mask, 32, "shfl.sync")
        value, b, c = (_spread(r, wave).reshape(-1, 32) for r in (read, by, clamp))
        b, segment, bound = b.astype(np.int64) & 31, c.astype(np.int64) >> 8 & 31, c.astype(np.int64) & 31
        last, first = lane & segment | bound & ~segment, lane & segment
        source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | b & ~segment}[mode]
        inside = source >= last if mode == "up" else source <= last
        result = np.take_along_axis(value, np.where(inside, source, lane), axis=1)
        write(wave, name, result.ravel(), mask)
        for p in predicate:
            write(wave, p, inside.ravel(), mask)

    return step


def _reduce(instruction: Instruction) -> Step:
    """``redux.sync``: the reduction of a register over a warp."""
    kind = instruction.parts[-1]
    reductions: dict[str, Callable[..., NDArray]] = {"max": np.max, "min": np.min, "add": np.sum}
    reduce = reductions[instruction.parts[2]]
    name, read = _name(instruction.operands[0]), reader(instruction.operands[1], kind)

    def step(wave: Wave, mask: Mask) -> None:
        wave.whole(mask, 32, "redux.sync")
        by_warp = reduce(_spread(read, wave).reshape(-1, 32), axis=1)
        write(wave, name, np.repeat(by_warp.astype(DTYPES[kind]), 32), mask)

    return step


# ---- memory ----


def _vector(parts: Sequence[str]) -> int:
    return next((int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)), 1)


def _load(instruction: Instruction) -> Step:
    _, space, *_, kind = parts = instruction.parts
    names, at = _names(instruction.operands[0]), instruction.operands[1]
    width, count = size_of(kind), _vector(parts)
    if space == "param":
        place = _address(at, "u64" if isinstance(at, Address) and register_bytes(at.base) == 8 else "u32")
        return lambda wave, mask: _write_loaded(
            wave, names[0], wave.parameters.view(UINTS[width])[place(wave) // width], kind, mask
        )
    if space not in ("global", "shared"):
        raise UnsupportedInstruction(f"{instruction.text}: memory {space}")
    address = _address(at, "u64" if space == "global" else "u32")

    def step(wave: Wave, mask: Mask) -> None:
        places, lanes = address(wave), wave.active(mask)
        if space == "global":
            traffic = wave.counts.sectors.setdefault(wave.index, Traffic())
            lanes = wave.memory.check(places, width * count, lanes, wave.origin, wave.report, traffic)
            values = wave.memory.load(places, width, count, lanes, wave.thread, wave.report)
        else:
            traffic = wave.counts.wavefronts.setdefault(wave.index, Traffic())
            lanes = wave.shared.check(places, width * count, lanes, wave.report, traffic, write=False)
            values = wave.shared.load(places, width, count, lanes)
        for i, name in enumerate(names):
            _write_loaded(wave, name, values[:, i], kind, mask)

    return step


def _store(instruction: Instruction) -> Step:
    _, space, *_, kind = parts = instruction.parts
    if space not in ("global", "shared"):
        raise UnsupportedInstruction(f"{instruction.text}: memory {space}")
    width, count = size_of(kind), _vector(parts)
    address = _address(instruction.operands[0], "u64" if space == "global" else "u32")
    names = _names(instruction.operands[1])
    reads = [reader(name, f"b{8 * width}") for name in names]

    def step(wave: Wave, mask: Mask) -> None:
        places, lanes = address(wave), wave.active(mask)
        values = np.stack([_spread(read, wave) for read in reads], axis=1)
        if space == "global":
            traffic = wave.counts.sectors.setdefault(wave.index, Traffic())
            lanes = wave.memory.check(places, width * count, lanes, wave.origin, wave.report, traffic)
            wave.memory.store(places, values, lanes, wave.thread, wave.report)
        else:
            traffic = wave.counts.wavefronts.setdefault(wave.index, Traffic())
            lanes = wave.shared.check(places, width * count, lanes, wave.report, traffic, write=True)
            wave.shared.store(places, values, lanes, wave.report)

    return step


def _async_copy(instruction: Instruction) -> Step:
    """``cp.async``, whose optional last operand is the number of bytes to read; the rest is filled with zeros."""
    if "commit_group" in instruction.parts:
        return lambda wave, mask: wave.commit_copies(mask)
    if "wait_group" in instruction.parts or "wait_all" in instruction.parts:
        pending = _number(_name(instruction.operands[0])) if instruction.operands else 0
        return lambda wave, mask: wave.wait_copies(mask, pending)
    if instruction.parts[:2] != ["cp", "async"] or instruction.parts[3:5] != ["shared", "global"]:
        raise UnsupportedInstruction(instruction.opcode)
    to, source = _address(instruction.operands[0], "u32"), _address(instruction.operands[1], "u64")
    size = _number(_name(instruction.operands[2]))
    length = reader(instruction.operands[3], "u32") if len(instruction.operands) > 3 else None

    def step(wave: Wave, mask: Mask) -> None:
        places, addresses, lanes = to(wave), source(wave), wave.active(mask)
        traffic = wave.counts.wavefronts.setdefault(wave.index, Traffic())
        lanes = wave.shared.check(places, size, lanes, wave.report, traffic, write=True)
        read = np.full(wave.lanes, size) if length is None else _spread(length, wave)
        if (lanes & (read != 0) & (read != size)).any():
            raise UnsupportedInstruction(f"{instruction.text}: a part of the bytes")
        traffic = wave.counts.sectors.setdefault(wave.index, Traffic())
        reading = wave.memory.check(addresses, size, lanes & (read > 0), wave.origin, wave.report, traffic)
        values = wave.memory.load(addresses, 4, size // 4, reading, wave.thread, wave.report)
        wave.begin_copy(places, values.view(np.uint8), lanes)

    return step


# ---- matrices ----


def _registers(wave: Wave, reads: Sequence[Reader]) -> NDArray:
    """Registers of all lanes as ``[warps, n, 32]``."""
    return np.stack([_spread(read, wave).reshape(-1, 32) for read in reads], axis=1)


def _matrix_rows(instruction: Instruction, wave: Wave, mask: Mask, address: Reader, write: bool) -> NDArray:
    """Where the rows of ``ldmatrix`` and ``stmatrix`` are, in units of 2 bytes of all shared memory: [warps, n, 8, 8].

    Lanes 8i to 8i + 7 of a warp have the addresses of the rows of matrix i.
    """
    wave.whole(mask, 32, instruction.parts[0])
    count = next(int(part[1:]) for part in instruction.parts if re.fullmatch(r"x\d", part))
    places = address(wave)
    lanes = wave.active(mask) & (np.arange(wave.lanes) % 32 < 8 * count)
    traffic = wave.counts.wavefronts.setdefault(wave.index, Traffic())
    allowed = wave.shared.check(places, 16, lanes, wave.report, traffic, write=write)
    places = np.where(allowed, wave.shared.block * wave.shared.size + places, 0)
    rows = places.reshape(-1, 32)[:, : 8 * count].reshape(-1, count, 8)
    return rows[..., None] // 2 + np.arange(8)


def _load_matrix(instruction: Instruction) -> Step:
    names, address = _names(instruction.operands[0]), _address(instruction.operands[1], "u32")
    transposed = "trans" in instruction.parts

    def step(wave: Wave, mask: Mask) -> None:
        rows = _matrix_rows(instruction, wave, mask, address, write=False)
        registers = matrix.load_matrix(wave.shared.bytes.view(np.uint16)[rows], transposed)
        for i, name in enumerate(names):
            write(wave, name, registers[:, i].ravel(), mask)

    return step


def _store_matrix(instruction: Instruction) -> Step:
    address = _address(instruction.operands[0], "u32")
    reads = [reader(name, "b32") for name in _names(instruction.operands[1])]
    transposed = "trans" in instruction.parts

    def step(wave: Wave, mask: Mask) -> None:
        rows = _matrix_rows(instruction, wave, mask, address, write=True)
        active = wave.active(mask).reshape(-1, 32)[:, 0]
        values = matrix.store_matrix(_registers(wave, reads), transposed)
        wave.shared.bytes.view(np.uint16)[rows[active]] = values[active]

    return step


def _product(instruction: Instruction) -> Step:
    """``mma.sync``: the product of two fragments, which is added to a third."""
    product = Product.of(instruction.parts)
    if instruction.parts[4:6] != ["row", "col"] or (product.m, product.n) != (16, 8):
        raise UnsupportedInstruction(instruction.opcode)
    to, a, b, c = (_names(operand) for operand in instruction.operands)
    reads_a, reads_b = ([reader(name, "b32") for name in names] for names in (a, b))
    reads_c = [reader(name, "f32") for name in c]

    def step(wave: Wave, mask: Mask) -> None:
        warps = wave.whole(mask, 32, "mma.sync")
        left = matrix.fragment_a(_registers(wave, reads_a), product)
        right = matrix.fragment_b(_registers(wave, reads_b), product)
        result = left @ right.swapaxes(1, 2)
        for i, (name, read) in enumerate(zip(to, reads_c)):
            rows, columns = matrix.accumulator_places(i)
            write(wave, name, result[:, rows, columns].ravel() + read(wave), mask)
        wave.counts.flops += 2 * product.m * product.n * product.k * int(warps.sum())

    return step


def _warpgroup(instruction: Instruction) -> Step:
    """``wgmma``: products of four warps whose second operand, and perhaps the first, is in shared memory."""
    if instruction.parts[1] == "fence":
        return lambda wave, mask: setattr(wave, "unfenced_registers", set())
    if instruction.parts[1] == "commit_group":
        return lambda wave, mask: wave.commit_products(mask)
    if instruction.parts[1] == "wait_group":
        pending = _number(_name(instruction.operands[0]))
        return lambda wave, mask: wave.wait_products(mask, pending)
    product = Product.of(instruction.parts)
    names, first, second, add, negate_a, negate_b, *orders = instruction.operands
    accumulator, in_registers = _names(names), isinstance(first, tuple)
    if [negate_a, negate_b] != ["1", "1"]:
        raise UnsupportedInstruction(f"{instruction.text}: a negated operand")
    transposed = [order == "1" for order in orders]
    transposed_b, transposed_a = bool(transposed and transposed[-1]), len(transposed) == 2 and transposed[0]
    reads_a = [reader(name, "b32") for name in _names(first)] if isinstance(first, tuple) else []
    descriptor_a = None if in_registers else reader(first, "u64")
    descriptor_b, adds = reader(second, "u64"), reader(add, "pred")
    size = 4 // product.per_register

    def operand(wave: Wave, active: NDArray, read: Reader, rows: int, transposed: bool) -> tuple[NDArray, NDArray]:
        """An operand of the active warpgroups, fp32 [groups, rows, k], and the units of shared memory that it is in."""
        descriptors = _spread(read, wave)[::WARPGROUP][active]
        places = matrix.operand_places(descriptors, rows, product, transposed)
        block, warp = wave.shared.block[::WARPGROUP][active], np.flatnonzero(active) * 4 % (wave.threads // 32)
        units = wave.shared.begin_product(places.reshape(len(places), -1), size, block, warp, wave.report)
        inside = np.clip(places, 0, wave.shared.size - size)
        bits = wave.shared.bytes.view(UINTS[size])[(block[:, None, None] * wave.shared.size + inside) // size]
        return product.decode(bits), units

    def step(wave: Wave, mask: Mask) -> None:
        active = wave.whole(mask, WARPGROUP, "wgmma")
        used = frozenset(accumulator) | frozenset(first if isinstance(first, tuple) else ())
        if wave.unfenced_registers is None or not used.isdisjoint(wave.unfenced_registers):
            wave.report("wgmma without a wgmma.fence behind other uses of its registers")
        right, read_units = operand(wave, active, descriptor_b, product.n, transposed_b)
        units = [read_units]
        if descriptor_a is None:
            left = matrix.fragment_a(_registers(wave, reads_a), product).reshape(-1, 64, product.k)[active]
        else:
            left, read_units = operand(wave, active, descriptor_a, 64, transposed_a)
            units.append(read_units)
        result = np.zeros((len(active), 4, 16, product.n), np.float32)
        result[active] = (left @ right.swapaxes(1, 2)).reshape(-1, 4, 16, product.n)
        adding = _spread(adds, wave)
        for i, name in enumerate(accumulator):
            rows, columns = matrix.accumulator_places(i)
            values = result[:, :, rows, columns].ravel()
            if adding.any():  # else the accumulator need not be set
                values = np.where(adding, values + wave.registers[name].view(np.float32), values)
            write(wave, name, values, mask)
        by_group = {int(g): [u[i] for u in units] for i, g in enumerate(np.flatnonzero(active))}
        wave.begin_product(frozenset(accumulator), used - frozenset(accumulator), by_group, active)
        wave.counts.flops += 2 * product.m * product.n * product.k * int(active.sum())

    return step


def _fence(instruction: Instruction) -> Step:
    """``fence.proxy.async`` makes writes visible to wgmma."""
    if instruction.parts[:3] != ["fence", "proxy", "async"]:
        raise UnsupportedInstruction(instruction.opcode)
    return lambda wave, mask: wave.shared.fence(wave.active(mask))


def _warp_barrier(instruction: Instruction) -> Step:
    def step(wave: Wave, mask: Mask) -> None:
        wave.whole(mask, 32, "bar.warp.sync")

    return step


_DECODERS: dict[str, Callable[[Instruction], Step]] = {
    "mov": _move, "shfl": _shuffle, "redux": _reduce, "ld": _load, "st": _store, "cp": _async_copy,
    "ldmatrix": _load_matrix, "stmatrix": _store_matrix, "mma": _product, "wgmma": _warpgroup, "fence": _fence,
    "bar": _warp_barrier,
}  # fmt: skip


def decode(instruction: Instruction) -> Step:
    """The function that executes an instruction, other than branches and barriers of the block.

    Raises:
        UnsupportedInstruction: an instruction, or a form of one, that is not known; the message names it.
    """
    decoder = _DECODERS.get(instruction.parts[0])
    step = decoder(instruction) if decoder else _arithmetic(instruction)
    if step is None:
        raise UnsupportedInstruction(f"{instruction.opcode} ({instruction.source}): {instruction.text}")
    if not instruction.guard:
        return step
    execute, guard, negated = step, instruction.guard, instruction.negated

    def guarded(wave: Wave, mask: Mask) -> None:
        chosen = wave.registers[guard] != negated
        if mask is not None:
            chosen = chosen & mask
        elif chosen.all():
            return execute(wave, None)
        return execute(wave, chosen)

    return guarded
