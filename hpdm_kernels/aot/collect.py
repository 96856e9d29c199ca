"""Collects the kernels that are compiled ahead of time: the ``aot_specs()`` of every op family."""

from __future__ import annotations

import importlib
import math
import pkgutil
import random
from collections.abc import Iterable, Sequence

import hpdm_kernels
from hpdm_kernels._triton import SHARED_MEMORY_LIMITS, KernelSpec


def op_modules() -> list[str]:
    """Modules of this package that define ``aot_specs``, not those that only import it."""
    modules = []
    for info in pkgutil.walk_packages(hpdm_kernels.__path__, "hpdm_kernels."):
        if info.name.startswith("hpdm_kernels.aot"):
            continue
        specs = getattr(importlib.import_module(info.name), "aot_specs", None)
        if specs is not None and specs.__module__ == info.name:
            modules.append(info.name)
    return modules


def collect_by_op(modules: Iterable[str]) -> dict[str, list[KernelSpec]]:
    """The specs of each op family, whose name is the folder of its module: ``attention``.

    Raises:
        ValueError: two specs of the same name for a target, or a spec that does not cover its kernel's arguments.
    """
    names: set[tuple[str, str]] = set()
    by_op: dict[str, list[KernelSpec]] = {}
    for module in modules:
        specs = importlib.import_module(module).aot_specs()
        for spec in specs:
            here = {(spec.name, target) for target in spec.targets or SHARED_MEMORY_LIMITS}
            if here & names:
                raise ValueError(f"{module}.aot_specs(): two specs are named {spec.name!r}, expected unique names")
            if list(spec.signature) != list(spec.fn.arg_names):
                raise ValueError(
                    f"{module}.aot_specs(): {spec.name!r} has arguments {list(spec.signature)}, "
                    f"expected {list(spec.fn.arg_names)}"
                )
            names |= here
        by_op.setdefault(module.split(".")[-2] if "." in module else module, []).extend(specs)
    return by_op


def collect(modules: Iterable[str]) -> list[KernelSpec]:
    """The specs of all modules; raises as :func:`collect_by_op`."""
    return [spec for specs in collect_by_op(modules).values() for spec in specs]


def sample(specs: Sequence[KernelSpec], one_in: int, seed: int) -> list[KernelSpec]:
    """Random specs: one in ``one_in`` of each kernel (the name up to the bracket), but at least one."""
    generator = random.Random(seed)
    by_kernel: dict[str, list[KernelSpec]] = {}
    for spec in specs:
        by_kernel.setdefault(spec.name.split("[")[0], []).append(spec)
    return [s for group in by_kernel.values() for s in generator.sample(group, math.ceil(len(group) / one_in))]
