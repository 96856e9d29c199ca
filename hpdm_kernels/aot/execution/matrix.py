"""Matrix instructions: which element of a matrix is in which register of which lane, and operands in shared memory.

Layouts are those of the PTX ISA, "Matrix fragments" of mma.m16n8 and wgmma.m64, and "Matrix-Descriptor" of wgmma.
Products of 16-bit floats and of TF32 are exact in fp32. Sums are rounded as numpy does; tensor cores truncate them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpdm_kernels.aot.execution.arithmetic import from_bf16, truncate_tf32
from hpdm_kernels.aot.execution.program import UnsupportedInstruction

_ROW, _COLUMN = np.arange(32) // 4, np.arange(32) % 4
"""Row and column group of each lane in a fragment of 8 rows."""


class Product(NamedTuple):
    """The sizes and the operand type of a matrix instruction."""

    m: int
    n: int
    k: int
    kind: str
    """``tf32``, ``bf16`` or ``f16``."""

    @classmethod
    def of(cls, parts: list[str]) -> Product:
        """Of the parts of ``mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32`` or of a ``wgmma.mma_async``."""
        shape = next((m for part in parts if (m := re.fullmatch(r"m(\d+)n(\d+)k(\d+)", part))), None)
        kinds = [part for part in parts if part in ("tf32", "bf16", "f16")]
        if shape is None or len(kinds) != 2 or kinds[0] != kinds[1] or "f32" not in parts:
            raise UnsupportedInstruction(
                f"{'.'.join(parts)}: expected two operands of tf32, bf16 or f16, and sums of f32"
            )
        return cls(int(shape[1]), int(shape[2]), int(shape[3]), kinds[0])

    @property
    def per_register(self) -> int:
        """Elements in a register of 32 bits."""
        return 1 if self.kind == "tf32" else 2

    def decode(self, bits: NDArray) -> NDArray:
        """Bits of elements -> fp32, as the tensor core reads them: TF32 is truncated."""
        if self.kind == "tf32":
            return truncate_tf32(bits)
        return from_bf16(bits) if self.kind == "bf16" else bits.view(np.float16).astype(np.float32)


def fragment_a(registers: NDArray, product: Product) -> NDArray:
    """Operand A, ``[warps, 16, k]`` fp32, from its registers ``[warps, n, 32]`` uint32."""
    return _fragment(registers, product, rows_per_register=2)


def fragment_b(registers: NDArray, product: Product) -> NDArray:
    """Operand B transposed, ``[warps, 8, k]`` fp32, from its registers ``[warps, n, 32]`` uint32."""
    return _fragment(registers, product, rows_per_register=1)


def _fragment(registers: NDArray, product: Product, rows_per_register: int) -> NDArray:
    """Register i holds rows ``8 * (i % rows_per_register) + lane / 4``, of the columns that belong to the lane."""
    warps, count, _ = registers.shape
    pack = product.per_register
    matrix = np.zeros((warps, 8 * rows_per_register, product.k), np.float32)
    for i in range(count):
        rows = _ROW + 8 * (i % rows_per_register)
        first = pack * (_COLUMN + 4 * (i // rows_per_register))
        for j in range(pack):
            bits = registers[:, i] if pack == 1 else (registers[:, i] >> np.uint32(16 * j)).astype(np.uint16)
            matrix[:, rows, first + j] = product.decode(np.ascontiguousarray(bits))
    return matrix


def accumulator_places(index: int) -> tuple[NDArray, NDArray]:
    """Rows (of 16) and columns of the accumulator in register ``index`` of each lane of a warp."""
    return _ROW + 8 * (index // 2 % 2), 8 * (index // 4) + 2 * _COLUMN + index % 2


def load_matrix(rows: NDArray, transposed: bool) -> NDArray:
    """``ldmatrix``: the registers ``[warps, n, 32]`` uint32 of matrices of 8 x 8 elements of 16 bits.

    ``rows [warps, n, 8, 8]`` uint16 are the rows at the addresses of the lanes.
    """
    elements = rows.swapaxes(2, 3) if transposed else rows
    pairs = elements.reshape(*rows.shape[:2], 32, 2).astype(np.uint32)
    return pairs[..., 0] | pairs[..., 1] << 16


def store_matrix(registers: NDArray, transposed: bool) -> NDArray:
    """``stmatrix``, the inverse of :func:`load_matrix`: rows ``[warps, n, 8, 8]`` uint16."""
    halves = np.stack([registers & 0xFFFF, registers >> 16], axis=-1).astype(np.uint16)
    rows = halves.reshape(*registers.shape[:2], 8, 8)
    return rows.swapaxes(2, 3) if transposed else rows


_SWIZZLES = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}
"""Mode of a descriptor -> bytes of a row of a core matrix, and which bits of the row's number move 16-byte chunks."""


def operand_places(descriptors: NDArray, rows: int, product: Product, transposed: bool) -> NDArray:
    """Places of an operand of wgmma in shared memory: bytes, int64 ``[warpgroups, rows, k]``.

    Args:
        descriptors: uint64 ``[warpgroups]``; all of the same mode.
        rows: 64 for A, n for B.
        product: the instruction.
        transposed: the elements of a column are adjacent, not those of a row.
    """
    field = lambda shift: ((descriptors >> np.uint64(shift) & np.uint64(0x3FFF)) << np.uint64(4)).astype(np.int64)
    start, leading, stride = (field(shift)[:, None, None] for shift in (0, 16, 32))
    width, swizzle = _SWIZZLES[int(descriptors[0] >> np.uint64(62))]
    size = 4 // product.per_register
    row, inner = np.arange(rows)[:, None], np.arange(product.k)[None, :]
    if transposed:
        per_row = width // size
        places = inner % 8 * width + row % per_row * size + inner // 8 * stride + row // per_row * leading
    else:
        places = row % 8 * width + inner * size % width + row // 8 * stride + inner * size // width * leading
    places = places + start
    return places ^ (places >> 7 & swizzle) << 4
