"""``hpdm table``: trains, samples and measures what the paper's Tables 3 and 4 compare, and writes the table."""

from __future__ import annotations

from typing import Annotated

import tyro

from hpdm.commands.table_ablations import AblationTable
from hpdm.commands.table_overlap import OverlapTable

TableCommand = (
    Annotated[AblationTable, tyro.conf.subcommand("ablations")]
    | Annotated[OverlapTable, tyro.conf.subcommand("overlap")]
)


def run(command: AblationTable | OverlapTable) -> int:
    """The command ``hpdm table``; returns the exit status."""
    return command.run()
