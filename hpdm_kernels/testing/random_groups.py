"""Random configurations of group normalization."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import hpdm_kernels
from hpdm_kernels.testing import formulas
from hpdm_kernels.testing.case import Arguments, Case
from hpdm_kernels.testing.draw import Draw

_MIXED = (torch.float32, torch.bfloat16, torch.float16)


def group_norm_act(draw: Draw, dtype: torch.dtype, backend: str) -> Case:
    """A configuration of :func:`hpdm_kernels.group_norm_act`: any statistics, modulation, activation and edges."""
    b, t, h, w = draw.size(3), draw.size(4), draw.size(8), draw.size(8)
    groups, width = draw.rows(6), draw.rows(8)
    c = groups * width
    other = draw.choose(_MIXED) if backend != "triton" and dtype in _MIXED and draw.chance(0.2) else dtype
    modulation = draw.choose((None, (b, c), (b, t, c)))
    pad = tuple((draw.random.randint(0, 2), draw.random.randint(0, 2)) for _ in range(3)) if draw.chance(0.5) else None
    arguments = {
        "x": draw.normal(b, t, h, w, c, dtype=dtype) + draw.choose((0.0, 0.0, 30.0)),
        "weight": draw.normal(c, dtype=other), "bias": draw.normal(c, dtype=other), "groups": groups,
        "scale": None if modulation is None else draw.normal(*modulation, dtype=other),
        "shift": None if modulation is None else draw.normal(*modulation, dtype=other),
        "over": draw.choose(("frame", "clip")), "act": draw.choose(("silu", "none")), "pad": pad,
        "eps": draw.choose((1e-5, 1e-6, 0.1)),
    }  # fmt: skip
    names = ("x", "weight", "bias", "scale", "shift")
    return Case(hpdm_kernels.group_norm_act, formulas.group_norm_act, arguments, names, 16.0, 16.0, sizes)


def sizes(arguments: Arguments, grads: Sequence[Tensor]) -> list[float]:
    """Terms of a norm: ``x`` minus its mean, divided by its deviation, which is small where ``x`` varies little."""
    x, scale, shift = (arguments[name] for name in ("x", "scale", "shift"))
    weight, bias = (arguments[name].abs().max().item() for name in ("weight", "bias"))
    split = x.unflatten(4, (arguments["groups"], -1))
    axes = (2, 3, 5) if arguments["over"] == "frame" else (1, 2, 3, 5)
    inverse = (split.var(dim=axes, correction=0) + arguments["eps"]).rsqrt().max().item()
    normal = 2 * x.abs().max().item() * inverse
    gain, added = (1.0, 0.0) if scale is None else (1 + scale.abs().max().item(), shift.abs().max().item())
    y = normal * weight + bias
    z = y * gain + added
    # SiLU's second derivative is at most 1/2, so an error of z reaches the gradient.
    repeated = math.prod(1 + front + back for front, back in arguments["pad"] or ())
    dz = grads[0].abs().max().item() * repeated * ((1 + z) if arguments["act"] == "silu" else 1)
    dx = inverse * dz * gain * weight * (2 + normal) * (1 + normal)
    b, t, h, w, _ = x.shape
    of_weight = b * t * h * w * dz * gain
    known = [z, dx, of_weight * normal, of_weight]
    if scale is None:
        return known
    of_scale = h * w * dz * (t if scale.ndim == 2 else 1)
    return [*known, of_scale * y, of_scale]
