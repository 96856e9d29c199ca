"""Chooses the backend of an op and the precision of its fp32 products, and registers custom ops.

Four backends (README, "Backends"):

``reference``  the paper's formula in plain PyTorch; in fp64 the oracle of the tests
``torch``      the optimized algorithm in portable PyTorch; the default on CPU
``triton``     the same algorithm as fused kernels; the default on CUDA
``auto``       picks ``triton`` or ``torch`` and logs why, once per reason

An explicit backend never falls back to another one: it raises and says why. Whatever the backend, results have the
dtype that the op documents, under :class:`torch.autocast` too.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch

from hpdm_kernels import _triton

BACKENDS = ("auto", "reference", "torch", "triton")
PRECISIONS = ("ieee", "tf32x3", "tf32")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The floating-point dtypes that the kernels support."""
LEAST_CAPABILITY = (8, 0)
"""The oldest GPUs that the kernels run on: older ones lack asynchronous copies, and matrix units for TF32 and bf16."""

logger = logging.getLogger("hpdm_kernels")

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _constant_when_compiling(fn: Callable[_P, _R]) -> Callable[_P, _R]:
    """Same as ``torch.compiler.assume_constant_result``, without importing Dynamo.

    ``torch.compile`` calls the function while tracing, and its result becomes a constant of the graph. PyTorch's
    decorator sets the same attribute, but first imports ``torch._dynamo``, which is slower than importing this package.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)


@_constant_when_compiling
def _log_choice(op: str, backend: str, reason: str) -> None:
    _log_once(f"{op}: backend='auto' chose {backend!r}: {reason}")


def check_backend(backend: str) -> str:
    """Returns ``backend`` if it is one of :data:`BACKENDS`, else raises ``ValueError``."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    return backend


def resolve(
    backend: str,
    op: str,
    tensor: torch.Tensor,
    triton_dtypes: Sequence[torch.dtype] = TRITON_DTYPES,
    obstacle: str | None = None,
) -> str:
    """The backend that will run ``op`` on tensors like ``tensor``: never ``"auto"``.

    Args:
        backend: one of :data:`BACKENDS`.
        op: the public name of the op, for messages.
        tensor: an input of the op; its device and dtype decide.
        triton_dtypes: the dtypes that the op's kernels support on a GPU. Triton's interpreter supports only fp32 and
            uint8, because its bf16 results are silently wrong.
        obstacle: why the op's kernels cannot take the arguments; ``None`` if they can.

    Raises:
        ValueError: unknown backend.
        RuntimeError: ``backend="triton"``, but the kernels cannot run on ``tensor``.
    """
    check_backend(backend)
    if backend in ("reference", "torch"):
        return backend
    obstacle = _triton_obstacle(tensor, triton_dtypes) or obstacle
    if backend == "triton":
        if obstacle:
            raise RuntimeError(f"{op}: backend='triton' cannot run: {obstacle}")
        return "triton"
    if tensor.device.type == "cuda" and not obstacle:
        _log_choice(op, "triton", "the tensors are on a CUDA device")
        return "triton"
    _log_choice(op, "torch", obstacle or "the tensors are not on a CUDA device")
    return "torch"


@_constant_when_compiling
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _triton_obstacle(tensor: torch.Tensor, dtypes: Sequence[torch.dtype]) -> str | None:
    """The reason why the kernels cannot run on ``tensor``, or ``None`` if they can."""
    if not _triton.AVAILABLE:
        return f"triton is not importable ({_triton.IMPORT_ERROR})"
    if tensor.device.type == "cuda":
        if _triton.INTERPRETED:
            return "TRITON_INTERPRET=1 is set, which runs kernels on the CPU"
        capability = _capability(tensor.device)
        if capability < LEAST_CAPABILITY:
            return "needs compute capability {}.{} or newer, got {}.{}".format(*LEAST_CAPABILITY, *capability)
        if tensor.dtype not in dtypes:
            return f"no kernel for {tensor.dtype} (have {', '.join(map(str, dtypes))})"
        return None
    if tensor.device.type == "cpu" and _triton.executed:
        return None if tensor.dtype in dtypes else f"no kernel for {tensor.dtype} (have {', '.join(map(str, dtypes))})"
    if tensor.device.type == "cpu":
        if not _triton.INTERPRETED:
            return "the tensors are on the CPU and Triton's interpreter is off (TRITON_INTERPRET=1 before import)"
        if tensor.dtype not in (torch.float32, torch.uint8):
            return f"Triton's interpreter is right for float32 (and uint8) only, got {tensor.dtype}"
        return None
    return f"no kernels for {tensor.device.type} devices"


# A constant of the graph, because Dynamo cannot trace a torch function that returns a string. When the setting changes,
# Dynamo recompiles by itself.
@_constant_when_compiling
def _default_precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def resolve_precision(precision: str | None) -> str:
    """How fp32 matrix products are computed: ``"ieee"``, ``"tf32x3"`` or ``"tf32"``.

    ``None`` follows :func:`torch.get_float32_matmul_precision`: ``highest`` means no TF32 (``"ieee"``), anything
    else one TF32 pass (``"tf32"``). 16-bit inputs ignore it, since their products are exact in fp32.

    Raises:
        ValueError: unknown precision.
    """
    if precision is None:
        return _default_precision()
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, expected None or one of {', '.join(map(repr, PRECISIONS))}")
    return precision


# Dynamo of PyTorch 2.11 cannot trace the question.
_WITH_AUTOCAST = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia") if torch.amp.is_autocast_available(device)
)


def autocast_off(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Disables autocast on ``x``'s device: inside, an op's inputs keep their dtype and so do its results."""
    device = x.device.type
    on = device in _WITH_AUTOCAST and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else contextlib.nullcontext()


PORTABLE: dict[Any, Callable[..., Any]] = {}
"""Registered op (``torch.ops.hpdm.fuse_context_fwd``) -> a function of the same arguments in PyTorch's own operations.

:mod:`hpdm.planning`, which counts FLOPs and memory, calls this function instead of the op to see its operations.
"""


IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}
"""Registered op -> the function of the same arguments that it runs.

:mod:`hpdm.planning` calls this function instead of the op to see what it allocates, where launches are left out
(:mod:`hpdm_kernels.dry_run`).
"""


def custom_op(name: str, mutates_args: Iterable[str] = ()) -> Callable[[Callable[..., Any]], torch.library.CustomOpDef]:
    """Registers a function as the op ``hpdm::name``, and its ``backend="torch"`` variant in :data:`PORTABLE`.

    The function itself is then in :data:`IMPLEMENTATIONS`.

    Args:
        name: name of the op within ``torch.ops.hpdm``.
        mutates_args: see :func:`torch.library.custom_op`.

    Returns:
        A decorator for a function with annotated arguments, one of them named ``backend``.
    """

    def register(fn: Callable[..., Any]) -> torch.library.CustomOpDef:
        signature = inspect.signature(fn)

        @functools.wraps(fn)
        def portable(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.arguments["backend"] = "torch"
            return fn(*bound.args, **bound.kwargs)

        op = torch.library.custom_op(f"hpdm::{name}", fn, mutates_args=mutates_args)
        PORTABLE[getattr(torch.ops.hpdm, name)] = portable
        IMPLEMENTATIONS[getattr(torch.ops.hpdm, name)] = fn
        return op

    return register
