"""The MQTT client of devices and server: connect, stay connected, publish at least once, hand on what arrives.

A `MqttTransport` owns one network thread. On it, and only there, live the paho client, the retries and the calls of
`on_event`; the public methods may be called from any thread, and only `connect` and `close` wait.

A QoS 1 publish is kept in memory and sent over as many connections as it takes, until the broker acknowledges it
(`Delivered`) or it is given up (`Rejected`). A restart of the process forgets it: the outbox of a device and the
journal of the server are for that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from ...protocol.errors import BrokerError, ConfigError
from ...protocol.wire.framing import MAX_PAYLOAD_BYTES
from .endpoint import Endpoint, TlsConfig
from .link_loss import Loss
from .mqtt_link import Link, LinkSettings
from .mqtt_types import (
    Arrived,
    Connected,
    Delivered,
    Disconnected,
    Publication,
    Rejected,
    Token,
    TransportEvent,
    Will,
)
from .retry import Retry
from .send_queue import SendQueue
from .traffic import PUBACK_BYTES, Traffic
from .wake import Wake

__all__ = [
    "Arrived",
    "Connected",
    "Delivered",
    "Disconnected",
    "MqttTransport",
    "Publication",
    "Rejected",
    "Token",
    "TransportEvent",
    "Will",
]

_log = logging.getLogger(__name__)

_STABLE_AFTER_S = 10.0  # a link that lived this long starts the back-off anew
_PUBACK_TIMEOUT_S = 120.0
_STEP_S = 1.0  # paho's keep-alive check runs at least this often


class MqttTransport:
    """A connection to a broker that repairs itself.

    MQTT 5 is tried first; a broker that refuses it, or drops the link on it, gets 3.1.1. Lost links are re-made for
    ever, after full-jitter exponential back-off (60 s at most), and all `subscriptions` (QoS 1) with them. Publishes
    wait until the subscriptions are granted, so the answer to a publish cannot be missed.

    ``endpoint``, ``traffic`` and ``queue`` (publishes that are not finished) are there to look at.
    """

    def __init__(
        self,
        url: str,
        client_id: str,
        *,
        on_event: Callable[[TransportEvent], None],
        subscriptions: Sequence[str] = (),
        username: str | None = None,
        password: str | None = None,
        tls: TlsConfig | None = None,
        will: Will | None = None,
        keepalive_s: int = 30,
        clean_start: bool = True,
        session_expiry_s: int = 0,
        manual_ack: bool = False,
        max_packet_bytes: int = MAX_PAYLOAD_BYTES + 1024,
        max_inflight: int = 4,
        max_queued: int = 1000,
        max_queued_bytes: int = 16 << 20,
        may_read: Callable[[], bool] = lambda: True,
    ) -> None:
        """Check the settings; nothing is sent before `connect`.

        Args:
            url: ``mqtt://`` or ``mqtts://``, see `Endpoint.parse`.
            client_id: Must be unique on the broker; a second client with the same id throws the first one out.
            on_event: Called on the network thread; must return soon (keep-alive stops meanwhile). What it raises is
                logged and dropped.
            subscriptions: Topic filters, subscribed at QoS 1 on every connect.
            username: Takes precedence over the one in the URL, as does the password.
            password: Never logged.
            tls: Files for a ``mqtts://`` URL; the system's certificates when None.
            will: Published by the broker when this client vanishes.
            keepalive_s: The broker takes the client for dead after 1.5 times this silence.
            clean_start: Throw away what the broker kept for this client id, on every connect.
            session_expiry_s: How long the broker keeps subscriptions and queue while the client is away.
            manual_ack: Messages stay unacknowledged until `acknowledge`; else they are when `on_event` returns.
            max_packet_bytes: Largest packet to accept. An MQTT 5 broker silently drops larger ones; 3.1.1 has no
                such limit.
            max_inflight: Publishes that wait for their acknowledgement at the same time.
            max_queued: Publishes that wait in memory; one more is `Rejected`.
            max_queued_bytes: Likewise, of their payloads.
            may_read: Asked before every read; while it says no, the broker has to wait. See `Inbox.has_room`.

        Raises:
            ConfigError: The URL, the client id, a limit or a TLS file cannot be used.
        """
        endpoint = Endpoint.parse(url)
        if max_inflight < 1 or max_queued < 1:
            raise ConfigError(f"max_inflight {max_inflight} and max_queued {max_queued} must be at least 1")
        self._settings = LinkSettings(
            endpoint=endpoint,
            client_id=client_id,
            username=endpoint.username if username is None else username,
            password=endpoint.password if password is None else password,
            tls=endpoint.tls_context(tls),
            will=will,
            keepalive_s=keepalive_s,
            clean_start=clean_start,
            session_expiry_s=session_expiry_s,
            manual_ack=manual_ack,
            max_packet_bytes=max_packet_bytes,
            subscriptions=tuple(subscriptions),
            may_read=may_read,
        )
        self.endpoint = endpoint
        self.traffic = Traffic()
        self._on_event = on_event
        self._max_inflight = max_inflight

        self._changed = threading.Condition()  # guards all below that both sides touch
        self.queue = SendQueue(max_queued, max_queued_bytes, self._changed)
        self._tokens: deque[Token] = deque()
        self._generation = 0
        self._linked = False  # accepted by the broker now
        self._ready = False  # and subscribed
        self._was_ready = False
        self._closing = False
        self._failure: Loss | None = None
        self._last_loss: Loss | None = None

        self._wake = Wake()
        self._thread = threading.Thread(target=self._run, name=f"mqtt-{client_id}", daemon=True)
        # Of the network thread alone:
        self._retry = Retry()
        self._inflight: dict[int, tuple[int, float]] = {}  # packet id -> message id, time sent

    @property
    def connected(self) -> bool:
        """Whether the link is up and the subscriptions are granted."""
        return self._ready

    def connect(self, timeout_s: float | None = 30.0) -> None:
        """Start, and wait for the first connection with all subscriptions granted; for ever when `timeout_s` is None.

        Raises:
            BrokerError: Not connected in time, or refused for good (credentials, certificate, rights). The transport
                is closed then.
        """
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._was_ready or self._closing, timeout_s)
            if self._was_ready:
                return
            unanswered = Loss("no answer so far", "check host and port, and whether TLS (mqtts://) is right")
            loss = self._failure or self._last_loss or unanswered
            refused = self._failure is not None
        self.close(timeout_s=0.0)
        waited = "" if refused or timeout_s is None else f" within {timeout_s:g} s"
        raise BrokerError(f"no connection to the broker {self.endpoint.address}{waited}: {loss.reason}", hint=loss.hint)

    def publish(
        self, topic: str, payload: bytes, qos: int = 1, retain: bool = False, expiry_s: float | None = None
    ) -> int:
        """Queue a message and return its id at once.

        QoS 1 messages wait for a connection and end in `Delivered` or `Rejected`. QoS 0 messages are dropped without a
        word while there is none.

        Args:
            topic: Exact topic name.
            payload: Body; not copied, so it must not be a buffer that changes.
            qos: 0 or 1.
            retain: The broker keeps it for late joiners; an empty payload removes what it kept.
            expiry_s: Not worth sending, nor keeping in the broker (MQTT 5), after this long.

        Raises:
            ValueError: The topic is empty or has a wildcard, the QoS is not 0 or 1, or the payload exceeds MQTT.
            BrokerError: The transport is closed.
        """
        publication = Publication(topic, payload, qos, retain)
        with self._changed:
            if self._closing:
                raise BrokerError(f"the connection to {self.endpoint.address} is closed; nothing can be published")
            message_id = self.queue.add(publication, expiry_s, connected=self._ready)
        self._wake.set()
        return message_id

    def is_pending(self, message_id: int) -> bool:
        """Whether a QoS 1 publish is not finished yet, so that publishing the same again would only double it."""
        with self._changed:
            return message_id in self.queue

    def acknowledge(self, token: Token) -> bool:
        """Acknowledge a message that arrived under `manual_ack`; call it in order of arrival.

        Returns:
            False when the connection that brought the message is gone: the broker will send it again.
        """
        with self._changed:
            if token.generation != self._generation or not self._linked:
                return False
            self._tokens.append(token)
        self._wake.set()
        return True

    def close(self, last: Publication | None = None, *, timeout_s: float = 5.0) -> None:
        """Send what is queued and `last`, say goodbye (the will is dropped), end the thread. Idempotent.

        Without a connection nothing is waited for. From within `on_event` the thread ends after the call returns.

        Args:
            last: A final message, such as a retained "off" state.
            timeout_s: Longest wait for the broker's acknowledgements.
        """
        on_network_thread = threading.current_thread() is self._thread
        with self._changed:
            if last is not None and not self._closing:
                self.queue.add(last, None, connected=self._ready)
                self._wake.set()
            if not on_network_thread:
                self._changed.wait_for(lambda: not self.queue or not self._ready or self._closing, timeout_s)
            self._closing = True
            self._changed.notify_all()
        self._wake.set()
        if self._thread.ident is None:
            self._wake.close()
        elif not on_network_thread:
            # A blocking TCP connect cannot be interrupted; the thread is a daemon and ends by itself.
            self._thread.join(timeout_s + 1.0)

    def _run(self) -> None:
        """From here on everything runs on the network thread."""
        try:
            while not self._closing:
                loss, stable = self._one_link()
                if loss is None:
                    break
                delay_s = self._retry.delay_s(loss, stable=stable)
                if delay_s is None:
                    continue
                self._emit(Disconnected(loss.reason, loss.hint, loss.refused))
                if loss.final and not self._was_ready:
                    self._failure = loss
                    break
                self._last_loss = loss
                self._back_off(delay_s)
        finally:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            self._wake.close()

    def _one_link(self) -> tuple[Loss | None, bool]:
        """Serve one connection; return why it ended (None: `close`), and whether it had been usable for a while."""
        ready_since: float | None = None
        link = Link(
            self._settings,
            self._retry.protocol,
            connack_timeout_s=self._retry.connack_timeout_s,
            on_accepted=self._accepted,
            on_message=self._arrived,
            on_acknowledged=self._acknowledged,
        )
        try:
            link.open()
            while link.loss is None and not self._closing:
                link.step(self._wake, _STEP_S)
                self._after_step(link)
                if link.ready and ready_since is None:
                    ready_since = time.monotonic()
            if self._closing:
                self._say_goodbye(link)
                return None, False
            return link.loss, ready_since is not None and time.monotonic() - ready_since >= _STABLE_AFTER_S
        except Exception as error:  # noqa: BLE001 (whatever a hostile packet does to the codec, the thread goes on)
            _log.exception("the MQTT connection to %s failed unexpectedly", self.endpoint.address)
            return Loss(f"{error.__class__.__name__}: {error}"), False
        finally:
            link.close()
            self._link_ended()

    def _say_goodbye(self, link: Link) -> None:
        if link.loss is not None:
            return
        self._after_step(link)  # acknowledgements that `acknowledge` promised to send
        link.disconnect()
        deadline = time.monotonic() + _STEP_S
        while link.loss is None and time.monotonic() < deadline:
            link.step(self._wake, 0.1)

    def _after_step(self, link: Link) -> None:
        self._reject_overflow()
        if link.loss is not None:
            return
        if link.ready and not self._ready:
            with self._changed:
                self._ready = self._was_ready = True
                self._changed.notify_all()
        while self._tokens:
            token = self._tokens.popleft()
            if token.generation == self._generation:
                link.acknowledge(token.mid)
                self.traffic.acknowledged(PUBACK_BYTES, up=True)
        if link.ready:
            self._send_waiting(link)
            oldest = next(iter(self._inflight.values()), None)
            if oldest is not None and time.monotonic() - oldest[1] > _PUBACK_TIMEOUT_S:
                link.drop(f"the broker acknowledged nothing for {_PUBACK_TIMEOUT_S:g} s")

    def _send_waiting(self, link: Link) -> None:
        """Fill the window; the next step of the link writes it. QoS 0 has no window, but waits for the socket too."""
        window = min(self._max_inflight, link.peer_max_inflight)
        while len(self._inflight) < window and not link.is_behind() and (entry := self.queue.take()) is not None:
            publication, left_s = entry.publication, entry.seconds_left()
            if left_s is not None and left_s <= 0.0:
                self._finish(entry.message_id, publication.qos, "expired before it could be sent")
                continue
            topic, size = publication.topic, len(publication.payload)
            length = link.packet_bytes(topic, size, publication.qos, expiry=left_s is not None)
            limit = link.peer_max_packet_bytes
            if limit is not None and length > limit:
                reason = f"a packet of {length} bytes exceeds the broker's limit of {limit}"
                self._finish(entry.message_id, publication.qos, reason)
                continue
            expiry_s = None if left_s is None else min(max(1, round(left_s)), 0xFFFFFFFF)
            mid = link.publish(topic, publication.payload, publication.qos, publication.retain, expiry_s)
            self.traffic.sent(topic, size, length)
            if publication.qos:
                self._inflight[mid] = (entry.message_id, time.monotonic())
            else:
                self.queue.finish(entry.message_id)

    def _finish(self, message_id: int, qos: int, refusal: str | None) -> None:
        self.queue.finish(message_id)
        if qos:
            self._emit(Delivered(message_id) if refusal is None else Rejected(message_id, refusal))

    def _link_ended(self) -> None:
        """Put what was in flight back to the front of the queue and forget the connection."""
        self._inflight.clear()
        with self._changed:
            self._linked = self._ready = False
            self._tokens.clear()
            self.queue.link_lost()

    def _back_off(self, delay_s: float) -> None:
        until = time.monotonic() + delay_s
        while not self._closing and (left_s := until - time.monotonic()) > 0.0:
            self._wake.wait(left_s)
            self._reject_overflow()

    def _reject_overflow(self) -> None:
        while (message_id := self.queue.take_overflow()) is not None:
            self._emit(Rejected(message_id, f"{len(self.queue)} messages wait already"))

    def _emit(self, event: TransportEvent) -> None:
        try:
            self._on_event(event)
        except Exception:  # noqa: BLE001 (the network thread must not end with a bug of its user)
            _log.exception("the handler of %s failed", event.__class__.__name__)

    def _accepted(self, session_present: bool) -> None:
        self._retry.accepted()
        with self._changed:
            self._generation += 1
            self._linked = True
        self._emit(Connected(session_present, self._retry.protocol, self._generation))

    def _arrived(self, topic: str, payload: bytes, qos: int, retain: bool, mid: int, packet_bytes: int) -> None:
        self.traffic.received(topic, len(payload), packet_bytes)
        manual = self._settings.manual_ack and qos > 0
        self._emit(Arrived(topic, payload, retain, Token(self._generation, mid) if manual else None))
        if qos and not manual:
            self.traffic.acknowledged(PUBACK_BYTES, up=True)

    def _acknowledged(self, mid: int, refusal: str | None, packet_bytes: int) -> None:
        entry = self._inflight.pop(mid, None)
        if entry is not None:  # QoS 0 is reported here too, and is finished already
            self.traffic.acknowledged(packet_bytes, up=False)
            self._finish(entry[0], 1, refusal)
