"""Runs before any test module: kernels are interpreted where there is no GPU, allocations are poisoned."""

import os

import pytest
import torch

# Triton decides at decoration, so this must come before the first import of hpdm_kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hpdm_kernels.testing import poisoned_allocations


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_allocations():
        yield


@pytest.fixture
def generator() -> torch.Generator:
    """Fresh inputs every run: the seed is drawn, and printed when a test fails."""
    seed = int(os.environ.get("HPDM_TEST_SEED", torch.seed() % 2**31))
    print(f"HPDM_TEST_SEED={seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
