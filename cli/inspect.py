"""`fedzo inspect`: who sent what in a run, what was refused, and why."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .command import command
from .output import Output

if TYPE_CHECKING:
    from ..broker_server.history.inspection import RoundInspection
    from ..broker_server.journal import Journal

__all__ = ["register"]

REASONS = 20


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""

    @command(app)
    def inspect(
        output: Output,
        run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")],
        round_: Annotated[
            int | None, typer.Option("--round", metavar="N", min=1, help="Show every device of this round.")
        ] = None,
        last: Annotated[
            int, typer.Option("--last", metavar="N", min=0, help="Rounds to list; 0 for all. JSON has all of them.")
        ] = 20,
    ) -> None:
        """Show what the journal of a run says: its rounds, or one round device by device.

        A server may write the journal meanwhile.

        Example:
            $ fedzo inspect runs/lenet5-20260101-120000-1
            $ fedzo inspect runs/lenet5-20260101-120000-1 --round 40
        """
        from ..broker_server.history.replay import open_run

        with open_run(run) as (_, journal, document):
            if round_ is not None:
                _show_round(output, journal, document.run, round_)
            else:
                _show_run(output, journal, document.run, last)


def _show_run(output: Output, journal: Journal, run: str, last: int) -> None:
    from ..broker_server.history.inspection import inspect_run

    found = inspect_run(journal)
    output.table(
        ("entries", "count", "bytes"),
        [(kind, found.entries[kind], found.payload_bytes[kind]) for kind in sorted(found.entries)],
        title=f"run {run}, {found.devices} devices",
    )
    if found.refusals:
        output.table(("refused", "times"), list(found.refusals.items())[:REASONS])
    for stop in found.stops:
        output.text(stop)
    columns = ("round", "phase", "asked", "reports", "counted", "refused", "garbled", "ended", "seconds", "outcome")
    output.table(
        columns,
        [
            (r.round, r.phase, r.asked, r.reports, r.usable, r.refused, r.garbled, _ended(r), r.seconds, r.outcome)
            for r in found.rounds[-last:]
        ],
    )
    output.result({"run": run, **dataclasses.asdict(found)})


def _show_round(output: Output, journal: Journal, run: str, round_: int) -> None:
    from ..broker_server.history.inspection import inspect_round

    found, devices = inspect_round(journal, round_)
    rows: list[tuple[str, object]] = [
        ("phase", found.phase),
        ("updates before it", found.updates),
        ("asked", found.asked),
        ("reports", found.reports),
        ("counted", found.usable),
        ("ended", _ended(found)),
        ("seconds", found.seconds),
        ("outcome", found.outcome),
    ]
    output.table(("round", str(round_)), rows, title=f"run {run}")
    columns = ("device", "what", "scalars", "samples", "queries", "loss", "bytes", "seconds", "why")
    output.table(
        columns,
        [
            (d.device, d.what, d.scalars, d.samples, d.queries, d.mean_loss, d.payload_bytes, d.seconds, d.detail)
            for d in devices
        ],
    )
    output.result({"run": run, **dataclasses.asdict(found), "devices": [dataclasses.asdict(d) for d in devices]})


def _ended(found: RoundInspection) -> str:
    if not found.ending:
        return "open"
    how = "complete" if found.ending == "close" else found.ending
    return how if found.in_time else f"{how}, after the deadline"
