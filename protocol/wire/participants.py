"""Sets of devices as they travel: a bitmap of ordinals, compressed."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from ..errors import ProtocolError

__all__ = ["MAX_PARTICIPANTS_BYTES", "pack_participants", "unpack_participants"]

MAX_PARTICIPANTS_BYTES = 18 << 10  # 100,000 random ordinals take 12.5 kB
_MAX_BITMAP_BYTES = 1 << 16


def pack_participants(ordinals: NDArray[np.int64]) -> bytes:
    """Pack a set of ordinals: bitmap, zlib. 10,000 devices take 20 bytes if all of them are in it, 1.3 kB at most.

    Args:
        ordinals: ``int64[n]``, distinct, not negative.
    """
    size = int(ordinals.max()) + 1 if ordinals.size else 0
    bits = np.zeros(size, dtype=np.uint8)
    bits[ordinals] = 1
    return zlib.compress(np.packbits(bits, bitorder="little").tobytes(), 9)


def unpack_participants(packed: bytes) -> NDArray[np.int64]:
    """Inverse of :func:`pack_participants`: ascending ``int64[n]``.

    Raises:
        ProtocolError: The bytes are no packed set.
    """
    if not packed:
        return np.zeros(0, dtype=np.int64)
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(packed, _MAX_BITMAP_BYTES)
    except zlib.error:
        raise ProtocolError("the set of participants cannot be unpacked") from None
    if not inflater.eof or inflater.unused_data:
        raise ProtocolError("the set of participants is truncated or too large")
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little")
    return np.flatnonzero(bits).astype(np.int64)
