"""Context: bad arguments are named, with what was got and what was expected."""

import pytest
import torch

from hpdm_kernels.context.api import fuse_context, fuse_projected, project_sources, sample_context

GRID = (2, 2, 2)
BAD = {
    "x is a list": ({"x": [1.0]}, TypeError, "^x: "),
    "x has two axes": ({"x": torch.zeros(8, 4)}, ValueError, "^x: "),
    "x is int": ({"x": torch.zeros(2, 8, 4, dtype=torch.int64)}, TypeError, "^x: "),
    "x and grid differ": ({"x": torch.zeros(2, 7, 4)}, ValueError, "^grid: "),
    "sources is a tensor": ({"sources": torch.zeros(2, 8, 4)}, TypeError, "^sources: "),
    "no sources": ({"sources": (), "source_boxes": (), "source_grids": ()}, ValueError, "^sources: "),
    "source of another width": ({"sources": (torch.zeros(2, 8, 5),)}, ValueError, r"^sources\[0\]: "),
    "source of another dtype": ({"sources": (torch.zeros(2, 8, 4).half(),)}, TypeError, r"^sources\[0\]: "),
    "source of another batch": ({"sources": (torch.zeros(3, 8, 4),)}, ValueError, r"^sources\[0\]: "),
    "source not of its grid": ({"source_grids": ((2, 2, 3),)}, ValueError, r"^sources\[0\]: "),
    "too many source boxes": ({"source_boxes": (torch.ones(2, 6),) * 2}, ValueError, "^source_boxes: "),
    "source boxes in fp64": ({"source_boxes": (torch.ones(2, 6).double(),)}, TypeError, r"^source_boxes\[0\]: "),
    "source box outside the video": ({"source_boxes": (torch.ones(2, 6),)}, ValueError, r"^source_boxes\[0\]: row 0"),
    "too many grids": ({"source_grids": (GRID, GRID)}, ValueError, "^source_grids: "),
    "grid of two": ({"grid": (2, 4)}, TypeError, "^grid: "),
    "grid with a zero": ({"grid": (0, 4, 2)}, ValueError, "^grid: "),
    "box of another batch": ({"box": torch.zeros(3, 6)}, ValueError, "^box: "),
    "box without scale": ({"box": torch.zeros(2, 6)}, ValueError, "^box: row 0"),
    "box outside the source's": (
        {"source_boxes": (torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.5, 0.5]]).repeat(2, 1),)}, ValueError, "^box: row 0",
    ),
    "narrow weight": ({"weight": torch.zeros(4, 9)}, ValueError, "^weight: "),
    "weight of another dtype": ({"weight": torch.zeros(4, 11).double()}, TypeError, "^weight: "),
    "long bias": ({"bias": torch.zeros(5)}, ValueError, "^bias: "),
    "float rows": ({"source_index": torch.zeros(2, 1)}, TypeError, "^source_index: "),
    "rows for other sources": ({"source_index": torch.zeros(2, 2).long()}, ValueError, "^source_index: "),
    "row beyond the source": ({"source_index": torch.tensor([[0], [2]])}, ValueError, "^source_index: "),
    "negative row": ({"source_index": torch.tensor([[0], [-1]])}, ValueError, "^source_index: "),
    "too many footprints": ({"footprints": (GRID, GRID)}, ValueError, "^footprints: "),
    "footprint beyond the grid": ({"footprints": ((2, 3, 2),)}, ValueError, r"^footprints\[0\]: "),
    "footprint too small": ({"footprints": ((2, 1, 2),)}, ValueError, r"^footprints\[0\]: .*at least"),
    "unknown precision": ({"precision": "fp8"}, ValueError, "^precision: "),
    "unknown backend": ({"backend": "cuda"}, ValueError, "^backend: "),
    "kernels in fp64": (
        {
            "backend": "triton", "x": torch.zeros(2, 8, 4).double(), "sources": (torch.zeros(2, 8, 4).double(),),
            "weight": torch.zeros(4, 11).double(), "bias": None,
        }, RuntimeError, "backend='triton'",
    ),
}  # fmt: skip


def good_arguments():
    whole = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]).repeat(2, 1)
    return {
        "x": torch.zeros(2, 8, 4), "sources": (torch.zeros(2, 8, 4),), "source_boxes": (whole,), "box": whole * 0.75,
        "weight": torch.zeros(4, 11), "bias": torch.zeros(4), "source_grids": (GRID,), "grid": GRID,
    }  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    changes, error, message = BAD[case]
    fuse_context(**good_arguments())
    with pytest.raises(error, match=message):
        fuse_context(**{**good_arguments(), **changes})


@pytest.mark.parametrize("case", [case for case in BAD if "footprint" in case or "source" in case or "weight" in case])
def test_bad_arguments_of_fuse_projected(case):
    def renamed(name):
        return "projected" if name == "sources" else name

    changes, error, message = BAD[case]
    arguments = {renamed(k): v for k, v in good_arguments().items()}
    fuse_projected(**arguments)
    with pytest.raises(error, match=message.replace("^sources", "^projected")):
        fuse_projected(**{**arguments, **{renamed(k): v for k, v in changes.items()}})


BAD_PROJECTION = {
    "sources is a tensor": ({"sources": torch.zeros(2, 8, 4)}, TypeError, "^sources: "),
    "no sources": ({"sources": ()}, ValueError, "^sources: "),
    "two axes": ({"sources": (torch.zeros(8, 4),)}, ValueError, r"^sources\[0\]: "),
    "of two widths": ({"sources": (torch.zeros(2, 8, 4), torch.zeros(2, 8, 5))}, ValueError, r"^sources\[1\]: "),
    "narrow weight": ({"weight": torch.zeros(4, 9)}, ValueError, "^weight: "),
    "weight of another dtype": ({"weight": torch.zeros(4, 11).double()}, TypeError, "^weight: "),
    "unknown precision": ({"precision": "fp8"}, ValueError, "^precision: "),
    "unknown backend": ({"backend": "cuda"}, ValueError, "^backend: "),
}


@pytest.mark.parametrize("case", BAD_PROJECTION)
def test_bad_arguments_of_project_sources(case):
    changes, error, message = BAD_PROJECTION[case]
    arguments = {"sources": (torch.zeros(2, 8, 4),), "weight": torch.zeros(4, 11)}
    project_sources(**arguments)
    with pytest.raises(error, match=message):
        project_sources(**{**arguments, **changes})


# Without x, the first source decides the width and the dtype, the box decides the batch.
FUSION_ONLY = {"source of another width", "source of another dtype", "box of another batch"}
SAMPLE_BAD = [
    case for case in BAD if case not in FUSION_ONLY and not BAD[case][0].keys() & {"x", "weight", "bias", "precision"}
]


@pytest.mark.parametrize("case", SAMPLE_BAD)
def test_bad_arguments_of_sample_context(case):
    changes, error, message = BAD[case]
    arguments = {k: v for k, v in good_arguments().items() if k not in ("x", "weight", "bias")}
    sample_context(**arguments)
    with pytest.raises(error, match=message):
        sample_context(**{**arguments, **changes})
