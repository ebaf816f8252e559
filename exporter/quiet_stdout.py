"""Keeps stdout clear of what others write: a command's stdout is data."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import tempfile
from collections.abc import Iterator

__all__ = ["quiet_stdout"]

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """While it lasts, what Python prints goes to stderr, and what libraries write to file 1 to the debug log.

    torch's exporter prints its whole graph from C++ when it fails. File 1 is the process's: no other thread may need
    it meanwhile.
    """
    before = sys.stdout
    _flush(before)
    try:
        saved = os.dup(1)
    except OSError:  # closed: nothing can be written there
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        finally:
            _flush(before)
            os.dup2(saved, 1)
            os.close(saved)
            file.seek(0)
            written = file.read().decode(errors="replace").strip()
            if written:
                logger.debug("written to stdout by a library:\n%s", written)


def _flush(stream: object) -> None:
    """Write out what Python's and C's buffers of file 1 still hold."""
    for writer in (stream, sys.__stdout__):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # None, closed, or a pipe without a reader
            writer.flush()  # type: ignore[attr-defined]
    with contextlib.suppress(TypeError, OSError):  # no such library on Windows
        ctypes.CDLL(None).fflush(None)
