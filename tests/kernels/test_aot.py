"""Every kernel compiles for every supported GPU, without spills and within its shared memory.

For GPUs that run sm_80's instructions with less shared memory only the configurations are compiled that sm_80 does not
have; for the others sm_80's shared memory is compared with theirs.

Compiling all of them takes a quarter of an hour, so `make test` compiles a random sample, new every run, and checks
that the committed table of all kernels is of today's code. `make test-aot` compiles all of them. So does every run with
another Triton than the table's, for which the table is no evidence.
"""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hpdm_kernels import _triton
from hpdm_kernels._triton import SHARED_MEMORY_LIMITS
from hpdm_kernels.aot import machine_code
from hpdm_kernels.aot import table as aot_table
from hpdm_kernels.aot.__main__ import main
from hpdm_kernels.aot.collect import collect, collect_by_op, op_modules, sample
from hpdm_kernels.aot.digest import digest
from hpdm_kernels.aot.result import TARGETS, Result, compilations
from hpdm_kernels.attention.block_sizes import HEAD_WIDTHS, Gpu, gpu_tiling
from tests.kernels.other_tritons import problem

TABLE = Path(__file__).parents[2] / "docs" / "kernels.md"
ONE_IN = 12
"""The sample: of each kernel one configuration in so many, and at least one."""
UPDATE = f"to update: python -m hpdm_kernels.aot --renew {TABLE}"
pytestmark = pytest.mark.skipif(not _triton.AVAILABLE, reason="triton is not installed")


def run_aot(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one interprets the kernels, and an interpreted kernel cannot be compiled."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "hpdm_kernels.aot", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED_MEMORY_LIMITS)
def test_kernels_compile_without_spills(target: str, tmp_path: Path, generator: torch.Generator) -> None:
    table = aot_table.read(TABLE.read_text(encoding="utf-8"))
    same_triton = table.tools["triton"] == _triton.triton.__version__
    by_op = collect_by_op(op_modules())
    file = tmp_path / "results.json"
    arguments = ["--target", target, "--jobs", "1", "--json", str(file)]
    if target not in TARGETS:
        arguments += ["--own"]
    if same_triton and os.environ.get("HPDM_AOT") != "all":
        seed = int(torch.randint(2**31, (1,), generator=generator))
        arguments += ["--sample", str(ONE_IN), "--seed", str(seed)]
        by_op = {op: sample(specs, ONE_IN, seed) for op, specs in by_op.items()}
    kernels = {s.name for _, s, t in compilations(by_op, [target] if target in TARGETS else ()) if t == target}
    done = run_aot(*arguments)
    assert done.returncode in (0, 1), done.stderr
    results = json.loads(file.read_text())
    assert {(r["kernel"], r["target"]) for r in results} == {(name, target) for name in kernels}
    for r in results:
        wrong = problem(Result(**r), _triton.triton.__version__)
        assert wrong == "", f"{r['kernel']} on {target}: {wrong}"
        assert r["stack"] == 0 or not same_triton
        assert r["shared"] <= SHARED_MEMORY_LIMITS[target]
        assert 0 < r["registers"] <= 255
    assert done.returncode == 0 or not same_triton
    # Another version of Triton may choose other instructions. Within a version, registers and counts may change with
    # any edit, so only lost kinds of instructions are a failure. The table is counted in SASS and this run in PTX: the
    # table is written only if both name the same matrix units.
    if same_triton:
        lost = aot_table.lost_instructions(table, [Result(**r) for r in results])
        assert not lost, "\n".join([*lost, f"if that is meant, {UPDATE}"])


def test_sample_has_every_kernel_and_depends_on_its_seed() -> None:
    specs = collect(op_modules())
    names = [[(spec.name, spec.targets) for spec in sample(specs, ONE_IN, seed)] for seed in (1, 1, 2)]
    assert names[0] == names[1] != names[2]
    assert len(specs) / ONE_IN <= len(set(names[0])) == len(names[0]) < len(specs) / 4
    assert {n.split("[")[0] for n, _ in names[0]} == {spec.name.split("[")[0] for spec in specs}
    assert {spec.name for spec in sample(specs, 1, 5)} == {spec.name for spec in specs}


def test_committed_table_is_of_the_kernels_of_today() -> None:
    """Their code, block sizes and other options; blocks are others in an interpreted process, such as this one."""
    done = run_aot("--check", str(TABLE))
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{UPDATE}"
    table = aot_table.read(TABLE.read_text(encoding="utf-8"))
    kernels = {spec.name for spec in collect(op_modules())}
    assert {(r.kernel, r.target) for r in table.results} == {(k, t) for k in kernels for t in TARGETS}
    assert {r.stack for r in table.results} == {0}


def test_configurations_of_sm_80_fit_cards_with_less_shared_memory() -> None:
    """Those that they do not replace by their own, which are compiled for them."""
    table = aot_table.read(TABLE.read_text(encoding="utf-8"))
    shared = {r.kernel: r.shared for r in table.results if r.target == "sm_80"}
    by_op = collect_by_op(op_modules())
    for target in sorted(SHARED_MEMORY_LIMITS.keys() - set(TARGETS)):
        own = {spec.name for _, spec, t in compilations(by_op) if t == target}
        names = {spec.name for _, spec, _ in compilations(by_op, [target])}
        assert names == shared.keys()
        assert own < names
        assert {n: shared[n] for n in names - own if shared[n] > SHARED_MEMORY_LIMITS[target]} == {}


def test_programs_of_a_multiprocessor_are_those_of_the_compiled_kernels() -> None:
    """The work is split by them, so a kernel that needs more registers must not go unnoticed."""
    table = aot_table.read(TABLE.read_text(encoding="utf-8"))
    blocks = {(r.kernel, r.target): r.blocks for r in table.results}
    fewest: dict[tuple[object, ...], int] = {}
    for _, spec, target in compilations({"attention": collect_by_op(op_modules())["attention"]}, TARGETS):
        kernel, dtype, precision = spec.name.removeprefix("cross_attention_").replace("[", ",").split(",")[:3]
        if kernel == "combine":
            continue
        width = next(width for width in HEAD_WIDTHS if spec.constexprs["BLOCK_D"] <= width)
        entry = (kernel, precision if dtype == "fp32" else "16bit", width)
        gpu = Gpu(int(target.removeprefix("sm_")), SHARED_MEMORY_LIMITS[target])
        tile = gpu_tiling(*entry, gpu, whole=spec.constexprs["EVEN"])
        fewest[*entry, tile] = min(fewest.get((*entry, tile), 32), blocks[spec.name, target])
    assert {key: key[-1].programs for key in fewest} == fewest


def test_stale_table_is_reported(tmp_path: Path) -> None:
    text = TABLE.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    name, config = (cell.strip() for cell in rows[1].strip("|").split("|")[:2])
    changed = text.replace(rows[0] + "\n", "").replace(rows[1], rows[1].replace(config, "M7, 1 x 1"))
    changed = changed.replace(rows[2], rows[2].replace("[", "[renamed,", 1))
    digest = rows[3].split("|")[-4].strip()
    changed = changed.replace(rows[3], rows[3].replace(digest, "0123456789ab"))
    file = tmp_path / "kernels.md"
    file.write_text(changed, encoding="utf-8")
    done = run_aot("--check", str(file))
    assert done.returncode == 1
    assert f"{rows[0].split('`')[1]}: not in the table" in done.stdout
    assert f"{name.strip('`')}: M7, 1 x 1 in the table, now {config}" in done.stdout
    assert "[renamed," in done.stdout
    assert f"{rows[3].split('`')[1]}: digest 0123456789ab in the table, now {digest}" in done.stdout
    assert len(done.stdout.splitlines()) == 5


KERNEL = """
    from hpdm_kernels._triton import KernelSpec, jit, tl
    {constant}

    @jit
    def _helper(x, SIZE: tl.constexpr):
        return x * SIZE

    @jit
    def _kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
        '''Doubles x.'''
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offsets, mask=offsets < size)  # [BLOCK]
        tl.store(out_ptr + offsets, _helper(x, 2), mask=offsets < size)

    def aot_specs():
        signature = {{"x_ptr": "*fp32", "out_ptr": "*fp32", "size": "i32", "BLOCK": "constexpr"}}
        return [KernelSpec("kernel", _kernel, signature, {{"BLOCK": 128}}, aligned=("x_ptr",))]
"""


def digest_of(source: str, tmp_path: Path) -> str:
    """The digest of the kernel in a module of this source."""
    file = tmp_path / f"kernels{len(list(tmp_path.iterdir()))}.py"
    file.write_text(textwrap.dedent(source).format(constant="VALUE = 3"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(file.stem, file))
    module.__spec__.loader.exec_module(module)
    return digest(module.aot_specs()[0])


def test_digest_ignores_comments_and_names(tmp_path: Path) -> None:
    same = {
        "comment": ("# [BLOCK]", "# of BLOCK elements\n        # more"),
        "docstring": ("Doubles x.", "Twice x."),
        "no docstring": ("'''Doubles x.'''\n", "\n"),
        "helper": ("_helper", "_times"),
        "variable": ("offsets", "columns"),
        "argument": ("size", "length"),
        "layout": ("_helper(x, 2)", "(_helper(\n            x,\n            2,\n        ))"),
    }
    before = digest_of(KERNEL, tmp_path)
    for name, (old, new) in same.items():
        assert old in KERNEL, name
        assert digest_of(KERNEL.replace(old, new), tmp_path) == before, name


def test_digest_changes_with_code_and_configuration(tmp_path: Path) -> None:
    other = {
        "code": ("mask=offsets < size)", "mask=offsets <= size)"),
        "helper's code": ("x * SIZE", "x * SIZE + 1"),
        "argument of a helper": ("_helper(x, 2)", "_helper(x, 2.0)"),
        "order": ("x_ptr, out_ptr, size", "out_ptr, x_ptr, size"),
        "global value": ("_helper(x, 2)", "_helper(x, VALUE)"),
        "type": ('"out_ptr": "*fp32"', '"out_ptr": "*bf16"'),
        "constant": ('"BLOCK": 128', '"BLOCK": 256'),
        "alignment": ('aligned=("x_ptr",)', 'aligned=("x_ptr", "out_ptr")'),
        "warps": ("aligned=", "num_warps=8, aligned="),
        "stages": ("aligned=", "num_stages=3, aligned="),
    }
    digests = {"before": digest_of(KERNEL, tmp_path)}
    for name, (old, new) in other.items():
        assert old in KERNEL, name
        digests[name] = digest_of(KERNEL.replace(old, new), tmp_path)
    digests["another global value"] = digest_of(
        KERNEL.replace("_helper(x, 2)", "_helper(x, VALUE)").replace("{constant}", "VALUE = 4"), tmp_path
    )
    assert len(set(digests.values())) == len(digests), digests


def test_rows_of_todays_code_are_kept() -> None:
    specs = collect(op_modules())[:3]
    rows = [Result(spec.name, "sm_80", "old", aot_table.config_text(spec), digest=digest(spec)) for spec in specs]
    table = aot_table.Table({}, [rows[0], replace(rows[1], digest="0123456789ab"), replace(rows[2], config="-")])
    assert aot_table.current_rows(table, {"new": specs}) == [replace(rows[0], op="new")]


def test_ops_are_found() -> None:
    ops = {"attention", "context", "groupnorm", "optimizer", "patches", "rows", "temporal", "tiles"}
    assert set(collect_by_op(op_modules())) == ops


BAD_KERNELS = """
    import triton
    import triton.language as tl
    from hpdm_kernels._triton import KernelSpec

    @triton.jit
    def _product_kernel(a_ptr, b_ptr, out_ptr, steps, N: tl.constexpr, K: tl.constexpr):
        rows, inner = tl.arange(0, N), tl.arange(0, K)
        total = tl.zeros((N, N), tl.float32)
        for step in range(steps):
            a = tl.load(a_ptr + step * N * K + rows[:, None] * K + inner[None, :])
            b = tl.load(b_ptr + step * N * K + inner[:, None] * N + rows[None, :])
            total += tl.dot(a, b, input_precision="tf32")
        tl.store(out_ptr + rows[:, None] * N + rows[None, :], total)

    @triton.jit
    def _broken_kernel(out_ptr):
        tl.store(out_ptr, undefined_name)

    def spec(name, n, k, warps, stages):
        signature = {"a_ptr": "*fp32", "b_ptr": "*fp32", "out_ptr": "*fp32", "steps": "i32"}
        signature |= {"N": "constexpr", "K": "constexpr"}
        aligned = ("a_ptr", "b_ptr", "out_ptr")
        return KernelSpec(name, _product_kernel, signature, {"N": n, "K": k}, warps, stages, aligned)

    def aot_specs():
        return [
            spec("good", 32, 32, 4, 2),
            spec("spilling", 128, 32, 1, 2),
            spec("oversized", 128, 128, 8, 4),
            KernelSpec("broken", _broken_kernel, {"out_ptr": "*fp32"}),
        ]
"""


def test_bad_kernels_are_reported(tmp_path: Path) -> None:
    (tmp_path / "bad_kernels.py").write_text(textwrap.dedent(BAD_KERNELS))
    file = tmp_path / "results.json"
    arguments = ("--module", "bad_kernels", "--target", "sm_80", "--jobs", "1", "--json", str(file))
    done = run_aot(*arguments, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    problems = {r["kernel"]: r["problem"] for r in json.loads(file.read_text())}
    assert problems["good"] == ""
    assert "bytes of stack" in problems["spilling"]
    assert "bytes of shared memory, at most 166912" in problems["oversized"]
    assert "undefined_name" in problems["broken"] or "Error" in problems["broken"]
    assert "FAILED" in done.stdout
    assert run_aot(*arguments, "--filter", "good", PYTHONPATH=str(tmp_path)).returncode == 0


def test_interpreted_process_is_refused() -> None:
    done = run_aot(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


def test_filter_without_match_is_an_error() -> None:
    done = run_aot("--filter", "no such kernel")
    assert done.returncode == 2
    assert "no such kernel" in done.stderr


@pytest.mark.parametrize("option", ["--save", "--renew", "--check"])
def test_table_of_a_part_is_refused(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([option, str(tmp_path / "kernels.md"), "--filter", "cross"]) == 2
    assert "--filter" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


PTX = """
    ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    @%p1 ld.global.L1::evict_last.b32 { %r5 }, [ %rd2 ];
    ld.global.v2.b64 { %rd1, %rd2 }, [ %rd3 ];
    cp.async.cg.shared.global [ %r6 + 0 ], [ %rd3 + 0 ], 0x10, %r7;
    cp.async.ca.shared.global [ %r6 + 0 ], [ %rd3 + 0 ], 0x4;
    cp.async.commit_group;
    ld.shared.v4.b32 { %r8, %r9, %r10, %r11 }, [ %r12 ];
"""
AMPERE = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 { %r1, %r2, %r3, %r4 }, { %r5 }, { %r6 }, { %r7 };\n"
HOPPER = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r90,%r91}, %rd1, %rd2, p, 1, 1, 0, 0;\n"
BLACKWELL = """
    mov.b32 %r103, {descriptor};
    @%p16 tcgen05.mma.cta_group::1.kind::{kind} [ %r340 + 0 ], {a}, %rd85, %r103, %p15;
"""


def test_ptx_is_read() -> None:
    assert machine_code.read_ptx(PTX) == machine_code.Code(matrix="-", loads=5, wide_loads=3, async_copies=2)
    assert machine_code.read_ptx(AMPERE).matrix == "HMMA"
    assert machine_code.read_ptx(HOPPER).matrix == "HGMMA"
    assert machine_code.read_ptx(AMPERE + HOPPER).matrix == "HGMMA+HMMA"
    blackwell = BLACKWELL.format(kind="tf32", descriptor=135268624, a="%rd84")
    assert machine_code.read_ptx(blackwell).matrix == "UTCHMMA"
    bulk = (
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd2, {%r3, %r4}], [%r5];"
    )
    assert machine_code.read_ptx(bulk).async_copies == 1


@pytest.mark.parametrize(
    ("ptx", "expected"),
    [
        (PTX, "-"),
        (AMPERE, "TF32"),
        (AMPERE.replace("tf32", "f16"), "F16"),
        (HOPPER, "BF16"),
        (HOPPER.replace("bf16", "f16") + HOPPER, "BF16+F16"),
        (BLACKWELL.format(kind="tf32", descriptor=135268624, a="%rd84"), "TF32"),
        (BLACKWELL.format(kind="f16", descriptor=135267472, a="%rd84"), "BF16"),
        (BLACKWELL.format(kind="f16", descriptor=135267472 - (1 << 7), a="[ %r9 + 16 ]"), "F16"),
        (BLACKWELL.format(kind="f16", descriptor="%r7", a="%rd84"), "kind::f16"),
    ],
)
def test_operands_are_read(ptx: str, expected: str) -> None:
    assert machine_code.read_operands(ptx) == expected


SASS = """
cross_attention_fwd_kernel:
.text.cross_attention_fwd_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R28, desc[UR24][R28.64] ;
        /*0020*/                   LDG.E.U16.CONSTANT R4, desc[UR24][R2.64] ;
        /*0030*/             @!UP1 LDG.E.64 R4, desc[UR24][R2.64] ;
        /*0040*/                   LDGSTS.E.BYPASS.LTC128B.128 [R24], desc[UR24][R38.64], !P0 ;
        /*0050*/                   LDGSTS.E.LTC128B [R24], desc[UR24][R38.64], !P0 ;
        /*0060*/                   LDGDEPBAR ;
        /*0070*/                   LDSM.16.M88.4 R4, [R10] ;
        /*0080*/                   LDS.128 R4, [R10] ;
        /*0090*/                   HGMMA.64x64x8.F32.TF32 R24, gdesc[UR4], R24, !UPT ;
        /*00a0*/                   UTMALDG.2D [UR8], [UR4] ;
"""


def test_sass_is_read() -> None:
    assert machine_code.read_sass(SASS) == machine_code.Code(matrix="HGMMA", loads=5, wide_loads=2, async_copies=3)
    both = SASS + "        /*10b0*/                   HMMA.1688.F32.TF32 R24, R4, R8, R24 ;\n"
    assert machine_code.read_sass(both).matrix == "HGMMA+HMMA"
    with pytest.raises(ValueError, match="sass"):
        machine_code.read_sass("nvdisasm fatal   : not a cubin")


def results() -> list[Result]:
    matrix = {"sm_80": "HMMA", "sm_90": "HGMMA+HMMA", "sm_100": "UTCHMMA"}
    cross = [
        Result(
            "cross[fp32]", target, "cross_attention", "M64 N32, 8 x 3", registers, 0, 32768, matrix[target], "TF32",
            40, 12, copies, "SASS",
        )
        for target, registers, copies in (("sm_80", 255, 24), ("sm_90", 90, 60), ("sm_100", 90, 0))
    ]  # fmt: skip
    tiles = [Result("tiles[fp32]", t, "tiles", "-, 4 x 2", 40, 0, 0, read_from="PTX") for t in matrix]
    return [*cross, *tiles]


def test_table_is_read_back_as_written() -> None:
    table = aot_table.Table({"triton": "3.9.0", "ptxas": "12.9.86 (ptxas) for sm_80"}, results())
    text = aot_table.render(table, "the command")
    assert aot_table.read(text) == table
    assert "| cross_attention | sm_80 | 1 | 255 | 32,768 B (20% of the limit) | 1 | 1 | 12 of 40 |" in text
    assert "| 255 / 90 / 90 | 0 | 32768 | HMMA / HGMMA+HMMA / UTCHMMA | TF32 | 12 of 40 | 24 / 60 / 0 | SASS |" in text
    with pytest.raises(ValueError, match="table"):
        aot_table.read(text.replace("24 / 60 / 0", "24 / 60"))


def test_table_repeats_what_was_executed() -> None:
    """Where the page of executed kernels has a row."""
    page = "| kernel | launches | sectors / ideal | wavefronts / ideal |\n| `cross[fp32]` | 3 | 1.00 / 1.20 | 1.50 |"
    table = aot_table.Table({}, results())
    rows = [line for line in aot_table.render(table, "the command", page).splitlines() if line.startswith("| `")]
    assert [row.split(" | ")[-2:] for row in rows] == [["1.00 / 1.20", "1.50 |"], ["-", "- |"]]
    assert aot_table.read("\n".join(["## cross_attention", rows[0]])).results == results()[:3]


def test_lost_instructions_are_reported() -> None:
    table = aot_table.Table({}, results())
    assert aot_table.lost_instructions(table, results()) == []
    # More registers, fewer wide loads, one copy instead of sixty, a matrix unit where there was none: not lost.
    fine = [replace(r, registers=200, wide_loads=0, async_copies=min(r.async_copies, 1)) for r in results()]
    fine[-1] = replace(fine[-1], matrix="UTCHMMA", operands="BF16")
    assert aot_table.lost_instructions(table, fine) == []
    sm_80, sm_90, sm_100 = results()[:3]
    lost = [replace(sm_80, async_copies=0), replace(sm_90, matrix="HMMA"), replace(sm_100, operands="-", matrix="-")]
    reported = aot_table.lost_instructions(table, lost)
    assert len(reported) == 4
    assert "cross[fp32] on sm_80: 24 async copies in the table, now none" in reported
    assert "cross[fp32] on sm_90: matrix unit HGMMA+HMMA in the table, now HMMA" in reported


def test_text_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "kernels.md"
    aot_table.write_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        aot_table.write_text(file, "new \ud800")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("kernels.md", "old")]
