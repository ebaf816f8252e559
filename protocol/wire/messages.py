"""The messages of a round: report, receipt, update record. Fixed little-endian headers, lengths checked exactly.

Foreign bytes enter through ``codec.decode`` only. The byte tables are in ``docs/protocol.md``, the JSON documents in
``documents.py``.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import ProtocolError
from ..perturbation.directions import MAX_BLOCKS, MAX_POSITION
from .documents import Phase
from .framing import (
    COUNT,
    MAX_AGE,
    MAX_PAYLOAD_BYTES,
    MAX_SCALARS,
    RUN_TAG_BYTES,
    VERSION,
    MessageType,
    check_digest,
    check_reserved,
    check_unsigned,
    unpack_exactly,
)
from .scalar_rows import ROW_PREFIX_BYTES, pack_row, unpack_row

__all__ = [
    "KINDS",
    "MAX_SEGMENTS",
    "MAX_UPDATE_BYTES",
    "Decline",
    "Receipt",
    "Report",
    "ReportKind",
    "ReportNumbers",
    "UpdateRecord",
    "Verdict",
    "report_numbers",
    "update_bytes",
]

MAX_REPORT_BLOCKS = 16
MAX_SEGMENTS = 16_384
MAX_UPDATE_BYTES = MAX_PAYLOAD_BYTES - 64  # a slice of the log puts a few bytes around a record


class ReportKind(enum.IntEnum):
    """What the scalars of a report are."""

    SALIENCY = 1  # blocks: sensitivities, moments, layer totals
    PROBE = 2  # one block for each block of the weights: slopes, or coordinates of a sketch
    EVALUATE = 3  # one block: loss sum, correct, samples


KINDS: dict[Phase, ReportKind] = {
    "saliency": ReportKind.SALIENCY,
    "train": ReportKind.PROBE,
    "evaluate": ReportKind.EVALUATE,
}  # which reports a phase asks for


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


_REPORT = struct.Struct("<BBBB4sIII16sdIIIH")


@dataclass(frozen=True, eq=False)
class Report:
    """What a device measured in one round. Idempotent by (run, round, device); the run is named by a tag.

    Attributes:
        kind: Meaning of the blocks.
        run_tag: Of the run, see :func:`~.framing.run_tag`.
        round: Of the announcement it answers.
        session: Boot counter of the device.
        samples: Samples behind the scalars; the aggregation weight.
        weights_digest: Digest of the device's weights, 16 bytes; zero before training.
        mean_loss: Loss at the unperturbed weights: for people, for a range test and for adapting sigma.
        queries: Forward passes spent.
        elapsed_ms: Time spent.
        peak_rss_kib: Peak of the device's process.
        blocks: Read-only arrays ``float32[n]``; of a probe one per block of the weights.
        decline: Why there are no blocks, if there are none.
        micro_batch: Samples of one run of a graph in the device's plan, at most 65535; 0 if it has none.
    """

    kind: ReportKind
    run_tag: bytes
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
    micro_batch: int = 0

    def __post_init__(self) -> None:
        for name in ("round", "session", "samples", "queries", "elapsed_ms", "peak_rss_kib"):
            check_unsigned(name, getattr(self, name), 32)
        check_unsigned("micro-batch", self.micro_batch, 16)
        check_digest("run tag", self.run_tag, RUN_TAG_BYTES)
        check_digest("weights digest", self.weights_digest)
        if not np.isfinite(self.mean_loss):
            raise ProtocolError("the mean loss is not finite")
        if len(self.blocks) > MAX_REPORT_BLOCKS or sum(b.size for b in self.blocks) > MAX_SCALARS:
            raise ProtocolError(f"a report holds at most {MAX_REPORT_BLOCKS} blocks and {MAX_SCALARS} scalars")
        if (self.decline is Decline.NONE) != bool(self.blocks):
            raise ProtocolError("a report has either scalars or a reason why not")

    def encode(self) -> bytes:
        """The payload."""
        head = _REPORT.pack(
            VERSION,
            MessageType.REPORT,
            self.kind | self.decline << 4,
            len(self.blocks),
            self.run_tag,
            self.round,
            self.session,
            self.samples,
            self.weights_digest,
            self.mean_loss,
            self.queries,
            self.elapsed_ms,
            self.peak_rss_kib,
            self.micro_batch,
        )
        counts = b"".join(COUNT.pack(b.size) for b in self.blocks)
        return head + counts + b"".join(pack_row(b) for b in self.blocks)

    @classmethod
    def decode(cls, data: bytes) -> Report:
        """Inverse of :meth:`encode`; called by ``codec.decode``."""
        _, _, kind, n_blocks, tag, round_, session, samples, digest, loss, queries, elapsed, peak, micro_batch = (
            _REPORT.unpack_from(data)
        )
        start = _REPORT.size + n_blocks * COUNT.size
        if n_blocks > MAX_REPORT_BLOCKS or len(data) < start:
            raise ProtocolError(f"a report of {len(data)} bytes cannot hold {n_blocks} blocks")
        counts = [COUNT.unpack_from(data, _REPORT.size + i * COUNT.size)[0] for i in range(n_blocks)]
        if sum(counts) > MAX_SCALARS:
            raise ProtocolError(f"a report of {sum(counts)} scalars is over the limit of {MAX_SCALARS}")
        blocks, rest = [], memoryview(data)[start:]
        for count in counts:
            values, length = unpack_row(rest, count)
            blocks.append(values)
            rest = rest[length:]
        if len(rest):
            raise ProtocolError(f"a report of {sum(counts)} scalars has {len(rest)} bytes too many")
        return cls(
            ReportKind(kind & 15), tag, round_, session, samples, digest, loss, queries, elapsed, peak,
            tuple(blocks), Decline(kind >> 4), micro_batch,
        )  # fmt: skip


class ReportNumbers(NamedTuple):
    """What a report says beside its scalars, see :class:`Report`."""

    round: int
    samples: int
    mean_loss: float
    queries: int
    elapsed_ms: int
    peak_rss_kib: int
    decline: Decline


def report_numbers(data: bytes) -> ReportNumbers:
    """Read the numbers of a report out of the journal, where only checked ones are: a hundredth of decoding all.

    Raises:
        ProtocolError: It is too short to be one.
    """
    if len(data) < _REPORT.size or data[1] != MessageType.REPORT:
        raise ProtocolError(f"{len(data)} bytes are no report")
    _, _, kind, _, _, round_, _, samples, _, loss, queries, elapsed, peak, _ = _REPORT.unpack_from(data)
    return ReportNumbers(round_, samples, loss, queries, elapsed, peak, Decline(kind >> 4))


_UPDATE = struct.Struct("<BBHIIf16s16sI")
_SEGMENT = struct.Struct("<QHH")


@dataclass(frozen=True, eq=False)
class UpdateRecord:
    """One optimiser step as scalars; the log is the list of these.

    Attributes:
        index: Position in the log, from 0.
        round: Round whose seed words made the directions.
        learning_rate: A float32 value.
        segments: ``(first position, count)`` runs; position ``p`` of block ``b`` counts as ``b * 2**60 + p``. Blocks
            ascend, in a block ages, and of one age positions, which are disjoint.
        coefficients: ``float32[sum of counts]``, rounded by the server; the gradient of a block is the sum of its
            coefficients times directions. Read-only.
        parent: Chain digest of the log before this record, 16 bytes.
        digest: Digest of the weights after it, 16 bytes.
        ages: Of every segment, how many records ago its round made one: its directions are that round's. Empty if all
            are of this round.
    """

    index: int
    round: int
    learning_rate: float
    segments: tuple[tuple[int, int], ...]
    coefficients: NDArray[np.float32]
    parent: bytes
    digest: bytes
    ages: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_unsigned("index", self.index, 32)
        check_unsigned("round", self.round, 32)
        check_digest("parent", self.parent)
        check_digest("digest", self.digest)
        if not np.isfinite(self.learning_rate) or float(np.float32(self.learning_rate)) != self.learning_rate:
            raise ProtocolError(f"the learning rate {self.learning_rate!r} is not a finite float32 value")
        if not 1 <= len(self.segments) <= MAX_SEGMENTS:
            raise ProtocolError(f"an update has 1 to {MAX_SEGMENTS} segments, not {len(self.segments)}")
        self._check_order()
        total = sum(count for _, count in self.segments)
        if total > MAX_SCALARS or total != self.coefficients.size:
            raise ProtocolError(f"{total} positions and {self.coefficients.size} coefficients (limit {MAX_SCALARS})")
        if (size := update_bytes(len(self.segments), total)) > MAX_UPDATE_BYTES:
            raise ProtocolError(f"an update of {size} bytes is over the limit of {MAX_UPDATE_BYTES}")

    def _check_order(self) -> None:
        if self.ages and (len(self.ages) != len(self.segments) or not any(self.ages)):
            raise ProtocolError(f"{len(self.segments)} segments have {len(self.ages)} ages")
        before, end = (0, 0), 0
        for (first, count), age in zip(self.segments, self.ages or [0] * len(self.segments), strict=True):
            group = first // MAX_POSITION, age
            if group > before:
                before, end = group, 0
            if count < 1 or first < end or group < before or first + count > MAX_BLOCKS * MAX_POSITION:
                raise ProtocolError("the segments of an update are not ascending, disjoint and below 2**63")
            if group[0] != (first + count - 1) // MAX_POSITION:
                raise ProtocolError("a segment of an update lies in two blocks")
            if not 0 <= age <= MAX_AGE:
                raise ProtocolError(f"a segment of an update is {age} updates old, the limit is {MAX_AGE}")
            end = first + count

    def positions(self) -> NDArray[np.int64]:
        """All positions in the order of segments: ``int64[sum of counts]``."""
        return np.concatenate([np.arange(count, dtype=np.int64) + first for first, count in self.segments])

    def encode(self) -> bytes:
        """The payload; also what the chain digest covers."""
        head = _UPDATE.pack(
            VERSION,
            MessageType.UPDATE,
            len(self.segments),
            self.index,
            self.round,
            self.learning_rate,
            self.parent,
            self.digest,
            self.coefficients.size,
        )
        rows = np.split(self.coefficients, np.cumsum(_row_lengths(self.segments))[:-1])
        ages = self.ages or (0,) * len(self.segments)
        places = (_SEGMENT.pack(*segment, age) for segment, age in zip(self.segments, ages, strict=True))
        return head + b"".join(places) + b"".join(pack_row(row) for row in rows)

    @classmethod
    def decode(cls, data: bytes) -> UpdateRecord:
        """Inverse of :meth:`encode`; called by ``codec.decode``."""
        _, _, n_segments, index, round_, rate, parent, digest, count = _UPDATE.unpack_from(data)
        start = _UPDATE.size + n_segments * _SEGMENT.size
        if count > MAX_SCALARS or n_segments < 1 or len(data) < start:
            raise ProtocolError(f"an update of {len(data)} bytes does not hold {n_segments} segments, {count} scalars")
        places = list(_SEGMENT.iter_unpack(data[_UPDATE.size : start]))
        segments, ages = tuple((first, n) for first, n, _ in places), tuple(age for _, _, age in places)
        if sum(n for _, n in segments) != count:
            raise ProtocolError(f"an update has {sum(n for _, n in segments)} positions and {count} coefficients")
        rows, rest = [], memoryview(data)[start:]
        for length in _row_lengths(segments):
            row, taken = unpack_row(rest, length)
            rows.append(row)
            rest = rest[taken:]
        if len(rest):
            raise ProtocolError(f"an update of {count} coefficients has {len(rest)} bytes too many")
        coefficients = np.concatenate(rows) if len(rows) > 1 else rows[0]
        coefficients.flags.writeable = False
        return cls(index, round_, rate, segments, coefficients, parent, digest, ages if any(ages) else ())


def _row_lengths(segments: Sequence[tuple[int, int]]) -> list[int]:
    """Coefficients of every block that an update moves: each has a row of its own."""
    return [sum(n for _, n in group) for _, group in groupby(segments, key=lambda segment: segment[0] // MAX_POSITION)]


def update_bytes(n_segments: int, n_scalars: int) -> int:
    """Most bytes of an encoded update record."""
    rows = min(n_segments, MAX_BLOCKS)
    return _UPDATE.size + n_segments * _SEGMENT.size + rows * ROW_PREFIX_BYTES + 4 * n_scalars


_RECEIPT = struct.Struct("<BBBB4sI")


@dataclass(frozen=True, slots=True)
class Receipt:
    """The coordinator's answer to a report, sent only after the journal is durable.

    Attributes:
        run_tag: Of the report.
        round: Of the report.
        verdict: What became of it.
    """

    run_tag: bytes
    round: int
    verdict: Verdict

    def __post_init__(self) -> None:
        check_digest("run tag", self.run_tag, RUN_TAG_BYTES)
        check_unsigned("round", self.round, 32)

    def encode(self) -> bytes:
        """The payload."""
        return _RECEIPT.pack(VERSION, MessageType.RECEIPT, self.verdict, 0, self.run_tag, self.round)

    @classmethod
    def decode(cls, data: bytes) -> Receipt:
        """Inverse of :meth:`encode`; called by ``codec.decode``."""
        _, _, verdict, reserved, tag, round_ = unpack_exactly(_RECEIPT, data)
        check_reserved(reserved)
        return cls(tag, round_, Verdict(verdict))
