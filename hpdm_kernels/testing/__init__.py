"""Measures errors of ops against fp64, and tries them on random arguments: ``python -m hpdm_kernels.testing fuzz``."""

from hpdm_kernels.testing.errors import (
    Comparison,
    assert_within_budget,
    check_op,
    compare_op,
    max_error,
    poisoned_allocations,
    random_boxes,
    value_and_grads,
)

__all__ = [
    "Comparison",
    "assert_within_budget",
    "check_op",
    "compare_op",
    "max_error",
    "poisoned_allocations",
    "random_boxes",
    "value_and_grads",
]
