"""What a run's folder holds, for comparing runs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import safe_open

from hpdm.training.checkpoint import list_checkpoints, verify


def digest(checkpoint: Path) -> str:
    """A hash of all tensors; the files' headers may list them in another order."""
    sha = hashlib.sha256()
    for path in sorted(checkpoint.glob("*/*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                sha.update(f"{path.parent.name} {name}".encode() + file.get_tensor(name).numpy().tobytes())
    return sha.hexdigest()


def curve(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of every logged step."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows}


def check_checkpoints(run: Path, like: Path, at_least: int) -> None:
    """Checks that a run's newest checkpoint is of step ``at_least`` or later, and every one is that of ``like``."""
    steps = [int(path.name[5:]) for path in list_checkpoints(run)]
    assert steps, "no checkpoint is left"
    assert steps[-1] >= at_least, f"the newest checkpoint is of step {steps[-1]}"
    for path in list_checkpoints(run):
        verify(path)
        assert digest(path) == digest(like / "checkpoints" / path.name), f"{path.name} holds other weights"


def leftovers(folder: Path) -> list[str]:
    """Hidden files and folders."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))
