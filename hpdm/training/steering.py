"""Options by which a run in progress is followed and kept. They change no weight, so a resumed run may change them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpdm.checks import at_least, check_choice
from hpdm.tensor_file import FilePrecision


@dataclass(frozen=True)
class Steering:
    """How a run is validated, sampled and saved while it trains.

    Raises:
        ValueError: a number out of range, or options that contradict each other.
    """

    validate_every: int = 0
    """Steps between validations of the averaged weights, which the last step has, too; 0 for none."""
    validation: Path | None = None
    """Folder of held-out clips, or of shards, for the validation; --data if not given."""
    validation_split: Literal["train", "test"] | None = None
    """UCF-101's official split for the validation. Default: of --data the side that training does not have."""
    validation_clips: int = 64
    """Clips of the validation, spread evenly over the set."""
    keep: int = 2
    """Number of checkpoints to resume from that are kept, the newest; 0 keeps all."""
    snapshot_every: int = 0
    """Steps between snapshots in RUN/snapshots, which are never deleted: the averaged weights alone, in a file that
    every --run takes; 0 for none."""
    snapshot_precision: FilePrecision = "fp32"
    """Of the weights in a snapshot; "fp16" takes half of the disk."""
    sample_prompts: tuple[str, ...] = ()
    """Captions for the sample grids of a run with text, out of those in --embeddings; some of the clips' captions if
    not given."""
    memory_gb: float | None = None
    """With --micro-batch auto: memory of a process in GB (1e9 bytes); 90 % of the GPU's if not given."""
    peak_tflops: float | None = None
    """Largest TFLOP/s of a device at the run's --precision, for the share of it in the log ("mfu"). It is known for
    A100, H100 and H200."""

    def __post_init__(self) -> None:
        at_least(self, 0, "validate_every", "keep", "snapshot_every")
        at_least(self, 1, "validation_clips")
        check_choice("snapshot_precision", self.snapshot_precision, FilePrecision)
        for name in ("memory_gb", "peak_tflops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}: got {value}, expected a finite number > 0")
        if not self.validate_every and (self.validation is not None or self.validation_split is not None):
            raise ValueError("validate_every: got 0 with clips for a validation, expected a number of steps")
