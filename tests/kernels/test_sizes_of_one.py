"""Launched for real, Triton turns every integer argument that is 1 into a constant; kernels must compile then, too.

The interpreter does not do that, and ahead-of-time specs have general sizes: one source, one sample or a transposed
matrix (stride 1) would fail on a GPU alone.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CODE = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hpdm_kernels.aot.collect import collect, op_modules

specs = {}
for spec in collect(op_modules()):
    specs.setdefault((spec.name.split("[")[0], tuple(sorted(spec.constexprs))), spec)
results = {}
for spec in specs.values():
    ones = [name for name, kind in spec.signature.items() if kind in ("i32", "i64")]
    source = ASTSource(
        fn=spec.fn,
        signature={name: "constexpr" if name in ones else kind for name, kind in spec.signature.items()},
        constexprs={**spec.constexprs, **dict.fromkeys(ones, 1)},
    )
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": spec.num_warps})
        results[spec.name] = ""
    except Exception as error:
        results[spec.name] = f"{type(error).__name__}: {error}"
print(json.dumps(results))
"""


@pytest.mark.slow
def test_every_kernel_compiles_with_every_integer_one():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout.splitlines()[-1])
    assert len(results) >= 14
    assert not {name: why for name, why in results.items() if why}
