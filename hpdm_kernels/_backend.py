"""Which implementation of an op runs, and in which precision its fp32 products are taken.

Four backends (README, "Backends"):

``reference``  the paper's formula in plain PyTorch: the oracle, and the model's "kernels off"
``torch``      the better algorithm in portable PyTorch: the default on CPU
``triton``     the same algorithm as fused kernels: the default on CUDA
``auto``       picks between the last two and logs why, once per reason

An explicit backend never falls back to another one: it raises and says why.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch

from hpdm_kernels import _triton

BACKENDS = ("auto", "reference", "torch", "triton")
PRECISIONS = ("ieee", "tf32x3", "tf32")

logger = logging.getLogger("hpdm_kernels")


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)


@torch.compiler.assume_constant_result
def _log_choice(op: str, backend: str, why: str) -> None:
    _log_once(f"{op}: backend='auto' chose {backend!r}: {why}")


def check_backend(backend: str) -> str:
    """Returns ``backend`` if it is one of :data:`BACKENDS`, else raises ``ValueError``."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    return backend


def resolve(backend: str, op: str, tensor: torch.Tensor, triton_dtypes: Sequence[torch.dtype]) -> str:
    """The backend that will run ``op`` on tensors like ``tensor``: never ``"auto"``.

    Args:
        backend: one of :data:`BACKENDS`.
        op: the public name of the op, for messages.
        tensor: decides by its device and dtype.
        triton_dtypes: the dtypes that the op's kernels take on a GPU. The interpreter takes fp32 and
            bytes alone, because its bf16 arithmetic is silently wrong.

    Raises:
        ValueError: unknown backend.
        RuntimeError: ``backend="triton"`` and the kernels cannot run on ``tensor`` here.
    """
    check_backend(backend)
    if backend in ("reference", "torch"):
        return backend
    obstacle = _triton_obstacle(tensor, triton_dtypes)
    if backend == "triton":
        if obstacle:
            raise RuntimeError(f"{op}: backend='triton' cannot run: {obstacle}")
        return "triton"
    if tensor.device.type == "cuda" and not obstacle:
        _log_choice(op, "triton", "the tensors are on a CUDA device")
        return "triton"
    _log_choice(op, "torch", obstacle or "the tensors are not on a CUDA device")
    return "torch"


def _triton_obstacle(tensor: torch.Tensor, dtypes: Sequence[torch.dtype]) -> str | None:
    if not _triton.AVAILABLE:
        return f"triton is not importable ({_triton.IMPORT_ERROR})"
    if tensor.device.type == "cuda":
        if _triton.INTERPRETED:
            return "TRITON_INTERPRET=1 is set, which runs kernels on the CPU"
        if tensor.dtype not in dtypes:
            return f"no kernel for {tensor.dtype} (have {', '.join(map(str, dtypes))})"
        return None
    if tensor.device.type == "cpu":
        if not _triton.INTERPRETED:
            return "the tensors are on the CPU and Triton's interpreter is off (TRITON_INTERPRET=1 before import)"
        if tensor.dtype not in (torch.float32, torch.uint8):
            return f"Triton's interpreter is right for float32 (and uint8) only, got {tensor.dtype}"
        return None
    return f"no kernels for {tensor.device.type} devices"


# Dynamo cannot trace a torch function that returns a string; it guards on the TF32 setting by itself.
@torch.compiler.assume_constant_result
def _default_precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def resolve_precision(precision: str | None) -> str:
    """How fp32 products are taken: ``"ieee"``, ``"tf32x3"`` or ``"tf32"``.

    ``None`` follows :func:`torch.get_float32_matmul_precision`: ``highest`` means no TF32 (``"ieee"``), anything
    else one TF32 pass. It has no meaning for 16-bit inputs, whose products are exact in fp32.

    Raises:
        ValueError: unknown precision.
    """
    if precision is None:
        return _default_precision()
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, expected None or one of {', '.join(map(repr, PRECISIONS))}")
    return precision


def unmixed(x: torch.Tensor) -> torch.autocast:
    """Context inside a registered op: it is one operation, whose insides automatic mixed precision must not cast."""
    return torch.autocast(x.device.type, enabled=False)
