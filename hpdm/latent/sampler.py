"""Samples clips of latents and decodes them: :class:`hpdm.sampling.Sampler` of latent video diffusion."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hpdm import distributed
from hpdm.conditioning import check_subjects
from hpdm.frames import Known
from hpdm.latent import coding
from hpdm.latent.denoiser import Conditions, KnownLatents, perturbed, sample
from hpdm.latent.latent_model import LVDM
from hpdm.latent.objective import time_on
from hpdm.noise import Purpose, level_generator, level_noise
from hpdm.process import SCHEDULES
from hpdm.sampling import Progress, SamplerOptions

NOT_FOR_LATENTS = (
    "steps_decay", "later_solver", "overlap", "tiles_per_patch", "later_guidance", "context_noise", "consistency",
    "later_known_noise", "clip", "cache",
)  # fmt: skip
"""Fields of :class:`~hpdm.sampling.SamplerOptions` that are about levels, tiles or pixels."""
NO_TILES = {"overlap": "none"}
"""Values of these fields that say the same as their defaults."""


class LatentSampler:
    """Samples whole videos; see :class:`hpdm.sampling.Sampler`. There is one part, the decoded video.

    Args:
        model: in eval mode, on the device to sample on.
        options: those that are about levels, tiles or pixels must have their defaults.

    Raises:
        ValueError: an option of another kind of model.
    """

    def __init__(self, model: LVDM, options: SamplerOptions | None = None) -> None:
        self.model, self.config = model, model.config
        self.options = options or SamplerOptions()
        check_options(self.options)
        self.schedule = SCHEDULES[self.config.unet.schedule]
        self.solver = self.options.level_solver(0, schedule=self.schedule)

    def __call__(
        self,
        seeds: Sequence[int],
        labels: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        progress: Progress | None = None,
        finished: Sequence[Tensor] = (),
        on_level: Callable[[int, Tensor], None] | None = None,
    ) -> list[Tensor]:
        """The videos ``[B, C, F, H, W]`` in a list of one; arguments as of :class:`hpdm.sampling.Sampler`."""
        videos = list(finished)
        for video in self.parts(seeds, labels, text, text_mask, progress, finished):
            videos.append(video)
            if on_level is not None:
                on_level(len(videos) - 1, video)
        return videos

    def parts(
        self,
        seeds: Sequence[int],
        labels: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        progress: Progress | None = None,
        finished: Sequence[Tensor] = (),
    ) -> Iterator[Tensor]:
        """Yields the decoded videos, ``[B, C, F, H, W]`` in [-1, 1], unless they are ``finished``.

        Raises:
            ValueError: no seeds, labels out of range, not one text per seed, or guidance without conditioning.
        """
        if not finished:
            latents = self.latents(seeds, Conditions(labels, text, text_mask), progress=progress)
            yield self.decoded(latents)

    @torch.no_grad()
    def latents(
        self,
        seeds: Sequence[int],
        conditions: Conditions,
        *,
        known: KnownLatents | None = None,
        window: int | Sequence[int] = 0,
        sparse: bool = False,
        progress: Progress | None = None,
    ) -> Tensor:
        """Samples one clip of latents per seed. A collective: the ranks share the clips.

        Args:
            seeds: B seeds. A clip depends on its own seed and conditioning alone, up to rounding.
            conditions: of the clips.
            known: known frames of these clips, see :func:`hpdm.latent.denoiser.perturbed`.
            window: number of the window in a longer video, or one for each clip: each has random streams of its own.
            sparse: whether the frames are far apart, for a network with a spacing.
            progress: called as (0, network calls done, network calls in all) after every network call.

        Returns:
            ``[B, z, T, h, w]`` on the model's device.

        Raises:
            ValueError: as :meth:`parts`.
        """
        check_subjects(self.config.unet, len(seeds), *conditions[:2], {"guidance": self.options.guidance})
        device = self.model.autoencoder.latent_mean.device
        conditions = Conditions(*(None if t is None else t.to(device) for t in conditions))
        shape = (self.config.unet.channels, *self.config.unet.latent)
        purpose: Purpose = "sparse" if sparse else "sampling"
        numbers = [window] * len(seeds) if isinstance(window, int) else list(window)
        share = math.ceil(len(seeds) / distributed.world_size())
        rows = min(share, max(1, self.options.tile_batch // self._copies(known)))
        batches = [slice(first, min(first + rows, len(seeds))) for first in range(0, len(seeds), rows)]
        own = distributed.shard(range(len(batches)))
        done, calls = 0, len(own) * len(self.solver.prediction_sigmas())

        def called() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(0, done, calls)

        results: dict[int, Tensor] = {}
        for number in own:
            batch = batches[number]
            generators = [level_generator(seed, 0, purpose, n) for seed, n in zip(seeds[batch], numbers[batch])]
            # Drawn on the CPU, so that every device gets the same noise.
            noise = lambda generators=generators: torch.stack(
                [torch.randn(shape, generator=g) for g in generators]
            ).to(device)  # fmt: skip
            results[number] = sample(
                self.model, self.config.unet, self.solver, noise,
                Conditions(*(None if t is None else t[batch] for t in conditions)),
                lambda sigma: self.options.guidance_at(0, sigma), _rows(known, batch), self.options.frame_guidance,
                called, sparse,
            )  # fmt: skip
        return _gathered(results, device)

    def known(
        self, seeds: Sequence[int], clips: Known, window: int | Sequence[int] = 0, sparse: bool = False
    ) -> KnownLatents:
        """Known frames of the clips that :meth:`latents` samples, perturbed as the options say.

        Args:
            seeds, window, sparse: as of :meth:`latents`.
            clips: the latents, one clip per seed, on the model's device.

        Raises:
            ValueError: as :func:`hpdm.latent.denoiser.perturbed`.
        """
        purpose: Purpose = "known sparse" if sparse else "known"
        numbers = [window] * len(seeds) if isinstance(window, int) else window
        shape = tuple(clips.video.shape[1:])
        noise = [level_noise([seed], 0, shape, purpose, number) for seed, number in zip(seeds, numbers)]
        t = time_on(self.schedule, self.options.known_noise)
        return perturbed(self.config.unet, clips, t, torch.cat(noise).to(clips.video))

    @torch.no_grad()
    def decoded(self, latents: Tensor, kept: slice | None = None) -> Tensor:
        """Videos of latents ``[B, z, T, h, w]``, one at a time. A collective: the ranks share the videos.

        Args:
            latents: of whole videos, or with what the frames that are kept depend on.
            kept: the frames to return, of videos that are decoded at once; ``None`` for all, of videos of any length.
        """
        chunk = coding.CHUNK if self.config.autoencoder.norm == "frame" and kept is None else None
        frames = slice(None) if kept is None else kept
        own = distributed.shard(range(len(latents)))
        videos = {
            b: coding.decode(self.model.autoencoder, latents[b : b + 1], chunk=chunk)[:, :, frames].clone() for b in own
        }
        return _gathered(videos, latents.device)

    def seams(self, video: Tensor) -> dict[str, float]:
        """Nothing: there are no tiles."""
        return {}

    def _copies(self, known: KnownLatents | None) -> int:
        """Rows of the network per clip."""
        guided = self.options.guidance != 1.0
        return 1 + guided + (known is not None and self.options.frame_guidance != 0.0)


def check_options(options: SamplerOptions) -> None:
    """Raises ValueError for options of levels, tiles or pixels that are not their defaults."""
    default = SamplerOptions()
    for name in NOT_FOR_LATENTS:
        value = getattr(options, name)
        if value not in (getattr(default, name), NO_TILES.get(name, getattr(default, name))):
            raise ValueError(f"{name}: got {value!r}, expected none: latent diffusion has no levels, tiles or pixels")


def _rows(known: KnownLatents | None, batch: slice) -> KnownLatents | None:
    return None if known is None else known._replace(clean=known.clean[batch], noised=known.noised[batch])


def _gathered(own: dict[int, Tensor], device: torch.device) -> Tensor:
    """The tensors of all ranks in the order of their numbers, joined along the first axis."""
    if distributed.world_size() == 1:
        return torch.cat([own[number] for number in sorted(own)])
    everyone = distributed.gather({number: t.cpu() for number, t in own.items()})
    return torch.cat(everyone).to(device)
