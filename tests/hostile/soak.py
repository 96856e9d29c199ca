"""How long the tests of hostile files run: shortly in the ordinary suite, at length with ``HPDM_SOAK=all``."""

import os
import random

from hypothesis import HealthCheck, settings


def everything() -> bool:
    """Whether all cases are wanted, not only those that take less than a minute together."""
    return os.environ.get("HPDM_SOAK") == "all"


def seed() -> int:
    """The seed of what is drawn: ``HPDM_SOAK_SEED``, or one of this run, the same in all of its processes."""
    if given := os.environ.get("HPDM_SOAK_SEED"):
        return int(given)
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    return int(run[:7], 16) if run else _SEED


_SEED = random.SystemRandom().randrange(2**28)

# The machine may be busy, so time is no reason to fail; what failed is printed, and no folder of examples is left.
EXAMPLES = settings(
    max_examples=10_000 if everything() else 200,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
