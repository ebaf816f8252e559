"""Two servers of one federation at one broker: the one that started later stays, the other one ends.

Both have one MQTT client id, so each throws the other out when it connects. Not every broker says so (Mosquitto 2.0.11
closes the link without a word, and MQTT 3.1.1 has no words for it), and whoever was thrown out by an older server that
came back must not go. So each looks at the retained presence when it comes back: if that is of a server that was not
there when its own began, that one is the later one. What it finds at its first connection is of the past: of a server
that ended or was killed, or that it has just replaced itself.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

from ..edge_runtime.connection.short_links import ShortLinks
from ..edge_runtime.connection.transport import Arrived, Connected, Disconnected, MqttTransport, TransportEvent
from ..protocol.errors import BrokerError, ProtocolError
from ..protocol.wire.documents import ServerPresence, parse
from ..protocol.wire.topics import Channel, topic

__all__ = ["Rivals"]

_log = logging.getLogger(__name__)
_CLOCKS_APART_MS = 3_600_000
"""Births are times in ms; one that is longer ago than clocks differ is that of a server that is gone."""


class Rivals:
    """Stands between the transport and the server's inbox; all of it runs on the network thread.

    Args:
        federation: Whose servers there may be.
        birth: Of this server.
        put: Takes every event, and the error.

    Attributes:
        error: Why the server has to end; None while it may go on.
        transport: To be set before it connects. It is closed before it can say anything as the server that was.
    """

    def __init__(self, federation: str, birth: int, put: Callable[[TransportEvent | BrokerError], None]) -> None:
        self._federation, self._birth, self._put = federation, birth, put
        self._topic = topic(federation, Channel.SERVER)
        self._earlier = -1  # the latest server of those before this one
        self._is_announced = False  # this one, as the broker said
        self._short = ShortLinks()
        self.error: BrokerError | None = None
        self.transport: MqttTransport | None = None

    def hear(self, event: TransportEvent) -> None:
        """Take an event of the transport."""
        if isinstance(event, Arrived) and event.topic == self._topic and self.error is None:
            self._look(event.payload)
        elif isinstance(event, Connected):
            self._short.began()
        elif isinstance(event, Disconnected) and self._short.ended():
            text = "the link breaks again and again: does another fedzo serve the federation %s at this broker?"
            _log.warning(text, self._federation, extra={"event": "disconnected"})
        self._put(event)

    def _look(self, payload: bytes) -> None:
        try:
            birth = parse(ServerPresence, payload).birth
        except ProtocolError:
            return  # Empty, or of somebody who may write what he likes.
        if birth == self._birth:
            self._is_announced = True
        elif not self._is_announced:
            self._earlier = max(self._earlier, birth)
        elif birth > max(self._earlier, self._birth - _CLOCKS_APART_MS):
            self._end()
        elif self.transport is not None:
            # The will of the one before, which came late, or what a broker remembers that lost power.
            with contextlib.suppress(BrokerError):  # This server is leaving just now.
                self.transport.publish(self._topic, ServerPresence(True, self._birth).encode(), retain=True)

    def _end(self) -> None:
        self.error = BrokerError(
            f"another fedzo serve took over federation {self._federation!r} at this broker",
            hint="stop it, or give this one --federation NAME",
        )
        self._put(self.error)
        if self.transport is not None:
            self.transport.close(timeout_s=0.0)
            self.transport.queue.drop_unsent()
