"""``hpdm sample`` with frames of any number or given by the user: videos are written while they are sampled.

A video is finished segment by segment. After each, ``OUT/.unfinished`` holds what the rest depends on, and the frames
so far as mp4 files of their own, which play (:mod:`hpdm.commands.long_files`). The same command, called again after an
interruption, goes on with the next segment. Under its name a video appears whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from hpdm import distributed
from hpdm.commands.given import GivenOptions, given_frames
from hpdm.commands.long_files import LongFiles
from hpdm.commands.subjects import Subject, conditions
from hpdm.commands.unfinished import Unfinished
from hpdm.frames import NOT_TRAINED
from hpdm.integrity import hash_of_file, hash_of_tensor
from hpdm.long_video import LongOptions, LongSampler, Segment, State
from hpdm.runs import Run
from hpdm.sampling import SamplerOptions
from hpdm.video_pieces import PIECE


class LongVideos:
    """Samples the videos of one call of the command, a batch at a time, and writes them.

    Memory does not grow with the length of the videos, but for the index of an mp4 file while its pieces are joined,
    about 100 bytes a frame.

    Args:
        run: the trained model.
        options: how to sample.
        long: how windows follow each other.
        given: the length, and the frames that the user gives.
        out: folder of the videos.
        fps: of the files.
        columns: frames per video on the contact sheet.

    Raises:
        ValueError: a file of the user that cannot be used, or a length that this run cannot sample.
    """

    def __init__(
        self, run: Run, options: SamplerOptions, long: LongOptions, given: GivenOptions, out: Path, fps: float,
        columns: int,
    ) -> None:  # fmt: skip
        self.run, self.options, self.long, self.given = run, options, long, given
        self.out, self.fps, self.columns = out, fps, columns
        self.sampler: LongSampler = run.system.long_sampler(run.model, options, long)
        self.frames, self.arguments, self.notes = given_frames(given, run, self.sampler.windows)
        if self.sampler.windows.count(self.frames) > 1 and not getattr(run.config, "known_frames", False):
            clip = run.config.resolution[0]
            option = next(iter(given.files), "frames")
            raise ValueError(f"{option}: got {self.frames} frames, expected at most {clip}, a clip: {NOT_TRAINED}")
        self.sampler.check(self.frames, self.arguments.get("first", ()), self.arguments.get("last", ()))

    def sample(
        self, seeds: Sequence[int], subjects: Sequence[Subject], paths: Sequence[Path], kept: Unfinished
    ) -> list[Tensor]:
        """Samples a batch of videos and writes them to ``paths``; a collective.

        Returns:
            On rank 0 the frames of each video for the contact sheet, uint8 ``[3, columns, H, W]``; else nothing.

        Raises:
            FloatingPointError: a video holds numbers that are not finite.
            LockedError: another command samples the same videos.
            OSError: a file cannot be written; what was written stays, and the same command goes on from there.
            ValueError: what an interrupted command left is damaged.
        """
        files: LongFiles | None = None  # on rank 0
        with distributed.raise_on_all_ranks():
            if distributed.is_first():
                path = kept.open(self._identity(seeds, subjects))
                files = LongFiles(path, len(seeds), self.frames, self.fps, self.columns)
                self._announce(seeds, files)
        done, state = distributed.broadcast((0, {}) if files is None else (files.segments, files.state))
        for segment in self._segments(seeds, subjects, done, state):
            if not segment.frames.isfinite().all():
                raise FloatingPointError(
                    f"segment {segment.number} holds numbers that are not finite; lower --guidance or take other "
                    "weights"
                )
            with distributed.raise_on_all_ranks():
                if files is not None:
                    files.keep(segment)
        with distributed.raise_on_all_ranks():
            if files is not None:
                files.finish(paths)
        return [] if files is None else files.sheet()

    def plan_line(self, videos: int, at_a_time: int) -> str:
        """One line to print before sampling.

        Args:
            videos: number of videos.
            at_a_time: of a batch.
        """
        return self.run.system.long_plan_line(
            self.run.model, self.options, self.long, self.frames, videos, at_a_time, distributed.world_size()
        )

    def _announce(self, seeds: Sequence[int], files: LongFiles) -> None:
        """Prints what was found of a batch, and where its frames are meanwhile."""
        name = f"seeds {seeds[0]} to {seeds[-1]}"
        if files.segments:
            print(f"found {files.segments} finished segment(s) of {name}, going on from there")
        if self.frames > PIECE and files.segments < self.sampler.windows.count(self.frames):
            print(f"{name}: until all is done, the frames so far are in {files.folder}, as mp4 files", flush=True)

    def _segments(
        self, seeds: Sequence[int], subjects: Sequence[Subject], done: int, state: State
    ) -> Iterator[Segment]:
        """The segments that are not done, with a bar on rank 0 that counts all."""
        total = self.sampler.windows.count(self.frames)
        hidden = not distributed.is_first()
        with tqdm(total=total, initial=done, unit="segment", dynamic_ncols=True, disable=hidden) as bar:

            def progress(window: int, part: int, calls: int, of_part: int) -> None:
                bar.set_postfix_str(f"level {part}: {calls}/{of_part}", refresh=calls % 8 == 0)

            for segment in self.sampler.segments(
                seeds, self.frames, **conditions(subjects), **_of_batch(self.arguments, len(seeds)), done=done,
                state={name: t.to(self.run.device) for name, t in state.items()} or None, progress=progress,
            ):  # fmt: skip
                yield segment
                bar.update(segment.number + 1 - bar.n)

    def _identity(self, seeds: Sequence[int], subjects: Sequence[Subject]) -> dict[str, Any]:
        """All that the files of a batch depend on."""
        # The tile batch and the place of the cache change a video by rounding at most.
        choices = asdict(replace(self.options, tile_batch=1, cache="gpu")) | asdict(self.long)
        return {
            "weights": self.run.digest, "seeds": list(seeds), "subjects": [s.caption for s in subjects],
            "text": [None if s.text is None else hash_of_tensor(s.text.cpu()) for s in subjects],
            "frames": self.frames, "fps": self.fps, "columns": self.columns, "given": self._given,
            "read": [self.run.training.get("stride"), self.run.training.get("fps")], **choices,
        }  # fmt: skip

    @cached_property
    def _given(self) -> dict[str, list[str]]:
        """Hashes of the files of the user, by option."""
        return {name: [hash_of_file(path) for path in paths] for name, paths in self.given.files.items()}


def _of_batch(arguments: dict[str, Any], videos: int) -> dict[str, Any]:
    """Arguments of the sampler for one video, as those for so many equal ones."""

    def of_batch(parts: Sequence[Tensor]) -> list[Tensor]:
        return [part.expand(videos, -1, -1, -1, -1) for part in parts]

    given: dict[str, Any] = {name: of_batch(parts) for name, parts in arguments.items() if name != "levels"}
    if "levels" in arguments:
        given["levels"] = lambda window: of_batch(arguments["levels"](window))
    return given


def report(videos: Sequence[Path], frames: int, started: float) -> str:
    """The last line of the command; ``started`` is of :func:`time.perf_counter`."""
    seconds = time.perf_counter() - started
    return f"{len(videos)} video(s) of {frames} frames and contact_sheet.png in {videos[0].parent}, {seconds:.1f} s"
