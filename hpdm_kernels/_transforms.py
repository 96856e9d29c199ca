"""The ops under ``torch.func`` and forward-mode differentiation: what is read, what is refused.

A transform of ``torch.func`` passes the tensors that it works on in wrappers, one for each transform, and wraps the
result of every operation inside of it. A wrapper of ``vmap`` stands for many tensors and has no values. The names below
``torch._C._functorch`` are PyTorch's own, for which it has no public ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad


def inside_transform() -> bool:
    """Whether a transform of ``torch.func`` is being applied."""
    return _functorch.peek_interpreter_stack() is not None


def _layers(tensor: Tensor) -> Iterator[Tensor]:
    """``tensor``, and below it what the transforms have wrapped, from the innermost transform outwards."""
    yield tensor
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
        yield tensor


def is_mapped(tensor: Tensor) -> bool:
    """Whether ``vmap`` maps over ``tensor``, which then has no values of its own."""
    return any(map(_functorch.is_batchedtensor, _layers(tensor)))


def differentiates(tensors: Iterable[Tensor | None]) -> bool:
    """Whether one of ``tensors`` has a tangent or is differentiated by ``torch.func``; never while it is compiled."""
    if torch.compiler.is_compiling():
        return False
    forward = forward_ad._current_level >= 0
    if not forward and not inside_transform():
        return False
    return any(
        (_functorch.is_gradtrackingtensor(layer) and layer.requires_grad)
        or (forward and not _functorch.is_batchedtensor(layer) and forward_ad.unpack_dual(layer).tangent is not None)
        for tensor in tensors
        if tensor is not None
        for layer in _layers(tensor)
    )


def refuse(op: str, backend: str, tensors: Iterable[Tensor | None]) -> None:
    """Raises if a derivative is asked for that only the reference has, instead of letting it be zero without a word.

    The registered ops have gradients by ``backward`` and :func:`torch.autograd.grad`. PyTorch gives a registered op
    neither a derivative in forward mode, where tangents would be lost, nor one under ``torch.func``.

    Args:
        op: the public name of the op, for messages.
        backend: the backend that will run it, from :func:`hpdm_kernels._backend.resolve`.
        tensors: the op's inputs, ``None`` for those that are missing.

    Raises:
        NotImplementedError: ``backend`` is not ``"reference"``, and an input carries a tangent (forward mode, such as
            ``torch.func.jvp``) or is differentiated by ``torch.func`` (``grad``, ``vjp``, ``jacrev``).
    """
    if backend != "reference" and differentiates(tensors):
        raise NotImplementedError(
            f"{op}: backend={backend!r} has no derivative under torch.func (grad, vjp, jvp, ...) and in forward mode, "
            "only by backward() and torch.autograd.grad; use backend='reference'"
        )
