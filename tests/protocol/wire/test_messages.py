"""Binary messages: golden payloads, round trips, limits, and no bytes that do anything but raise ProtocolError."""

from __future__ import annotations

import dataclasses
import json
import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedzo.protocol.errors import ProtocolError
from fedzo.protocol.wire.codec import BinaryMessage, decode
from fedzo.protocol.wire.framing import MAX_PAYLOAD_BYTES, MAX_SCALARS, VERSION, MessageType
from fedzo.protocol.wire.messages import (
    MAX_REPORT_BLOCKS,
    MAX_SEGMENTS,
    Decline,
    Receipt,
    Report,
    ReportKind,
    UpdateRecord,
    Verdict,
    report_numbers,
)
from fedzo.protocol.wire.scalar_rows import pack_row
from fedzo.protocol.wire.transfers import MAX_BLOCK_BYTES, MAX_LOG_RECORDS, BlobBlock, BlobRequest, LogRequest, LogSlice
from tests.protocol.golden.message_cases import MESSAGES, PAYLOADS
from tests.protocol.strategies import binary_messages, reports

GOLDEN: dict[str, str] = json.loads(PAYLOADS.read_text(encoding="utf-8"))["messages"]


def plain(value: Any) -> Any:
    """Messages as comparable data; arrays compare by their bits."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    if dataclasses.is_dataclass(value):
        return type(value), tuple(plain(getattr(value, field.name)) for field in dataclasses.fields(value))
    return value


def floats(count: int) -> NDArray[np.float32]:
    return np.zeros(count, dtype=np.float32)


def test_every_message_type_has_a_golden_payload() -> None:
    assert set(GOLDEN) == set(MESSAGES)
    assert {bytes.fromhex(text)[1] for text in GOLDEN.values()} == {int(kind) for kind in MessageType}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_payloads(name: str) -> None:
    payload = bytes.fromhex(GOLDEN[name])
    assert MESSAGES[name].encode() == payload
    assert plain(decode(payload)) == plain(MESSAGES[name])


@given(message=binary_messages)
def test_round_trip(message: BinaryMessage) -> None:
    payload = message.encode()
    assert payload[0] == VERSION
    assert plain(decode(payload)) == plain(message)


@given(message=binary_messages)
def test_decoded_arrays_are_read_only(message: BinaryMessage) -> None:
    found = decode(message.encode())
    arrays = found.blocks if isinstance(found, Report) else ()
    if isinstance(found, UpdateRecord):
        arrays = (found.coefficients,)
    assert not any(array.flags.writeable for array in arrays)


@pytest.mark.parametrize("name", GOLDEN)
def test_every_truncation_and_every_extension_is_refused(name: str) -> None:
    payload = bytes.fromhex(GOLDEN[name])
    # A blob block says nothing of its own length: the blob's hash is what protects it.
    shortest = 45 if name == "blob block" else len(payload)
    for length in range(shortest):
        with pytest.raises(ProtocolError):
            decode(payload[:length])
    for tail in (b"\0", b"\0\0\0\0", bytes(64)):
        with pytest.raises(ProtocolError):
            decode(payload + tail)


def still_sound(payload: bytes) -> None:
    """Damaged bytes give a ProtocolError, or a message that encodes to those very bytes."""
    try:
        message = decode(payload)
    except ProtocolError:
        return
    assert message.encode() == payload


@pytest.mark.parametrize("name", GOLDEN)
def test_every_changed_byte_is_refused_or_carried(name: str) -> None:
    payload = bytes.fromhex(GOLDEN[name])
    for place in range(len(payload)):
        for value in (0, 1, 2, 7, 8, 16, 64, 127, 128, 192, 254, 255):
            still_sound(payload[:place] + bytes([value]) + payload[place + 1 :])


@pytest.mark.parametrize("name", GOLDEN)
def test_random_damage_is_refused_or_carried(name: str) -> None:
    payload, source = bytes.fromhex(GOLDEN[name]), random.Random(name)
    for _ in range(1_000):
        data = bytearray(payload)
        for _ in range(source.randint(1, 6)):
            place = source.randrange(2, len(data))
            action = source.randrange(4)
            if action == 0:
                data[place] = source.randrange(256)
            elif action == 1:
                data[place : place + 4] = source.choice([b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\0\0\xc0\x7f", bytes(4)])
            elif action == 2 and len(data) > 4:
                del data[place]
            else:
                data.insert(place, source.randrange(256))
        still_sound(bytes(data))


@settings(max_examples=300)
@given(head=st.sampled_from([bytes([VERSION, kind]) for kind in range(9)]), body=st.binary(max_size=300))
def test_foreign_bytes_are_refused_or_carried(head: bytes, body: bytes) -> None:
    still_sound(head + body)


@pytest.mark.parametrize(
    ("payload", "match"),
    [
        (b"", "0 bytes"),
        (b"\x01", "1 bytes"),
        (bytes(MAX_PAYLOAD_BYTES + 1), "outside"),
        (b"\x02\x03\x01\0\0\0\0\0", "version 2"),
        (b"\0\x03\x01\0\0\0\0\0", "version 0"),
        (b"\x01\0\x01\0\0\0\0\0", "malformed"),
        (b"\x01\x08\x01\0\0\0\0\0", "malformed"),
        (b"{}", "version 123"),
    ],
)
def test_what_is_no_message_is_refused(payload: bytes, match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        decode(payload)


def report(**changes: Any) -> Report:
    fields: dict[str, Any] = {
        "kind": ReportKind.PROBE, "run_tag": bytes(4), "round": 1, "session": 1, "samples": 1,
        "weights_digest": bytes(16), "mean_loss": 0.0, "queries": 1, "elapsed_ms": 1, "peak_rss_kib": 1,
        "blocks": (floats(1),), "decline": Decline.NONE, "micro_batch": 8,
    }  # fmt: skip
    return Report(**(fields | changes))


def update(**changes: Any) -> UpdateRecord:
    fields: dict[str, Any] = {
        "index": 0, "round": 0, "learning_rate": 1.0, "segments": ((0, 1),), "coefficients": floats(1),
        "parent": bytes(16), "digest": bytes(16),
    }  # fmt: skip
    return UpdateRecord(**(fields | changes))


REFUSED: dict[str, Callable[[], object]] = {
    "report: round": lambda: report(round=2**32),
    "report: negative": lambda: report(samples=-1),
    "report: run tag": lambda: report(run_tag=bytes(3)),
    "report: micro-batch": lambda: report(micro_batch=2**16),
    "report: digest": lambda: report(weights_digest=bytes(15)),
    "report: NaN loss": lambda: report(mean_loss=float("nan")),
    "report: infinite loss": lambda: report(mean_loss=float("inf")),
    "report: too many blocks": lambda: report(blocks=(floats(1),) * (MAX_REPORT_BLOCKS + 1)),
    "report: too many scalars": lambda: report(blocks=(floats(MAX_SCALARS), floats(1))),
    "report: neither scalars nor a reason": lambda: report(blocks=()),
    "report: scalars and a reason": lambda: report(decline=Decline.FAILED),
    "report: NaN scalar": lambda: report(blocks=(np.array([np.nan], dtype=np.float32),)).encode(),
    "report: infinite scalar": lambda: report(blocks=(np.array([np.inf], dtype=np.float32),)).encode(),
    "report: two rows": lambda: report(blocks=(np.zeros((2, 2), dtype=np.float32),)).encode(),
    "update: index": lambda: update(index=2**32),
    "update: rate is no float32": lambda: update(learning_rate=0.1),
    "update: rate is not finite": lambda: update(learning_rate=float("nan")),
    "update: no segment": lambda: update(segments=(), coefficients=floats(0)),
    "update: too many segments": lambda: update(
        segments=tuple((2 * i, 1) for i in range(MAX_SEGMENTS + 1)), coefficients=floats(MAX_SEGMENTS + 1)
    ),
    "update: empty segment": lambda: update(segments=((0, 0), (1, 1))),
    "update: overlap": lambda: update(segments=((0, 2), (1, 1)), coefficients=floats(3)),
    "update: descending": lambda: update(segments=((5, 1), (1, 1)), coefficients=floats(2)),
    "update: count": lambda: update(coefficients=floats(2)),
    "update: too many scalars": lambda: update(segments=((0, MAX_SCALARS + 1),), coefficients=floats(MAX_SCALARS + 1)),
    "update: position": lambda: update(segments=(((1 << 63), 1),)),
    "update: two blocks": lambda: update(segments=(((1 << 60) - 1, 2),), coefficients=floats(2)),
    "update: last two blocks": lambda: update(segments=(((7 << 60) - 1, 2),), coefficients=floats(2)),
    "update: parent": lambda: update(parent=b""),
    "request: hash": lambda: BlobRequest(bytes(31), 0, 1),
    "request: nothing": lambda: BlobRequest(bytes(32), 0, 0),
    "request: too much": lambda: BlobRequest(bytes(32), 0, MAX_BLOCK_BYTES + 1),
    "request: offset": lambda: BlobRequest(bytes(32), 2**32, 1),
    "block: empty": lambda: BlobBlock(bytes(32), 0, 1, b""),
    "block: absent at an offset": lambda: BlobBlock(bytes(32), 1, 0, b""),
    "block: absent with data": lambda: BlobBlock(bytes(32), 0, 0, b"x"),
    "block: beyond the end": lambda: BlobBlock(bytes(32), 1, 1, b"x"),
    "block: before the start": lambda: BlobBlock(bytes(32), -1, 1, b"x"),
    "block: too long": lambda: BlobBlock(bytes(32), 0, 1 << 20, bytes(MAX_BLOCK_BYTES + 1)),
    "log request: nothing": lambda: LogRequest(0, 0),
    "log request: too much": lambda: LogRequest(0, MAX_LOG_RECORDS + 1),
    "log slice: empty": lambda: LogSlice(0, ()),
    "log slice: gap": lambda: LogSlice(0, (update(index=0), update(index=2))),
    "receipt: round": lambda: Receipt(bytes(4), 2**32, Verdict.LATE),
    "receipt: run tag": lambda: Receipt(bytes(5), 1, Verdict.LATE),
}


@pytest.mark.parametrize("name", REFUSED)
def test_limits_hold_at_construction(name: str) -> None:
    with pytest.raises(ProtocolError):
        REFUSED[name]()


def test_scalars_that_are_not_finite_are_refused_on_the_wire() -> None:
    payload = report(blocks=(floats(3),)).encode()
    for bad in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(ProtocolError, match="not finite"):
            decode(payload[:-4] + struct.pack("<f", bad))
    with pytest.raises(ProtocolError):
        pack_row(np.array([1.0, np.nan], dtype=np.float32))


def test_the_last_allowed_position_replays() -> None:
    last = (1 << 63) - 1
    record = decode(update(segments=((last - 1, 2),), coefficients=floats(2)).encode())
    assert isinstance(record, UpdateRecord)
    assert record.positions().tolist() == [last - 1, last]


def test_segments_of_blocks_may_touch_where_one_ends() -> None:
    end = 1 << 60
    record = update(segments=((end - 2, 2), (end, 1)), coefficients=floats(3))
    assert record.positions().tolist() == [end - 2, end - 1, end]


def test_counts_that_lie_allocate_nothing() -> None:
    """Headers that promise 2**32 scalars or segments are refused by their length."""
    head = bytearray(report(blocks=(floats(3),)).encode())
    head[58:62] = b"\xff\xff\xff\xff"
    with pytest.raises(ProtocolError, match="over the limit"):
        decode(bytes(head))
    record = bytearray(update().encode())
    record[48:52] = b"\xff\xff\xff\xff"
    with pytest.raises(ProtocolError, match="does not hold"):
        decode(bytes(record))


def test_the_largest_messages_fit_a_payload() -> None:
    """Whatever can be constructed can be sent: the largest report, update, slice and block."""
    counts = [MAX_SCALARS // MAX_REPORT_BLOCKS] * MAX_REPORT_BLOCKS
    largest = report(blocks=tuple(floats(count) for count in counts))
    record = update(segments=((0, MAX_SCALARS),), coefficients=floats(MAX_SCALARS))
    block = BlobBlock(bytes(32), 0, MAX_BLOCK_BYTES, bytes(MAX_BLOCK_BYTES))
    for message in (largest, record, LogSlice(0, (record,)), block):
        payload = message.encode()
        assert len(payload) <= MAX_PAYLOAD_BYTES
        assert plain(decode(payload)) == plain(message)


def test_an_update_that_would_not_fit_a_payload_is_refused() -> None:
    """Many segments and many scalars together: devices could never decode it, nor pull it as a slice."""
    segments = tuple((3 * i, 2) for i in range(15_000))
    with pytest.raises(ProtocolError, match="bytes"):
        update(segments=segments, coefficients=floats(30_000))


def test_a_slice_with_a_foreign_record_is_refused() -> None:
    """The version inside a slice counts as well: the record's bytes are what the chain digest covers."""
    payload = bytearray(LogSlice(0, (update(),)).encode())
    for place, value in ((12, 9), (13, int(MessageType.REPORT))):
        damaged = payload.copy()
        damaged[place] = value
        with pytest.raises(ProtocolError):
            decode(bytes(damaged))


@given(reports())
def test_the_numbers_of_a_report_are_those_of_the_whole(message: Report) -> None:
    numbers = report_numbers(message.encode())
    assert all(getattr(message, name) == value for name, value in numbers._asdict().items())


@pytest.mark.parametrize("name", [name for name, message in MESSAGES.items() if not isinstance(message, Report)])
def test_other_messages_have_no_numbers(name: str) -> None:
    with pytest.raises(ProtocolError, match="no report"):
        report_numbers(MESSAGES[name].encode())


def test_half_a_header_has_no_numbers() -> None:
    with pytest.raises(ProtocolError, match="no report"):
        report_numbers(report().encode()[:40])
