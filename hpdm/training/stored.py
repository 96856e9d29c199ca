"""Which tensors of a model are stored with a run: its parameters, and what was measured of it after training."""

from __future__ import annotations

from torch import Tensor, nn


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers by name: what :meth:`hpdm.system.System.measure` sets."""
    stored = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in stored}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters, without gradients, and the persistent buffers by name."""
    return {name: p.detach() for name, p in model.named_parameters()} | buffers_of(model)
