"""What all binary messages share: version and type bytes, limits, scalars, digests."""

from __future__ import annotations

import enum
import hashlib
import struct
from typing import Any, Final

from ..errors import ProtocolError

__all__ = [
    "COUNT",
    "DIGEST_BYTES",
    "MAX_AGE",
    "MAX_PAYLOAD_BYTES",
    "MAX_SCALARS",
    "RUN_TAG_BYTES",
    "VERSION",
    "MessageType",
    "check_digest",
    "check_reserved",
    "check_unsigned",
    "run_tag",
    "unpack_exactly",
]

VERSION: Final = 1
DIGEST_BYTES: Final = 16
MAX_PAYLOAD_BYTES: Final = 256 << 10
MAX_SCALARS: Final = 60_000
MAX_AGE: Final = 100  # updates that a late scalar may be behind
RUN_TAG_BYTES: Final = 4
COUNT: Final = struct.Struct("<I")


class MessageType(enum.IntEnum):
    """Second byte of every binary message."""

    REPORT = 1
    UPDATE = 2
    RECEIPT = 3
    BLOB_REQUEST = 4
    BLOB_BLOCK = 5
    LOG_REQUEST = 6
    LOG_SLICE = 7
    ANNOUNCEMENT = 8
    SNAPSHOT_OFFER = 9


def check_unsigned(name: str, value: int, bits: int) -> None:
    """Raise ProtocolError unless ``0 <= value < 2**bits``."""
    if not 0 <= value < 1 << bits:
        raise ProtocolError(f"{name} {value} does not fit {bits} bits")


def check_digest(name: str, value: bytes, length: int = DIGEST_BYTES) -> None:
    """Raise ProtocolError unless ``value`` has ``length`` bytes."""
    if len(value) != length:
        raise ProtocolError(f"{name} has {len(value)} bytes instead of {length}")


def check_reserved(value: int) -> None:
    """Raise ProtocolError unless the padding of a header is zero, so that a message has one encoding only."""
    if value:
        raise ProtocolError(f"a reserved field is {value}, it must be zero")


def run_tag(run: str) -> bytes:
    """What binary messages of a run carry in place of its id: the first 4 bytes of the id's SHA-256."""
    return hashlib.sha256(run.encode()).digest()[:RUN_TAG_BYTES]


def unpack_exactly(layout: struct.Struct, data: bytes) -> tuple[Any, ...]:
    """Unpack a message of fixed length.

    Raises:
        ProtocolError: ``data`` has another length.
    """
    if len(data) != layout.size:
        raise ProtocolError(f"a message of {len(data)} bytes should have {layout.size}")
    return layout.unpack(data)
