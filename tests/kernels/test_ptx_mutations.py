"""Faults put into the compiled kernels: each must be reported, or change the results.

Barriers and waits are removed, masks dropped, addresses shifted, strides changed, one at a time, in the PTX of real
kernels. A mutation that is neither reported nor seen in the results must be one that provably changes nothing; the
tests say why. These tests need ``--execute-ptx``; ``test_executed_ptx.py`` starts them. They try a random sample, with
HPDM_PTX=all every mutation.
"""

import os
import random
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch

from hpdm_kernels import _triton, average_tiles, extract_tiles, sample_patches
from hpdm_kernels.aot.execution.origins import origins
from hpdm_kernels.aot.execution.program import parse
from hpdm_kernels.attention import triton_backend as attention
from hpdm_kernels.context import triton_backend as context
from hpdm_kernels.testing import random_boxes, steps

pytestmark = pytest.mark.skipif(not _triton.AVAILABLE or _triton.INTERPRETED, reason="needs --execute-ptx")
MOST = 30 if os.environ.get("HPDM_PTX") == "all" else 4
"""Mutations of each kind that are tried in each kernel: all but for the hundreds of offsets, or a sample."""


class Mutation(NamedTuple):
    kind: str
    what: str
    ptx: str
    place: int
    """Where it is in the original."""
    probe: str = ""
    """The original with a faulty load in every lane that a dropped mask masks off."""


def without(pattern: str, kind: str, ptx: str) -> Iterator[Mutation]:
    for i, m in enumerate(re.finditer(pattern, ptx)):
        yield Mutation(kind, f"number {i}: {m[0]}", ptx[: m.start()] + ptx[m.end() :], m.start())


def without_masks(ptx: str) -> Iterator[Mutation]:
    """Drops guards of accesses to global memory, and the number of bytes of asynchronous copies, which is 0 or all."""
    guards = r"@(?P<negated>!?)(?P<guard>%p\d+) (?=(?:ld\.global|st\.global|cp\.async))"
    copies = r"cp\.async\.c[^;]*(?P<size>, (?P<bytes>%r\d+)(?=;))"
    for i, m in enumerate(re.finditer(f"{guards}|{copies}", ptx)):
        if m["guard"]:
            fault = f"@{'' if m['negated'] else '!'}{m['guard']} ld.global.b32 %r99999, [%rd99999];"
            dropped = ptx[: m.start()] + ptx[m.end() :]
        else:
            fault = f"setp.eq.s32 %p99999, {m['bytes']}, 0; @%p99999 ld.global.b32 %r99999, [%rd99999];"
            dropped = ptx[: m.start("size")] + ptx[m.end("size") :]
        before = ptx[: m.start()].rstrip()
        # A copy may have a guard, too: then the probe stands before it, which only makes it find more.
        if guard := re.search(r"@!?%p\d+$", before):
            before = before[: guard.start()]
        probe = f"{before} mov.b64 %rd99999, 0; {fault} {ptx[len(before) :]}"
        kind = "mask of a store" if ptx[m.end() :].startswith("st.") else "mask of a load"
        yield Mutation(kind, f"number {i}: {m[0][:60]}", dropped, m.start(), probe)


def mutations(ptx: str, parameters: list[str]) -> Iterator[Mutation]:
    """Every mutation of a kernel with parameters of these names."""
    for pattern, kind in {
        r"bar\.sync\s+0;": "barrier",
        r"cp\.async\.wait_group\s+\w+;": "wait",
        r"wgmma\.wait_group[^;]*;": "wait for products",
        r"wgmma\.fence[^;]*;": "fence of registers",
        r"fence\.proxy\.async[^;]*;": "fence of memory",
    }.items():
        yield from without(pattern, kind, ptx)
    yield from without_masks(ptx)
    access = r"(?:(?:ld|st)\.(?:global|shared)|ldmatrix|stmatrix|cp\.async\.c)\S*\s[^;\[]*\[\s*%\w+(?: ?\+ ?\d+)?"
    for i, m in enumerate(re.finditer(access, ptx)):
        base, _, offset = m[0].partition("+")
        shifted = f"{base}+{int(offset or 0) + 16}"
        yield Mutation(
            "offset", f"number {i}: {m[0].split()[0]}", ptx[: m.start()] + shifted + ptx[m.end() :], m.start()
        )
    for i in (i for i, name in enumerate(parameters) if name.startswith("stride")):
        for m in re.finditer(rf"ld\.param\.[bs](?:32|64)\s+(%r\w+), \[\w+_param_{i}\];", ptx):
            bits = 64 if m[1].startswith("%rd") else 32
            more = f"{m[0]} add.s{bits} {m[1]}, {m[1]}, 16;"
            yield Mutation("stride", m[0], ptx[: m.start()] + more + ptx[m.end() :], m.start())


class Kernel(NamedTuple):
    """A launch whose kernel is mutated."""

    name: str
    call: Callable[[], list[torch.Tensor]]
    """Returns everything that the kernel writes."""
    kinds: tuple[str, ...]
    """Which mutations are tried: masks where blocks are partial, addresses where all that is read matters."""


STORES = ("mask of a store",)
MASKS = ("mask of a load", *STORES)
ORDER = ("barrier", "wait", "wait for products", "fence of registers", "fence of memory")
ADDRESSES = ("offset", "stride")


def amid_nan(t: torch.Tensor) -> torch.Tensor:
    """A copy of ``t`` in a larger tensor of NaN: what is read beside it shows in the results."""
    whole = torch.full([n + 16 for n in t.shape], torch.nan, dtype=t.dtype)
    return whole[tuple(slice(8, 8 + n) for n in t.shape)].copy_(t)


def attention_kernels(batch, sizes, dtype, generator, kinds):
    queries, keys, width = sizes
    draw = lambda n: amid_nan(torch.randn(batch, n, batch, width, generator=generator).to(dtype)).transpose(1, 2)
    q, k, v, grad = draw(queries), draw(keys), draw(keys), draw(queries)
    forward = lambda: list(attention.forward(q, k, v, 0.1, "tf32"))
    out, lse = forward()
    backward = lambda: list(attention.backward(grad, q, k, v, out, lse, 0.1, "tf32"))
    return [
        Kernel("cross_attention_fwd_kernel", forward, kinds),
        Kernel("cross_attention_bwd_q_kernel", backward, kinds),
        Kernel("cross_attention_bwd_kv_kernel", backward, kinds),
    ]


def long_attention(generator):
    """Loops that use each stage of their pipeline several times."""
    return attention_kernels(1, (256, 320, 64), torch.bfloat16, generator, ORDER)


def whole_attention(generator):
    return attention_kernels(2, (128, 128, 64), torch.bfloat16, generator, ADDRESSES)


def partial_attention(generator):
    return attention_kernels(2, (70, 90, 48), torch.float32, generator, MASKS)


def products(generator):
    kernels = []
    for (m, k, n), kinds in (((128, 224, 64), ORDER + ADDRESSES), ((150, 200, 70), MASKS)):
        a, b = (amid_nan(torch.randn(shape, generator=generator)) for shape in ((m, k), (n, k)))
        kernels.append(Kernel("_context_matmul_kernel", lambda a=a, b=b: [context._matmul(a, b.t(), "tf32")], kinds))
    return kernels


def pixels(generator):
    """The masks of their loads only save reading: what they hide has weight 0, or is not stored."""
    video = amid_nan(torch.randn(2, 2, 3, 9, 108, generator=generator))
    origins = torch.cartesian_prod(torch.tensor([0, 1]), torch.tensor([0, 3]), torch.tensor([0, 37]))
    tiles = amid_nan(torch.randn(2, 8, 2, 2, 6, 71, generator=generator))
    box, every = random_boxes(2, (0.6, 0.8, 0.7), generator), ORDER + ADDRESSES + STORES
    return [
        Kernel("extract_tiles_kernel", lambda: [extract_tiles(video, origins, (2, 6, 71), backend="triton")], every),
        Kernel("average_tiles_kernel", lambda: [average_tiles(tiles, origins, (3, 9, 108), backend="triton")], every),
        Kernel("sample_patches_fwd_kernel", lambda: [sample_patches(video, box, (2, 7, 41), backend="triton")], every),
    ]


def lists(generator):
    """A full chunk, a partial one behind it, and a short tensor."""
    kernels = []
    for op, names in {"adamw_step": ("adamw",), "lamb_step": ("lamb_moments", "sum_chunks", "lamb_apply")}.items():
        arguments = steps.draw(generator, ((2301,), (3, 5)), op=op)
        call = lambda op=op, arguments=arguments: list(steps.after(op, arguments, "triton").values())
        kernels += [Kernel(f"{name}_kernel", call, MASKS + ORDER + ADDRESSES) for name in names]
    return kernels


class Outcome(NamedTuple):
    """What a call gave whose kernel was perhaps mutated."""

    results: list[torch.Tensor]
    findings: list[str]
    requests: dict[int, int]
    """Accesses of the kernel's warps to memory, by instruction."""
    ptx: str
    """The original."""
    parameters: list[str]
    """Names of the kernel's parameters."""


def outcome(kernel: Kernel, target: int, ptx: str | None = None) -> Outcome:
    from hpdm_kernels.aot.execution.launch import executing

    seen = []

    def rewrite(name: str, original: str) -> str:
        if name != kernel.name:
            return original
        seen.append(original)
        return original if ptx is None else ptx

    with executing(target, rewrite=rewrite, strict=False) as execution:
        results = kernel.call()
    launches = execution.launches
    launch = [launch for launch in launches if launch.function.__name__ == kernel.name][-1]
    parameters = [name for name in launch.function.arg_names if launch.types[name] != "constexpr"]
    requests: dict[int, int] = {}
    for traffic in (launch.counts.sectors, launch.counts.wavefronts):
        for index, part in traffic.items():
            requests[index] = requests.get(index, 0) + part.requests
    return Outcome(
        results=results,
        findings=[text for each in launches for text in each.findings],
        requests=requests,
        ptx=seen[0],
        parameters=parameters,
    )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, NaNs included."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def survives(kernel: Kernel, target: int, before: Outcome, mutation: Mutation) -> bool:
    """Whether a mutation is neither reported nor seen in the results."""
    try:
        after = outcome(kernel, target, mutation.ptx)
    except Exception:  # the execution could not go on
        return False
    return not after.findings and all(map(same_bits, before.results, after.results))


def without_comments(ptx: str) -> str:
    lines = (raw.partition("//")[0] for raw in ptx.splitlines())
    return " ".join(" ".join(line.split()) for line in lines if line.strip() and not line.strip().startswith(".loc"))


WAIT, BARRIER, FENCE = "cp.async.wait_group", "bar.sync 0;", "fence.proxy.async"
WRITES = r"st\.shared|stmatrix|cp\.async\.wait_group"


def is_repeated(first: str, rest: str) -> bool:
    """Whether the wait at the start of ``rest`` follows one, or is followed by one, for as many groups or more."""
    number, _, behind = rest.removeprefix(WAIT).partition(";")
    before = first.rpartition("commit_group")[2]
    at_once = re.split(r"commit_group|ldmatrix|ld\.shared|bar\.sync|\bbra\b", behind)[0]
    return any(int(n) <= int(number) for n in re.findall(rf"{WAIT} (\d+);", f"{before} {at_once}"))


def is_idle(first: str, rest: str) -> bool:
    """Whether threads only read between the barriers before and behind the one at the start of ``rest``.

    Copies that are waited for between them are written there, unless the wait is repeated.
    """
    before, behind = first.rpartition(BARRIER)[2], rest.removeprefix(BARRIER).partition(BARRIER)[0]
    if re.search(r"cp\.async\.c[ag]|st\.shared|stmatrix", before + behind):
        return False
    waits = [m.start() for m in re.finditer(WAIT, before)]
    start = len(first) - len(before)
    return all(is_repeated(first[: start + at], first[start + at :]) for at in waits)


def shared_registers(first: str, rest: str) -> set[str]:
    """Registers of the product behind a fence that were used since the fence before it."""
    product = rest[rest.index("wgmma.mma_async") :].partition(";")[0]
    since = first.rpartition("wgmma.fence")[2]
    return set(re.findall(r"%r\d+", product)) & set(re.findall(r"%r\d+", since))


def only_guards_a_spare_stage(first: str, rest: str) -> bool:
    """Whether the barrier at the start of ``rest`` is in a loop of products of warpgroups, in front of its copies.

    Such a loop has one stage more than it copies ahead. The copies go to the stage of the iteration before, whose
    products every warp waited for earlier in this iteration, in front of another barrier.
    """
    before, behind = first.rpartition(BARRIER)[2], rest.removeprefix(BARRIER).partition(BARRIER)[0]
    copies = "cp.async.c" in behind and "st.shared" not in behind
    return copies and "wgmma.mma_async" in before + behind and not re.search(WRITES, before)


NOT_NEEDED = {
    ("cross_attention_fwd_kernel", "k_ptr"): "the scores of keys beyond the last one are replaced by -inf",
    ("cross_attention_bwd_q_kernel", "out_ptr"): "columns beyond the width are multiplied by the zeros of grad",
}
"""Kernel and pointer -> why a mask of its loads changes no result where what is read instead is in bounds."""


def why_nothing_changes(kernel: Kernel, target: int, before: Outcome, mutation: Mutation) -> str:
    """The reason why a mutation provably changes nothing, empty if there is none."""
    first, rest = without_comments(before.ptx[: mutation.place]), without_comments(before.ptx[mutation.place :])
    if mutation.kind in MASKS and not outcome(kernel, target, mutation.probe).findings:
        return "the mask holds in every lane"
    index = len(parse(before.ptx[: mutation.place] + "\n}").instructions)
    if mutation.kind == "offset" and not before.requests.get(index):
        return "no lane executes the access"
    if mutation.kind in MASKS:
        pointers = {before.parameters[i] for i in origins(parse(before.ptx))[index]}
        return next((r for (name, p), r in NOT_NEEDED.items() if name == kernel.name and pointers == {p}), "")
    if mutation.kind == "wait" and is_repeated(first, rest):
        return "another wait, with no new copies between the two, is for the same groups"
    if mutation.kind == "barrier" and is_idle(first, rest):
        return "nothing is written between the barriers before and behind it"
    if mutation.kind == "fence of memory" and not re.search(WRITES, first.rpartition(FENCE)[2]):
        return "nothing is written between the fence before and this one"
    if mutation.kind == "fence of registers" and not shared_registers(first, rest):
        return "no register of the next product was used since the fence before"
    if mutation.kind == "barrier" and target == 90 and only_guards_a_spare_stage(first, rest):
        return "the copies behind it go to a stage that all warps are done with since an earlier barrier"
    # Triton ends every pipelined loop with a wait and a barrier. Its last copies have no lanes, so that there is
    # nothing to wait for, and the loop's own last barrier is behind all accesses to what is overwritten then.
    is_wait, is_barrier = mutation.kind == "wait", mutation.kind == "barrier" and first.endswith(f"{WAIT} 0;")
    is_last = f"{WAIT} 0; {BARRIER}" not in rest.removeprefix(f"{WAIT} 0;")
    return "nothing is in flight behind the loop" if (is_wait or is_barrier) and is_last else ""


@pytest.mark.parametrize("make", [long_attention, whole_attention, partial_attention, products, pixels, lists])
def test_mutations_are_noticed(make, generator, request):
    target = request.config.getoption("--execute-ptx")
    choice = random.Random(int(torch.randint(2**31, (1,), generator=generator)))
    unnoticed = []
    for kernel in make(generator):
        before = outcome(kernel, target)
        assert not before.findings
        by_kind: dict[str, list[Mutation]] = {}
        for mutation in mutations(before.ptx, before.parameters):
            by_kind.setdefault(mutation.kind, []).append(mutation)
        for all_of_kind in (by_kind[kind] for kind in kernel.kinds if kind in by_kind):
            for mutation in choice.sample(all_of_kind, min(MOST, len(all_of_kind))):
                if survives(kernel, target, before, mutation):
                    reason = why_nothing_changes(kernel, target, before, mutation)
                    print(f"{kernel.name}: {mutation.kind} {mutation.what}: {reason or 'NOT NOTICED'}")
                    unnoticed += [] if reason else [f"{kernel.name}: {mutation.kind} {mutation.what}"]
    assert not unnoticed
