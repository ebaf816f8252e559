"""The state of a run between two rounds, so that a restart replays no more than what came after it.

A snapshot says nothing that the entries before it do not say; it says it at once. A new one is due when the entries
since the last one have :data:`SHARE` times its size (and :data:`LEAST_BYTES`), or when the updates since then would
take long to replay: :data:`MOST_UPDATES` of them, or fewer with many weights, but not fewer than
:data:`LEAST_UPDATES`. A journal keeps the newest one only.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from dataclasses import dataclass
from typing import Any, Final

from ..errors import ProtocolError

__all__ = [
    "LEAST_BYTES",
    "LEAST_UPDATES",
    "MOST_BYTES",
    "MOST_ENTRIES",
    "MOST_UPDATES",
    "SHARE",
    "Snapshot",
    "SnapshotClock",
]

SHARE: Final = 16
LEAST_BYTES: Final = 64 << 10
MOST_UPDATES: Final = 100
LEAST_UPDATES: Final = 10
MOST_ENTRIES: Final = 1 << 22
"""Weights that the updates since the last snapshot may have touched, counted once an update."""
MOST_BYTES: Final = 900_000_000
"""Of a snapshot that is made: SQLite takes entries of 1e9 bytes at most. Larger runs are replayed from their start."""
_MAX_STATE_BYTES: Final = 256 << 20
_HEADER = struct.Struct("<4sII")
_MAGIC: Final = b"FZJ1"
_DIGEST_BYTES: Final = 32


@dataclass(frozen=True)
class Snapshot:
    """What a coordinator knows after an update.

    Attributes:
        state: Everything but arrays, as JSON types.
        arrays: What the adaptation of directions remembers, little-endian; empty if nothing.
        replica: :meth:`~..replay.update.Replica.snapshot`: weights, optimiser and head of the log. Any replica of the
            run can take it.
    """

    state: dict[str, Any]
    arrays: bytes
    replica: bytes

    def encode(self) -> bytes:
        """Header, state (zlib), arrays, replica, and the SHA-256 of all that."""
        state = zlib.compress(json.dumps(self.state, separators=(",", ":")).encode(), 1)
        data = b"".join([_HEADER.pack(_MAGIC, len(state), len(self.arrays)), state, self.arrays, self.replica])
        return data + hashlib.sha256(data).digest()

    @classmethod
    def decode(cls, data: bytes) -> Snapshot:
        """Inverse of :meth:`encode`.

        Raises:
            ProtocolError: The bytes are no snapshot, or damaged.
        """
        body = memoryview(data)[:-_DIGEST_BYTES]
        if len(data) < _HEADER.size + _DIGEST_BYTES or hashlib.sha256(body).digest() != data[-_DIGEST_BYTES:]:
            raise ProtocolError(f"a snapshot of {len(data)} bytes is damaged")
        magic, n_state, n_arrays = _HEADER.unpack_from(data)
        first, second = _HEADER.size + n_state, _HEADER.size + n_state + n_arrays
        if magic != _MAGIC or second > len(body):
            raise ProtocolError(f"{len(data)} bytes are no snapshot of a run")
        try:
            inflater = zlib.decompressobj()
            state = json.loads(inflater.decompress(body[_HEADER.size : first], _MAX_STATE_BYTES))
        except (zlib.error, ValueError) as error:
            raise ProtocolError(f"the state of a snapshot cannot be read: {error}") from None
        if not isinstance(state, dict):
            raise ProtocolError("the state of a snapshot is no object")
        return cls(state, bytes(body[first:second]), bytes(body[second:]))


class SnapshotClock:
    """When the next snapshot is due; the same after a restart, as it counts what the journal holds."""

    def __init__(self) -> None:
        self._bytes = self._updates = 0

    def count(self, kind: str, payload: bytes) -> None:
        """Take an entry."""
        if kind == "snapshot":
            self._bytes = self._updates = 0
            return
        self._bytes += len(payload)
        self._updates += kind == "update"

    def is_due(self, size: int, n_survivors: int) -> bool:
        """Whether the next entry should be a snapshot.

        Args:
            size: Its size in bytes, roughly.
            n_survivors: Weights that an update touches.
        """
        many = min(MOST_UPDATES, max(LEAST_UPDATES, MOST_ENTRIES // n_survivors))
        is_due = self._updates >= many or (self._updates > 0 and self._bytes >= max(LEAST_BYTES, SHARE * size))
        return is_due and size <= MOST_BYTES
