"""Options that take several numbers."""

from __future__ import annotations

import typer

__all__ = ["number_list"]


def number_list(text: str | None, option: str) -> tuple[float, ...] | None:
    """``0.49,0.48,0.45`` as numbers; None if the option was not given.

    Raises:
        typer.BadParameter: It is something else.
    """
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of numbers such as 0.49,0.48,0.45", param_hint=option) from None
