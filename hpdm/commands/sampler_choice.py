"""How a command samples: what the user gave, else what a protocol, the run's preset or its kind of model suggests."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from hpdm.runs import Run
from hpdm.sampling import SamplerOptions


class NotGiven:
    """Marks the value of an option that the user did not give. It is a plain number or string to all that use it."""


class _Text(NotGiven, str):
    pass


class _Integer(NotGiven, int):
    pass


class _Number(NotGiven, float):
    pass


_MARKED: dict[type, Any] = {str: _Text, int: _Integer, float: _Number}


def sampler_not_given() -> SamplerOptions:
    """The default of a command's sampler options: numbers and names, which may be replaced, are marked."""
    options = SamplerOptions()
    values = {f.name: getattr(options, f.name) for f in fields(options)}
    return replace(
        options, **{name: _MARKED[type(value)](value) for name, value in values.items() if type(value) in _MARKED}
    )


def choose_sampler(run: Run, options: SamplerOptions, **defaults: Any) -> SamplerOptions:
    """``options`` with ``defaults``, then those of the run's model and preset, in place of what the user did not give.

    Args:
        run: gives the defaults of its model.
        options: from the command line, where :func:`sampler_not_given` was the default.
        **defaults: values of fields, of a protocol; ``None`` for no value.
    """
    values = {name: value for name, value in defaults.items() if value is not None}
    values |= run.system.sampler_defaults(run.config, run.training.get("preset"))
    given = {f.name: getattr(options, f.name) for f in fields(options)}
    changes: dict[str, Any] = {
        name: values.get(name, _plain(value))
        for name, value in given.items()
        if isinstance(value, NotGiven) or value is None  # what has no value by default cannot be marked
    }
    return replace(options, **changes)


def _plain(value: Any) -> Any:
    """A marked value without its mark; ``None`` as it is."""
    return None if value is None else next(kind(value) for kind, marked in _MARKED.items() if isinstance(value, marked))
