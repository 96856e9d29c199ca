"""What the executor must report: small programs with one fault each, beside the same program without it."""

import pytest
import torch

from hpdm_kernels.aot.execution.global_memory import fill_unwritten
from hpdm_kernels.aot.execution.wave import ExecutionError
from tests.kernels.ptx_programs import execute

# Each thread passes its number to the thread of the next warp through shared memory.
EXCHANGE = """
    shl.b32 %r1, %r0, 2; st.shared.b32 [%r1], %r0;
    bar.sync 0;
    xor.b32 %r2, %r1, 128; ld.shared.b32 %r3, [%r2];
"""
REUSE = EXCHANGE + "bar.sync 0; st.shared.b32 [%r1], %r3; bar.sync 0; ld.shared.b32 %r4, [%r2];"
COPY = """
    shl.b32 %r1, %r0, 4; mad.wide.s32 %rd10, %r0, 16, %rd1;
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd10 + 0 ], 0x10;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    xor.b32 %r2, %r1, 512; ld.shared.b32 %r3, [%r2];
    mad.wide.s32 %rd11, %r0, 4, %rd2; st.global.b32 [%rd11], %r3;
"""


def found(body, tensors=(), threads=64, shared=1024):
    """Kinds of findings."""
    return {text.split(" (")[0] for text in execute(body, tensors, threads, shared)[1]}


def test_exchange_through_shared_memory():
    assert found(EXCHANGE) == found(REUSE) == set()
    without = EXCHANGE.replace("bar.sync 0;", "")
    assert found(without) == {"race: read after another warp's write without a barrier"}
    # In lock-step the values are right all the same.
    out = torch.zeros(64, dtype=torch.int32)
    store = "mad.wide.s32 %rd10, %r0, 4, %rd1; st.global.b32 [%rd10], %r3;"
    execute(without + store, [out], 64, 1024)
    assert out.tolist() == [i ^ 32 for i in range(64)]
    # Within a warp no barrier is needed.
    assert found(without.replace("128", "64")) == set()


def test_reuse_of_shared_memory():
    first, second = REUSE.split("bar.sync 0; st", 1)
    assert found(first + "st" + second) == {"race: write after another warp's read without a barrier"}
    two_writers = "and.b32 %r1, %r0, 31; shl.b32 %r1, %r1, 2; st.shared.b32 [%r1], %r0;"
    assert found(two_writers) == {"race: lanes write different values to one place of shared memory"}
    apart = f"setp.lt.s32 %p1, %r0, 32; @%p1 {two_writers.split('; ')[2]} @!%p1 {two_writers.split('; ')[2]}"
    assert found("and.b32 %r1, %r0, 31; shl.b32 %r1, %r1, 2;" + apart) == {
        "race: write after another warp's write without a barrier"
    }


def test_unwritten_and_outside_shared_memory():
    assert found("mov.b32 %r1, 64; ld.shared.b32 %r2, [%r1];") == {"read of shared memory that nothing has written"}
    for place in (1024, -4, 2):
        program = f"mov.b32 %r1, {place}; st.shared.b32 [%r1], %r0;"
        assert "access of 4 bytes outside of shared memory or misaligned" in found(program, threads=32)


def test_bytes_beside_each_other_are_no_race():
    program = "st.shared.b8 [%r0], %r0; bar.sync 0; xor.b32 %r1, %r0, 32; ld.shared.b8 %rs1, [%r1];"
    assert found(program) == set()


def test_asynchronous_copies():
    source, out = torch.arange(256, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    assert found(COPY, [source, out]) == set()
    assert out.tolist() == [4 * (i ^ 32) for i in range(64)]
    in_flight = "race: read of shared memory that a cp.async may still write"
    assert found(COPY.replace("cp.async.wait_group 0;", ""), [source, out]) == {in_flight}
    assert found(COPY.replace("wait_group 0", "wait_group 1"), [source, out]) == {in_flight}
    assert found(COPY.replace("bar.sync 0;", ""), [source, out]) == {
        "race: read after another warp's write without a barrier"
    }
    # Without a commit the copy is of no group that could be waited for.
    assert found(COPY.replace("cp.async.commit_group;", ""), [source, out]) == {in_flight}
    over = COPY.replace("cp.async.wait_group 0;", "st.shared.b32 [%r1], %r0; cp.async.wait_group 0;")
    assert "race: write over a cp.async in flight" in found(over, [source, out])


def test_copied_bytes_are_seen_only_after_the_wait():
    source, out = torch.full((256,), 7, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    early = COPY.replace("cp.async.wait_group 0;", "ld.shared.b32 %r5, [%r1]; cp.async.wait_group 0;")
    early = early.replace("shl.b32 %r1, %r0, 4;", "shl.b32 %r1, %r0, 4; st.shared.b32 [%r1], %r0;")
    execute(early.replace("[%rd11], %r3", "[%rd11], %r5"), [source, out], 64, 1024)
    assert out.tolist() == list(range(64))


def test_a_copy_of_no_bytes_writes_zeros():
    source, out = torch.full((256,), 7, dtype=torch.int32), torch.ones(64, dtype=torch.int32)
    program = COPY.replace("0x10;", "0x10, %r9;").replace(
        "cp.async.cg", "setp.lt.s32 %p1, %r0, 40; selp.b32 %r9, 16, 0, %p1; cp.async.cg"
    )
    short = source[: 4 * 40].clone()
    assert found(program, [short, out]) == set()
    assert out.tolist() == [7 if (i ^ 32) < 40 else 0 for i in range(64)]


def test_global_memory_out_of_bounds_and_misaligned():
    x = torch.zeros(64)
    load = "mad.wide.s32 %rd10, %r0, 4, %rd1; ld.global.b32 %r1, [%rd10 + {}];"
    outside = "access of 4 bytes of global memory outside of its tensor"
    assert found(load.format(0), [x]) == set()
    assert found(load.format(4), [x]) == {outside}
    assert found(load.format(-4).replace("+ -4", "+-4"), [x]) == {outside}
    assert found(load.format(0), [x[:63]]) == {outside}  # the tensor, not its storage
    assert found(load.format(2), [x]) >= {"misaligned access of 4 bytes to global memory"}
    guarded = "setp.lt.s32 %p1, %r0, 63; mad.wide.s32 %rd10, %r0, 4, %rd1; @%p1 ld.global.b32 %r1, [%rd10 + 4];"
    assert found(guarded, [x]) == set()
    wide = "mad.wide.s32 %rd10, %r0, 8, %rd1; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd10];"
    assert "misaligned access of 16 bytes to global memory" in found(wide, [torch.zeros(512)])


def test_a_pointer_does_not_reach_the_tensor_beside_its_own():
    whole = torch.zeros(128)
    load = "mad.wide.s32 %rd10, %r0, 4, %rd{}; ld.global.b32 %r1, [%rd10 + {}];"
    outside = {"access of 4 bytes of global memory outside of its tensor"}
    assert found(load.format(1, 0), [whole[:64], whole[64:]]) == set()
    assert found(load.format(1, 4), [whole[:64], whole[64:]]) == outside
    assert found(load.format(2, -4), [whole[:64], whole[64:]]) == outside
    # A loop carries the pointer, which is chosen from two.
    loop = """
        setp.lt.s32 %p1, %r0, 32; selp.b64 %rd5, %rd1, %rd2, %p1; mov.b64 %rd6, %rd5; mov.b32 %r5, 0;
        $L: ld.global.b32 %r1, [%rd6]; add.s64 %rd6, %rd6, 4; add.s32 %r5, %r5, 1;
        setp.lt.s32 %p2, %r5, {}; @%p2 bra $L;
    """
    apart = [whole[:32], whole[64:96], whole[96:]]
    assert found(loop.format(32), apart) == set()
    assert found(loop.format(33), apart) == outside


def test_addresses_from_a_table():
    data = torch.arange(64, dtype=torch.int32)
    table = torch.tensor([data.data_ptr()])
    program = "ld.global.b64 %rd5, [%rd1]; mad.wide.s32 %rd6, %r0, 4, %rd5; ld.global.b32 %r1, [%rd6];"
    assert execute(program, [table], 64, exposed=[data])[1] == []
    for exposed in ([], [data[:63]]):
        findings = execute(program, [table, data], 64, exposed=exposed)[1]
        assert [f.split(" (")[0] for f in findings] == ["access of 4 bytes of global memory outside of its tensor"]


def test_what_nothing_wrote_is_not_stored_over():
    x = torch.zeros(64)
    program = "mad.wide.s32 %rd10, %r0, 4, %rd1; st.global.b32 [%rd10 + 128], %r0;"
    found(program, [x[:40]])
    assert x[40:].eq(0).all()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64]
)
def test_unwritten_global_memory(dtype, generator):
    bits = 8 * dtype.itemsize
    register = {16: "%rs1", 32: "%r1", 64: "%rd11"}[bits]
    program = f"mad.wide.s32 %rd10, %r0, {dtype.itemsize}, %rd1; ld.global.b{bits} {register}, [%rd10];"
    x = torch.empty(64, dtype=dtype)
    fill_unwritten(x.data_ptr(), x.nbytes)
    assert found(program, [x]) == {"load of global memory that nothing has written"}
    if dtype.is_floating_point:
        assert x.isnan().all()
    assert found(program, [x.clone()]) == {"load of global memory that nothing has written"}  # a copy of it
    x.copy_(torch.randint(-100, 100, (64,), generator=generator))
    assert found(program, [x]) == set()
    if dtype.is_floating_point:
        assert found(program, [torch.full_like(x, torch.nan)]) == set()  # a NaN that was written


def test_threads_that_store_to_one_place():
    race = "race: threads store different values to one place of global memory"
    store = "shr.u32 %r1, %r0, 1; mad.wide.s32 %rd10, %r1, 4, %rd1; st.global.b32 [%rd10], {};"
    assert found(store.format("%r0"), [torch.zeros(32)]) == {race}
    assert found(store.format("%r1"), [torch.zeros(32)]) == set()  # the same value
    one_by_one = "and.b32 %r2, %r0, 1; setp.eq.s32 %p1, %r2, 0;" + store.format("%r0").replace("st.", "@%p1 st.")
    assert found(one_by_one, [torch.zeros(32)]) == set()
    assert found(one_by_one + "@!%p1 st.global.b32 [%rd10], %r0;", [torch.zeros(32)]) == {race}
    # Blocks, too: each stores its number.
    blocks = execute("mov.u32 %r1, %ctaid.x; st.global.b32 [%rd1], %r1;", [torch.zeros(1)], blocks=300)[1]
    assert {text.split(" (")[0] for text in blocks} == {race}
    other = "mad.wide.s32 %rd10, %r0, 4, %rd1; st.global.b32 [%rd10], %r0; ld.global.b32 %r3, [%rd10 + {}];"
    assert found(other.format(0), [torch.zeros(65)]) == set()
    assert found(other.format(4), [torch.zeros(65)]) == {"race: load of global memory that another thread stores"}


def test_threads_of_a_block_exchange_through_global_memory():
    """After a barrier a thread sees what the others of its block have stored, but not what other blocks have."""
    store = "mad.wide.s32 %rd10, %r0, 4, %rd1; st.global.b32 [%rd10], %r0;"
    turned = "xor.b32 %r2, %r0, 32; mad.wide.s32 %rd11, %r2, 4, %rd1; {} ld.global.b32 %r3, [%rd11];"
    reads, writes = (
        "race: load of global memory that another thread stores",
        "race: threads store different values to one place of global memory",
    )
    again = turned.replace("ld.global.b32 %r3, [%rd11]", "st.global.b32 [%rd11], %r0")
    assert found(store + turned.format(""), [torch.zeros(64)]) == {reads}
    assert found(store + again.format(""), [torch.zeros(64)]) == {writes}
    for second in (turned, again):
        assert found(store + second.format("bar.sync 0;"), [torch.zeros(64)]) == set()
    first_block = "mov.u32 %r4, %ctaid.x; setp.eq.s32 %p1, %r4, 0;"
    stores_of_one = first_block + store.replace("st.global", "@%p1 st.global") + turned.format("bar.sync 0;")
    assert {f.split(" (")[0] for f in execute(stores_of_one, [torch.zeros(64)], 64, blocks=2)[1]} == {reads}


def test_barriers_that_diverge():
    some = "setp.lt.s32 %p1, %r0, 32; @%p1 bra $L1; bar.sync 0; bra $L2; $L1: bar.sync 0; $L2: mov.b32 %r1, 0;"
    assert found(some) == {"divergent barrier: threads of a block wait at different ones"}
    gone = "setp.lt.s32 %p1, %r0, 32; @%p1 bra $L1; bar.sync 0; $L1: mov.b32 %r1, 0;"
    assert found(gone) == {"barrier that some threads of the block never reach"}


def test_parts_of_a_warp():
    half = "setp.lt.s32 %p1, %r0, 16; @%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;"
    assert found(half) == {"shfl.sync executed by a part of its warp"}
    assert found(half.replace("16", "32")) == set()


def test_lanes_part_and_meet_again():
    """Each thread loops as often as its number says, in many blocks at a time."""
    out = torch.zeros(70 * 64, dtype=torch.int32)
    body = """
        mov.b32 %r1, 0; mov.b32 %r2, 0; mov.u32 %r9, %ctaid.x; add.s32 %r8, %r9, %r0;
        $LOOP: setp.ge.s32 %p1, %r2, %r8; @%p1 bra $DONE;
        add.s32 %r2, %r2, 1; add.s32 %r1, %r1, %r2; bra.uni $LOOP;
        $DONE: mad.lo.s32 %r3, %r9, 64, %r0; mad.wide.s32 %rd10, %r3, 4, %rd1; st.global.b32 [%rd10], %r1;
    """
    counts, findings = execute(body, [out], threads=64, blocks=70)
    assert not findings
    n = torch.arange(70)[:, None] + torch.arange(64)
    assert torch.equal(out.view(70, 64), (n * (n + 1) // 2).int())
    # A warp's loop runs as often as that of its last lane.
    add = next(i for i, text in counts.texts.items() if text.startswith("bra.uni"))
    assert counts.issued[add] == sum(b + 31 + 32 * w for b in range(70) for w in range(2))


def test_registers_that_were_never_set_are_named():
    with pytest.raises(ExecutionError, match="%r77"):
        execute("add.s32 %r1, %r77, 1;")


PRODUCT = """
    shl.b32 %r1, %r0, 4; mov.b32 %r2, 0; st.shared.v4.b32 [%r1], {%r2, %r2, %r2, %r2};
    st.shared.v4.b32 [%r1 + 2048], {%r2, %r2, %r2, %r2}; mov.b32 %r60, 0; mov.b32 %r61, 0; mov.b32 %r62, 0;
    mov.b32 %r63, 0;
    bar.sync 0;
    fence.proxy.async.shared::cta;
    wgmma.fence.sync.aligned;
    mov.b64 %rd20, 4611686293305294848; mov.b64 %rd21, 4611686293305294848;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r60, %r61, %r62, %r63}, %rd20, %rd21, 1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    add.f32 %r10, %r60, %r61;
    bar.sync 0; st.shared.b32 [%r1], %r10;
"""


def test_products_of_warpgroups():
    check = lambda body: found(body, threads=128, shared=8192)
    # The descriptor's operand has 64 rows of 128 bytes.
    whole = PRODUCT.replace("bar.sync 0;", "st.shared.v4.b32 [%r1 + 4096], {%r2, %r2, %r2, %r2}; "
                            "st.shared.v4.b32 [%r1 + 6144], {%r2, %r2, %r2, %r2}; bar.sync 0;", 1)  # fmt: skip
    assert check(whole) == set()
    assert check(PRODUCT) == {"read of shared memory that nothing has written"}
    assert check(whole.replace("fence.proxy.async.shared::cta;", "")) == {
        "wgmma reads what was written without fence.proxy.async"
    }
    assert check(whole.replace("wgmma.fence.sync.aligned;", "")) == {
        "wgmma without a wgmma.fence behind other uses of its registers"
    }
    used = whole.replace("mov.b64 %rd20", "add.f32 %r10, %r60, %r61; mov.b64 %rd20")
    assert check(used) == {"wgmma without a wgmma.fence behind other uses of its registers"}
    for broken in (
        whole.replace("wgmma.wait_group.sync.aligned 0;", ""),
        whole.replace("wait_group.sync.aligned 0", "wait_group.sync.aligned 1"),
    ):
        assert check(broken) == {
            "race: registers of a wgmma in flight are used before wgmma.wait_group",
            "race: write over what a wgmma may still read",
        }
    first, _, second = whole.partition("bar.sync 0;")
    assert "race: read after another warp's write without a barrier" in check(first + second)
    assert check(whole.rpartition("bar.sync 0;")[0] + "st.shared.b32 [%r1], %r10;") == {
        "race: write after another warp's read without a barrier"
    }


def test_sectors_and_wavefronts():
    x = torch.zeros(4096)
    for stride, sectors in ((4, 4), (8, 8), (32, 32), (0, 1)):
        counts, _ = execute(f"mad.wide.s32 %rd10, %r0, {stride}, %rd1; ld.global.b32 %r1, [%rd10];", [x])
        (traffic,) = counts.sectors.values()
        assert (traffic.requests, traffic.moved, traffic.ideal) == (1, sectors, 4 if stride else 1)
    for stride, wavefronts in ((4, 1), (8, 2), (32, 8), (128, 32), (132, 1), (0, 1)):
        body = f"mul.lo.s32 %r1, %r0, {stride}; st.shared.b32 [%r1], 7;"
        counts, _ = execute(body, shared=8192)
        (traffic,) = counts.wavefronts.values()
        assert (traffic.requests, traffic.moved, traffic.ideal) == (1, wavefronts, 1)
    counts, _ = execute("mul.lo.s32 %r1, %r0, 16; st.shared.v4.b32 [%r1], {%r0, %r0, %r0, %r0};", shared=8192)
    (traffic,) = counts.wavefronts.values()
    assert (traffic.moved, traffic.ideal) == (4, 4)
    assert counts.instructions_per_warp == 4  # with the reading of %tid.x and ret
