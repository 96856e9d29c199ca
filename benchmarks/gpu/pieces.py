"""The pieces that ``python -m benchmarks.gpu`` runs, the most valuable first.

A piece is one file of checks or timings, or a part of one, and runs in a separate process. Checks run in parallel: most
of their time is compilation, on one core per process. For the same reason the longest files are split by arithmetic.
Timings run alone on the device. Before that, a piece that runs beside the checks compiles and validates what they time.
Budgets are generous for a large GPU with 16 CPU cores.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Piece:
    """A file of checks or timings, or the part of its tests that ``select`` matches, with a time budget."""

    name: str
    file: str
    """Relative to ``benchmarks/``. ``gpu/tiles.py`` has cases, which need no pytest; ``test_tiles.py`` needs pytest."""
    seconds: float
    """Budget. The piece is stopped after this time; results until then are kept."""
    shows: str
    select: str = ""
    """Only tests whose names contain this run."""
    options: tuple[str, ...] = ()
    alone: bool = False
    """Whether nothing else may run on the device at the same time; true for timings."""

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @property
    def needs_pytest(self) -> bool:
        """Whether the file has pytest tests instead of cases."""
        return not self.file.startswith("gpu/")


ARITHMETICS = (("fp32 ieee", "fp32-ieee"), ("bf16", "bf16"), ("fp32 tf32", "fp32-1xtf32"))
ARITHMETICS += (("fp32 tf32x3", "fp32-3xtf32"), ("fp16", "fp16"))
AGAINST_FP64 = "value and gradients against fp64, the same bits twice"

CHECKS = (
    *(Piece(f"attention {a}", "gpu/attention.py", 100, AGAINST_FP64, select=k) for a, k in ARITHMETICS),
    *(Piece(f"fusion {a}", "gpu/fusion.py", 80, AGAINST_FP64, select=k) for a, k in ARITHMETICS),
    Piece("context", "gpu/context.py", 100, AGAINST_FP64),
    Piece("tiles", "gpu/tiles.py", 100, AGAINST_FP64),
    Piece("patches", "gpu/patches.py", 60, AGAINST_FP64),
    Piece("rows", "gpu/rows.py", 60, AGAINST_FP64),
    Piece("groups", "gpu/groups.py", 60, AGAINST_FP64),
    Piece("temporal", "gpu/temporal.py", 60, AGAINST_FP64),
    Piece("optimizer", "gpu/optimizer.py", 60, "steps against fp64, the same bits twice, steps that are skipped"),
    Piece("large", "gpu/large.py", 60, "tensors of more than 2^31 elements: 64-bit offsets"),
    Piece("opcheck", "gpu/ops.py", 90, "opcheck of every registered op", select="opcheck"),
    Piece("graphs", "gpu/graphs.py", 60, "a training step in a CUDA graph, replayed for other clips"),
    Piece("compile", "gpu/ops.py", 100, "torch.compile(fullgraph=True), forward and backward", select="compile"),
)

# Order and budgets of the timings. Other files come after these; the paper's tables come last, in the remaining time.
_SECONDS = {
    "test_cross_attention.py": 120,
    "test_context.py": 110,
    "test_tiles.py": 70,
    "test_patches.py": 50,
    "test_rows.py": 50,
    "test_group_norm_act.py": 40,
    "test_temporal_attention.py": 60,
    "test_training_step.py": 150,
    "test_growth.py": 80,
    "test_sampling.py": 100,
}
_OTHERS_SECONDS = 120
_LAST = "test_paper_table1.py"
_LAST_SECONDS = 300
# Benchmarks whose contenders are compiled and validated beside the checks: file -> (label, part of the tests' names).
_PREPARED = {
    "test_cross_attention.py": (("attention fp32", "float32"), ("attention bf16", "bfloat16")),
    "test_context.py": (("context", "test_sample_context"), ("fusion", "test_fuse_context")),
    "test_tiles.py": (("tiles", ""),),
    "test_patches.py": (("patches", ""),),
    "test_rows.py": (("rows", ""),),
    "test_group_norm_act.py": (("groups", ""),),
    "test_temporal_attention.py": (("temporal attention", ""),),
}


def timings(files: Sequence[str]) -> tuple[Piece, ...]:
    """One timing piece for each of ``files`` (names in ``benchmarks/``), in the order of the runs."""
    known = [name for name in _SECONDS if name in files]
    others = sorted(name for name in files if name not in _SECONDS and name != _LAST)
    pieces = []
    for name in (*known, *others, *([_LAST] if _LAST in files else [])):
        seconds = _LAST_SECONDS if name == _LAST else _SECONDS.get(name, _OTHERS_SECONDS)
        label = name.removeprefix("test_").removesuffix(".py").replace("_", " ")
        shows = "time against peers, roofline, peak memory" if name in _PREPARED else "time and peak memory"
        # Predictions take minutes of a CPU core and need no GPU.
        select = "measured" if name == _LAST else ""
        pieces.append(
            Piece(f"time {label}", name, seconds, shows, select=select, options=("--seconds", "0.15"), alone=True)
        )
    return tuple(pieces)


def preparations(files: Sequence[str]) -> tuple[Piece, ...]:
    """Pieces that compile and validate the contenders of the op benchmarks among ``files``, without timing them."""
    shows, options = "compiles and validates what is timed later", ("--seconds", "0")
    return tuple(
        Piece(f"prepare {label}", file, 140, shows, select=select, options=options)
        for file, parts in _PREPARED.items()
        if file in files
        for label, select in parts
    )


def all_pieces(folder: Path = BENCHMARKS) -> tuple[Piece, ...]:
    """All pieces, the most valuable first; every ``test_*.py`` in ``folder`` is a timing."""
    files = [path.name for path in folder.glob("test_*.py")]
    return (*CHECKS, *preparations(files), *timings(files))
