"""``hpdm sample`` with frames of any number or given by the user: videos are written while they are sampled.

A video is finished segment by segment. After each, ``OUT/.unfinished`` holds what the rest depends on, and the frames
so far as mp4 files of their own, which play. The same command, called again after an interruption, goes on with the next
segment. Under its name a video appears whole.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hpdm import distributed
from hpdm.commands import unfinished
from hpdm.commands.given import GivenOptions, given_frames
from hpdm.commands.subjects import Subject, conditions
from hpdm.commands.unfinished import Unfinished
from hpdm.integrity import hash_of_file, hash_of_tensor
from hpdm.long_video import LongOptions, LongSampler, Segment
from hpdm.runs import Run
from hpdm.sampling import SamplerOptions
from hpdm.video import to_uint8
from hpdm.video_pieces import VideoPieces


class LongVideos:
    """Samples the videos of one call of the command, a batch at a time, and writes them.

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
        self.run, self.options, self.long, self.given, self.out, self.fps = run, options, long, given, out, fps
        self.sampler: LongSampler = run.system.long_sampler(run.model, options, long)
        self.frames, self.arguments, self.notes = given_frames(given, run, self.sampler.known)
        self.shown = torch.linspace(0, self.frames - 1, columns).round().long().tolist()
        """The frames of the contact sheet."""

    def sample(
        self, seeds: Sequence[int], subjects: Sequence[Subject], stems: Sequence[str], kept: Unfinished
    ) -> list[Tensor]:
        """Samples a batch of videos and writes them as ``OUT/STEM.mp4``; a collective.

        Returns:
            On rank 0 the frames of each video for the contact sheet, uint8 ``[3, columns, H, W]``; else nothing.

        Raises:
            FloatingPointError: a video holds numbers that are not finite.
            LockedError: another command samples the same videos.
            OSError: a file cannot be written; what was written stays, and the same command goes on from there.
        """
        first, path, found = distributed.is_first(), Path(), dict[str, Tensor]()
        with distributed.raise_on_all_ranks():
            if first:
                path = kept.open(self._identity(seeds, subjects))
                found = unfinished.read_state(path)
        found = distributed.broadcast(found)
        files: list[_File] = []
        with distributed.raise_on_all_ranks():
            if first:
                files = [_File(path.with_suffix(""), n, self.fps, found, self.shown) for n in range(len(seeds))]
        segments = self._segments(seeds, subjects, found)
        done = int(found["segments"]) if found else 0
        if done and first:
            print(f"found {done} finished segment(s) of seeds {seeds[0]} to {seeds[-1]}, going on from there")
        for segment in segments:
            if not segment.frames.isfinite().all():
                raise FloatingPointError(
                    f"segment {segment.number} holds numbers that are not finite; lower --guidance or take other weights"
                )
            with distributed.raise_on_all_ranks():
                if first:
                    self._keep(path, files, segment)
        with distributed.raise_on_all_ranks():
            for file, stem in zip(files, stems):
                file.pieces.finish(self.out / f"{stem}.mp4")
        return [file.sheet() for file in files]

    def plan_line(self, videos: int, at_a_time: int) -> str:
        """One line to print before sampling."""
        segments = self.sampler.count(self.frames)
        steps = "/".join(
            str(self.options.level_steps(n)) for n in range(len(self.run.system.part_sizes(self.run.config)))
        )
        return (
            f"{videos} videos of {self.frames} frames, {at_a_time} at a time: {segments} window(s), "
            f"{self.long.scheme}, {self.sampler.known} frame(s) of level 0 known, steps {steps}"
        )

    def _segments(self, seeds: Sequence[int], subjects: Sequence[Subject], found: Mapping[str, Tensor]) -> Any:
        videos = len(seeds)
        given = dict(self.arguments)
        for name in ("first", "last"):
            if name in given:
                given[name] = [part.expand(videos, -1, -1, -1, -1) for part in given[name]]
        if "levels" in given:
            of_one = given["levels"]
            given["levels"] = lambda window: [part.expand(videos, -1, -1, -1, -1) for part in of_one(window)]
        state = {name[6:]: tensor for name, tensor in found.items() if name.startswith("state_")}
        return _with_bar(
            self.sampler, seeds, self.frames, **conditions(subjects), **given,
            state={name: tensor.to(self.run.device) for name, tensor in state.items()} or None,
            done=int(found["segments"]) if found else 0,
        )  # fmt: skip

    def _keep(self, path: Path, files: Sequence[_File], segment: Segment) -> None:
        """Writes the frames of a segment, then what the rest depends on."""
        state = {f"state_{name}": tensor.cpu() for name, tensor in segment.state.items()}
        state["segments"] = torch.tensor(segment.number + 1)
        try:
            for file, frames in zip(files, segment.frames):
                file.add(to_uint8(frames))
                state |= file.state()
            unfinished.write_state(path, state)
        except OSError as error:
            number = files[0].pieces.done
            raise OSError(
                f"{error}; {number} of {self.frames} frames are in {path.with_suffix('')}, as files that play, and the "
                "same command goes on from there"
            ) from error

    def _identity(self, seeds: Sequence[int], subjects: Sequence[Subject]) -> dict[str, Any]:
        """All that the videos depend on."""
        # The tile batch and the place of the cache change a video by rounding at most.
        choices = asdict(replace(self.options, tile_batch=1, cache="gpu")) | asdict(self.long)
        paths = [*(self.given.between or ()), self.given.continues, self.given.animate, self.given.from_level]
        return {
            "weights": self.run.digest, "seeds": list(seeds), "subjects": [s.caption for s in subjects],
            "text": [None if s.text is None else hash_of_tensor(s.text.cpu()) for s in subjects],
            "frames": self.frames, "fps": self.fps, "shown": self.shown,
            "given": [None if p is None else hash_of_file(p) for p in paths], **choices,
        }  # fmt: skip


class _File:
    """One video that is written: its pieces, and its frames for the contact sheet."""

    def __init__(
        self, folder: Path, number: int, fps: float, found: Mapping[str, Tensor], shown: Sequence[int]
    ) -> None:
        self.number, self.wanted = number, shown
        done = int(found["frames"]) if found else 0
        self.pieces = VideoPieces(folder / f"{number:03}", fps, done, found.get(f"rest_{number}"))
        self.shown: list[Tensor] = list(found[f"shown_{number}"].unbind(1)) if found else []

    def add(self, frames: Tensor) -> None:
        """Appends frames, uint8 ``[3, n, H, W]``."""
        first = self.pieces.done
        self.shown += [frames[:, n - first] for n in self.wanted if first <= n < first + frames.shape[1]]
        self.pieces.add(frames)

    def state(self) -> dict[str, Tensor]:
        """What to go on with, besides the pieces."""
        return {
            "frames": torch.tensor(self.pieces.done),
            f"rest_{self.number}": self.pieces.rest,
            f"shown_{self.number}": self.sheet(),
        }

    def sheet(self) -> Tensor:
        """The frames for the contact sheet so far, uint8 ``[3, n, H, W]``."""
        _, _, height, width = self.pieces.rest.shape
        return torch.stack(self.shown, dim=1) if self.shown else torch.empty(3, 0, height, width, dtype=torch.uint8)


def _with_bar(sampler: LongSampler, seeds: Sequence[int], frames: int, done: int, **arguments: Any) -> Any:
    """The segments, with a bar on rank 0 that counts them."""
    total = sampler.count(frames)
    with tqdm(total=total, initial=done, unit="segment", dynamic_ncols=True, disable=not distributed.is_first()) as bar:

        def progress(window: int, part: int, calls: int, total: int) -> None:
            bar.set_postfix_str(f"level {part}: {calls}/{total}", refresh=calls % 8 == 0)

        for segment in sampler.segments(seeds, frames, **arguments, done=done, progress=progress):
            yield segment
            bar.update()


def report(videos: Sequence[Path], frames: int, started: float) -> str:
    """The last line of the command."""
    seconds = time.perf_counter() - started
    return f"{len(videos)} videos of {frames} frames in {videos[0].parent}, {seconds:.1f} s"
