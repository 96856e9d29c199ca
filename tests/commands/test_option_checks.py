"""Checks of options and tensors name what is wrong."""

from types import SimpleNamespace
from typing import Literal

import pytest
import torch

from hpdm.checks import at_least, check_choice, check_shape


def test_the_first_field_below_its_bound_is_named():
    options = SimpleNamespace(steps=1, batch=0, columns=-1, count=None)
    at_least(options, 1, "steps", "count")
    with pytest.raises(ValueError, match=r"^batch: got 0, expected at least 1$"):
        at_least(options, 1, "steps", "count", "batch", "columns")


def test_choices_are_listed():
    assert check_choice("mode", "fast", Literal["fast", "exact"]) == "fast"
    with pytest.raises(ValueError, match=r"^mode: got 'slow', expected one of 'fast', 'exact'$"):
        check_choice("mode", "slow", Literal["fast", "exact"])


def test_shapes_are_compared():
    check_shape("x", torch.zeros(2, 3), (2, 3))
    with pytest.raises(ValueError, match=r"^x: got shape \(2, 3\), expected \(2, 4\)$"):
        check_shape("x", torch.zeros(2, 3), (2, 4))
