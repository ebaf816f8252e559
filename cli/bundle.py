"""`fedzo bundle`: everything that a board without a network needs, as one folder."""

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
    def bundle(
        output: Output,
        platform: Annotated[
            str, typer.Option(metavar="NAME", help="The board's: aarch64, armhf or x86_64 (uname -m tells).")
        ] = "aarch64",
        python: Annotated[str, typer.Option(metavar="X.Y", help="The board's Python: python3 --version.")] = "3.11",
        artifact: Annotated[
            Path | None, typer.Option(metavar="DIR", help="Folder of fedzo export, to check the board with.")
        ] = None,
        out: Annotated[
            Path | None, typer.Option("--out", "-o", metavar="DIR", help="[default: fedzo-NAME-pythonX.Y]")
        ] = None,
        wheel: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Wheel of fedzo [default: made of the fedzo that runs].")
        ] = None,
        glibc: Annotated[
            str, typer.Option(metavar="2.N", help="Oldest C library that it must run on: ldd --version.")
        ] = "2.28",
        system_packages: Annotated[
            bool,
            typer.Option("--system-packages", help="The board takes numpy and onnxruntime from its distribution."),
        ] = False,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle.")] = False,
    ) -> None:
        """Make an offline folder for a board: wheels, artifact, hashes, and install.sh.

        Copy it there and run `sh install.sh`: it makes a virtual environment and runs fedzo-device doctor.

        Example:
            $ fedzo bundle --platform aarch64 --python 3.11 --artifact artifact
            $ fedzo bundle --platform armhf --python 3.13 --system-packages
        """
        from ..exporter.board_wheels import PLATFORMS, Board
        from ..exporter.bundle import make_bundle

        minor = glibc.removeprefix("2.")
        if not (glibc.startswith("2.") and minor.isdecimal()):
            raise typer.BadParameter(f"{glibc!r} is no version of glibc; write 2.28")
        board = Board(PLATFORMS.get(platform.lower(), platform), python, int(minor))
        folder = out or Path(f"fedzo-{platform.lower()}-python{python}")
        output.say(f"fetching wheels for Python {python} on {board.machine}")
        made = make_bundle(
            board, folder, artifact=artifact, wheel=wheel, system_packages=system_packages, overwrite=overwrite
        )
        if system_packages and board.machine != "armv7l":
            output.warn("the board's own onnxruntime may be one that does not work there: see docs/boards.md")
        output.text(f"{made.folder}: {len(made.wheels)} wheels, {made.size / 1e6:.1f} MB; on the board: sh install.sh")
        output.result({"folder": made.folder, "wheels": made.wheels, "bytes": made.size, "machine": board.machine})
