"""Which shipped configurations were executed: compares launches with the specs that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from hpdm_kernels._triton import KernelSpec
from hpdm_kernels.aot.execution.launch import Launch


@dataclass(frozen=True)
class Executed:
    """One configuration executed on one target."""

    kernel: str
    """Name of the spec."""
    target: str
    """``sm_80``."""
    op: str
    """The op family."""
    launches: int
    """How many launches were of this configuration; the other numbers are of the largest of them."""
    instructions: int
    """Executed instructions per warp."""
    barriers: float
    """Barriers per warp."""
    special_functions: float
    """Calls of the special-function unit per warp."""
    flops: int
    """Of matrix instructions, in the whole launch."""
    sectors: float
    """32-byte sectors of global memory for each that the distinct bytes would need."""
    wavefronts: float
    """Wavefronts of shared memory for each without bank conflicts."""
    worst: str
    """The instruction with the most sectors or wavefronts that are not needed."""
    findings: tuple[str, ...]
    """What is wrong; empty if all is right."""


def is_of(launch: Launch, spec: KernelSpec) -> bool:
    """Whether a launch is of the configuration: the same kernel, constexprs, dtypes, warps and stages."""
    if launch.function is not spec.fn or launch.values.get("num_warps", 4) != spec.num_warps:
        return False
    if launch.values.get("num_stages", spec.num_stages) != spec.num_stages:
        return False
    if any(launch.values.get(name) != value for name, value in spec.constexprs.items()):
        return False
    tensors = {name: v for name, v in launch.values.items() if isinstance(v, Tensor)}
    if {name for name, kind in spec.signature.items() if kind.startswith("*")} != set(tensors):
        return False
    pointers = [v.data_ptr() for v in tensors.values()]
    for name, tensor in tensors.items():
        # What a configuration does not read has another argument's tensor in its place.
        is_read = pointers.count(tensor.data_ptr()) == 1
        if is_read and launch.types[name] != spec.signature[name]:
            return False
    return True


def executed(op: str, spec: KernelSpec, target: str, launches: Iterable[Launch]) -> Executed | None:
    """The record of a configuration, ``None`` if no launch was of it."""
    found = [launch for launch in launches if is_of(launch, spec)]
    if not found:
        return None
    largest = max(found, key=lambda launch: launch.counts.warps)
    counts = largest.counts
    sectors, wavefronts = counts.total(counts.sectors), counts.total(counts.wavefronts)
    traffic = (
        counts.sectors if sectors.moved - sectors.ideal > wavefronts.moved - wavefronts.ideal else counts.wavefronts
    )
    return Executed(
        kernel=spec.name,
        target=target,
        op=op,
        launches=len(found),
        instructions=round(counts.instructions_per_warp),
        barriers=round(counts.barriers / counts.warps, 1),
        special_functions=round(counts.special_functions / counts.warps, 1),
        flops=counts.flops,
        sectors=round(sectors.ratio, 2),
        wavefronts=round(wavefronts.ratio, 2),
        worst=counts.worst(traffic),
        findings=tuple(dict.fromkeys(text for launch in found for text in launch.findings)),
    )
