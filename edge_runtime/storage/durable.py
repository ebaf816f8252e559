"""Write a file so that it is either the old one or the whole new one, also after a power cut."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["remove_leftovers", "write_durably"]

_PREFIX = ".partial-"


def write_durably(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``: a temporary file beside it, flushed to the disk, then renamed.

    Raises:
        OSError: It cannot be written; the old file is untouched.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=_PREFIX)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    # The rename itself is durable only once the folder is on the disk; Windows cannot open a folder.
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed left in a folder that nobody writes to now."""
    for path in folder.glob(f"{_PREFIX}*"):
        path.unlink(missing_ok=True)
