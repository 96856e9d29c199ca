"""Steps whose gradient is not finite: they are skipped and counted, and too many in a row end the run.

That a step is skipped is decided on the device, and nothing waits for it: the host learns of it after the next step.
"""

from __future__ import annotations

import logging

from hpdm import distributed

logger = logging.getLogger(__name__)


class Skips:
    """Counts the skipped steps of a run. A resumed run begins anew.

    Args:
        most: number of skipped steps in a row that ends the run.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._since_row = self._in_a_row = 0

    def count(self, step: int, skipped: bool, saved: int) -> None:
        """Counts a step, and says so if it was skipped. Call it for every step, in their order.

        Args:
            step: the step.
            skipped: whether it was skipped.
            saved: the step of the last checkpoint.

        Raises:
            FloatingPointError: too many steps in a row were skipped.
        """
        self._since_row += skipped
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if self._in_a_row >= self.most:
            steps = f"step {step}" if self.most == 1 else f"the {self.most} steps up to {step}"
            raise FloatingPointError(f"the norm of the gradient is not finite at {steps}; {advice(saved)}")
        if skipped and distributed.is_first():
            logger.warning("step %d is skipped: the norm of its gradient is not finite", step)

    def read(self) -> int:
        """The steps skipped since the last reading."""
        number, self._since_row = self._since_row, 0
        return number


def advice(saved: int) -> str:
    """What to do about numbers that are not finite, with the step of the last checkpoint."""
    last = f"the last checkpoint is of step {saved}" if saved else "there is no checkpoint yet"
    return f"{last}. Lower --lr or set --clip-norm"
