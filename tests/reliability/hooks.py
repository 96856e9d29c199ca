"""What tests do to a process before its command begins."""

import os
import signal

import hpdm.lock


def without_locks(*_: str) -> None:
    """Makes this process see a file system without locks."""

    def lockf(*_: object) -> None:
        raise OSError(hpdm.lock.NO_LOCKS[0], "No locks available")

    hpdm.lock.lockf = lockf


def die_after_the_first_level(*_: str) -> None:
    """Kills this process once a sampling has kept a finished level."""
    real = os.replace

    def replace(source: str, target: str) -> None:
        real(source, target)
        if ".unfinished" in str(target):
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
