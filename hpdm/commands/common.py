"""What several commands share: types of options, and the clips that a run reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from hpdm.data.clips import VideoDataset
from hpdm.data.layout import Split
from hpdm.runs import Run

Kernels = Literal["auto", "reference", "torch", "triton"]
"""Backend of every op; "reference" is the paper's formulas without our kernels."""


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
