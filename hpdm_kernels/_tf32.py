"""Rounds operands of TF32 products, as cuBLAS does.

TF32 keeps 10 of the 23 mantissa bits of fp32. A tensor core ignores the other 13 bits of its operands, and
``tl.dot(..., input_precision="tf32")`` passes fp32 operands on as they are. Operands that nobody rounds are therefore
truncated, which doubles the largest error and biases every operand toward zero.
"""

# Kernels' arguments have Triton's types, not Python's.
# mypy: allow-untyped-defs

from __future__ import annotations

from hpdm_kernels._triton import INTERPRETED, jit, tl


@jit
def _rounded_by_instruction(x, IN_PLACE: tl.constexpr):
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=not IN_PLACE, pack=1)


@jit
def _rounded_by_integers(x, IN_PLACE: tl.constexpr):
    # Adding half of the last kept bit carries into the kept bits, also from the mantissa into the exponent.
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


# Triton's interpreter cannot run instructions of the GPU.
_rounded = _rounded_by_integers if INTERPRETED else _rounded_by_instruction


@jit
def as_operand(x, PRECISION: tl.constexpr, IN_PLACE: tl.constexpr = False):
    """``x``, fp32 or of 16 bits, as an operand of ``tl.dot(..., input_precision=PRECISION)``.

    For one pass of TF32 (``"tf32"``), fp32 is rounded to the nearest TF32 number, ties away from zero. NaN stays NaN;
    what is larger than the largest TF32 number becomes infinite. Otherwise ``x`` is returned unchanged.

    The compiler may move the rounding behind a load from shared memory, where each warp of a block repeats it: twice as
    many instructions in a loop over keys. With ``IN_PLACE`` it stays where it is, which may need more registers.
    """
    if PRECISION == "tf32" and x.dtype == tl.float32:
        x = _rounded(x, IN_PLACE)
    return x
