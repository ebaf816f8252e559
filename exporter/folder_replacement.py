"""Puts a finished folder in its place, so that the place holds the former one or the new one and never half of one."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

__all__ = ["flush_folder", "replace_folder"]


def replace_folder(fresh: Path, out: Path) -> None:
    """Rename ``fresh`` to ``out``. What was there is moved aside first, and deleted when the new one is in place.

    Args:
        fresh: A complete folder beside ``out``, with its files on the disk.
        out: Its place. Whether what is there may go is for the caller to judge.

    Raises:
        OSError: ``out`` is as it was; if it cannot even be put back, it is kept whole beside its place.
    """
    if not out.exists():
        fresh.rename(out)
        flush_folder(out.parent)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
    former = aside / out.name
    try:
        out.rename(former)
        try:
            fresh.rename(out)
        except BaseException:
            former.rename(out)
            raise
    except BaseException:
        if not former.exists():
            aside.rmdir()
        raise
    flush_folder(out.parent)
    shutil.rmtree(aside, ignore_errors=True)


def flush_folder(folder: Path, *, files: bool = False) -> None:
    """Wait until the names in a folder are on the disk, with ``files`` also all files and folders below it."""
    if os.name != "posix":
        return  # Windows cannot open a folder
    for path in (*(folder.rglob("*") if files else ()), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
