"""How many times the tests of reliability try: few times in the ordinary suite, often with ``HPDM_SOAK=all``."""

import os
import random


def times(short: int, long: int) -> int:
    """The number of tries: ``short`` in the ordinary suite, ``long`` in ``make test-soak``."""
    return long if os.environ.get("HPDM_SOAK") == "all" else short


def generator(name: str) -> random.Random:
    """What a test draws, other in every run: its seed is printed, and ``HPDM_TEST_SEED`` sets it."""
    seed = os.environ.get("HPDM_TEST_SEED") or str(random.SystemRandom().randrange(2**31))
    print(f"HPDM_TEST_SEED={seed}")
    return random.Random(f"{seed} {name}")
