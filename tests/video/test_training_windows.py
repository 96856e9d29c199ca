"""What training is given: the right windows, with and without the cache, in any number of processes."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from hpdm.data.clips import VideoDataset
from hpdm.training.batches import MicroBatches
from tests.video.cases import Case
from tests.video.corpus import CASES, everything
from tests.video.truth import sequential

NAMES = (
    "h264-open-gop.mp4",
    "h264-intra-refresh.mp4",
    "hevc-open-gop.mp4",
    "packed-2b.avi",
    "wmv2.wmv",
    "times-repeated.mkv",
    "mpeg2-open-gop.ts",
)
"""Kinds in which a decoder that seeks goes wrong, or gives a window other frames than the whole clip."""
STEPS = 20
NO_CACHE, CACHE_OF_SOME, CACHE_OF_ALL = 0, 2**22, 2**28
"""Bytes of the cache; a clip of the corpus has 1.8 million."""
READERS = [(cache, workers) for cache in (NO_CACHE, CACHE_OF_SOME, CACHE_OF_ALL) for workers in (0, 1, 2)]
if not everything():
    READERS = [(NO_CACHE, 0), (CACHE_OF_SOME, 1), (CACHE_OF_ALL, 2)]


@pytest.fixture(scope="module")
def folder(video_file: Callable[[Case], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("training")
    for case in CASES:
        if case.name in NAMES:
            shutil.copy(video_file(case), root)
    return root


@pytest.fixture(scope="module")
def truth(folder: Path) -> dict[str, np.ndarray]:
    """The frames of each file, uint8 ``[F, H, W, 3]``."""
    return {str(path): np.stack(sequential(path)) for path in folder.iterdir()}


@pytest.mark.parametrize(("cache_bytes", "workers"), READERS)
def test_windows_are_right_whatever_reads_them(folder, truth, cache_bytes, workers):
    data = VideoDataset(folder, frames=8, size=(96, 160), seed=3, cache_bytes=cache_bytes)
    # A process that hangs is an error of the test, not its end.
    patience = 120 if workers else 0
    loader = DataLoader(
        data, batch_sampler=MicroBatches(len(data), 4, 4, seed=1), num_workers=workers, timeout=patience
    )
    wrong, seen = [], []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="clip skipped")
        for _, batch in zip(range(STEPS), loader):
            for video, path, start in zip(batch["video"], batch["path"], batch["start"].tolist()):
                right = truth[path][start : start + 8]
                seen.append((path, start))
                if not np.array_equal(video.permute(1, 2, 3, 0).numpy(), right):
                    wrong.append(f"{Path(path).name} from {start}")
    assert len({path for path, _ in seen}) == len(NAMES)
    assert len(set(seen)) > 2 * len(NAMES), "several windows of every clip"
    assert not wrong, f"{len(wrong)} of {len(seen)} windows are wrong: {sorted(wrong)}"
