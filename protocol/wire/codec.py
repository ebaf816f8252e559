"""The only place where foreign binary bytes enter.

Every binary message starts with a version byte and a type byte. :func:`decode` raises
:class:`~..errors.ProtocolError` and never anything else, whatever the bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection

from ..errors import ProtocolError
from .documents import Announcement
from .framing import MAX_PAYLOAD_BYTES, VERSION, MessageType
from .messages import Receipt, Report, UpdateRecord
from .transfers import BlobBlock, BlobRequest, LogRequest, LogSlice, SnapshotOffer

__all__ = ["BinaryMessage", "decode"]

BinaryMessage = (
    Report | UpdateRecord | Receipt | BlobRequest | BlobBlock | LogRequest | LogSlice | SnapshotOffer | Announcement
)

_DECODERS: dict[MessageType, Callable[[bytes], BinaryMessage]] = {
    MessageType.REPORT: Report.decode,
    MessageType.UPDATE: UpdateRecord.decode,
    MessageType.RECEIPT: Receipt.decode,
    MessageType.BLOB_REQUEST: BlobRequest.decode,
    MessageType.BLOB_BLOCK: BlobBlock.decode,
    MessageType.LOG_REQUEST: LogRequest.decode,
    MessageType.LOG_SLICE: LogSlice.decode,
    MessageType.ANNOUNCEMENT: Announcement.decode,
    MessageType.SNAPSHOT_OFFER: SnapshotOffer.decode,
}


def decode(data: bytes, types: Collection[MessageType] = tuple(MessageType)) -> BinaryMessage:
    """Parse one binary payload.

    Args:
        data: The payload.
        types: Those that belong here; nothing else is looked at further than its type.

    Raises:
        ProtocolError: Wrong version, type, length or value.
    """
    if not 2 <= len(data) <= MAX_PAYLOAD_BYTES:
        raise ProtocolError(f"a payload of {len(data)} bytes is outside 2 to {MAX_PAYLOAD_BYTES}")
    if data[0] != VERSION:
        raise ProtocolError(f"protocol version {data[0]}, this fedzo speaks {VERSION}")
    try:
        kind = MessageType(data[1])
        if kind not in types:
            raise ProtocolError(f"a message of type {kind.name} does not belong here")
        return _DECODERS[kind](data)
    except (ValueError, struct.error) as error:
        raise ProtocolError(f"malformed message: {error}") from None
