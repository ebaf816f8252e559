"""A throw-away MQTT client that shows what a broker really does: reason codes, granted QoS, announced limits.

`MqttTransport` hides all this and repairs what breaks, which is wrong for a look at a broker. This client does nothing
by itself: it reads and writes only while somebody waits in `wait`, so one that is not waited on is a silent client.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from ...edge_runtime.connection.endpoint import Endpoint
from ...edge_runtime.connection.mqtt_types import ProtocolName, Will

if TYPE_CHECKING:
    import ssl

__all__ = ["Place", "ProbeClient", "ProbeLost", "wait"]

_STEP_S = 0.01
_FILTERS = 8  # AWS IoT Core takes no more at once; a device of fedzo needs seven


class ProbeLost(Exception):  # noqa: N818 (a finding, not an error)
    """The broker refused something, ended the link, or did not answer in time; the text says which."""


@dataclass(frozen=True)
class Place:
    """Where and as whom to connect.

    Attributes:
        endpoint: Address.
        tls: Context of a ``mqtts://`` URL.
        username: MQTT user.
        password: Its password.
        timeout_s: Longest wait for one answer of the broker.
    """

    endpoint: Endpoint
    tls: ssl.SSLContext | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    timeout_s: float = 10.0


class ProbeClient:
    """One client, connected by its constructor.

    Args:
        place: Where, and as whom.
        client_id: MQTT client id.
        protocol: MQTT version.
        clean: Throw away what the broker kept under this id.
        expiry_s: How long the broker keeps the session afterwards; in 3.1.1 only zero or not zero matters.
        will: What the broker publishes when the link breaks.
        keepalive_s: MQTT keep-alive.
        manual_ack: Arriving messages are never acknowledged.

    Attributes:
        session_present: What CONNACK said.
        limits: Properties of the CONNACK of MQTT 5 by their names in the standard, without spaces.
        arrived: Messages, in order.
        loss: Why the link ended; None while it lives.

    Raises:
        ProbeLost: Not connected.
    """

    def __init__(
        self,
        place: Place,
        client_id: str,
        *,
        protocol: ProtocolName = "5",
        clean: bool = True,
        expiry_s: int = 0,
        will: Will | None = None,
        keepalive_s: int = 60,
        manual_ack: bool = False,
    ) -> None:
        self.client_id, self._place, self._v5 = client_id, place, protocol == "5"
        self.session_present = False
        self.limits: dict[str, int] = {}
        self.arrived: list[MQTTMessage] = []
        self.loss: str | None = None
        self._is_accepted = False
        self._answers: dict[int, str | None] = {}  # packet id of a publish -> why it was refused
        self._granted: dict[int, list[int]] = {}
        self._client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            clean_session=None if self._v5 else clean and expiry_s == 0,
            protocol=MQTTProtocolVersion.MQTTv5 if self._v5 else MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
            manual_ack=manual_ack,
        )
        self._client.connect_timeout = place.timeout_s
        self._client.max_inflight_messages_set(0)  # no limit: `publish` waits for every batch
        self._client.on_connect, self._client.on_disconnect = self._on_connect, self._on_disconnect
        self._client.on_message, self._client.on_publish = self._on_message, self._on_publish
        self._client.on_subscribe = self._on_subscribe
        if place.username is not None:
            self._client.username_pw_set(place.username, place.password)
        if place.tls is not None:
            self._client.tls_set_context(place.tls)
        if will is not None:
            self._client.will_set(will.topic, will.payload, will.qos, will.retain)
        self._connect(clean, expiry_s, keepalive_s)

    def _connect(self, clean: bool, expiry_s: int, keepalive_s: int) -> None:
        endpoint = self._place.endpoint
        try:
            if self._v5:
                properties = _properties(PacketTypes.CONNECT)
                properties.SessionExpiryInterval = expiry_s
                self._client.connect(
                    endpoint.host, endpoint.port, keepalive_s, clean_start=clean, properties=properties
                )
            else:
                self._client.connect(endpoint.host, endpoint.port, keepalive_s)
        except (OSError, ValueError) as error:
            self.cut()
            raise ProbeLost(f"no connection: {error}") from None
        sock = self._socket()
        if sock is not None:  # else what is measured is Nagle's algorithm
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not wait([self], lambda: self._is_accepted, self._place.timeout_s):
            self.cut()
            raise ProbeLost(self.loss or f"no CONNACK within {self._place.timeout_s:g} s")

    def subscribe(self, filters: Sequence[str]) -> list[int]:
        """Subscribe at QoS 1 and wait for the answer.

        Returns:
            What was granted for each filter: a QoS, or a reason code from 128 up.
        """
        granted: list[int] = []
        for start in range(0, len(filters), _FILTERS):
            _, mid = self._client.subscribe([(name, 1) for name in filters[start : start + _FILTERS]])
            if mid is None or not wait([self], lambda mid=mid: mid in self._granted, self._place.timeout_s):  # type: ignore[misc]
                raise ProbeLost(self.loss or f"no SUBACK within {self._place.timeout_s:g} s")
            granted += self._granted.pop(mid)
        return granted

    def publish(
        self, messages: Iterable[tuple[str, bytes]], *, retain: bool = False, others: Sequence[ProbeClient] = ()
    ) -> list[str | None]:
        """Publish at QoS 1 and wait for all answers, ten at a time (a broker may close above its Receive Maximum).

        Args:
            messages: Topics and payloads.
            retain: For late joiners.
            others: Clients that go on reading meanwhile.

        Returns:
            For each message why the broker refused it, None if it did not. 3.1.1 cannot refuse.
        """
        answers: list[str | None] = []
        batch: list[int] = []
        everything = list(messages)
        for number, (name, payload) in enumerate(everything, 1):
            batch.append(self._client.publish(name, payload, 1, retain).mid)
            if len(batch) == 10 or number == len(everything):
                if not wait([self, *others], lambda: all(mid in self._answers for mid in batch), self._place.timeout_s):
                    raise ProbeLost(self.loss or f"no PUBACK within {self._place.timeout_s:g} s")
                answers += [self._answers.pop(mid) for mid in batch]
                batch.clear()
        return answers

    def acknowledge(self) -> None:
        """Acknowledge all that arrived; for ``manual_ack``."""
        for message in self.arrived:
            self._client.ack(message.mid, message.qos)

    def cut(self) -> None:
        """End without a word, as a board without power does. Idempotent."""
        self.loss = self.loss or "cut"
        sock = self._socket()
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def leave(self) -> None:
        """Say goodbye: no will. Idempotent."""
        if self.loss is None:
            self._client.disconnect()
            wait([self], lambda: self.loss is not None, 1.0)
        self.cut()

    def step(self, timeout_s: float) -> None:
        """Read and write what is due; `wait` calls it."""
        if self.loss is None:
            code = self._client.loop(timeout_s)
            if code != MQTTErrorCode.MQTT_ERR_SUCCESS and self.loss is None:
                self.loss = f"the link was lost ({code.name})"

    def _socket(self) -> socket.socket | None:
        sock = self._client.socket()
        return sock if isinstance(sock, socket.socket) else None

    def _on_connect(
        self, _client: Client, _data: Any, flags: ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self.loss = f"the broker refused the connection: {reason}"
            return
        self.session_present, self._is_accepted = flags.session_present, True
        if properties is not None:
            values: dict[str, Any] = {name: getattr(properties, name, None) for name in _ANNOUNCED}
            self.limits = {name: int(value) for name, value in values.items() if value is not None}

    def _on_disconnect(
        self, _client: Client, _data: Any, flags: DisconnectFlags, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        by_broker = flags.is_disconnect_packet_from_server
        self.loss = self.loss or (f"the broker closed the link: {reason}" if by_broker else "the broker cut the link")

    def _on_message(self, _client: Client, _data: Any, message: MQTTMessage) -> None:
        self.arrived.append(message)

    def _on_publish(
        self, _client: Client, _data: Any, mid: int, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        self._answers[mid] = str(reason) if reason.is_failure else None

    def _on_subscribe(
        self, _client: Client, _data: Any, mid: int, reasons: Sequence[ReasonCode], _properties: Properties | None
    ) -> None:
        self._granted[mid] = [reason.value for reason in reasons]


_ANNOUNCED = (
    "ReceiveMaximum",
    "MaximumQoS",
    "RetainAvailable",
    "MaximumPacketSize",
    "SessionExpiryInterval",
    "WildcardSubscriptionAvailable",
    "ServerKeepAlive",
)


def wait(clients: Sequence[ProbeClient], done: Callable[[], bool], timeout_s: float) -> bool:
    """Let clients read and write until something is true.

    Returns:
        Whether it came true before the time was over and while one of the clients was still connected.
    """
    deadline = time.monotonic() + timeout_s
    while not done():
        alive = [client for client in clients if client.loss is None]
        if not alive or time.monotonic() >= deadline:
            return False
        for client in alive:
            client.step(_STEP_S / len(alive))
    return True


def _properties(packet_type: int) -> Properties:
    return Properties(packet_type)  # type: ignore[no-untyped-call]
