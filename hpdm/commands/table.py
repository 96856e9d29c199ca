"""``hpdm table``: trains, samples and measures what a table compares, and writes it: the paper's Tables 3 and 4."""

from __future__ import annotations

from typing import Annotated

import tyro

from hpdm.commands.table_ablations import AblationTable
from hpdm.commands.table_ladder import LadderTable
from hpdm.commands.table_overlap import OverlapTable

TableCommand = (
    Annotated[AblationTable, tyro.conf.subcommand("ablations")]
    | Annotated[OverlapTable, tyro.conf.subcommand("overlap")]
    | Annotated[LadderTable, tyro.conf.subcommand("ladder")]
)


def run(command: AblationTable | OverlapTable | LadderTable) -> int:
    """The command ``hpdm table``; returns the exit status."""
    return command.run()
