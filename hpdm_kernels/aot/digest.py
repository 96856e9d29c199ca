"""The digest of a kernel: of the code of its functions and of the configuration it is compiled in.

A row of the committed table is valid as long as its digest matches the current code. The digest ignores what does not
reach the compiled code: comments, docstrings, the files that functions are in, and the names of functions, arguments
and variables. It does not cover the compiler, whose version the table states.
"""

from __future__ import annotations

import ast
import builtins
import functools
import hashlib
import inspect
import json
import textwrap
from types import FunctionType, ModuleType
from typing import Any

from hpdm_kernels._triton import KernelSpec

# Fields of the syntax tree that do not reach Triton, or that do not exist in all versions of Python.
_IGNORED = ("ctx", "decorator_list", "kind", "name", "returns", "type_comment", "type_params")


def compile_options(spec: KernelSpec) -> dict[str, Any]:
    """The options of ``triton.compile``. Fused multiply-add is the default, but Triton warns if it is not set."""
    return {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "enable_fp_fusion": True}


def digest(spec: KernelSpec) -> str:
    """12 hexadecimal digits that change with the kernel's code or configuration."""
    names = list(spec.signature)
    compiled = {
        "code": _code_digest(spec.fn.fn),
        "types": list(spec.signature.values()),
        "constants": sorted((names.index(name), repr(value)) for name, value in spec.constexprs.items()),
        "aligned": sorted(names.index(name) for name in spec.aligned),
        "options": compile_options(spec),
    }
    return hashlib.sha256(json.dumps(compiled, sort_keys=True).encode()).hexdigest()[:12]


@functools.cache
def _code_digest(function: FunctionType) -> str:
    """Digest of a function's code, including the kernel functions that it calls."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    return hashlib.sha256(_Writer(function, tree).text(tree).encode()).hexdigest()


class _Writer:
    """Writes a syntax tree as text: local names become numbers in order of appearance, global names are resolved."""

    def __init__(self, function: FunctionType, tree: ast.stmt) -> None:
        self._globals = vars(builtins) | function.__globals__
        stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self._local = stored | {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
        self._numbers: dict[str, int] = {}

    def text(self, node: object) -> str:
        """The text of a node, of a list of nodes or of a value in a node."""
        if isinstance(node, list):
            return f"[{','.join(map(self.text, node))}]"
        if isinstance(node, ast.Name):
            return self._name(node.id)
        if not isinstance(node, ast.AST):
            return f"{type(node).__name__}:{node!r}"
        fields = {name: value for name, value in ast.iter_fields(node) if name not in _IGNORED}
        if isinstance(node, ast.arg):
            fields["arg"] = ast.Name(node.arg)
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            fields["body"] = node.body[1:]
        # Fields that are None or empty are left out, since versions of Python differ in them; constants are kept.
        written = [
            f"{name}={self.text(value)}"
            for name, value in sorted(fields.items())
            if isinstance(node, ast.Constant) or (value is not None and value != [])
        ]
        return f"{type(node).__name__}({','.join(written)})"

    def _name(self, name: str) -> str:
        if name in self._local:
            return f"local:{self._numbers.setdefault(name, len(self._numbers))}"
        if name not in self._globals:
            return f"unknown:{name}"
        value = self._globals[name]
        kernel_function = getattr(value, "fn", None)
        if isinstance(kernel_function, FunctionType):
            return f"kernel:{_code_digest(kernel_function)}"
        if isinstance(value, ModuleType):
            return f"module:{value.__name__}"
        if hasattr(value, "__qualname__"):
            return f"object:{value.__module__}.{value.__qualname__}"
        return f"value:{value!r}"
