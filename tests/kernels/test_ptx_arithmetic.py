"""The executor's arithmetic, instruction by instruction, against PyTorch, Python's integers and exact fractions."""

import math
from fractions import Fraction

import pytest
import torch

from hpdm_kernels.aot.execution.program import UnsupportedInstruction
from tests.kernels.ptx_programs import apply, execute

ODD = torch.tensor(
    [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.5, 3.4e38, -3.4e38, 1e-45, -1e-40, 65519.9, 65520]
)


def any_bits(generator, n=2000):
    """fp32 of any bits: every magnitude, subnormal numbers, infinities and NaNs."""
    bits = torch.randint(-(2**31), 2**31, (n,), generator=generator).to(torch.int32)
    return torch.cat([bits.view(torch.float32), ODD])


def integers(generator, bits=32, n=500):
    edge = torch.tensor([0, 1, -1, 2 ** (bits - 1) - 1, -(2 ** (bits - 1))])
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return torch.cat([torch.randint(low, high, (n,), generator=generator), edge]).to(getattr(torch, f"int{bits}"))


def test_narrow_floats_are_rounded_as_pytorch_does(generator):
    x = any_bits(generator)
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        got = apply(f"cvt.rn.{name}.f32 {{d}}, {{0}};", x, out=torch.int16).view(dtype)
        torch.testing.assert_close(got, x.to(dtype), rtol=0, atol=0, equal_nan=True)
        back = apply(f"cvt.f32.{name} {{d}}, {{0}};", got.view(torch.int16))
        torch.testing.assert_close(back, got.float(), rtol=0, atol=0, equal_nan=True)


def test_halfway_cases_go_to_even():
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF], dtype=torch.int32)
    got = apply("cvt.rn.bf16.f32 {d}, {0};", bits.view(torch.float32), out=torch.int16)
    assert got.tolist() == [0x3F80, 0x3F82, 0x3F81, 0x3F80]


def test_pairs_have_the_first_operand_in_the_high_half(generator):
    a, b = torch.randn(50, generator=generator), torch.randn(50, generator=generator)
    got = apply("cvt.rn.bf16x2.f32 {d}, {0}, {1};", a, b, out=torch.int32).view(torch.bfloat16).view(-1, 2)
    assert torch.equal(got, torch.stack([b.bfloat16(), a.bfloat16()], dim=1))


def test_tf32_is_rounded_half_away_from_zero(generator):
    x = torch.randn(1000, generator=generator)
    x[:2] = torch.tensor([0x3F801000, -0x407FF000], dtype=torch.int32).view(torch.float32)  # halfway
    got = apply("cvt.rna.tf32.f32 {d}, {0};", x).double()
    step = 2.0 ** (torch.frexp(x.double())[1] - 11).double()  # units of 10 bits behind the leading one
    expected = torch.sign(x.double()) * torch.floor(x.double().abs() / step + 0.5) * step
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("mode", "function"), [("rmi", torch.floor), ("rpi", torch.ceil), ("rzi", torch.trunc), ("rni", torch.round)]
)
def test_rounding_to_integers(mode, function, generator):
    x = torch.cat([torch.randn(500, generator=generator) * 20, torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])])
    assert torch.equal(apply(f"cvt.{mode}.f32.f32 {{d}}, {{0}};", x), function(x))
    assert torch.equal(apply(f"cvt.{mode}.s32.f32 {{d}}, {{0}};", x, out=torch.int32), function(x).int())


def test_conversion_to_integers_saturates():
    x = torch.tensor([3e9, -3e9, math.inf, -math.inf, math.nan, -1.0])
    got = apply("cvt.rzi.s32.f32 {d}, {0};", x, out=torch.int32)
    assert got.tolist() == [2**31 - 1, -(2**31), 2**31 - 1, -(2**31), 0, -1]
    assert apply("cvt.rzi.u32.f32 {d}, {0};", x, out=torch.int32).tolist() == [-1294967296, 0, -1, 0, 0, 0]
    wide = apply(
        "cvt.rzi.s64.f64 {d}, {0};", torch.tensor([1e300, -1e300, 2.0**62], dtype=torch.float64), out=torch.int64
    )
    assert wide.tolist() == [2**63 - 1, -(2**63), 2**62]


def test_subnormal_numbers_are_flushed_where_the_instruction_says_so():
    x = torch.tensor([1e-40, -1e-40, 1.0])
    one = torch.ones(3)
    assert apply("fma.rn.f32 {d}, {0}, {1}, 0f00000000;", x, one).tolist() == x.tolist()
    assert apply("fma.rn.ftz.f32 {d}, {0}, {1}, 0f00000000;", x, one).tolist() == [0.0, 0.0, 1.0]
    got = apply("ex2.approx.ftz.f32 {d}, {0};", torch.tensor([-130.0, -1.0, math.inf, -math.inf]))
    assert got.tolist() == [0.0, 0.5, math.inf, 0.0]


def test_fused_multiply_add_rounds_once(generator):
    a, b = torch.randn(2, 500, generator=generator)
    c = -(a * b) + 1e-7 * torch.randn(500, generator=generator)  # cancels, so that what was rounded would show
    got = apply("fma.rn.f32 {d}, {0}, {1}, {2};", a, b, c)
    for x, y, z, r in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist()):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        assert abs(Fraction(r) - exact) <= Fraction(2.0**-24) * abs(exact) * (1 + Fraction(1, 2**20))


def test_fused_multiply_add_of_fp64_rounds_once(generator):
    a, b = torch.randn(2, 500, generator=generator, dtype=torch.float64)
    c = -(a * b) + 1e-16 * torch.randn(500, generator=generator, dtype=torch.float64)
    got = apply("fma.rn.f64 {d}, {0}, {1}, {2};", a, b, c, out=torch.float64)
    for x, y, z, r in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist()):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        assert abs(Fraction(r) - exact) <= Fraction(2.0**-53) * abs(exact) * (1 + Fraction(1, 2**20))


@pytest.mark.parametrize(("name", "dtype", "bits"), [("bf16", torch.bfloat16, 8), ("f16", torch.float16, 11)])
def test_16_bit_arithmetic_rounds_once(name, dtype, bits, generator):
    a, b, c = (torch.randn(300, generator=generator).to(dtype) for _ in range(3))
    raw = [t.view(torch.int16) for t in (a, b, c)]
    got = apply(f"fma.rn.{name} {{d}}, {{0}}, {{1}}, {{2}};", *raw, out=torch.int16).view(dtype)
    for x, y, z, r in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist()):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        spacing = Fraction(2) ** (math.frexp(float(exact))[1] - bits)
        assert abs(Fraction(r) - exact) <= max(spacing, Fraction(2) ** -24) / 2
    got = apply(f"add.{name} {{d}}, {{0}}, {{1}};", *raw[:2], out=torch.int16).view(dtype)
    assert torch.equal(got, a + b)
    pairs = [t.view(torch.int32) for t in raw]
    got = apply(f"add.{name}x2 {{d}}, {{0}}, {{1}};", *pairs[:2], out=torch.int32).view(dtype)
    assert torch.equal(got, a + b)


def test_comparisons_with_nan():
    a, b = torch.tensor([1.0, math.nan, 2.0]), torch.tensor([2.0, 2.0, 2.0])
    results = {
        "lt": [1, 0, 0], "ne": [1, 0, 0], "neu": [1, 1, 0], "ltu": [1, 1, 0], "equ": [0, 1, 1], "num": [1, 0, 1],
        "nan": [0, 1, 0], "ge": [0, 0, 1],
    }  # fmt: skip
    for name, expected in results.items():
        got = apply(f"setp.{name}.f32 %p1, {{0}}, {{1}}; selp.b32 {{d}}, 1, 0, %p1;", a, b, out=torch.int32)
        assert got.tolist() == expected, name
    assert apply("max.f32 {d}, {0}, {1};", a, b).tolist() == [2.0, 2.0, 2.0]
    assert apply("max.NaN.f32 {d}, {0}, {1};", a, b).isnan().tolist() == [False, True, False]


def signed(value: int, bits: int = 32) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


INTEGER = {
    "add.s32": lambda a, b: a + b,
    "sub.s32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.s32": lambda a, b: a * b >> 32,
    "mul.hi.u32": lambda a, b: (a % 2**32) * (b % 2**32) >> 32,
    "min.s32": min,
    "max.u32": lambda a, b: max(a % 2**32, b % 2**32),
    "div.s32": lambda a, b: int(Fraction(a, b)) if b else -1,
    "rem.s32": lambda a, b: a - b * int(Fraction(a, b)) if b else a,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << (b % 2**32) if b % 2**32 < 32 else 0,
    "shr.s32": lambda a, b: a >> min(b % 2**32, 32),
    "shr.u32": lambda a, b: (a % 2**32) >> min(b % 2**32, 32),
}


@pytest.mark.parametrize("name", INTEGER)
def test_integers(name, generator):
    a, b = integers(generator), integers(generator)
    b = torch.where(torch.arange(len(b)) % 2 == 0, b, b % 40)  # shifts around the width, and small divisors
    got = apply(f"{name} {{d}}, {{0}}, {{1}};", a, b, out=torch.int32)
    assert got.tolist() == [signed(INTEGER[name](x, y)) for x, y in zip(a.tolist(), b.tolist())]


def test_wide_products(generator):
    a, b = integers(generator), integers(generator)
    for kind, of in (("s32", lambda x: x), ("u32", lambda x: x % 2**32)):
        got = apply(f"mul.wide.{kind} {{d}}, {{0}}, {{1}};", a, b, out=torch.int64)
        assert got.tolist() == [signed(of(x) * of(y), 64) for x, y in zip(a.tolist(), b.tolist())]
    c = integers(generator, 64)
    got = apply("mad.wide.s32 {d}, {0}, {1}, {2};", a, b, c, out=torch.int64)
    assert got.tolist() == [signed(x * y + z, 64) for x, y, z in zip(a.tolist(), b.tolist(), c.tolist())]


@pytest.mark.parametrize(("start", "length"), [(0, 5), (3, 7), (28, 9), (31, 1), (0, 32), (5, 0)])
def test_bit_fields(start, length, generator):
    a = integers(generator)
    got = apply(f"bfe.u32 {{d}}, {{0}}, {start}, {length};", a, out=torch.int32)
    field = [(x % 2**32 >> start) % 2**length for x in a.tolist()]
    assert got.tolist() == [signed(x) for x in field]
    got = apply(f"bfe.s32 {{d}}, {{0}}, {start}, {length};", a, out=torch.int32)
    # The sign bit is the field's last one, or that of the number where the field goes beyond it.
    bits = min(length, 32 - start)
    assert got.tolist() == [signed(x, bits) if bits else 0 for x in field]


@pytest.mark.parametrize("selector", [0x3210, 0x7654, 0x3340, 0x0123, 0x5410, 0xBA98, 0xFEDC])
def test_byte_permutation(selector, generator):
    a, b = integers(generator), integers(generator)
    got = apply(f"prmt.b32 {{d}}, {{0}}, {{1}}, {selector:#x}U;", a, b, out=torch.int32)
    for x, y, r in zip(a.tolist(), b.tolist(), got.tolist()):
        data = (x % 2**32).to_bytes(4, "little") + (y % 2**32).to_bytes(4, "little")
        nibbles = [selector >> 4 * i & 15 for i in range(4)]
        picked = [data[n & 7] if n < 8 else 255 * (data[n & 7] >> 7) for n in nibbles]
        assert r == signed(int.from_bytes(bytes(picked), "little"))


def test_funnel_shifts_and_lookup(generator):
    a, b, s = integers(generator), integers(generator), integers(generator) % 64
    both = [(x % 2**32) + ((y % 2**32) << 32) for x, y in zip(a.tolist(), b.tolist())]
    got = apply("shf.l.wrap.b32 {d}, {0}, {1}, {2};", a, b, s, out=torch.int32)
    assert got.tolist() == [signed(x << n % 32 >> 32) for x, n in zip(both, s.tolist())]
    got = apply("shf.r.clamp.b32 {d}, {0}, {1}, {2};", a, b, s, out=torch.int32)
    assert got.tolist() == [signed(x >> min(n, 32)) for x, n in zip(both, s.tolist())]
    got = apply("lop3.b32 {d}, {0}, {1}, {2}, 0x96;", a, b, s, out=torch.int32)
    assert torch.equal(got, a ^ b ^ s)


def test_pairs_are_packed_and_unpacked(generator):
    a = integers(generator)
    got = apply("mov.b32 {{%rs1, %rs2}}, {0}; mov.b32 {d}, {{%rs2, %rs1}};", a, out=torch.int32)
    assert got.tolist() == [signed((x % 2**32 >> 16) | (x % 2**16) << 16) for x in a.tolist()]


@pytest.mark.parametrize(
    ("mode", "by", "source"),
    [
        ("bfly", 5, lambda i: i ^ 5), ("idx", 3, lambda i: 3), ("up", 4, lambda i: i - 4 if i >= 4 else i),
        ("down", 6, lambda i: i + 6 if i + 6 < 32 else i),
    ],
)  # fmt: skip
def test_shuffles(mode, by, source):
    x = torch.arange(100, 164, dtype=torch.int32)
    clamp = 0 if mode == "up" else 31
    got = apply(f"shfl.sync.{mode}.b32 {{d}}, {{0}}, {by}, {clamp}, -1;", x, out=torch.int32)
    assert got.tolist() == [100 + i // 32 * 32 + source(i % 32) for i in range(64)]


def test_reductions_of_a_warp(generator):
    x = integers(generator)[:64]
    got = apply("redux.sync.max.s32 {d}, {0}, -1;", x, out=torch.int32)
    assert got.tolist() == [max(x[i // 32 * 32 : i // 32 * 32 + 32].tolist()) for i in range(64)]


@pytest.mark.parametrize(
    "instruction",
    [
        "frobnicate.b32 %r1, %r0;",
        "tcgen05.mma.x %r1;",
        "cvt.rn.e4m3x2.f32 %rs1, %r0, %r0;",
        "ld.local.b32 %r1, [%r0];",
        "bar.sync 1, 64;",
    ],
)
def test_unknown_instructions_are_named(instruction):
    with pytest.raises(UnsupportedInstruction, match=instruction.split()[0].split(".")[0]):
        execute(instruction)
