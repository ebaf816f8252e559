"""Answers to devices that ask for update records."""

from __future__ import annotations

from collections.abc import Callable

from ..protocol.wire.codec import decode
from ..protocol.wire.messages import UpdateRecord
from ..protocol.wire.transfers import LogRequest, LogSlice

__all__ = ["SLICE_BYTES", "log_slice"]

SLICE_BYTES = 192 << 10


def log_slice(request: LogRequest, length: int, payload: Callable[[int], bytes]) -> LogSlice | None:
    """As many of the records as fit one payload; the device asks again for the rest.

    Args:
        request: What is asked for.
        length: Records in the log.
        payload: Gives an encoded record by its number.

    Returns:
        At least one record, or None if the log has none of them.
    """
    size = 0
    records: list[UpdateRecord] = []
    for number in range(request.first, min(request.first + request.count, length)):
        data = payload(number)
        size += len(data) + 4
        if records and size > SLICE_BYTES:
            break
        record = decode(data)
        assert isinstance(record, UpdateRecord)
        records.append(record)
    return LogSlice(request.first, tuple(records)) if records else None
