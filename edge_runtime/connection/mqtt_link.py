"""One MQTT connection: a paho client that lives from one TCP connect to its loss and is then thrown away.

paho can reconnect by itself, but then it keeps state of the old connection (packet ids, queue, protocol version), ends
its thread on an exception in a callback, and waits without jitter. A fresh client per connection, driven by the
caller's thread, has none of these problems. What paho is used for is the packet codec, TLS, and keep-alive.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ...protocol.errors import ConfigError
from .endpoint import Endpoint
from .light_imports import not_needed_by_paho, stand_ins
from .link_loss import Loss, explain_connect, explain_end, unanswered
from .mqtt_types import ProtocolName, Will
from .traffic import PUBACK_BYTES, publish_packet_bytes
from .wake import Wake

with stand_ins(*not_needed_by_paho()):
    from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
    from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties
    from paho.mqtt.reasoncodes import ReasonCode

    from .buffered_client import BufferedClient

if TYPE_CHECKING:
    import ssl

__all__ = ["Link", "LinkSettings"]

_TCP_TIMEOUT_S = 8.0
_SUBACK_TIMEOUT_S = 10.0
_PAUSE_S = 0.02
_UNSUPPORTED_VERSION = 0x84
# Bad user name or password, not authorized, client id not valid, banned, bad authentication method: retrying the same
# words cannot help. The other refusals (unavailable, busy, quota, rate) pass.
_FINAL_REFUSALS = frozenset({0x85, 0x86, 0x87, 0x8A, 0x8C})
# MQTT 5.0, section 2.2.2.2: identifier byte and four-byte integer.
_EXPIRY_PROPERTY_BYTES = 5


@dataclass(frozen=True)
class LinkSettings:
    """What stays the same over all connections of a transport."""

    endpoint: Endpoint
    client_id: str
    username: str | None
    password: str | None
    tls: ssl.SSLContext | None
    will: Will | None
    keepalive_s: int
    clean_start: bool
    session_expiry_s: int
    manual_ack: bool
    max_packet_bytes: int
    subscriptions: tuple[str, ...]
    may_read: Callable[[], bool] = lambda: True

    def __post_init__(self) -> None:
        if not self.client_id:
            raise ConfigError("the MQTT client id is empty", hint="give the device or server an id")
        for name, value, low, high in (
            ("keepalive_s", self.keepalive_s, 1, 65_535),
            ("session_expiry_s", self.session_expiry_s, 0, 0xFFFFFFFF),
            ("max_packet_bytes", self.max_packet_bytes, 1024, 268_435_455),
            ("will payload bytes", len(self.will.payload) if self.will else 0, 0, 65_535),
        ):
            if not low <= value <= high:
                raise ConfigError(f"{name} is {value}; allowed are {low} to {high}")


class Link:
    """One connection. Not thread-safe: everything, callbacks included, runs on the thread that drives it."""

    def __init__(
        self,
        settings: LinkSettings,
        protocol: ProtocolName,
        *,
        connack_timeout_s: float,
        on_accepted: Callable[[bool], None],
        on_message: Callable[[str, bytes, int, bool, int, int], None],
        on_acknowledged: Callable[[int, str | None, int], None],
    ) -> None:
        """Prepare one attempt.

        Args:
            settings: What to connect to, and as whom.
            protocol: MQTT version to speak.
            connack_timeout_s: How long the broker may take to answer CONNECT.
            on_accepted: Called with "session present" when CONNACK is positive; SUBSCRIBE is on its way then.
            on_message: Called with topic, payload, QoS, retain flag, packet id and length of an arriving PUBLISH.
            on_acknowledged: Called with the packet id of a publish, the reason when the broker refused it, and the
                length of the answer.
        """
        self.protocol: ProtocolName = protocol
        self.ready = False  # subscriptions are granted, publishing may begin
        self.loss: Loss | None = None
        self.peer_max_packet_bytes: int | None = None
        self.peer_max_inflight = 65_535  # MQTT 5.0, section 3.2.2.3.3: the default Receive Maximum
        self._settings = settings
        self._told_accepted, self._told_message, self._told_acknowledged = on_accepted, on_message, on_acknowledged
        self._accepted = False
        self._connack_timeout_s = connack_timeout_s
        self._deadline = 0.0
        self._selector = selectors.DefaultSelector()
        self._client = self._new_client()
        self.is_behind = self._client.is_behind

    def open(self) -> None:
        """Connect TCP and TLS (blocking, at most some 8 s each) and send CONNECT; failures end up in `loss`."""
        settings = self._settings
        endpoint = settings.endpoint
        try:
            if self.protocol == "5":
                properties = _properties(PacketTypes.CONNECT)
                properties.SessionExpiryInterval = settings.session_expiry_s
                properties.MaximumPacketSize = settings.max_packet_bytes
                self._client.connect(
                    endpoint.host,
                    endpoint.port,
                    settings.keepalive_s,
                    clean_start=settings.clean_start,
                    properties=properties,
                )
            else:
                self._client.connect(endpoint.host, endpoint.port, settings.keepalive_s)
            sock = self._socket()
            if sock is None:
                self._lose("the link closed")
                return
            # Nagle plus delayed ACK cost 40 ms a message: 45 MB in 128 KiB blocks took 2.75 s instead of 0.18 s.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(sock, selectors.EVENT_READ)
            self._deadline = time.monotonic() + self._connack_timeout_s
        except (OSError, ValueError) as error:  # ValueError: a host name that IDNA cannot encode
            self.loss = explain_connect(error, endpoint)

    def step(self, wake: Wake, timeout_s: float) -> None:
        """Wait for the network, for `wake` or for the time-out, then do the reading and writing that is due.

        While nothing may be read, or the broker reads no answers, what it sends stays in the socket. A pause of more
        than two keep-alives ends the link, and the broker sends again what was not acknowledged.
        """
        if self._client.is_clogged:
            self._write()
        if self.loss is not None:
            return
        sock = self._socket()
        if sock is None:
            self._lose("the link closed")
            return
        if wake.receiver not in self._selector.get_map():
            self._selector.register(wake.receiver, selectors.EVENT_READ)
        self._selector.modify(sock, selectors.EVENT_READ | (selectors.EVENT_WRITE if self._client.has_unsent else 0))
        if self._may_read():
            # A pause may have left bytes, and OpenSSL may hold some that the socket no longer shows as readable.
            pending = self._client.has_unread or (
                self._settings.tls is not None and cast("ssl.SSLSocket", sock).pending() > 0
            )
            ready = {key.fileobj: mask for key, mask in self._selector.select(0.0 if pending else timeout_s)}
            if wake.receiver in ready:
                wake.clear()
            mask = ready.get(sock, 0)
        else:
            wake.wait(_PAUSE_S)
            pending, mask = False, 0
        if pending or mask & selectors.EVENT_READ:
            if not self._client.has_unread:
                self._client.refill()
            self._check(self._client.loop_read())
            while self.loss is None and self._client.has_unread and self._may_read():
                self._check(self._client.loop_read())
        if self.loss is None and (mask & selectors.EVENT_WRITE or self._client.has_unsent):
            self._write()
        if self.loss is None:
            self._check(self._client.loop_misc())
        if self.loss is None and not self.ready and time.monotonic() > self._deadline:
            missing = f"no SUBACK for {_SUBACK_TIMEOUT_S:g} s"
            self._lose(missing if self._accepted else f"{self._connack_timeout_s:g} s passed")

    def _may_read(self) -> bool:
        return self._settings.may_read() and not self._client.is_clogged

    def _write(self) -> None:
        self._check(self._client.loop_write())
        try:
            if self.loss is None:
                self._client.flush()
        except OSError as error:
            self._lose(f"the link was lost ({explain_end(error)})", ended=True)

    def publish(self, topic: str, payload: bytes, qos: int, retain: bool, expiry_s: int | None) -> int:
        """Hand a message to the client, to be written by the next `step`, and return its packet id."""
        properties: Properties | None = None
        if self.protocol == "5" and expiry_s is not None:
            properties = _properties(PacketTypes.PUBLISH)
            properties.MessageExpiryInterval = expiry_s
        info = self._client.publish(topic, payload, qos, retain, properties)
        while info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:  # the packet id wrapped round onto one still in flight
            info = self._client.publish(topic, payload, qos, retain, properties)
        return info.mid

    def packet_bytes(self, topic: str, payload_bytes: int, qos: int, *, expiry: bool) -> int:
        """Return the length of a PUBLISH on this connection."""
        if self.protocol == "3.1.1":
            return publish_packet_bytes(topic, payload_bytes, qos, None)
        return publish_packet_bytes(topic, payload_bytes, qos, _EXPIRY_PROPERTY_BYTES if expiry else 0)

    def acknowledge(self, mid: int) -> None:
        """Send the PUBACK of a message that arrived on this connection."""
        self._client.ack(mid, 1)

    def disconnect(self) -> None:
        """Ask for a graceful end (the will is dropped); the next `step` writes it."""
        self._client.disconnect()

    def drop(self, reason: str) -> None:
        """Cut the link."""
        self._lose(reason)

    def close(self) -> None:
        """Free the socket. Idempotent."""
        self._selector.close()
        sock = self._socket()
        if sock is not None:
            sock.close()

    # paho's callbacks. None lets an exception out: paho would leave its packet half handled.

    def _on_connect(
        self, _client: Client, _data: Any, flags: ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self.loss = self._refusal(reason)
            return
        if properties is not None:
            self.peer_max_packet_bytes = getattr(properties, "MaximumPacketSize", None)
            self.peer_max_inflight = getattr(properties, "ReceiveMaximum", self.peer_max_inflight)
        self._accepted = True
        self._told_accepted(flags.session_present)
        if self._settings.subscriptions:
            self._deadline = time.monotonic() + _SUBACK_TIMEOUT_S
            self._client.subscribe([(topic, 1) for topic in self._settings.subscriptions])
        else:
            self.ready = True

    def _on_subscribe(
        self, _client: Client, _data: Any, _mid: int, reasons: Sequence[ReasonCode], _properties: Properties | None
    ) -> None:
        refused = [
            f"{topic} ({reason})"
            for topic, reason in zip(self._settings.subscriptions, reasons, strict=False)
            if reason.is_failure
        ]
        if refused:
            hint = "this user needs the right to read these topics"
            self.loss = Loss(f"the broker refused the subscription to {', '.join(refused)}", hint, final=True)
        else:
            self.ready = True

    def _on_message(self, _client: Client, _data: Any, message: MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:  # MQTT forbids it; a broker that lets it through must not stop us
            self._client.ack(message.mid, message.qos)
            return
        payload = bytes(message.payload)
        length = self.packet_bytes(topic, len(payload), message.qos, expiry=False)
        self._told_message(topic, payload, message.qos, message.retain, message.mid, length)

    def _on_publish(
        self, _client: Client, _data: Any, mid: int, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        self._told_acknowledged(mid, str(reason) if reason.is_failure else None, PUBACK_BYTES + (reason.value != 0))

    def _on_disconnect(
        self, _client: Client, _data: Any, flags: DisconnectFlags, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        if flags.is_disconnect_packet_from_server:
            self._lose(f"the broker closed the link: {reason}", ended=True)
        elif self._client.has_ended:  # paho knows no more than "Unspecified error" then
            self._lose(f"the link was lost ({explain_end(self._client.error)})", ended=True)
        else:
            self._lose(f"the link was lost ({reason})")

    def _new_client(self) -> BufferedClient:
        settings = self._settings
        v5 = self.protocol == "5"
        client = BufferedClient(
            CallbackAPIVersion.VERSION2,
            client_id=settings.client_id,
            # In 3.1.1 one flag stands for both: start clean, and forget the session at the end.
            clean_session=None if v5 else settings.clean_start or settings.session_expiry_s == 0,
            protocol=MQTTProtocolVersion.MQTTv5 if v5 else MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,  # also stops paho's own downgrade to 3.1
            manual_ack=settings.manual_ack,
        )
        client.connect_timeout = _TCP_TIMEOUT_S
        client.max_inflight_messages_set(0)  # no limit here: the transport holds the window
        if settings.username is not None:
            client.username_pw_set(settings.username, settings.password)
        if settings.tls is not None:
            client.tls_set_context(settings.tls)
        if settings.will is not None:
            will, properties = settings.will, None
            if v5 and will.delay_s:
                properties = _properties(PacketTypes.WILLMESSAGE)
                properties.WillDelayInterval = will.delay_s
            client.will_set(will.topic, will.payload, will.qos, will.retain, properties)
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_disconnect = self._on_disconnect
        # With this set paho only queues packets, and all writing happens in `step`.
        client.on_socket_register_write = lambda *_: None
        return client

    def _socket(self) -> socket.socket | None:
        sock = self._client.socket()
        return sock if isinstance(sock, socket.socket) else None

    def _check(self, code: MQTTErrorCode) -> None:
        """Turn paho's return code into a loss; `_on_disconnect` may have told a better reason already."""
        if self.loss is None and (code != MQTTErrorCode.MQTT_ERR_SUCCESS or self._client.socket() is None):
            self._lose(f"the link was lost ({code.name})")

    def _lose(self, reason: str, *, ended: bool = False) -> None:
        """End the link, unless it has ended for a reason that is known better."""
        if self.loss is not None:
            return
        settings = self._settings
        self.loss = (
            Loss(reason) if self._accepted else unanswered(reason, settings.endpoint, settings.client_id, ended=ended)
        )

    def _refusal(self, reason: ReasonCode) -> Loss:
        if reason.value == _UNSUPPORTED_VERSION:
            return Loss(f"the broker does not speak MQTT {self.protocol}", version_refused=True)
        final = reason.value in _FINAL_REFUSALS
        hint = "check the client id, the user name and the password file" if final else ""
        return Loss(f"the broker refused the connection: {reason}", hint, final=final, refused=final)


def _properties(packet_type: int) -> Properties:
    return Properties(packet_type)  # type: ignore[no-untyped-call]
