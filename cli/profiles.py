"""`fedzo profiles`: the boards that fedzo knows, and where each number about them comes from."""

from __future__ import annotations

import typer

from .command import group

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Adds the group to the app."""
    profiles = group(
        app,
        "profiles",
        """Look at the hardware profiles: what a board has and what fedzo may use of it.

        Example:
            $ fedzo profiles show rpi-zero-2w
        """,
    )
