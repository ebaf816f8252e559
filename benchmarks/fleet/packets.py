"""The few MQTT 5 packets that a board needs, byte by byte.

Boards use paho; a process with ten thousand of them cannot afford a client object and a thread each. What is written
here is what paho writes for :mod:`fedzo.edge_runtime.connection.transport`, so that sizes on the wire are those of a
board. MQTT Version 5.0, sections 2 and 3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

__all__ = ["CONNACK", "PUBACK", "PUBLISH", "SUBACK", "connect", "disconnect", "puback", "publish", "split", "subscribe"]

CONNACK, PUBLISH, PUBACK, SUBACK = 2, 3, 4, 9
_MAXIMUM_PACKET_SIZE = 0x27
_SESSION_EXPIRY_INTERVAL = 0x11
_MAXIMUM_PACKET_BYTES = 263_168
_KEEPALIVE_S = 600
_WILL_RETAIN_QOS_1, _CLEAN_START = 0x2C, 0x02


def _text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return len(data).to_bytes(2, "big") + data


def _packet(first: int, body: bytes) -> bytes:
    length, size = bytearray(), len(body)
    while True:
        size, low = size >> 7, size & 127
        length.append(low | (128 if size else 0))
        if not size:
            return bytes((first, *length)) + body


def connect(client_id: str, will_topic: str, will: bytes) -> bytes:
    """CONNECT as a board's, but for the keep-alive, which is long: there are no pings in between."""
    properties = struct.pack(">BIBI", _SESSION_EXPIRY_INTERVAL, 0, _MAXIMUM_PACKET_SIZE, _MAXIMUM_PACKET_BYTES)
    head = _text("MQTT") + struct.pack(">BBH", 5, _CLEAN_START | _WILL_RETAIN_QOS_1, _KEEPALIVE_S)
    return _packet(0x10, head + _text_block(properties) + _text(client_id) + b"\0" + _text(will_topic) + _text(will))


def _text_block(properties: bytes) -> bytes:
    return len(properties).to_bytes(1, "big") + properties


def subscribe(filters: Sequence[str]) -> bytes:
    """SUBSCRIBE to filters at QoS 1, as packet 1."""
    return _packet(0x82, b"\0\1\0" + b"".join(_text(one) + b"\1" for one in filters))


def publish(topic: bytes, payload: bytes, packet_id: int, *, retain: bool = False) -> bytes:
    """PUBLISH at QoS 1 without properties."""
    return _packet(0x32 | retain, _text(topic) + packet_id.to_bytes(2, "big") + b"\0" + payload)


def puback(packet_id: int) -> bytes:
    """PUBACK of a plain success."""
    return b"\x40\x02" + packet_id.to_bytes(2, "big")


def disconnect() -> bytes:
    """DISCONNECT; the will is dropped."""
    return b"\xe0\x00"


def split(buffer: bytearray) -> Iterator[tuple[int, int, bytes]]:
    """Take whole packets off the front of a buffer.

    Yields:
        Type, flags and body of each.
    """
    place, end = 0, len(buffer)
    while end - place >= 2:
        size = shift = 0
        start = place + 1
        while start < end:
            byte = buffer[start]
            size |= (byte & 127) << shift
            start, shift = start + 1, shift + 7
            if byte < 128:
                break
        else:
            break
        if start + size > end:
            break
        yield buffer[place] >> 4, buffer[place] & 15, bytes(buffer[start : start + size])
        place = start + size
    del buffer[:place]


def message(flags: int, body: bytes) -> tuple[bytes, bytes, int]:
    """Topic, payload and packet id (0 at QoS 0) of a PUBLISH."""
    end = 2 + int.from_bytes(body[:2], "big")
    topic, packet_id = body[2:end], 0
    if flags & 6:
        packet_id, end = int.from_bytes(body[end : end + 2], "big"), end + 2
    return topic, body[end + 1 + body[end] :], packet_id
