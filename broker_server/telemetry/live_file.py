"""A note in the run's folder of who serves it and where its metrics are; gone when the server ends by itself."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["live_url", "noted"]

NAME = "live.json"


@contextmanager
def noted(folder: Path, url: str) -> Iterator[None]:
    """Leave the note for a while.

    Args:
        folder: Of the run.
        url: Of the metrics endpoint; empty without one.

    Raises:
        OSError: It cannot be written.
    """
    path = folder / NAME
    path.write_text(json.dumps({"pid": os.getpid(), "url": url}) + "\n")
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()


def live_url(folder: Path) -> str:
    """Address of the endpoint, as it was noted; empty if none is known. A server that was killed leaves its note."""
    try:
        return str(json.loads((folder / NAME).read_text())["url"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
