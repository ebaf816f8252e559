"""The binary messages: reports, updates, receipts, blocks. Fixed little-endian headers, lengths checked exactly.

Every binary message starts with a version byte and a type byte. :func:`decode` is the only place where foreign bytes
enter; it raises :class:`~.errors.ProtocolError` and never anything else. The JSON documents are in ``documents.py``,
the byte tables in ``docs/protocol.md``.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import ProtocolError

__all__ = [
    "MAX_PAYLOAD_BYTES",
    "BinaryMessage",
    "BlobBlock",
    "BlobRequest",
    "Decline",
    "LogRequest",
    "LogSlice",
    "Receipt",
    "Report",
    "ReportKind",
    "UpdateRecord",
    "Verdict",
    "decode",
]

VERSION = 1
DIGEST_BYTES = 16
MAX_PAYLOAD_BYTES = 256 << 10
MAX_BLOCK_BYTES = 128 << 10
MAX_SCALARS = 60_000
MAX_BLOCKS = 16
MAX_SEGMENTS = 16_384
MAX_LOG_RECORDS = 4_096
_NO_DIGEST = bytes(DIGEST_BYTES)


class _Type(enum.IntEnum):
    REPORT = 1
    UPDATE = 2
    RECEIPT = 3
    BLOB_REQUEST = 4
    BLOB_BLOCK = 5
    LOG_REQUEST = 6
    LOG_SLICE = 7


class ReportKind(enum.IntEnum):
    """What the scalars of a report are."""

    SALIENCY = 1  # blocks: sensitivities, moments, layer totals
    PROBE = 2  # one block: directional derivatives, one per position
    EVALUATE = 3  # one block: loss sum, correct, samples


class Decline(enum.IntEnum):
    """Why a report carries no scalars."""

    NONE = 0
    NON_FINITE = 1
    OVER_BUDGET = 2
    NO_DATA = 3
    FAILED = 4


class Verdict(enum.IntEnum):
    """What the coordinator did with a report. Every verdict clears the device's outbox."""

    ACCEPTED = 1
    DUPLICATE = 2
    LATE = 3
    REFUSED = 4


def _unsigned(name: str, value: int, bits: int) -> None:
    if not 0 <= value < 1 << bits:
        raise ProtocolError(f"{name} {value} does not fit {bits} bits")


def _digest(name: str, value: bytes, length: int = DIGEST_BYTES) -> None:
    if len(value) != length:
        raise ProtocolError(f"{name} has {len(value)} bytes instead of {length}")


def _scalars(raw: bytes | memoryview, count: int) -> NDArray[np.float32]:
    out = np.frombuffer(raw, dtype="<f4", count=count).astype(np.float32)
    if not bool(np.isfinite(out).all()):
        raise ProtocolError("a scalar is not finite")
    out.flags.writeable = False
    return out


def _scalar_bytes(values: NDArray[np.float32]) -> bytes:
    if values.ndim != 1 or not bool(np.isfinite(values).all()):
        raise ProtocolError("scalars must be one row of finite float32 values")
    return values.astype("<f4", copy=False).tobytes()


_REPORT = struct.Struct("<BBBBIII16sdIII")
_COUNT = struct.Struct("<I")


@dataclass(frozen=True, eq=False)
class Report:
    """What a device measured in one round. Idempotent by (run, round, device).

    Attributes:
        kind: Meaning of the blocks.
        round: Of the announcement it answers.
        session: Boot counter of the device.
        samples: Samples behind the scalars; the aggregation weight.
        weights_digest: Digest of the device's weights, 16 bytes; zero before training.
        mean_loss: Loss at the unperturbed weights, for the log only.
        queries: Forward passes spent.
        elapsed_ms: Time spent.
        peak_rss_kib: Peak of the device's process.
        blocks: Read-only arrays ``float32[n]``, one per basis.
        decline: Why there are no blocks, if there are none.
    """

    kind: ReportKind
    round: int
    session: int
    samples: int
    weights_digest: bytes
    mean_loss: float
    queries: int
    elapsed_ms: int
    peak_rss_kib: int
    blocks: tuple[NDArray[np.float32], ...]
    decline: Decline = Decline.NONE

    def __post_init__(self) -> None:
        for name in ("round", "session", "samples", "queries", "elapsed_ms", "peak_rss_kib"):
            _unsigned(name, getattr(self, name), 32)
        _digest("weights digest", self.weights_digest)
        if not np.isfinite(self.mean_loss):
            raise ProtocolError("the mean loss is not finite")
        if len(self.blocks) > MAX_BLOCKS or sum(b.size for b in self.blocks) > MAX_SCALARS:
            raise ProtocolError(f"a report holds at most {MAX_BLOCKS} blocks and {MAX_SCALARS} scalars")
        if (self.decline is Decline.NONE) != bool(self.blocks):
            raise ProtocolError("a report has either scalars or a reason why not")

    def encode(self) -> bytes:
        """The payload."""
        head = _REPORT.pack(
            VERSION,
            _Type.REPORT,
            self.kind | self.decline << 4,
            len(self.blocks),
            self.round,
            self.session,
            self.samples,
            self.weights_digest,
            self.mean_loss,
            self.queries,
            self.elapsed_ms,
            self.peak_rss_kib,
        )
        counts = b"".join(_COUNT.pack(b.size) for b in self.blocks)
        return head + counts + b"".join(_scalar_bytes(b) for b in self.blocks)


_UPDATE = struct.Struct("<BBHIIf16s16sI")
_SEGMENT = struct.Struct("<QI")


@dataclass(frozen=True, eq=False)
class UpdateRecord:
    """One optimiser step as scalars; the log is the list of these.

    Attributes:
        index: Position in the log, from 0.
        round: Round whose seed words made the directions.
        learning_rate: A float32 value.
        segments: ``(first position, count)`` runs of the walk over the basis, ascending and disjoint.
        coefficients: ``float32[sum of counts]``, rounded by the server; read-only.
        parent: Chain digest of the log before this record, 16 bytes.
        digest: Digest of the weights after it, 16 bytes.
    """

    index: int
    round: int
    learning_rate: float
    segments: tuple[tuple[int, int], ...]
    coefficients: NDArray[np.float32]
    parent: bytes
    digest: bytes

    def __post_init__(self) -> None:
        _unsigned("index", self.index, 32)
        _unsigned("round", self.round, 32)
        _digest("parent", self.parent)
        _digest("digest", self.digest)
        if not np.isfinite(self.learning_rate) or float(np.float32(self.learning_rate)) != self.learning_rate:
            raise ProtocolError(f"the learning rate {self.learning_rate!r} is not a finite float32 value")
        if not 1 <= len(self.segments) <= MAX_SEGMENTS:
            raise ProtocolError(f"an update has 1 to {MAX_SEGMENTS} segments, not {len(self.segments)}")
        end = 0
        for first, count in self.segments:
            if count < 1 or first < end or first + count > 1 << 63:
                raise ProtocolError("the segments of an update are not ascending and disjoint")
            end = first + count
        total = sum(count for _, count in self.segments)
        if total > MAX_SCALARS or total != self.coefficients.size:
            raise ProtocolError(f"{total} positions and {self.coefficients.size} coefficients (limit {MAX_SCALARS})")

    def positions(self) -> NDArray[np.int64]:
        """All positions in ascending order: ``int64[sum of counts]``."""
        return np.concatenate([np.arange(first, first + count, dtype=np.int64) for first, count in self.segments])

    def encode(self) -> bytes:
        """The payload; also what the chain digest covers."""
        head = _UPDATE.pack(
            VERSION,
            _Type.UPDATE,
            len(self.segments),
            self.index,
            self.round,
            self.learning_rate,
            self.parent,
            self.digest,
            self.coefficients.size,
        )
        return head + b"".join(_SEGMENT.pack(*s) for s in self.segments) + _scalar_bytes(self.coefficients)


_RECEIPT = struct.Struct("<BBBBI")


@dataclass(frozen=True, slots=True)
class Receipt:
    """The coordinator's answer to a report, sent only after the journal is durable.

    Attributes:
        round: Of the report.
        verdict: What became of it.
    """

    round: int
    verdict: Verdict

    def encode(self) -> bytes:
        """The payload."""
        return _RECEIPT.pack(VERSION, _Type.RECEIPT, self.verdict, 0, self.round)


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
        _digest("blob hash", self.sha256, 32)
        _unsigned("offset", self.offset, 32)
        if not 1 <= self.length <= MAX_BLOCK_BYTES:
            raise ProtocolError(f"a block has 1 to {MAX_BLOCK_BYTES} bytes, not {self.length}")

    def encode(self) -> bytes:
        """The payload."""
        return _BLOB_REQUEST.pack(VERSION, _Type.BLOB_REQUEST, 0, self.sha256, self.offset, self.length)


_BLOB_BLOCK = struct.Struct("<BBH32sII")


@dataclass(frozen=True, slots=True)
class BlobBlock:
    """One block of a blob.

    Attributes:
        sha256: Of the whole blob, 32 bytes.
        offset: Of the first byte.
        total: Length of the whole blob in bytes.
        data: The bytes.
    """

    sha256: bytes
    offset: int
    total: int
    data: bytes

    def __post_init__(self) -> None:
        _digest("blob hash", self.sha256, 32)
        _unsigned("total", self.total, 32)
        if not 1 <= len(self.data) <= MAX_BLOCK_BYTES or self.offset + len(self.data) > self.total:
            raise ProtocolError(f"block of {len(self.data)} bytes at {self.offset} in a blob of {self.total}")

    def encode(self) -> bytes:
        """The payload."""
        head = _BLOB_BLOCK.pack(VERSION, _Type.BLOB_BLOCK, 0, self.sha256, self.offset, self.total)
        return head + self.data


_LOG_REQUEST = struct.Struct("<BBHII")


@dataclass(frozen=True, slots=True)
class LogRequest:
    """A device asks for update records that it missed.

    Attributes:
        first: Index of the first one.
        count: How many at most.
    """

    first: int
    count: int

    def __post_init__(self) -> None:
        _unsigned("first", self.first, 32)
        if not 1 <= self.count <= MAX_LOG_RECORDS:
            raise ProtocolError(f"a log request asks for 1 to {MAX_LOG_RECORDS} records, not {self.count}")

    def encode(self) -> bytes:
        """The payload."""
        return _LOG_REQUEST.pack(VERSION, _Type.LOG_REQUEST, 0, self.first, self.count)


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
        _unsigned("first", self.first, 32)
        if not 1 <= len(self.records) <= MAX_LOG_RECORDS:
            raise ProtocolError(f"a log slice holds 1 to {MAX_LOG_RECORDS} records, not {len(self.records)}")
        if any(record.index != self.first + i for i, record in enumerate(self.records)):
            raise ProtocolError("the records of a log slice are not consecutive")

    def encode(self) -> bytes:
        """The payload."""
        parts = [_LOG_SLICE.pack(VERSION, _Type.LOG_SLICE, len(self.records), self.first)]
        for record in self.records:
            data = record.encode()
            parts += [_COUNT.pack(len(data)), data]
        return b"".join(parts)


BinaryMessage = Report | UpdateRecord | Receipt | BlobRequest | BlobBlock | LogRequest | LogSlice


def _decode_report(data: bytes) -> Report:
    _, _, kind, n_blocks, round_, session, samples, digest, loss, queries, elapsed, peak = _REPORT.unpack_from(data)
    start = _REPORT.size + n_blocks * _COUNT.size
    if n_blocks > MAX_BLOCKS or len(data) < start:
        raise ProtocolError(f"a report of {len(data)} bytes cannot hold {n_blocks} blocks")
    counts = [_COUNT.unpack_from(data, _REPORT.size + i * _COUNT.size)[0] for i in range(n_blocks)]
    if sum(counts) > MAX_SCALARS or len(data) != start + 4 * sum(counts):
        raise ProtocolError(f"a report of {len(data)} bytes does not hold {sum(counts)} scalars")
    blocks = []
    for count in counts:
        blocks.append(_scalars(memoryview(data)[start : start + 4 * count], count))
        start += 4 * count
    return Report(
        ReportKind(kind & 15), round_, session, samples, digest, loss, queries, elapsed, peak,
        tuple(blocks), Decline(kind >> 4),
    )  # fmt: skip


def _decode_update(data: bytes) -> UpdateRecord:
    _, _, n_segments, index, round_, rate, parent, digest, count = _UPDATE.unpack_from(data)
    start = _UPDATE.size + n_segments * _SEGMENT.size
    if count > MAX_SCALARS or len(data) != start + 4 * count:
        raise ProtocolError(f"an update of {len(data)} bytes does not hold {n_segments} segments, {count} scalars")
    segments = tuple(_SEGMENT.iter_unpack(data[_UPDATE.size : start]))
    return UpdateRecord(index, round_, rate, segments, _scalars(data[start:], count), parent, digest)


def _decode_log_slice(data: bytes) -> LogSlice:
    _, _, count, first = _LOG_SLICE.unpack_from(data)
    records, start = [], _LOG_SLICE.size
    for _ in range(count):
        (length,) = _COUNT.unpack_from(data, start)
        start += _COUNT.size
        if length < _UPDATE.size or start + length > len(data) or data[start + 1] != _Type.UPDATE:
            raise ProtocolError("a log slice is truncated")
        records.append(_decode_update(data[start : start + length]))
        start += length
    if start != len(data):
        raise ProtocolError(f"a log slice has {len(data) - start} bytes too many")
    return LogSlice(first, tuple(records))


def _exact(layout: struct.Struct, data: bytes) -> tuple[int, ...]:
    if len(data) != layout.size:
        raise ProtocolError(f"a message of {len(data)} bytes should have {layout.size}")
    return layout.unpack(data)


def _decode_small(type_: _Type, data: bytes) -> BinaryMessage:
    if type_ is _Type.RECEIPT:
        _, _, verdict, _, round_ = _exact(_RECEIPT, data)
        return Receipt(round_, Verdict(verdict))
    if type_ is _Type.LOG_REQUEST:
        return LogRequest(*_exact(_LOG_REQUEST, data)[3:])
    if type_ is _Type.BLOB_REQUEST:
        _, _, _, sha256, offset, length = _BLOB_REQUEST.unpack(data)
        return BlobRequest(sha256, offset, length)
    _, _, _, sha256, offset, total = _BLOB_BLOCK.unpack_from(data)
    return BlobBlock(sha256, offset, total, data[_BLOB_BLOCK.size :])


def decode(data: bytes) -> BinaryMessage:
    """Parse one binary payload.

    Raises:
        ProtocolError: Wrong version, type, length or value. Nothing else is raised, whatever the bytes.
    """
    if not 2 <= len(data) <= MAX_PAYLOAD_BYTES:
        raise ProtocolError(f"a payload of {len(data)} bytes is outside 2 to {MAX_PAYLOAD_BYTES}")
    if data[0] != VERSION:
        raise ProtocolError(f"protocol version {data[0]}, this fedzo speaks {VERSION}")
    try:
        type_ = _Type(data[1])
        if type_ is _Type.REPORT:
            return _decode_report(data)
        if type_ is _Type.UPDATE:
            return _decode_update(data)
        if type_ is _Type.LOG_SLICE:
            return _decode_log_slice(data)
        return _decode_small(type_, data)
    except (ValueError, struct.error) as error:
        raise ProtocolError(f"malformed message: {error}") from None
