"""Count the MQTT bytes of one client, by topic and in total."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

__all__ = ["Flow", "Traffic", "publish_packet_bytes"]

# A peer that invents topics must not grow this table for ever.
_MAX_TOPICS = 4096
OTHER_TOPICS = "(other)"

PUBACK_BYTES = 4  # of a plain success, which is sent without a reason code


@dataclass
class Flow:
    """Messages and bytes in one direction.

    Attributes:
        messages: Number of PUBLISH packets, resent ones included.
        payload_bytes: Sum of their payloads.
        packet_bytes: Sum of the whole packets: fixed header, topic, packet id, properties, payload.
    """

    messages: int = 0
    payload_bytes: int = 0
    packet_bytes: int = 0

    def add(self, payload_bytes: int, packet_bytes: int) -> None:
        """Count one packet."""
        self.messages += 1
        self.payload_bytes += payload_bytes
        self.packet_bytes += packet_bytes


@dataclass
class Traffic:
    """Bytes up (sent by this client) and down (received), safe to use from any thread.

    PUBLISH packets are counted exactly as MQTT lays them out, except that properties which a peer may add to an
    arriving MQTT 5 packet count as one byte, and reason strings not at all. CONNECT, SUBSCRIBE, pings, TLS and TCP/IP
    headers are not counted.
    """

    up: Flow = field(default_factory=Flow)
    down: Flow = field(default_factory=Flow)
    acknowledgement_bytes_up: int = 0
    acknowledgement_bytes_down: int = 0
    _by_topic: dict[str, tuple[Flow, Flow]] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def bytes_up(self) -> int:
        """Packet bytes sent, acknowledgements included."""
        return self.up.packet_bytes + self.acknowledgement_bytes_up

    @property
    def bytes_down(self) -> int:
        """Packet bytes received, acknowledgements included."""
        return self.down.packet_bytes + self.acknowledgement_bytes_down

    def sent(self, topic: str, payload_bytes: int, packet_bytes: int) -> None:
        """Count one PUBLISH that this client put on the wire."""
        with self._lock:
            self.up.add(payload_bytes, packet_bytes)
            self._topic(topic)[0].add(payload_bytes, packet_bytes)

    def received(self, topic: str, payload_bytes: int, packet_bytes: int) -> None:
        """Count one PUBLISH that arrived."""
        with self._lock:
            self.down.add(payload_bytes, packet_bytes)
            self._topic(topic)[1].add(payload_bytes, packet_bytes)

    def acknowledged(self, packet_bytes: int, *, up: bool) -> None:
        """Count one PUBACK."""
        with self._lock:
            if up:
                self.acknowledgement_bytes_up += packet_bytes
            else:
                self.acknowledgement_bytes_down += packet_bytes

    def by_topic(self) -> dict[str, tuple[Flow, Flow]]:
        """Return a copy: topic -> (up, down). Topics beyond the first 4096 share the key ``(other)``."""
        with self._lock:
            return {
                topic: (Flow(up.messages, up.payload_bytes, up.packet_bytes),
                        Flow(down.messages, down.payload_bytes, down.packet_bytes))
                for topic, (up, down) in self._by_topic.items()
            }  # fmt: skip

    def _topic(self, topic: str) -> tuple[Flow, Flow]:
        if topic not in self._by_topic and len(self._by_topic) >= _MAX_TOPICS:
            topic = OTHER_TOPICS
        return self._by_topic.setdefault(topic, (Flow(), Flow()))


def publish_packet_bytes(topic: str, payload_bytes: int, qos: int, property_bytes: int | None) -> int:
    """Return the length of a PUBLISH packet (MQTT 5.0, section 3.3).

    Args:
        topic: The topic name.
        payload_bytes: Length of the payload.
        qos: 0, or more when the packet carries a packet id.
        property_bytes: Length of the properties without their own length byte; None for MQTT 3.1.1, which has none.
    """
    remaining = 2 + len(topic.encode("utf-8")) + (2 if qos else 0) + payload_bytes
    if property_bytes is not None:
        remaining += 1 + property_bytes
    length_bytes = 1 + sum(remaining >= limit for limit in (128, 16_384, 2_097_152))
    return 1 + length_bytes + remaining
