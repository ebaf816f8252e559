"""From MQTT payloads to messages for a device: the only place where foreign bytes enter it."""

from __future__ import annotations

from typing import Final

from ...protocol.device_side.device_events import Received
from ...protocol.errors import ProtocolError
from ...protocol.wire.codec import BinaryMessage, decode
from ...protocol.wire.documents import Announcement, Document, Order, RunDocument, ServerPresence, parse
from ...protocol.wire.messages import Receipt, UpdateRecord
from ...protocol.wire.topics import Channel, parse_topic
from ...protocol.wire.transfers import BlobBlock, LogSlice, SnapshotOffer

__all__ = ["read_message"]

_DOCUMENTS: Final[dict[Channel, type[Document]]] = {
    Channel.SERVER: ServerPresence,
    Channel.RUN: RunDocument,
    Channel.HEAD: Announcement,
    Channel.COMMAND: Order,
}
_BINARY: Final[dict[Channel, tuple[type[BinaryMessage], ...]]] = {
    Channel.LOG: (UpdateRecord,),
    Channel.ACK: (Receipt,),
    Channel.BLOCK: (BlobBlock, LogSlice, SnapshotOffer),
}


def read_message(federation: str, device: str, topic: str, payload: bytes) -> Received:
    """Parse what arrived on a topic as what belongs there.

    Raises:
        ProtocolError: It is for somebody else, or no message of the topic's kind.
    """
    place = parse_topic(topic)
    if place.federation != federation or place.device not in ("", device):
        raise ProtocolError("it is addressed to somebody else")
    if place.channel in _DOCUMENTS:
        return Received(place.channel, parse(_DOCUMENTS[place.channel], payload))
    kinds = _BINARY.get(place.channel, ())
    message = decode(payload)
    if not isinstance(message, kinds):
        raise ProtocolError(f"a {type(message).__name__} does not belong there")
    return Received(place.channel, message)
