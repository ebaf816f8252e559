"""What a `MqttTransport` takes and tells: publications, wills, events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "Arrived",
    "Connected",
    "Delivered",
    "Disconnected",
    "ProtocolName",
    "Publication",
    "Rejected",
    "Token",
    "TransportEvent",
    "Will",
]

_MAX_PAYLOAD_BYTES = 268_435_455 - 65_542  # the largest MQTT packet, less the largest header

ProtocolName = Literal["5", "3.1.1"]


@dataclass(frozen=True, slots=True)
class Publication:
    """One message to publish.

    Raises:
        ValueError: The topic is empty or has a wildcard, the QoS is not 0 or 1, or the payload exceeds MQTT.
    """

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False

    def __post_init__(self) -> None:
        topic, size = self.topic, len(self.payload)
        if not topic or "+" in topic or "#" in topic or "\0" in topic or len(topic.encode("utf-8")) > 65_535:
            raise ValueError(f"{topic!r} is no topic name to publish on")
        if self.qos not in (0, 1):
            raise ValueError(f"QoS {self.qos} is not used; allowed are 0 and 1")
        if size > _MAX_PAYLOAD_BYTES:
            raise ValueError(f"a payload of {size} bytes exceeds MQTT's limit of {_MAX_PAYLOAD_BYTES}")


@dataclass(frozen=True)
class Will:
    """What the broker publishes when this client is gone without a word.

    Attributes:
        topic: Exact topic.
        payload: Body, at most 65,535 bytes.
        qos: 0 or 1.
        retain: Whether late joiners see it.
        delay_s: Seconds that the broker waits first (MQTT 5 only). The delay ends with the session, so it needs a
            session expiry of at least as long.
    """

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = True
    delay_s: int = 0


@dataclass(frozen=True, slots=True)
class Token:
    """Stands for one unacknowledged message of one connection."""

    generation: int
    mid: int


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker accepted the connection; comes before everything that arrives on it.

    Attributes:
        session_present: The broker kept the session. If not, it may have lost everything, retained messages included.
        protocol: MQTT version spoken.
        generation: Counts connections from 1; tokens of older ones are void.
    """

    session_present: bool
    protocol: ProtocolName
    generation: int


@dataclass(frozen=True, slots=True)
class Disconnected:
    """A connection was lost, or one more attempt failed; the next follows by itself.

    Attributes:
        reason: Half a sentence for people.
        hint: What they could do about it; may be empty.
        refused: Whether the broker is there and does not let this client in.
    """

    reason: str
    hint: str = ""
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Arrived:
    """A message came in. `token` is None unless it waits for `MqttTransport.acknowledge`."""

    topic: str
    payload: bytes
    retain: bool
    token: Token | None


@dataclass(frozen=True, slots=True)
class Delivered:
    """The broker acknowledged a QoS 1 publish."""

    message_id: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """A QoS 1 publish is given up: the broker refused it, or it cannot be sent at all."""

    message_id: int
    reason: str


TransportEvent = Connected | Disconnected | Arrived | Delivered | Rejected
