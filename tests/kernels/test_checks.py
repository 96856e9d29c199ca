"""Validation: what passes, and that each message names the argument, what was got and what was expected."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hpdm_kernels._checks import check_tensor, check_triple, values_are_readable
from hpdm_kernels.boxes import check_boxes

X = torch.zeros(2, 5, 8)


@pytest.mark.parametrize("shape", [(2, 5, 8), ("B", "N", "D"), (2, "N", 8), None])
def test_good_shapes_pass(shape) -> None:
    assert check_tensor("x", X, shape) is X


@pytest.mark.parametrize(
    ("value", "options", "error", "message"),
    [
        ([1.0], {}, TypeError, r"^x: got list, expected a torch.Tensor"),
        (None, {}, TypeError, r"^x: got NoneType"),
        (X.int(), {}, TypeError, r"^x: got dtype torch.int32, expected one of torch.float16"),
        (X, {"shape": (2, 5)}, ValueError, r"^x: got shape \(2, 5, 8\), expected \[2, 5\]"),
        (X, {"shape": (2, 5, 9)}, ValueError, r"^x: got shape \(2, 5, 8\), expected \[2, 5, 9\]"),
        (X[:0], {"shape": ("B", 5, 8)}, ValueError, r"^x: got shape \(0, 5, 8\), expected \[B, 5, 8\] with every size"),
        (X, {"like": ("y", X.to("meta"))}, ValueError, r"^x: got device cpu, expected meta as for y"),
        (X, {"like": ("y", X.half())}, TypeError, r"^x: got dtype torch.float32, expected torch.float16 as for y"),
    ],
)
def test_bad_tensors_are_named(value, options, error, message) -> None:
    with pytest.raises(error, match=message):
        check_tensor("x", value, **options)


def test_dtypes() -> None:
    index = torch.zeros(3, dtype=torch.int32)
    assert check_tensor("index", index, dtypes=(torch.int32, torch.int64)) is index
    assert check_tensor("any", index, dtypes=None) is index
    assert check_tensor("x", X, like=("y", X.half()), same_dtype=False) is X


@pytest.mark.parametrize("value", [(1, 2, 3), [1, 2, 3], torch.Size((1, 2, 3))])
def test_good_triples_pass(value) -> None:
    assert check_triple("grid", value) == (1, 2, 3)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ((1, 2), TypeError),
        ((1, 2, 3, 4), TypeError),
        ("123", TypeError),
        (7, TypeError),
        ((1, 2.0, 3), TypeError),
        ((True, 2, 3), TypeError),
        ((0, 2, 3), ValueError),
        ((1, -2, 3), ValueError),
    ],
)
def test_bad_triples_are_named(value, error) -> None:
    with pytest.raises(error, match=r"^grid: got .*expected"):
        check_triple("grid", value)


def test_triple_minimum() -> None:
    assert check_triple("origin", (0, 0, 0), minimum=0) == (0, 0, 0)
    with pytest.raises(ValueError, match="every entry >= 0"):
        check_triple("origin", (0, -1, 0), minimum=0)


def boxes(*row: float) -> torch.Tensor:
    return torch.tensor([[0, 0, 0, 1, 1, 1], row], dtype=torch.float32)


@pytest.mark.parametrize("row", [(0, 0, 0, 1, 1, 1), (0.5, 0.25, 0, 0.5, 0.75, 1), (0.3, 0.3, 0.3, 0.700001, 0.1, 0.1)])
def test_good_boxes_pass(row) -> None:
    check_boxes("box", boxes(*row), 2, ("x", X))


@pytest.mark.parametrize(
    "row",
    [
        (-0.1, 0, 0, 1, 1, 1),
        (0.5, 0, 0, 0.6, 1, 1),
        (0, 0, 0, 1, 0, 1),
        (0, 0, 0, 1, 1, -1),
        (0, float("nan"), 0, 1, 1, 1),
    ],
)
def test_bad_boxes_are_named(row) -> None:
    with pytest.raises(ValueError, match=r"^box: row 1 is .*inside the whole video"):
        check_boxes("box", boxes(*row), 2, ("x", X))


def test_boxes_are_fp32_whatever_the_data() -> None:
    check_boxes("box", boxes(0, 0, 0, 1, 1, 1), 2, ("x", X.half()))
    with pytest.raises(TypeError, match=r"^box: got dtype torch.float64"):
        check_boxes("box", boxes(0, 0, 0, 1, 1, 1).double(), 2, ("x", X))
    with pytest.raises(ValueError, match=r"^box: got shape \(2, 6\), expected \[3, 6\]"):
        check_boxes("box", boxes(0, 0, 0, 1, 1, 1), 3, ("x", X))


def test_values_are_read_only_where_that_is_free() -> None:
    assert values_are_readable(X)
    assert values_are_readable(torch.nn.Parameter(X))
    assert not values_are_readable(X.to("meta"))
    with FakeTensorMode():
        assert not values_are_readable(torch.zeros(1))
