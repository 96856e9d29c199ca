"""What several commands share: types of options, checks of them against a run, and the clips that a run reads."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from hpdm import distributed
from hpdm.data.clips import VideoDataset
from hpdm.data.layout import Split
from hpdm.files import check_not_a_file
from hpdm.lock import FolderLock
from hpdm.runs import Run
from hpdm.sampling import SamplerOptions

logger = logging.getLogger(__name__)

Kernels = Literal["auto", "reference", "torch", "triton"]
"""Backend of every op; "reference" is the paper's formulas without our kernels."""


@contextmanager
def only_writer(out: Path, work: str) -> Iterator[None]:
    """Holds a folder for ``work``, a command, on rank 0, which writes for all or lets all write. A collective.

    Raises:
        LockedError: another process writes there; on rank 0. RuntimeError on the others.
    """
    with ExitStack() as stack:
        with distributed.raise_on_all_ranks():
            check_not_a_file("out", out)
            if distributed.is_first():
                stack.enter_context(FolderLock(out, "out", work))
        yield


def warn_of_untrained_context(run: Run, options: SamplerOptions) -> None:
    """Warns, on rank 0, of a context noise that the run has not seen: contexts that are clean or a little noised.

    It is sampled all the same: a run whose contexts had the times of their own levels saw such ones now and then.
    """
    # Runs of earlier versions do not have this option, and were not trained so.
    if options.context_noise > 0 and not run.training.get("clean_context", 0) and distributed.is_first():
        logger.warning(
            "context_noise: got %g for a run with clean_context 0, whose training seldom showed contexts as clean as "
            "that; expected 0, or a run that was trained with --clean-context",
            options.context_noise,
        )


def clips_of_run(run: Run, root: Path, split: Split | None, *, argument: str, **changes: Any) -> VideoDataset:
    """The clips of ``root``, read as in the run's training, with the middle window of each clip.

    Args:
        run: gives size, stride, frame rate and the treatment of short clips.
        root: folder of videos or shards.
        split: a side of UCF-101's official split, or ``None`` for all clips.
        argument: name of the option that gave ``root``, for error messages.
        **changes: arguments of :class:`~hpdm.data.clips.VideoDataset` that replace those above.

    Raises:
        FileNotFoundError: no such folder or split.
        ValueError: other classes than the run's.
    """
    frames, height, width = run.config.resolution
    arguments = {
        "frames": frames,
        "size": (height, width),
        "stride": int(run.training["stride"]),
        "fps": run.training.get("fps"),  # runs of earlier versions do not have this option
        "split": split,
        "train": False,
        "short": run.training["short"],
    }
    dataset = VideoDataset(root, **(arguments | changes))
    if run.config.conditioning == "class" and dataset.class_names != run.classes:
        raise ValueError(f"{argument}: got classes {dataset.class_names}, expected {run.classes} as in the run")
    return dataset
