"""What the backward pass computes again instead of keeping it (activation checkpointing).

Most of what a block keeps for its backward pass costs little to make again: normalized and modulated rows, what follows
a GELU, and the results of products whose rows get wider, such as the hidden layers of MLPs: they take the most memory
for their work. :func:`recomputed_but_products` computes these again and keeps the other products, convolutions and
attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "selective", "block"]
"""``"none"``: nothing is computed again.

``"selective"``: what is cheap, see above, and keys and values of tokens. With HPDM-M 14 to 15 % more work; a third of
the activations is kept.
``"block"``: everything but the tokens and latents between the read, the layers and the write of a block. 26 to 29 %
more work; the least memory where there are many tokens.
"""

_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}


def recomputed(fn: Callable[..., Any], *inputs: Any) -> Any:
    """``fn(*inputs)``, keeping only the inputs and calling ``fn`` again in the backward pass.

    The state of the random generators is not restored: nothing in the model is random.
    """
    if not torch.is_grad_enabled():
        return fn(*inputs)
    return checkpoint(fn, *inputs, use_reentrant=False, preserve_rng_state=False)


def recomputed_but_products(fn: Callable[..., Any], *inputs: Any) -> Any:
    """:func:`recomputed`, but attention, convolutions and products ``[R, K] @ [K, N]`` with ``N <= K`` are kept."""
    if not torch.is_grad_enabled():
        return fn(*inputs)
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(fn, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _policy(_: object, op: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    """Whether the result of ``op`` is kept."""
    if op in _PRODUCTS:
        inner, columns = args[-1].shape
        keep = columns <= inner
    else:
        # Attention along time costs a few passes over its rows, no more than a normalization.
        attention = "attention" in op.name() and "temporal_attention" not in op.name()
        keep = op is torch.ops.aten.convolution.default or attention
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
