"""A note in the run's folder of who serves it, where its metrics are, and what boards said that take no part.

It is gone when the server ends by itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["live_refusals", "live_url", "noted"]

NAME = "live.json"


@contextmanager
def noted(folder: Path, url: str) -> Iterator[Callable[[Mapping[str, str]], None]]:
    """Leave the note for a while.

    Args:
        folder: Of the run.
        url: Of the metrics endpoint; empty without one.

    Yields:
        Takes who takes no part, with the reason, to be noted as well.

    Raises:
        OSError: It cannot be written.
    """
    path = folder / NAME
    note = {"pid": os.getpid(), "url": url}
    path.write_text(json.dumps(note) + "\n")

    def keep(refused: Mapping[str, str]) -> None:
        new = path.with_suffix(".new")
        with suppress(OSError):
            new.write_text(json.dumps({**note, "refused": refused}) + "\n")
            new.replace(path)  # Whoever reads finds the one or the other.

    try:
        yield keep
    finally:
        with suppress(OSError):
            path.unlink()


def live_url(folder: Path) -> str:
    """Address of the endpoint, as it was noted; empty if none is known. A server that was killed leaves its note."""
    try:
        return str(json.loads((folder / NAME).read_text())["url"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def live_refusals(folder: Path) -> dict[str, str]:
    """Devices that take no part, with the reason, as the server noted; empty if none are known."""
    try:
        found = json.loads((folder / NAME).read_text())["refused"]
        return {str(name): str(reason) for name, reason in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
