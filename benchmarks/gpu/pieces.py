"""What a CUDA machine can show, piece by piece, the most valuable first.

A piece is one file of tests, or some of one, in a process of its own. Checks run side by side, because compiling their
kernels takes nearly all of their time (0.3 to 7 s each, several hundred variants, on one core per process), so the
longest file is cut by arithmetic. Timings run alone on the device, after a piece beside the checks has compiled and
validated what they time. Budgets are what a machine with 16 cores should need at most, twice over.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Piece:
    """A file of tests, or those of its tests that ``select`` picks, with a time budget."""

    name: str
    file: str
    """Relative to ``benchmarks/``."""
    seconds: float
    """Stopped after this long; what it has reported by then is kept."""
    shows: str
    select: str = ""
    """As pytest's ``-k``."""
    options: tuple[str, ...] = ()
    alone: bool = False
    """Whether nothing else may run on the device meanwhile: timings."""

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


ARITHMETICS = (("fp32 ieee", "fp32-ieee"), ("bf16", "bf16"), ("fp32 tf32", "fp32-1xtf32"))
ARITHMETICS += (("fp32 tf32x3", "fp32-3xtf32"), ("fp16", "fp16"))
AGAINST_FP64 = "value and gradients against fp64, the same bits twice"

CHECKS = (
    *(Piece(f"attention {a}", "gpu/test_cross_attention.py", 150, AGAINST_FP64, select=k) for a, k in ARITHMETICS),
    *(Piece(f"fusion {a}", "gpu/test_fuse_context.py", 150, AGAINST_FP64, select=k) for a, k in ARITHMETICS),
    Piece("context", "gpu/test_context.py", 150, AGAINST_FP64),
    Piece("tiles", "gpu/test_tiles.py", 120, AGAINST_FP64),
    Piece("patches", "gpu/test_patches.py", 120, AGAINST_FP64),
    Piece("large", "gpu/test_large.py", 90, "tensors of more than 2^31 elements: 64-bit offsets"),
    Piece("opcheck", "gpu/test_ops.py", 120, "opcheck of every registered op", select="opcheck"),
    Piece("compile", "gpu/test_ops.py", 120, "torch.compile(fullgraph=True), forward and backward", select="compile"),
)

# Timed in this order; files that are not named here come after them, the paper's tables last with what is left. Not
# measured yet, but reckoned for one Hopper card and 16 cores: checks and preparations two to three minutes, the timings
# of ops three, training one.
_SECONDS = {
    "test_cross_attention.py": 110,
    "test_context.py": 110,
    "test_tiles.py": 60,
    "test_patches.py": 40,
    "test_training_step.py": 110,
}
_OTHERS_SECONDS = 120
_LAST = "test_paper_table1.py"
_LAST_SECONDS = 300
# Benchmarks whose contenders are compiled and validated beside the checks: file -> (what, pytest's -k). The compiled
# peers of the context take 5 to 20 s each.
_PREPARED = {
    "test_cross_attention.py": (("attention fp32", "float32"), ("attention bf16", "bfloat16")),
    "test_context.py": (("context", "test_sample_context"), ("fusion", "test_fuse_context")),
    "test_tiles.py": (("tiles", ""),),
    "test_patches.py": (("patches", ""),),
}


def timings(files: Sequence[str]) -> tuple[Piece, ...]:
    """A timing piece for each of ``files`` (names in ``benchmarks/``), in the order in which they run."""
    known = [name for name in _SECONDS if name in files]
    others = sorted(name for name in files if name not in _SECONDS and name != _LAST)
    pieces = []
    for name in (*known, *others, *([_LAST] if _LAST in files else [])):
        seconds = _LAST_SECONDS if name == _LAST else _SECONDS.get(name, _OTHERS_SECONDS)
        what = name.removeprefix("test_").removesuffix(".py").replace("_", " ")
        shows = "time against peers, roofline, peak memory" if name in _PREPARED else "time and peak memory"
        pieces.append(Piece(f"time {what}", name, seconds, shows, options=("--seconds", "0.3"), alone=True))
    return tuple(pieces)


def preparations(files: Sequence[str]) -> tuple[Piece, ...]:
    """For each op benchmark among ``files``: compiles and validates all contenders without timing any."""
    shows, options = "compiles and validates what is timed later", ("--seconds", "0")
    return tuple(
        Piece(f"prepare {what}", file, 150, shows, select=select, options=options)
        for file, parts in _PREPARED.items()
        if file in files
        for what, select in parts
    )


def all_pieces(folder: Path = BENCHMARKS) -> tuple[Piece, ...]:
    """Every piece, in the order of their value; any ``test_*.py`` in ``folder`` is a timing."""
    files = [path.name for path in folder.glob("test_*.py")]
    return (*CHECKS, *preparations(files), *timings(files))
