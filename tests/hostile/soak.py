"""How long the tests of hostile files run: shortly in the ordinary suite, at length with ``HPDM_SOAK=all``."""

import os

from hypothesis import HealthCheck, settings


def everything() -> bool:
    """Whether all cases are wanted, not only those that take less than a minute together."""
    return os.environ.get("HPDM_SOAK") == "all"


# The machine may be busy, so time is no reason to fail; what failed is printed, and no folder of examples is left.
EXAMPLES = settings(
    max_examples=20_000 if everything() else 200,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
