"""The executor's matrix instructions against plain products, with operands in shared memory and in registers."""

import pytest
import torch

from tests.kernels.ptx_programs import execute

KINDS = {"tf32": (torch.float32, 8), "bf16": (torch.bfloat16, 16), "f16": (torch.float16, 16)}


def truncated(x):
    """TF32 operands are truncated; 16-bit operands are exact."""
    if x.dtype is not torch.float32:
        return x.float()
    return (x.contiguous().view(torch.int32) & -(1 << 13)).view(torch.float32)


def registers(first, count):
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


@pytest.mark.parametrize("kind", KINDS)
def test_mma_multiplies(kind, generator):
    """Fragments as the PTX ISA lays them out: row lane / 4, columns from lane % 4 on."""
    dtype, k = KINDS[kind]
    a, b = torch.randn(16, k, generator=generator).to(dtype), torch.randn(k, 8, generator=generator).to(dtype)
    c = torch.randn(16, 8, generator=generator)
    pack = 32 // (8 * dtype.itemsize)
    fa, fb = torch.zeros(32, 4, pack, dtype=dtype), torch.zeros(32, 2, pack, dtype=dtype)
    fc, rows = torch.zeros(32, 4), torch.zeros(32, 4, 2, dtype=torch.int64)
    for lane in range(32):
        group, member = lane // 4, lane % 4
        for i in range(4):
            row = group if i in (0, 2) else group + 8
            rows[lane, i] = torch.tensor([group + 8 * (i >= 2), 2 * member + i % 2])
            fc[lane, i] = c[tuple(rows[lane, i])]
            for j in range(pack):
                fa[lane, i, j] = a[row, member * pack + j + (k // 2 if i >= 2 else 0)]
        for i in range(2):
            for j in range(pack):
                fb[lane, i, j] = b[member * pack + j + (k // 2) * i, group]
    out = torch.zeros(32, 4)
    body = f"""
        mad.wide.s32 %rd10, %r0, 16, %rd1; ld.global.v4.b32 {registers(10, 4)}, [%rd10];
        mad.wide.s32 %rd11, %r0, 8, %rd2; ld.global.v2.b32 {registers(20, 2)}, [%rd11];
        mad.wide.s32 %rd12, %r0, 16, %rd3; ld.global.v4.b32 {registers(30, 4)}, [%rd12];
        mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {registers(40, 4)}, {registers(10, 4)},
            {registers(20, 2)}, {registers(30, 4)};
        mad.wide.s32 %rd13, %r0, 16, %rd4; st.global.v4.b32 [%rd13], {registers(40, 4)};
    """
    counts, findings = execute(body, [fa, fb, fc, out])
    assert not findings
    assert counts.flops == 2 * 16 * 8 * k
    expected = truncated(a) @ truncated(b) + c
    torch.testing.assert_close(out, expected[rows[..., 0], rows[..., 1]], rtol=1e-5, atol=1e-5)


COPY_IN = """
    shl.b32 %r1, %r0, 4; mad.wide.s32 %rd10, %r0, 16, %rd1;
    ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd10]; st.shared.v4.b32 [%r1], {%r2, %r3, %r4, %r5}; bar.sync 0;
"""


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_loaded_and_stored(transposed, generator):
    """Row i of matrix m is at the address of lane 8m + i; lane l gets elements 2l and 2l + 1, or column-wise."""
    x = torch.randint(-30000, 30000, (4, 8, 8), generator=generator, dtype=torch.int16)
    out, again = torch.zeros(32, 4, 2, dtype=torch.int16), torch.zeros(4, 8, 8, dtype=torch.int16)
    trans = ".trans" if transposed else ""
    body = f"""{COPY_IN}
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {registers(10, 4)}, [%r1];
        mad.wide.s32 %rd11, %r0, 16, %rd2; st.global.v4.b32 [%rd11], {registers(10, 4)};
        add.s32 %r6, %r1, 512;
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r6], {registers(10, 4)};
        ld.shared.v4.b32 {registers(20, 4)}, [%r1 + 512];
        mad.wide.s32 %rd12, %r0, 16, %rd3; st.global.v4.b32 [%rd12], {registers(20, 4)};
    """
    _, findings = execute(body, [x, out, again], shared=1024)
    assert not findings
    expected = x.transpose(1, 2) if transposed else x
    assert torch.equal(out, expected.reshape(4, 32, 2).permute(1, 0, 2))
    assert torch.equal(again, x)


def swizzled(matrix, width, *, chunk_rows=8):
    """``[rows, row bytes]`` uint8 cut into columns of ``width`` bytes, with 16-byte chunks moved within 128 bytes."""
    rows, row_bytes = matrix.shape
    flat = torch.zeros(rows * row_bytes, dtype=torch.uint8)
    bits = {16: 0, 32: 1, 64: 3, 128: 7}[width]
    for row in range(rows):
        for at in range(0, row_bytes, 16):
            place = (at // width) * rows * width + row * width + at % width
            place ^= (place >> 7 & bits) << 4
            flat[place : place + 16] = matrix[row, at : at + 16]
    return flat


@pytest.mark.parametrize("in_registers", [False, True])
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_wgmma_multiplies_swizzled_operands(kind, width, in_registers, generator):
    """Operands whose rows are contiguous; the second of two instructions goes on behind the first ``k`` columns."""
    dtype, k = KINDS[kind]
    n, inner = 16, width // dtype.itemsize
    a, b = torch.randn(64, inner, generator=generator).to(dtype), torch.randn(n, inner, generator=generator).to(dtype)
    data = torch.cat([swizzled(t.view(torch.uint8), width) for t in (a, b)])
    padded = torch.cat([data, torch.zeros(-len(data) % 2048, dtype=torch.uint8)])
    out, size = torch.zeros(64, n), len(padded)
    mode = {128: 1, 64: 2, 32: 3}[width]
    common = (8 * width >> 4) << 32 | mode << 62 | 1 << 16
    fragments = torch.zeros(inner // k, 128, 4, 4 // dtype.itemsize, dtype=dtype)
    for step in range(inner // k):
        for thread in range(128):
            warp, group, member = thread // 32, thread % 32 // 4, thread % 4
            for i in range(4):
                row = 16 * warp + group + 8 * (i % 2)
                column = step * k + (k // 2) * (i // 2) + member * (4 // dtype.itemsize)
                fragments[step, thread, i] = a[row, column : column + 4 // dtype.itemsize]
    copy = "".join(
        f"ld.global.v4.b32 {registers(2, 4)}, [%rd10 + {at}]; st.shared.v4.b32 [%r1 + {at}], {registers(2, 4)};\n"
        for at in range(0, size, 2048)
    )
    products = ""
    for step in range(inner // k):
        at_a, at_b = step * k * dtype.itemsize, a.nbytes + step * k * dtype.itemsize
        left = registers(10 + 4 * step, 4) if in_registers else "%rd20"
        tail = "1, 1" if kind == "tf32" else "1, 1, 0" if in_registers else "1, 1, 0, 0"
        products += f"""
            mov.b64 %rd20, {common | at_a >> 4}; mov.b64 %rd21, {common | at_b >> 4};
            wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{kind}.{kind} {registers(60, n // 2)}, {left}, %rd21,
                {int(step > 0)}, {tail};
        """
    loads = "".join(
        f"mad.wide.s32 %rd12, %r0, 16, %rd3; ld.global.v4.b32 {registers(10 + 4 * s, 4)}, [%rd12 + {2048 * s}];\n"
        for s in range(inner // k)
    )
    # Register i of thread t: row 16 * warp + lane / 4 + 8 * (i / 2 % 2), columns 8 * (i / 4) + 2 * (lane % 4) + i % 2.
    stores = "".join(
        f"st.global.v2.b32 [%rd14 + {4 * (8 * (i // 4) + n * 8 * (i // 2 % 2))}], {registers(60 + i, 2)};\n"
        for i in range(0, n // 2, 2)
    )
    body = f"""
        shl.b32 %r1, %r0, 4; mad.wide.s32 %rd10, %r0, 16, %rd1;
        {copy} {loads} bar.sync 0; fence.proxy.async.shared::cta; wgmma.fence.sync.aligned; {products}
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        shr.u32 %r7, %r0, 2; and.b32 %r8, %r0, 3; shr.u32 %r9, %r0, 5; and.b32 %r7, %r7, 7;
        mad.lo.s32 %r7, %r9, 16, %r7; mul.lo.s32 %r7, %r7, {4 * n}; mad.lo.s32 %r7, %r8, 8, %r7;
        cvt.u64.u32 %rd13, %r7; add.s64 %rd14, %rd2, %rd13; {stores}
    """
    counts, findings = execute(body, [padded, out, fragments], threads=128, shared=size)
    assert not findings, findings
    assert counts.flops == 2 * 64 * n * inner
    torch.testing.assert_close(out, truncated(a) @ truncated(b).t(), rtol=1e-5, atol=1e-4)


def test_wgmma_multiplies_an_operand_whose_columns_are_contiguous(generator):
    """B as [k, n]: what a value matrix is, in rows of 128 swizzled bytes."""
    k, n = 16, 64
    a, b = torch.randn(64, k, generator=generator).bfloat16(), torch.randn(k, n, generator=generator).bfloat16()
    data = torch.cat([swizzled(a.view(torch.uint8), 32), swizzled(b.view(torch.uint8), 128)])
    out = torch.zeros(64, n)
    first = (8 * 32 >> 4) << 32 | 3 << 62 | 1 << 16
    second = (8 * 128 >> 4) << 32 | 1 << 62 | 1 << 16 | a.nbytes >> 4
    copy = "".join(
        f"ld.global.v4.b32 {registers(2, 4)}, [%rd10 + {at}]; st.shared.v4.b32 [%r1 + {at}], {registers(2, 4)};\n"
        for at in range(0, len(data), 2048)
    )
    stores = "".join(
        f"st.global.v2.b32 [%rd14 + {4 * (8 * (i // 4) + n * 8 * (i // 2 % 2))}], {registers(60 + i, 2)};\n"
        for i in range(0, n // 2, 2)
    )
    body = f"""
        shl.b32 %r1, %r0, 4; mad.wide.s32 %rd10, %r0, 16, %rd1; {copy} bar.sync 0;
        fence.proxy.async.shared::cta; wgmma.fence.sync.aligned; mov.b64 %rd20, {first}; mov.b64 %rd21, {second};
        wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {registers(60, n // 2)}, %rd20, %rd21, 0, 1, 1, 0, 1;
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        shr.u32 %r7, %r0, 2; and.b32 %r8, %r0, 3; shr.u32 %r9, %r0, 5; and.b32 %r7, %r7, 7;
        mad.lo.s32 %r7, %r9, 16, %r7; mul.lo.s32 %r7, %r7, {4 * n}; mad.lo.s32 %r7, %r8, 8, %r7;
        cvt.u64.u32 %rd13, %r7; add.s64 %rd14, %rd2, %rd13; {stores}
    """
    _, findings = execute(body, [data, out], threads=128, shared=len(data))
    assert not findings, findings
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-4)
