"""The command line: ``hpdm {train,sample,evaluate,export,plan,data}``."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from hpdm.commands.data import DataCommand
from hpdm.commands.evaluate import EvaluateOptions
from hpdm.commands.export import ExportOptions
from hpdm.commands.plan import PlanCommand
from hpdm.commands.sample import SampleOptions
from hpdm.commands.train import TrainOptions

Command = (
    Annotated[TrainOptions, tyro.conf.subcommand("train")]
    | Annotated[SampleOptions, tyro.conf.subcommand("sample")]
    | Annotated[EvaluateOptions, tyro.conf.subcommand("evaluate")]
    | Annotated[ExportOptions, tyro.conf.subcommand("export")]
    | Annotated[PlanCommand, tyro.conf.subcommand("plan")]
    | Annotated[
        DataCommand, tyro.conf.subcommand("data", description="Render the synthetic clips, look into video files.")
    ]
)

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its status.

    What a user can cause (bad options, missing or damaged files, a full disk, a device that is not there) is one line
    on standard error and status 1, with ``HPDM_DEBUG=1`` its traceback too; anything else is a bug and always shows it.
    """
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    try:
        command = tyro.cli(
            Command,
            prog="hpdm",
            description="Hierarchical Patch Diffusion Models for video.",
            args=arguments,
            config=(tyro.conf.OmitSubcommandPrefixes,),
        )
        status = command.run()
    except (ValueError, OSError, RuntimeError, FloatingPointError, ImportError) as error:
        if os.environ.get("HPDM_DEBUG") == "1":
            raise
        print(f"hpdm: error: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        status = INTERRUPTED
    sys.exit(status)
