"""From what the transport says to events of the coordinator: the only place where foreign bytes enter the server."""

from __future__ import annotations

import logging

from ..edge_runtime.connection.transport import Arrived, Connected, Disconnected, Rejected, TransportEvent
from ..protocol.errors import ProtocolError
from ..protocol.server_side import coordinator_events as machine
from ..protocol.wire.codec import decode
from ..protocol.wire.documents import Hello, Presence, parse
from ..protocol.wire.framing import MessageType
from ..protocol.wire.topics import Channel, parse_topic
from .security.access import Access

__all__ = ["Drops", "Intake"]

_log = logging.getLogger(__name__)
_TYPES = {  # what a device may say; other messages can take long to read
    Channel.REPORT: (MessageType.REPORT,),
    Channel.GET: (MessageType.BLOB_REQUEST, MessageType.LOG_REQUEST),
}


class Drops:
    """Counts what a server gives up, by reason.

    Attributes:
        counts: ``undecodable`` payloads, messages that were ``unsent``, ``blocks`` that found no room, messages of
            ``strangers`` without credentials.
    """

    def __init__(self) -> None:
        self.counts = {"undecodable": 0, "unsent": 0, "blocks": 0, "strangers": 0}

    def add(self, reason: str, text: str, *arguments: object) -> None:
        """Count one, and say so at powers of two: a flood must not fill the log."""
        self.counts[reason] += 1
        count = self.counts[reason]
        if count & (count - 1) == 0:
            _log.warning(f"{text} (%d so far)", *arguments, count, extra={"event": f"dropped_{reason}"})


class Intake:
    """Translates; what does not parse is counted and dropped.

    Args:
        federation: Whose topics are heard.
        drops: Where it is counted.
        access: Whose messages count; everybody's without it.
    """

    def __init__(self, federation: str, drops: Drops, access: Access | None = None) -> None:
        self._federation, self._drops, self._access = federation, drops, access

    def event(self, item: TransportEvent | machine.CoordinatorEvent) -> machine.CoordinatorEvent | None:
        """What the coordinator is told, if it is."""
        if isinstance(item, Connected):
            return machine.Connected()
        if isinstance(item, Disconnected):
            _log.warning("the link to the broker is lost: %s", item.reason, extra={"event": "disconnected"})
            return None
        if isinstance(item, Rejected):
            self._drops.add("unsent", "the broker did not take a message: %s", item.reason)
            return None
        if isinstance(item, Arrived):
            return self._parse(item)
        return item if isinstance(item, machine.CoordinatorEvent) else None

    def _parse(self, arrived: Arrived) -> machine.DeviceSaid | machine.Garbled | None:
        device = ""
        try:
            place = parse_topic(arrived.topic)
            if place.federation != self._federation or not arrived.payload or not place.device:
                return None
            if self._access is not None and not self._access.admits(place.device):
                self._drops.add("strangers", "refused %s: it has no credentials, or they were revoked", place.device)
                return None
            device = place.device
            if place.channel is Channel.HELLO:
                return machine.DeviceSaid(place.device, place.channel, parse(Hello, arrived.payload))
            if place.channel is Channel.STATE:
                return machine.DeviceSaid(place.device, place.channel, parse(Presence, arrived.payload))
            return machine.DeviceSaid(
                place.device, place.channel, decode(arrived.payload, _TYPES.get(place.channel, ()))
            )
        except ProtocolError as error:
            self._drops.add("undecodable", "dropped a payload on %s: %s", arrived.topic[:120], error.message)
            return machine.Garbled(device, error.message) if device else None
