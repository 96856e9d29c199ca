"""Arithmetic of PTX: what an instruction computes from registers, as functions on numpy arrays.

Results are those of the hardware to the bit, except that ``fma.rn.f32`` rounds twice, which differs in the last place
about once in 2^29, and that approximations (``ex2.approx``, ``div.full``) are exact here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpdm_kernels.aot.execution.program import UnsupportedInstruction

DTYPES: dict[str, Any] = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.uint16, "f16x2": np.uint32,
    "bf16x2": np.uint32, "tf32": np.uint32, "pred": np.bool_,
}  # fmt: skip
"""Type of PTX -> dtype of numpy; bf16, tf32 and pairs are kept as bits."""


class Operation(NamedTuple):
    """An instruction without memory and control flow."""

    inputs: tuple[str, ...]
    """Types of the operands behind the destination."""
    compute: Callable[..., NDArray]
    """Result from the operands, arrays of :data:`DTYPES`."""


def from_bf16(bits: NDArray) -> NDArray:
    """bf16 in uint16 -> fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: NDArray) -> NDArray:
    """fp32 -> bf16 in uint16, to nearest, ties to even; NaN becomes the hardware's, 0x7FFF."""
    bits = values.view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF).astype(np.uint32)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def to_tf32(values: NDArray) -> NDArray:
    """fp32 -> TF32 in uint32, to nearest, ties away from zero (``cvt.rna``)."""
    rounded = (values.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), rounded, values.view(np.uint32))


def truncate_tf32(bits: NDArray) -> NDArray:
    """What a matrix instruction reads of an fp32 operand, given and returned in 32 bits: 10 bits of mantissa."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def flush(values: NDArray) -> NDArray:
    """Subnormal numbers become zeros of the same sign (``.ftz``)."""
    small = np.abs(values) < np.finfo(values.dtype).tiny
    return np.where(small, np.copysign(values.dtype.type(0), values), values)


def _fma64(a: NDArray, b: NDArray, c: NDArray) -> NDArray:
    """``a * b + c`` in fp64 with a single rounding but for rare ties, by exact products and sums of two numbers."""
    product = a * b
    high_a, high_b = (x * 134217729.0 - (x * 134217729.0 - x) for x in (a, b))
    low_a, low_b = a - high_a, b - high_b
    lost = ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b
    total = product + c
    back = total - product
    lost = lost + ((product - (total - back)) + (c - back))
    return np.where(np.isfinite(lost), total + lost, total)


def _divide(a: NDArray, b: NDArray) -> NDArray:
    """Integer division that truncates; by zero it gives all ones, as on the hardware."""
    wide_a, wide_b = a.astype(np.int64), b.astype(np.int64)
    quotient = np.abs(wide_a) // np.maximum(np.abs(wide_b), 1)
    return np.where(wide_b == 0, -1, np.where((wide_a < 0) != (wide_b < 0), -quotient, quotient)).astype(a.dtype)


def _remainder(a: NDArray, b: NDArray) -> NDArray:
    return a - _divide(a, b) * b


def _select(a: NDArray, b: NDArray, choose: NDArray) -> NDArray:
    return np.where(choose, a, b)


def _shift(left: bool, kind: str) -> Callable[..., NDArray]:
    dtype, bits = DTYPES[kind], np.dtype(DTYPES[kind]).itemsize * 8

    def shift(a: NDArray, by: NDArray) -> NDArray:
        inside = np.minimum(by, bits - 1).astype(dtype)
        beyond = a >> dtype(bits - 1) if kind[0] == "s" else np.zeros_like(a)
        return np.where(by >= bits, beyond, a << inside if left else a >> inside)

    return shift


def _permute_bytes(a: NDArray, b: NDArray, selector: NDArray) -> NDArray:
    """``prmt``: byte i of the result is the byte of ``b:a`` that nibble i selects, or its sign (bit 3)."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> ((nibble & 7) * 8).astype(np.uint64) & np.uint64(255)).astype(np.uint32)
        sign = np.where(byte & 128, np.uint32(255), np.uint32(0))
        result |= np.where(nibble & 8, sign, byte).astype(np.uint32) << np.uint32(8 * i)
    return result


def _funnel(left: bool, clamp: bool) -> Callable[..., NDArray]:
    def shift(low: NDArray, high: NDArray, by: NDArray) -> NDArray:
        both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        n = (np.minimum(by, 32) if clamp else by & 31).astype(np.uint64)
        return ((both << n) >> np.uint64(32) if left else both >> n).astype(np.uint32)

    return shift


def _extract_bits(kind: str) -> Callable[..., NDArray]:
    """``bfe``: ``length`` bits from ``start`` on, extended by their sign where the type has one."""
    dtype, bits = DTYPES[kind], np.dtype(DTYPES[kind]).itemsize * 8

    def extract(a: NDArray, start: NDArray, length: NDArray) -> NDArray:
        start, length = np.minimum(start & 255, bits).astype(np.int64), np.minimum(length & 255, bits).astype(np.int64)
        # Python integers are wide enough for every shift; the operands are constants in practice.
        if start.size > 1 or length.size > 1:
            raise UnsupportedInstruction(f"bfe.{kind} with a start or length that is no constant")
        first, count = int(start.item()), int(length.item())
        if count == 0:
            return np.zeros_like(a)
        up = max(0, bits - first - count)
        return (a << dtype(up)) >> dtype(min(bits - 1, up + first)) if first < bits else np.zeros_like(a)

    return extract


def _lookup(a: NDArray, b: NDArray, c: NDArray, table: NDArray) -> NDArray:
    """``lop3``: any function of three bits."""
    result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for i in range(8):
        if int(table.item()) >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


_COMPARE = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _comparison(name: str, kind: str) -> Callable[..., NDArray]:
    """Comparison with a NaN is false, ``ne`` too, except for those with ``u`` (unordered)."""
    if kind[0] != "f":
        return _COMPARE[name]
    unordered = lambda a, b: np.isnan(a) | np.isnan(b)
    if name in ("num", "nan"):
        return unordered if name == "nan" else lambda a, b: ~unordered(a, b)
    if name.endswith("u"):
        return lambda a, b: _COMPARE[name[:-1]](a, b) | unordered(a, b)
    return lambda a, b: _COMPARE[name](a, b) & ~unordered(a, b)


_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _to_integer(kind: str, rounding: str) -> Callable[[NDArray], NDArray]:
    """Float -> integer: clamped to the range, NaN becomes 0."""
    limits = np.iinfo(DTYPES[kind])

    def convert(a: NDArray) -> NDArray:
        whole = _ROUND[rounding](a.astype(np.float64))
        # The upper limit of 64 bits is no fp64, so what reaches it is set apart.
        inside = np.where(np.isnan(whole) | (whole >= float(limits.max)), 0.0, np.maximum(whole, float(limits.min)))
        return np.where(whole >= float(limits.max), limits.max, inside.astype(DTYPES[kind])).astype(DTYPES[kind])

    return convert


def _conversion(modifiers: list[str], to: str, source: str) -> Operation:
    if to in ("bf16x2", "f16x2"):
        narrow = to_bf16 if to == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)
        pack = lambda high, low: narrow(high).astype(np.uint32) << 16 | narrow(low).astype(np.uint32)
        return Operation(("f32", "f32"), pack)
    if to == "tf32":
        return Operation((source,), to_tf32)
    if "bf16" in (to, source):
        return Operation((source,), from_bf16 if source == "bf16" else to_bf16)
    rounding = next((m for m in modifiers if m in _ROUND), "")
    if source[0] == "f" and to[0] != "f":
        return Operation((source,), _to_integer(to, rounding))
    if rounding:
        return Operation((source,), lambda a: _ROUND[rounding](a).astype(DTYPES[to]))
    return Operation((source,), lambda a: a.astype(DTYPES[to]))


def _wide(kind: str) -> str:
    return f"{kind[0]}{2 * int(kind[1:])}"


def _multiply(modifiers: list[str], kind: str) -> Operation:
    if "wide" in modifiers:
        wide = DTYPES[_wide(kind)]
        return Operation((kind, kind), lambda a, b: a.astype(wide) * b.astype(wide))
    if "hi" in modifiers:
        wide, bits = DTYPES[_wide(kind)], int(kind[1:])
        return Operation(
            (kind, kind), lambda a, b: (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(DTYPES[kind])
        )
    return _float16_aware(kind, 2, np.multiply)


def _multiply_add(modifiers: list[str], kind: str) -> Operation:
    if "wide" in modifiers:
        wide = DTYPES[_wide(kind)]
        return Operation((kind, kind, _wide(kind)), lambda a, b, c: a.astype(wide) * b.astype(wide) + c)
    if kind == "f64":
        return Operation((kind,) * 3, _fma64)
    if kind == "f32":
        fma = lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32)
        return Operation((kind,) * 3, fma)
    return _float16_aware(kind, 3, lambda a, b, c: a * b + c)


def _float16_aware(kind: str, inputs: int, compute: Callable[..., NDArray]) -> Operation:
    """16-bit floats, and pairs of them, are computed in fp64 and rounded once; other types in their own arithmetic."""
    single = kind.removesuffix("x2")
    if single not in ("bf16", "f16"):
        return Operation((kind,) * inputs, compute)

    def scalar(*values: NDArray) -> NDArray:
        wide = [(from_bf16(v) if single == "bf16" else v.view(np.float16)).astype(np.float64) for v in values]
        # Products of two 16-bit floats are exact in fp64; a sum is exact but for far smaller addends.
        result = compute(*wide)
        if single == "f16":
            return result.astype(np.float16).view(np.uint16)
        once = result.astype(np.float32).astype(np.float64)
        return to_bf16(_round_to_odd32(once.astype(np.float32), result - once))

    if single == kind:
        return Operation((kind,) * inputs, lambda *v: scalar(*(x.view(np.uint16) for x in v)))

    def pair(*values: NDArray) -> NDArray:
        low, high = (scalar(*((v >> np.uint32(s)).astype(np.uint16) for v in values)) for s in (0, 16))
        return low.astype(np.uint32) | high.astype(np.uint32) << 16

    return Operation((kind,) * inputs, pair)


def _round_to_odd32(rounded: NDArray, error: NDArray) -> NDArray:
    """fp32 such that rounding it again is as rounding ``rounded + error`` once."""
    odd = rounded.view(np.uint32) & 1 == 1
    toward = np.where(error > 0, np.inf, -np.inf).astype(np.float32)
    return np.where((error == 0) | odd | ~np.isfinite(rounded), rounded, np.nextafter(rounded, toward))


_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_SPECIAL: dict[str, Callable[[NDArray], NDArray]] = {
    "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt, "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
    "rcp": lambda a: a.dtype.type(1) / a, "rsqrt": lambda a: a.dtype.type(1) / np.sqrt(a),
}  # fmt: skip


@functools.cache
def operation(opcode: str) -> Operation | None:
    """What ``opcode`` computes, ``None`` if it is no arithmetic.

    Raises:
        UnsupportedInstruction: an arithmetic instruction in a form that is not known.
    """
    base, *modifiers = opcode.split(".")
    kind = modifiers[-1] if modifiers else ""
    try:
        found = _operation(base, modifiers, kind)
    except KeyError as error:
        raise UnsupportedInstruction(f"{opcode}: {error} is not supported") from error
    if found is None or "ftz" not in modifiers:
        return found
    # Results of conversions to integers are never subnormal.
    after = flush if kind == "f32" and base not in ("setp", "cvt") else (lambda x: x)
    flushed = lambda *values: after(found.compute(*(flush(v) if v.dtype == np.float32 else v for v in values)))
    return Operation(found.inputs, flushed)


def _operation(base: str, modifiers: list[str], kind: str) -> Operation | None:
    if base == "cvt":
        return _conversion(modifiers[:-2], modifiers[-2], kind)
    if base == "setp":
        inputs = (kind, kind, "pred") if len(modifiers) == 3 and modifiers[1] in _LOGIC else (kind, kind)
        compare = _comparison(modifiers[0], kind)
        if len(inputs) == 2:
            return Operation(inputs, compare)
        combine = _LOGIC[modifiers[1]]
        return Operation(inputs, lambda a, b, also: combine(compare(a, b), also))
    if base == "mul":
        return _multiply(modifiers, kind)
    if base in ("mad", "fma"):
        return _multiply_add(modifiers, kind)
    if base == "div":
        return Operation((kind, kind), np.divide if kind[0] == "f" else _divide)
    if base in ("shl", "shr"):
        return Operation((kind, "u32"), _shift(base == "shl", kind))
    if base in ("max", "min"):
        quiet = kind[0] == "f" and "NaN" not in modifiers  # the other operand, if one is a NaN
        chosen = (np.fmax if quiet else np.maximum) if base == "max" else (np.fmin if quiet else np.minimum)
        return Operation((kind, kind), chosen)
    if base in _SPECIAL:
        return Operation((kind,), _SPECIAL[base])
    if base in _LOGIC:
        return Operation((kind, kind), _LOGIC[base])
    simple: dict[str, tuple[tuple[str, ...], Callable[..., NDArray]]] = {
        "not": ((kind,), lambda a: np.invert(a)),
        "abs": ((kind,), lambda a: np.abs(a)),
        "neg": ((kind,), lambda a: np.negative(a)),
        "rem": ((kind, kind), _remainder),
        "selp": ((kind, kind, "pred"), _select),
        "bfe": ((kind, "u32", "u32"), _extract_bits(kind) if base == "bfe" else np.add),
        "prmt": (("b32",) * 3, _permute_bytes),
        "lop3": (("b32",) * 4, _lookup),
        "shf": (("b32", "b32", "u32"), _funnel("l" in modifiers, "clamp" in modifiers)),
    }
    if base in simple:
        return Operation(*simple[base])
    if base in ("add", "sub"):
        return _float16_aware(kind, 2, np.add if base == "add" else np.subtract)
    return None
