"""The tools beside `make gpu`: block sizes that are tried, and the hardware's counters beside the executor's counts."""

import pytest

from benchmarks.gpu import counters, tilings
from hpdm_kernels.aot.execution.counts import Counts, Traffic
from hpdm_kernels.attention.block_sizes import Gpu, gpu_tiling

H100 = Gpu(90, 232_448)


@pytest.mark.parametrize("kernel", tilings.KERNELS)
@pytest.mark.parametrize("products", tilings.ARITHMETIC)
def test_the_shipped_tiling_is_tried_first_and_none_twice(kernel, products):
    found = tilings.candidates(kernel, products, 64, H100)
    assert found[0] == gpu_tiling(kernel, products, 64, H100, whole=True)
    assert len({tile[:5] for tile in found}) == len(found) >= 36
    # A thread holds `parts` rows of four columns of a block that is turned.
    looped = [tile.block_m if kernel == "bwd_kv" else tile.block_n for tile in found]
    for tile, rows in zip(found, looped, strict=True):
        most = rows * 64 // (4 * 32 * tile.num_warps)
        assert tile.parts == (min(4, most) if products == "tf32" else 0), tile


def row(seconds, **changes):
    values = {"kernel": "fwd", "products": "tf32", "width": 64, "tiling": [128, 64, 8, 1, 4, 1], "registers": 200}
    return values | {"stack": 0, "shared": 49152, "difference": 0.0, "seconds": {"a": seconds, "b": 1e-6}} | changes


def test_the_table_has_the_fastest_and_the_shipped_one():
    rows = [row(9e-6), row(5e-6), row(3e-6), {"kernel": "fwd", "products": "tf32", "width": 64, "error": "too large"}]
    lines = tilings.table(rows, most=1).splitlines()
    assert lines[0] == "fwd tf32 d64"
    assert "1 of 4" in lines[1]
    assert len(lines) == 4
    assert "    3.0      1.0 us" in lines[2]
    assert "    9.0      1.0 us" in lines[3]
    assert [line.endswith("shipped") for line in lines[2:]] == [False, True]


def test_counters_are_read_in_the_order_of_the_launches(tmp_path):
    names = ",".join(f'"{name}"' for name in ("Kernel Name", *counters.COUNTERS.values()))
    units = ",".join(['""'] * 5)
    file = tmp_path / "counters.csv"
    file.write_text(
        f'==PROF== Connected\n{names}\n{units}\n"b_kernel","1,024","16","8","4"\n"a_kernel","1","2","3","4"\n'
    )
    first, second = counters.profiled(file)
    assert first == ("b_kernel", dict(zip(counters.COUNTERS, (1024, 16, 8, 4), strict=True)))
    assert second[0] == "a_kernel"


def test_asynchronous_copies_are_loads_of_global_memory_and_no_stores_to_shared():
    texts = (
        "ld.global.v4.b32 k.py:1",
        "cp.async.cg.shared.global k.py:2",
        "st.global.b32 k.py:3",
        "ldmatrix.x4 k.py:4",
    )
    counts = Counts(texts=dict(enumerate((*texts, "st.shared.b32 k.py:5"))))
    counts.sectors = {i: Traffic(1, moved, 1) for i, moved in ((0, 10), (1, 200), (2, 3))}
    counts.wavefronts = {i: Traffic(1, moved, 1) for i, moved in ((1, 4000), (3, 50), (4, 6))}
    assert list(counters.counted(counts).values()) == [210, 3, 50, 6]


@pytest.mark.parametrize(("text", "message"), [("", "no launches"), ('"Kernel Name"\n""\n"a"\n', "no column")])
def test_a_file_that_is_no_profile_is_named(text, message, tmp_path, capsys):
    file = tmp_path / "counters.csv"
    file.write_text(text)
    assert counters.main(["compare", str(file), "--filter", "sample_patches[uint8]"]) == 2
    error = capsys.readouterr().err
    assert str(file) in error
    assert message in error


def test_a_filter_without_cases_is_an_error(capsys):
    with pytest.raises(SystemExit) as ended:
        counters.main(["run", "--filter", "no such case"])
    assert ended.value.code == 2
    assert "no case's name contains one of" in capsys.readouterr().err
