"""The trained weights that come with the package, as files of ``hpdm export`` in ``hpdm/weights``.

Every ``--run`` takes their names: ``hpdm sample --run tiny --out videos``.
"""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "weights"


def names() -> list[str]:
    """The names of the weights, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def find(name: str | os.PathLike[str]) -> Path | None:
    """The file of weights with this name; ``None`` if there are none, or if ``name`` is a file or folder itself."""
    if Path(name).exists() or str(name) not in names():
        return None
    return FOLDER / f"{name}.safetensors"
