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


def hang_at_step(step: str) -> None:
    """Makes this process wait for its clips for ever at a step, as on a dead network drive."""
    import time

    from hpdm.training.trainer import Trainer

    real = Trainer.train_step

    def train_step(self: Trainer, batches: list) -> tuple:
        result = real(self, batches)
        if self.step + 2 == int(step):
            self.batches.own = _Endless(self.batches.own)
        return result

    class _Endless:
        """A number in sums and products, for which a loop waits."""

        def __init__(self, number: int) -> None:
            self.number = number

        def __rmul__(self, other: int) -> int:
            return other * self.number

        def __radd__(self, other: int) -> int:
            return other + self.number

        def __index__(self) -> int:
            time.sleep(3600)
            return 0

    Trainer.train_step = train_step


def break_a_number(step: str, part: str, seed: str) -> None:
    """Puts a NaN into one number of a loss, gradient, weight, average or of the optimizer's state, in a step."""
    import math
    import random

    import torch

    from hpdm.patch.system import PatchDiffusion
    from hpdm.training import step as step_module
    from hpdm.training.trainer import Trainer

    now, draw = [0], random.Random(seed)
    real_step, real_losses, real_norm = Trainer.train_step, PatchDiffusion.losses, step_module.gradient_norm

    def spoil(t: torch.Tensor) -> None:
        local = t.to_local() if hasattr(t, "to_local") else t
        if local.numel():
            local.view(-1)[draw.randrange(local.numel())] = math.nan

    @torch.no_grad()
    def train_step(self: Trainer, batches: list) -> tuple:
        now[0] = self.step + 1
        if now[0] == int(step):
            name, p = draw.choice(list(self.model.named_parameters()))
            if part == "weight":
                spoil(p)
            elif part == "average":
                spoil(self.ema.shadow[name])
            elif part == "state" and self.optimizer.state[p]:
                spoil(self.optimizer.state[p]["exp_avg"])
        with torch.enable_grad():
            return real_step(self, batches)

    def losses(*arguments: object, **options: object) -> dict:
        values = real_losses(*arguments, **options)
        factor = math.nan if part == "loss" and now[0] == int(step) else 1.0
        return {name: loss * factor for name, loss in values.items()}

    def norm(network: torch.nn.Module) -> torch.Tensor:
        if part == "gradient" and now[0] == int(step):
            spoil(draw.choice([p.grad for p in network.parameters() if p.grad is not None]))
        return real_norm(network)

    Trainer.train_step, PatchDiffusion.losses, step_module.gradient_norm = train_step, losses, norm
