"""The proof that every configuration was executed: which launches count as which configuration."""

from dataclasses import replace

import pytest
import torch

from hpdm_kernels._triton import KernelSpec
from hpdm_kernels.aot.execution.counts import Counts
from hpdm_kernels.aot.execution.coverage import Executed, executed, is_of
from hpdm_kernels.aot.execution.launch import Launch, executing
from hpdm_kernels.aot.execution.limits import is_above, reason
from hpdm_kernels.aot.execution.report import render


def kernel():
    """Stands for a kernel, which is compared by identity."""


SPEC = KernelSpec(
    "kernel[bf16]", kernel,
    {"x_ptr": "*bf16", "bias_ptr": "*fp32", "out_ptr": "*bf16", "n": "i32", "BLOCK": "constexpr"},
    {"BLOCK": 64}, num_warps=8, num_stages=3,
)  # fmt: skip


def launch(**changes):
    x, bias, out = torch.zeros(4).bfloat16(), torch.zeros(4), torch.zeros(4).bfloat16()
    values = {"x_ptr": x, "bias_ptr": bias, "out_ptr": out, "n": 7, "BLOCK": 64, "num_warps": 8, "num_stages": 3}
    names = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float16: "*fp16"}
    values |= changes
    types = {name: names[v.dtype] if isinstance(v, torch.Tensor) else "i32" for name, v in values.items()}
    return Launch(kernel, values, types, 8, 3, Counts(warps=2), [])


def test_a_launch_is_of_its_configuration():
    assert is_of(launch(), SPEC)
    # What is not read may have another argument's tensor in its place, of whatever dtype.
    plain = launch()
    assert is_of(
        launch(out_ptr=plain.values["x_ptr"], bias_ptr=plain.values["x_ptr"], x_ptr=plain.values["x_ptr"]), SPEC
    )
    # Options that the launch leaves to Triton are those of the specs by default.
    bare = launch()
    bare = replace(bare, values={k: v for k, v in bare.values.items() if not k.startswith("num_")})
    assert is_of(bare, replace(SPEC, num_warps=4, num_stages=2))
    assert not is_of(bare, SPEC)


@pytest.mark.parametrize(
    "changes",
    [
        {"BLOCK": 32}, {"num_warps": 4}, {"num_stages": 2}, {"bias_ptr": None},
        {"x_ptr": torch.zeros(4).half()}, {"out_ptr": torch.zeros(4)},
    ],
    ids=str,
)  # fmt: skip
def test_another_launch_is_not(changes):
    assert not is_of(launch(**changes), SPEC)


def test_a_constant_pointer_must_be_none():
    without = replace(
        SPEC, signature=SPEC.signature | {"bias_ptr": "constexpr"}, constexprs=SPEC.constexprs | {"bias_ptr": None}
    )
    assert is_of(launch(bias_ptr=None), without)
    assert not is_of(launch(), without)


def test_the_largest_launch_is_recorded_and_all_findings_are():
    small, large = launch(), launch()
    large.counts.warps, large.counts.flops = 10, 77
    small.findings.append("a race")
    record = executed("op", SPEC, "sm_80", [small, large, launch(BLOCK=1)])
    assert (record.launches, record.flops, record.findings) == (2, 77, ("a race",))
    assert executed("op", SPEC, "sm_80", [launch(BLOCK=1)]) is None


def test_unknown_target_and_interpreted_process_are_refused():
    with pytest.raises(ValueError, match=r"^target: got 75, expected one of 80, 90"), executing(75):
        pass
    from hpdm_kernels import _triton

    if _triton.INTERPRETED:
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), executing(80):
            pass


def result(kernel, target="sm_80", sectors=1.0, wavefronts=1.0):
    return Executed(kernel, target, "op", 1, 10, 0, 0, 0, sectors, wavefronts, "", ())


def test_more_traffic_than_allowed_needs_a_reason():
    assert not is_above(result("average_tiles[fp32,mean]", sectors=1.1, wavefronts=1.25))
    for above in (result("average_tiles[fp32,mean]", sectors=1.11), result("x", wavefronts=1.26)):
        assert is_above(above)
        assert reason(above) == "", "none is known for the shapes of the paper"
    # The presets' heads, aligned rows, products on matrix units: nothing explains waste in these.
    for kernel in (
        "cross_attention_fwd[fp32,tf32,d64]",
        "cross_attention_bwd_q[bf16,ieee,d64]",
        "add_context[fp32,onto,aligned]",
    ):
        assert reason(result(kernel)) == "", kernel
    assert reason(result("cross_attention_fwd[bf16,ieee,d24,mask]")) == "a"
    assert reason(result("context_matmul[ieee,nt]")) == "b"
    turned = [reason(result("context_matmul[tf32,nn]", target)) for target in ("sm_80", "sm_90")]
    assert turned == ["", "c"]
    page = render([result("sample_patches_fwd[fp32]", sectors=1.5), result("extract_tiles[fp32,plain]")], "command")
    assert "| f | 1 | pixels of a patch" in page
    assert "| 1.50 | 1.00 | f | - |" in page
    assert "| 1.00 | 1.00 |  | - |" in page
