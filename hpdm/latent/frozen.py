"""A network inside of another that is stored with it and not trained."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def frozen(module: M) -> M:
    """Turns all parameters into persistent buffers of the same names, in place; returns the module.

    So optimizers, moving averages, and the ranks that share gradients do not know it, while checkpoints and exported
    files hold it.
    """
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())
    return module
