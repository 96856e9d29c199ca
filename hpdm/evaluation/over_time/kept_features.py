"""Features of the clips of long video files, kept in a folder: each video is read, and its features computed, once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from hpdm.evaluation.array_file import read_arrays, write_arrays
from hpdm.evaluation.detector import Detector
from hpdm.evaluation.over_time.borders import CLIP

FORMAT = 1
"""Version of the files."""


class KeptFeatures:
    """A file for each video, by the contents of the video and of the detector. Written as each video is done.

    Args:
        folder: of the files.
        detector: of features.
        clips: clips of a video.
    """

    def __init__(self, folder: Path, detector: Detector, clips: int) -> None:
        self.folder, self.detector, self.clips = folder, detector, clips
        self._identities: dict[Path, dict[str, Any]] = {}

    def read(self, video: Path) -> np.ndarray | None:
        """The features of a video's clips, float32 ``[clips, W]``; ``None`` if there are none.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._file_of(video)
        if not path.is_file():
            return None
        try:
            identity, arrays = read_arrays(path)
            features = arrays["features"]
            if features.dtype != np.float32 or features.ndim != 2 or len(features) != self.clips:
                raise ValueError(f"features {features.dtype} {features.shape} of {self.clips} clips")
            if identity != self._identity(video) or not np.isfinite(features).all():
                raise ValueError("of another video, or not finite")
        except Exception as error:  # numpy raises errors of many types for damaged files
            raise ValueError(f"statistics: {path} is damaged ({type(error).__name__}: {error}); delete it") from None
        return features

    def write(self, video: Path, features: np.ndarray) -> None:
        """Keeps the features of a video's clips, float32 ``[clips, W]``."""
        write_arrays(self._file_of(video), self._identity(video), {"features": features})

    def _identity(self, video: Path) -> dict[str, Any]:
        """Everything that the features depend on."""
        if video not in self._identities:
            with video.open("rb") as file:
                contents = hashlib.file_digest(file, "sha256").hexdigest()
            self._identities[video] = {
                "format": FORMAT,
                "video": contents,
                "clips": self.clips,
                "clip": CLIP,
                "detector": self.detector.sha256,
            }
        return self._identities[video]

    def _file_of(self, video: Path) -> Path:
        digest = hashlib.sha256(json.dumps(self._identity(video), sort_keys=True).encode()).hexdigest()
        return self.folder / f"clips-{digest[:32]}.npz"
