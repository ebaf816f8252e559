"""What a device pulls: blocks of blobs (graphs, masks, snapshots) and update records that it missed."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ..errors import ProtocolError
from .framing import COUNT, VERSION, MessageType, check_digest, check_reserved, check_unsigned, unpack_exactly
from .messages import UpdateRecord

__all__ = ["MAX_BLOCK_BYTES", "BlobBlock", "BlobRequest", "LogRequest", "LogSlice", "SnapshotOffer"]

MAX_BLOCK_BYTES = 128 << 10
MAX_LOG_RECORDS = 4_096

_BLOB_REQUEST = struct.Struct("<BBH32sII")


@dataclass(frozen=True, slots=True)
class BlobRequest:
    """A device asks for one block of a blob.

    Attributes:
        sha256: Of the whole blob, 32 bytes.
        offset: First byte wanted.
        length: Bytes wanted, at most 128 KiB.
    """

    sha256: bytes
    offset: int
    length: int

    def __post_init__(self) -> None:
        check_digest("blob hash", self.sha256, 32)
        check_unsigned("offset", self.offset, 32)
        if not 1 <= self.length <= MAX_BLOCK_BYTES:
            raise ProtocolError(f"a block has 1 to {MAX_BLOCK_BYTES} bytes, not {self.length}")

    def encode(self) -> bytes:
        """The payload."""
        return _BLOB_REQUEST.pack(VERSION, MessageType.BLOB_REQUEST, 0, self.sha256, self.offset, self.length)

    @classmethod
    def decode(cls, data: bytes) -> BlobRequest:
        """Inverse of :meth:`encode`; called by ``codec.decode``."""
        _, _, reserved, sha256, offset, length = _BLOB_REQUEST.unpack(data)
        check_reserved(reserved)
        return cls(sha256, offset, length)


_BLOB_BLOCK = struct.Struct("<BBH32sII")


@dataclass(frozen=True, slots=True)
class BlobBlock:
    """One block of a blob, or the answer that there is no such blob: then offset, total and data are empty.

    Attributes:
        sha256: Of the whole blob, 32 bytes.
        offset: Of the first byte.
        total: Length of the whole blob in bytes; 0 if the server has no such blob.
        data: The bytes.
    """

    sha256: bytes
    offset: int
    total: int
    data: bytes

    def __post_init__(self) -> None:
        check_digest("blob hash", self.sha256, 32)
        check_unsigned("offset", self.offset, 32)
        check_unsigned("total", self.total, 32)
        if self.total == self.offset == len(self.data) == 0:
            return
        if not 1 <= len(self.data) <= MAX_BLOCK_BYTES or self.offset + len(self.data) > self.total:
            raise ProtocolError(f"block of {len(self.data)} bytes at {self.offset} in a blob of {self.total}")

    def encode(self) -> bytes:
        """The payload."""
        head = _BLOB_BLOCK.pack(VERSION, MessageType.BLOB_BLOCK, 0, self.sha256, self.offset, self.total)
        return head + self.data

    @classmethod
    def decode(cls, data: bytes) -> BlobBlock:
        """Inverse of :meth:`encode`; called by ``codec.decode``."""
        _, _, reserved, sha256, offset, total = _BLOB_BLOCK.unpack_from(data)
        check_reserved(reserved)
        return cls(sha256, offset, total, data[_BLOB_BLOCK.size :])


_LOG_REQUEST = struct.Struct("<BBHII")


@dataclass(frozen=True, slots=True)
class LogRequest:
    """A device asks for update records that it missed.

    Attributes:
        first: Index of the first one.
        count: How many at most.
        records_only: Whether it wants no snapshot in their place.
    """

    first: int
    count: int
    records_only: bool = False

    def __post_init__(self) -> None:
        check_unsigned("first", self.first, 32)
        if not 1 <= self.count <= MAX_LOG_RECORDS:
            raise ProtocolError(f"a log request asks for 1 to {MAX_LOG_RECORDS} records, not {self.count}")

    def encode(self) -> bytes:
        """The payload."""
        return _LOG_REQUEST.pack(VERSION, MessageType.LOG_REQUEST, self.records_only, self.first, self.count)

    @classmethod
    def decode(cls, data: bytes) -> LogRequest:
        """Inverse of :meth:`encode`; called by ``codec.decode``."""
        _, _, records_only, first, count = unpack_exactly(_LOG_REQUEST, data)
        if records_only > 1:
            raise ProtocolError(f"a log request has the flags {records_only}")
        return cls(first, count, bool(records_only))


_SNAPSHOT_OFFER = struct.Struct("<BBHIII32s")


@dataclass(frozen=True, slots=True)
class SnapshotOffer:
    """In answer to a log request: a snapshot that is cheaper than the records, to be pulled as a blob.

    Attributes:
        index: Records behind it.
        round: The latest round that was announced when it was made.
        size: Its length in bytes.
        sha256: Of its bytes, 32 bytes.
    """

    index: int
    round: int
    size: int
    sha256: bytes

    def __post_init__(self) -> None:
        check_digest("snapshot hash", self.sha256, 32)
        check_unsigned("index", self.index, 32)
        check_unsigned("round", self.round, 32)
        check_unsigned("size", self.size, 32)

    def encode(self) -> bytes:
        """The payload."""
        kind = MessageType.SNAPSHOT_OFFER
        return _SNAPSHOT_OFFER.pack(VERSION, kind, 0, self.index, self.round, self.size, self.sha256)

    @classmethod
    def decode(cls, data: bytes) -> SnapshotOffer:
        """Inverse of :meth:`encode`; called by ``codec.decode``."""
        _, _, reserved, index, round_, size, sha256 = unpack_exactly(_SNAPSHOT_OFFER, data)
        check_reserved(reserved)
        return cls(index, round_, size, sha256)


_LOG_SLICE = struct.Struct("<BBHI")


@dataclass(frozen=True, eq=False)
class LogSlice:
    """Consecutive update records, as many as fit one payload.

    Attributes:
        first: Index of the first one.
        records: The records.
    """

    first: int
    records: tuple[UpdateRecord, ...]

    def __post_init__(self) -> None:
        check_unsigned("first", self.first, 32)
        if not 1 <= len(self.records) <= MAX_LOG_RECORDS:
            raise ProtocolError(f"a log slice holds 1 to {MAX_LOG_RECORDS} records, not {len(self.records)}")
        if any(record.index != self.first + i for i, record in enumerate(self.records)):
            raise ProtocolError("the records of a log slice are not consecutive")

    def encode(self) -> bytes:
        """The payload."""
        parts = [_LOG_SLICE.pack(VERSION, MessageType.LOG_SLICE, len(self.records), self.first)]
        for record in self.records:
            data = record.encode()
            parts += [COUNT.pack(len(data)), data]
        return b"".join(parts)

    @classmethod
    def decode(cls, data: bytes) -> LogSlice:
        """Inverse of :meth:`encode`; called by ``codec.decode``."""
        _, _, count, first = _LOG_SLICE.unpack_from(data)
        records, start = [], _LOG_SLICE.size
        for _ in range(count):
            (length,) = COUNT.unpack_from(data, start)
            start += COUNT.size
            if start + length > len(data) or data[start : start + 2] != bytes((VERSION, MessageType.UPDATE)):
                raise ProtocolError("a log slice is truncated or holds something else than update records")
            records.append(UpdateRecord.decode(data[start : start + length]))
            start += length
        if start != len(data):
            raise ProtocolError(f"a log slice has {len(data) - start} bytes too many")
        return cls(first, tuple(records))
