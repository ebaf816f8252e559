"""`fedzo profiles`: the boards that fedzo knows, and where each number about them comes from."""

from __future__ import annotations

from typing import Annotated

import typer

from .command import command, group
from .output import Output

__all__ = ["names", "register"]


def names(incomplete: str) -> list[str]:
    """Completion of a profile's name."""
    from ..hardware_profiles import profile_names

    return [name for name in profile_names() if name.startswith(incomplete)]


def register(app: typer.Typer) -> None:
    """Adds the group to the app."""
    profiles = group(
        app,
        "profiles",
        """Look at the hardware profiles: what a board has and what fedzo may use of it.

        Example:
            $ fedzo profiles list
            $ fedzo profiles show rpi-zero-2w
        """,
    )
    command(profiles, "list")(list_boards)
    command(profiles, "show")(show_board)


def list_boards(output: Output) -> None:
    """List the boards, with the memory that fedzo may use on each.

    Example:
        $ fedzo profiles list
        $ fedzo profiles list --json
    """
    from ..hardware_profiles import list_profiles

    boards = list_profiles()
    columns = ("name", "board", "machine", "cores", "RAM MiB", "budget MiB", "copy MB/s", "unverified")
    rows = [
        (b.name, b.title, b.machine, b.cores, b.ram_total_mib, b.ram_budget_mib, b.memcpy_mb_s, len(b.unverified))
        for b in boards
    ]
    output.table(columns, rows)
    output.result({"profiles": boards})


def show_board(
    output: Output,
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="A name from the list, or the path of a TOML file.", autocompletion=names),
    ],
) -> None:
    """Show one profile, each value with its source.

    Example:
        $ fedzo profiles show rpi-zero-2w
        $ fedzo profiles show ./my-board.toml
    """
    from ..hardware_profiles import load_profile
    from ..hardware_profiles.loader import FIELDS

    board = load_profile(name)
    rows = []
    for field in FIELDS:
        value = getattr(board, field)
        if field != "sources" and value not in (None, ""):
            shown = ", ".join(value) if isinstance(value, tuple) else value
            rows.append((field, shown, board.sources.get(field, "")))
    output.table(("field", "value", "source"), rows)
    output.result({"profile": board})
