"""Arrays of any size, piece by piece; pages of a mapped file leave the process once they were read.

What was read of a mapped file stays in the process until memory is short, and counts as its memory till then. Given
back, it stays in the page cache, so what is read again comes without a read from the disk.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["PIECE_BYTES", "is_mapped", "pieces", "release"]

PIECE_BYTES: Final = 1 << 20

_AROUND_BYTES: Final = 2 << 20
"""A page that is needed brings others with it: 64 KiB, or a piece of up to 2 MiB in which the kernel keeps the file."""


def pieces(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """All values of ``array[n, ...]`` in views of at most :data:`PIECE_BYTES`, in the order of the memory.

    A mapped piece leaves the process when the next one is asked for.
    """
    array = np.asarray(array)
    if not array.size:
        return
    if array.flags.f_contiguous:
        array = array.T
    rows = PIECE_BYTES // array[:1].nbytes
    if not rows:
        for row in array:
            yield from pieces(row)
        return
    for start in range(0, len(array), rows):
        piece = array[start : start + rows]
        yield piece
        release(piece)


def is_mapped(array: NDArray[Any]) -> bool:
    """Whether the values lie in a mapped file."""
    return _mapping(array) is not None


def release(array: NDArray[Any]) -> None:
    """Let the pages of an array leave the process, if they are mapped read-only and the system can do that."""
    advice = getattr(mmap, "MADV_DONTNEED", None)
    found = _mapping(array)
    if advice is None or found is None or found[0].mode != "r":  # Of "c" changes would be lost.
        return
    mapping = found[1]
    start, end = 0, len(mapping)
    if array.flags.c_contiguous or array.flags.f_contiguous:
        offset = _address(array) - _address(np.frombuffer(mapping, np.uint8))
        start = max(0, offset - _AROUND_BYTES) // mmap.PAGESIZE * mmap.PAGESIZE
        end = min(end, offset + array.nbytes + _AROUND_BYTES)
    with contextlib.suppress(OSError):
        mapping.madvise(advice, start, end - start)


def _mapping(array: Any) -> tuple[np.memmap[Any, Any], mmap.mmap] | None:
    mapped = None
    while isinstance(array, np.ndarray):
        mapped = array if isinstance(array, np.memmap) else mapped
        array = array.base
    return (mapped, array) if mapped is not None and isinstance(array, mmap.mmap) else None


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])
