"""`fedzo status`: how a run stands, once or for as long as it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .command import command
from .output import Output

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""

    @command(app)
    def status(
        output: Output,
        run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")],
        watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until the run is done.")] = False,
        interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1, max=3600.0)] = 1.0,
        devices: Annotated[int, typer.Option(help="Devices to list; those that need a look come first.", min=0)] = 15,
        metrics: Annotated[
            str | None,
            typer.Option(metavar="URL", help="Endpoint of the server [default: the one that it noted in RUN]."),
        ] = None,
    ) -> None:
        """Show how a run stands: phase, round, devices, accuracy, pace, refusals, traffic.

        It reads the run's journal, also while a server writes it, and asks the server's metrics endpoint if there is
        one. Nothing is changed.

        Example:
            $ fedzo status runs/lenet5-20260101-120000-1
            $ fedzo status runs/lenet5-20260101-120000-1 --watch
        """
        from .status_view import show_status

        show_status(output, run, watch=watch, interval_s=interval, most=devices, url=metrics)
