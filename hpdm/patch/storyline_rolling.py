"""Level 0 frame by frame: noise rises along a window that moves on by one frame as the next one is finished.

Rolling diffusion (Ruhe et al. 2024), started from a finished window as in FIFO-Diffusion (Kim et al. 2024). Of the F
frames of a window the first k are finished, and known. The times of the other M rise: that of the i-th is (i + u) / M.
As u falls from 1 to 0 all of them get cleaner by 1 / M, and the first one is finished. Then the window moves on, and a
frame of noise enters at the end. Frames of the first window, which are finished when they enter, are shown as they are,
noised to the time of their place.

**Why frames stay known.** Without (k = 0) a frame leaves as it is finished, while the next one still has a noise of
1 / F, and what remains undecided of that is then decided without it: with the best denoiser of a Gaussian process whose
neighbors have correlation 0.8, they have 0.42 in a rolling window of four frames. With k = 1 they have 0.8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hpdm.frames import Known, of_pixels
from hpdm.long_video import State
from hpdm.noise import level_generator, level_noise
from hpdm.patch.sampler import Sampler
from hpdm.patch.storyline import Autoregressive
from hpdm.patch.tile_network import KnownTiles, TileNetwork, VideoConditions
from hpdm.process import T_MAX, gamma
from hpdm.windows import Window, Windows


class Rolling(Autoregressive):
    """A rolling window; see :class:`hpdm.patch.storyline.Autoregressive`. The first is sampled whole."""

    def __init__(self, sampler: Sampler, windows: Windows, seeds: Sequence[int], conditions: Mapping[str, Any]) -> None:
        super().__init__(sampler, windows, seeds, conditions)
        self.config, self.device = sampler.config, sampler.model.latents.device
        self.per_token, frames = self.config.tokenizer[0], self.config.grid[0]
        self.known = windows.known // self.per_token
        """Frames of tokens that are known."""
        self.rolling = frames - self.known
        """Frames of tokens whose noise rises, M."""
        self.steps = max(1, round(sampler.options.level_steps(0) / self.rolling))
        """Steps while the window moves on by a frame of tokens."""
        self.turns = 0
        """Frames of tokens by which the window has moved on."""
        self._window = torch.empty(0)  # x~ of the frames that are not known, as the next turn begins
        self._old = torch.empty(0)  # what was predicted of them last
        self._last = torch.empty(0)  # the newest finished frames [B, C, f, h, w]; at first, the first window

    def window(self, window: Window, known: Known | None) -> list[Tensor]:
        if window.number == 0:
            return []
        network = self._network()
        needed = (window.start + self.windows.window) // self.per_token - self.known
        while self.turns < needed:
            finished = self._turn(network)
            if self.turns > self.rolling:  # before, they are those of the first window
                self._last = torch.cat((self._last, finished), dim=2)[:, :, self.per_token :]
        return [self._last]

    def finished(self, window: Window, video: Tensor) -> None:
        if window.number == 0:
            self.turns, self._last = 0, video
            self._window = self._entered(self._times(1.0))
            self._old = video[:, :, self.known * self.per_token :] * self.config.signal_scale(0)

    def state(self) -> State:
        turns = torch.tensor(self.turns)
        return {"rolling": self._window, "rolling_old": self._old, "rolling_last": self._last, "rolling_turns": turns}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._window, self._old, self._last = (state[f"rolling{name}"] for name in ("", "_old", "_last"))
        self.turns = int(state["rolling_turns"])

    def _network(self) -> TileNetwork:
        """The network, which with self-conditioning begins without latents in each window, so that it can go on."""
        options, given = self.sampler.options, self.conditions
        conditions = VideoConditions(
            self.config, options, len(self.seeds), given.get("labels"), given.get("text"), given.get("text_mask"),
            self.device,
        )  # fmt: skip
        return TileNetwork(self.sampler.model, options, conditions)

    def _turn(self, network: TileNetwork) -> Tensor:
        """Moves the window on by a frame of tokens; returns the one that is finished, ``[B, C, pf, h, w]``."""
        x, scale = self._window, self.config.signal_scale(0)
        known_t = self.sampler.options.known_noise
        first = min(self.turns, self.rolling) * self.per_token
        known = self._last[:, :, first : first + self.known * self.per_token] * scale
        g = float(gamma(torch.tensor(known_t, dtype=torch.float64)))
        noise = level_noise(self.seeds, 0, tuple(known.shape[1:]), "known", self.turns + 1).to(known)
        shown = g**0.5 * known + (1 - g) ** 0.5 * noise
        for step in range(self.steps):
            now, then = self._times(1 - step / self.steps), self._times(1 - (step + 1) / self.steps)
            times = torch.cat((torch.full((self.known,), known_t), now))
            y = self._denoised(network, torch.cat((shown, x), dim=2), times)[:, :, known.shape[2] :]
            x = _step(x, y, self._old, now, then, 1 / (self.rolling * self.steps), self.per_token)
            self._old = y
            entered = self._entered(then)
            x = torch.cat((entered, x[:, :, entered.shape[2] :]), dim=2)
        self.turns += 1
        finished = x[:, :, : self.per_token] / scale
        generators = [level_generator(seed, 0, window=self.turns) for seed in self.seeds]
        entering = torch.stack([torch.randn(finished.shape[1:], generator=generator) for generator in generators])
        self._window = torch.cat((x[:, :, self.per_token :], entering.to(x)), dim=2)
        self._old = torch.cat((self._old[:, :, self.per_token :], torch.zeros_like(entering).to(x)), dim=2)
        return finished.clamp(-1, 1)

    def _denoised(self, network: TileNetwork, x: Tensor, times: Tensor) -> Tensor:
        """The scaled clean window that the network predicts of ``x~`` at ``times [F]``; both ``[B, C, f, h, w]``."""
        box = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]])
        known = KnownTiles(x[:, None], times[None].to(self.device))
        guidance = self.sampler.options.level_guidance(0)
        return network.denoise(0, x[:, None], box, float(times[-1]), None, guidance, known)[:, 0]

    def _entered(self, times: Tensor) -> Tensor:
        """The frames of the first window that are among those with rising times, ``x~ [B, C, n, h, w]``.

        ``times [M]`` are those of all of these.
        """
        if self.turns >= self.rolling:
            return self._last[:, :, :0]
        y = self._last[:, :, (self.turns + self.known) * self.per_token :] * self.config.signal_scale(0)
        g = of_pixels(gamma(times.double()), self.per_token)[..., : y.shape[2], None, None].to(y)  # [1, n, 1, 1]
        noise = level_noise(self.seeds, 0, tuple(self._last.shape[1:]), "known").to(y)
        return g.sqrt() * y + (1 - g).sqrt() * noise[:, :, noise.shape[2] - y.shape[2] :]

    def _times(self, u: float) -> Tensor:
        """Times of the frames of tokens that are not known, ``[M]``."""
        return ((torch.arange(self.rolling) + u) / self.rolling).clamp(max=T_MAX)


def _step(x: Tensor, y: Tensor, old: Tensor, now: Tensor, then: Tensor, step: float, per_token: int) -> Tensor:
    """DPM-Solver++(2M) from the times ``now [M]`` to ``then [M]``, each frame on its own (see :mod:`hpdm.solvers`).

    ``y`` is predicted at ``now``, ``old`` at the times ``step`` earlier, which frames that have just entered lack. With
    ``c = sqrt(g) = cos`` and ``s = sqrt(1 - g) = sin``: ``x~' = (s' / s) x~ + (c' - s' c / s) D``.
    """

    def sigma(times: Tensor) -> Tensor:
        return torch.tan(times * (math.pi / 2))

    now, then = now.double(), then.double()
    before = (now + step).clamp(max=T_MAX)
    h, h_old = (sigma(now) / sigma(then)).log(), (sigma(before) / sigma(now)).log()
    weight = torch.where((then > 0) & (h_old > 1e-6), h / (2 * h_old), 0.0)

    def of_frames(values: Tensor) -> Tensor:
        return of_pixels(values, per_token)[..., None, None].to(x)  # [1, f, 1, 1]

    (c, s), (c_then, s_then) = ((times.mul(math.pi / 2).cos(), times.mul(math.pi / 2).sin()) for times in (now, then))
    d = y + of_frames(weight) * (y - old)
    return of_frames(s_then / s) * x + of_frames(c_then - s_then * c / s) * d
