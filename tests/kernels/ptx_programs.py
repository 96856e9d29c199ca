"""Small PTX programs for tests: runs a few instructions in every thread, on inputs and outputs of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpdm_kernels.aot.execution.counts import Counts
from hpdm_kernels.aot.execution.global_memory import GlobalMemory
from hpdm_kernels.aot.execution.machine import Machine
from hpdm_kernels.aot.execution.program import parse

_REGISTERS = {2: "%rs", 4: "%r", 8: "%rd"}


def execute(
    body: str,
    tensors: Sequence[Tensor] = (),
    threads: int = 32,
    shared: int = 0,
    blocks: int = 1,
    exposed: Sequence[Tensor] = (),
) -> tuple[Counts, list[str]]:
    """Executes ``body`` with the addresses of ``tensors`` in %rd1, %rd2, ... and the thread's number in %r0.

    Returns:
        The counts and the findings.
    """
    parameters = ",\n".join(f".param .u64 .ptr .global .align 1 k_param_{i}" for i in range(len(tensors)))
    loads = "\n".join(f"ld.param.b64 %rd{i + 1}, [k_param_{i}];" for i in range(len(tensors)))
    text = (
        f".version 8.4\n.target sm_90a\n.visible .entry k({parameters})\n.reqntid {threads}\n{{\n"
        f"mov.u32 %r0, %tid.x;\n{loads}\n{body}\nret;\n}}\n"
    )
    machine = Machine(parse(text), shared)
    return machine.run([t.data_ptr() for t in tensors], (blocks, 1, 1), GlobalMemory(tensors, exposed))


def apply(instruction: str, *inputs: Tensor, out: torch.dtype = torch.float32) -> Tensor:
    """Executes one instruction once per element of the inputs, and returns its results.

    ``instruction`` has ``{d}`` for its destination and ``{0}``, ``{1}``, ... for its operands, registers of the width
    of the inputs: ``"add.f32 {d}, {0}, {1};"``.
    """
    n = inputs[0].numel()
    threads = -(-n // 32) * 32
    padded = [torch.cat([t.flatten(), t.flatten()[:1].expand(threads - n)]) for t in inputs]
    result = torch.zeros(threads, dtype=out)
    lines, names = [], []
    for i, t in enumerate(padded):
        size = t.element_size()
        names.append(f"{_REGISTERS[size]}{50 + i}")
        lines.append(f"mad.wide.s32 %rd{20 + i}, %r0, {size}, %rd{i + 1};")
        lines.append(f"ld.global.b{8 * size} {names[i]}, [%rd{20 + i}];")
    size = result.element_size()
    d = f"{_REGISTERS[size]}90"
    lines.append(instruction.format(*names, d=d))
    lines.append(f"mad.wide.s32 %rd40, %r0, {size}, %rd{len(padded) + 1};")
    lines.append(f"st.global.b{8 * size} [%rd40], {d};")
    _, findings = execute("\n".join(lines), [*padded, result], threads)
    assert not findings, findings
    return result[:n].view(inputs[0].shape)
