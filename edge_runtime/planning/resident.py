"""Keeps the resident memory of a device process small.

Three things that are no tensors decide it: what the C library's heap keeps after a ``free``, huge pages, and code. A
library's code becomes resident when it runs or when the kernel maps what lies around it, and stays so: after start-up
most of it will not run again. :func:`release_code` takes clean, read-only pages of libraries out of this process. They
stay in the page cache, so what runs again comes back without a read from the disk, and the kernel could always take
them back anyway; what falls is the resident set that limits and plans are about.

Nothing here happens unless :func:`keep_small` was called, which a device does and a server does not.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

__all__ = ["keep_small", "release_code", "trim_heap"]

# malloc.h of glibc
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_PR_SET_THP_DISABLE: Final = 41
_MADV_DONTNEED: Final = 4

_LARGE_BLOCK_BYTES: Final = 1 << 20
"""Blocks from here on are given back to the system when they are freed. It is glibc's first value, but glibc raises it
to the size of the largest block freed so far, up to 32 MiB, which leaves freed weights and batches in the heap."""

_MAP: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \d+ +(/.*)\n?")
_small = False
_clean: dict[str, bool] = {}


def keep_small() -> None:
    """Set what libraries read once, at their import, and what must be set before there are threads.

    Telemetry of ONNX Runtime is off, OpenBLAS makes no threads (a buffer each), there is one heap for all threads (1.2
    MiB less at the peak of a LeNet-5 run), large blocks go back when freed, and there are no huge pages: neither numpy
    nor the system rounds the process up to them.
    """
    global _small  # noqa: PLW0603 (of the process, as what it sets)
    _small = True
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("NUMPY_MADVISE_HUGEPAGE", "0")
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):  # musl has no mallopt
        library = ctypes.CDLL(None)
        library.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
        # The variables themselves would be too late; a user's wins.
        for name, option, value in (
            ("MALLOC_ARENA_MAX", _M_ARENA_MAX, 1),
            ("MALLOC_MMAP_THRESHOLD_", _M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES),
            ("MALLOC_TRIM_THRESHOLD_", _M_TRIM_THRESHOLD, _LARGE_BLOCK_BYTES),
        ):
            if name not in os.environ:
                library.mallopt(option, value)


def trim_heap() -> None:
    """Give free memory of the heap back to the system."""
    if _small and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def release_code() -> int:
    """Take library pages that were never written out of this process, see the module.

    Returns:
        Mappings that were released; 0 if the system tells nothing about them or :func:`keep_small` was not called.
    """
    if not _small or sys.platform != "linux":
        return 0
    try:
        candidates = list(_candidates())
        if any(line not in _clean for line, _, _ in candidates):
            _clean.update(_cleanliness())
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return 0
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return sum(advise(start, end - start, _MADV_DONTNEED) == 0 for line, start, end in candidates if _clean.get(line))


def _candidates() -> Iterator[tuple[str, int, int]]:
    """Read-only private mappings of files that are mapped as code too: libraries, which are never unmapped."""
    libraries = {match[4] for match in _mappings() if "x" in match[3]}
    for match in _mappings():
        if match[3] in ("r-xp", "r--p") and match[4] in libraries:
            yield match[0].rstrip("\n"), int(match[1], 16), int(match[2], 16)


def _mappings() -> Iterator[re.Match[str]]:
    """Mappings of files, line by line: the whole table of a process with many libraries is hundreds of KiB."""
    with Path("/proc/self/maps").open(encoding="utf-8", errors="surrogateescape") as file:
        yield from filter(None, map(_MAP.fullmatch, file))


def _cleanliness() -> dict[str, bool]:
    """Of each mapping, whether none of its pages was written: those would be lost (the linker writes addresses).

    An emulator that shows no numbers says that nothing is resident; then nothing counts as clean.
    """
    clean: dict[str, bool] = {}
    line = ""
    with Path("/proc/self/smaps").open(encoding="utf-8", errors="surrogateescape") as file:
        for text in file:
            key, _, value = text.partition(":")
            if _MAP.fullmatch(text):
                line = text.rstrip("\n")
                clean[line] = True
            elif line and key in ("Rss", "Anonymous", "Swap"):
                clean[line] &= (value.split()[0] != "0") == (key == "Rss")
            elif "-" in key and " " in key:  # a mapping without a file
                line = ""
    return clean
