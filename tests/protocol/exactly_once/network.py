"""A network without time: whatever is on its way waits until the scheduler takes it.

One :class:`Flight` is one message on one of its two ways, up to the broker or down to a subscriber. As MQTT has it,
the topics of :data:`IN_ORDER` keep their order between one sender and one receiver, what is retained is given to
everybody who connects, and a link that breaks takes what it carried with it: a client that lives sends again what the
broker did not acknowledge, a client that died does not, and the broker gives a persistent session again what its
client did not acknowledge. Messages travel as objects; their codecs have tests of their own.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

from fedzo.protocol.wire.topics import FROM_DEVICE, RETAINED, Channel

__all__ = ["SERVER", "Client", "Flight", "Network"]

IN_ORDER = (Channel.SERVER, Channel.RUN, Channel.STATE)
SERVER = "server"
Message = Any


class Flight:
    """A message on its way.

    Attributes:
        client: Whose link it uses; None for a will, which the broker itself publishes.
        up: Whether it goes to the broker.
        channel: The channel.
        device: Whose topic; empty on broadcast channels.
        message: What is sent.
    """

    __slots__ = ("channel", "client", "device", "is_in_order", "message", "up")

    def __init__(self, client: Client | None, up: bool, channel: Channel, device: str, message: Message) -> None:
        self.client, self.up, self.channel, self.device, self.message = client, up, channel, device, message
        self.is_in_order = channel in IN_ORDER

    def is_behind(self, other: Flight) -> bool:
        """Whether it must not come before another one that was sent earlier."""
        return (
            self.is_in_order
            and self.channel is other.channel
            and self.device == other.device
            and self.up == other.up
            and (self.up or self.client is other.client)
        )


class Client:
    """A client of the broker.

    Attributes:
        name: Device id, or :data:`SERVER`.
        is_server: Whether it is the server.
        alive: Whether the process runs.
        online: Whether it has a link.
        held: What waits for the next link, oldest first.
        keeps_session: Whether the broker keeps what comes while it is away.
        queues: Whether its transport keeps what it publishes without a link.
        local: What happens inside the process, in order: answers of stores and engines.
    """

    def __init__(self, network: Network, name: str) -> None:
        self.network = network
        self.name = name
        self.is_server = name == SERVER
        self.alive = self.online = False
        self.held: list[Flight] = []
        self.keeps_session = False
        self.queues = True
        self.local: deque[Callable[[], None]] = deque()

    def on_link(self, up: bool) -> None:
        """The link came or went."""
        raise NotImplementedError

    def receive(self, flight: Flight) -> None:
        """A message came."""
        raise NotImplementedError

    def will(self) -> Flight:
        """What the broker publishes when the link breaks."""
        raise NotImplementedError


class Network:
    """The broker and all links.

    Args:
        source: Of everything that happens by chance.

    Attributes:
        flights: What is on its way over links that are up, oldest first.
        retained: By channel and device.
        unacknowledged: What the server has received and not acknowledged.
    """

    def __init__(self, source: random.Random) -> None:
        self.random = source
        self.flights: list[Flight] = []
        self.retained: dict[tuple[Channel, str], Message] = {}
        self.unacknowledged: list[Flight] = []
        self.clients: list[Client] = []

    # --- links ----------------------------------------------------------------------------------------------------

    def connect(self, client: Client) -> None:
        """Give a client a link; its transport sends what waits, the broker what it kept."""
        client.online = True
        self.flights += client.held
        client.held.clear()
        client.on_link(True)
        if not client.online:
            return  # It died of it.
        for (channel, device), message in self.retained.items():
            if (channel in FROM_DEVICE) is client.is_server:
                self.flights.append(Flight(client, False, channel, device, message))

    def disconnect(self, client: Client, *, will: bool = True) -> None:
        """Break a client's link. Whether it lives decides what becomes of what the link carried."""
        if not client.online:
            return
        client.online = False
        mine = [flight for flight in self.flights if flight.client is client]
        self.flights = [flight for flight in self.flights if flight.client is not client]
        if client.is_server:
            if client.keeps_session:  # what was not acknowledged comes first
                client.held += [flight for flight in self.unacknowledged if flight not in mine]
            self.unacknowledged.clear()
        for flight in mine:
            if not flight.up:
                if client.keeps_session:
                    client.held.append(flight)
            elif client.alive and client.queues:
                # The broker may have taken it, and only its acknowledgement was lost.
                if self.random.random() < 0.3:
                    self.flights.append(Flight(None, True, flight.channel, flight.device, flight.message))
                client.held.append(flight)
            elif self.random.random() < 0.5:
                self.flights.append(Flight(None, True, flight.channel, flight.device, flight.message))
        if will:
            self.flights.append(client.will())
        if client.alive:
            client.on_link(False)

    def restart_broker(self, *, forgets: bool) -> None:
        """Every link breaks; without its disk the broker forgets what is retained, its sessions and what it carried."""
        online = [client for client in self.clients if client.online]
        for client in online:
            self.disconnect(client, will=False)
        self.flights = [flight for flight in self.flights if flight.client is not None or not forgets]
        if forgets:
            self.retained.clear()
            for client in self.clients:
                client.held = [flight for flight in client.held if flight.up]

    # --- messages -------------------------------------------------------------------------------------------------

    def publish(self, client: Client, channel: Channel, message: Message, device: str = "") -> None:
        """A client publishes."""
        flight = Flight(client, True, channel, device, message)
        if client.online:
            self.flights.append(flight)
        elif client.queues:
            client.held.append(flight)

    def deliver(self, index: int, *, again: bool = False) -> None:
        """Let a flight arrive, or an earlier one that it must not overtake; with ``again`` it stays on its way."""
        flight = self.flights[index]
        if flight.is_in_order:
            index, flight = next((i, f) for i, f in enumerate(self.flights) if f is flight or flight.is_behind(f))
        if not again:
            del self.flights[index]
        if flight.up:
            self._arrive(flight)
            return
        client = flight.client
        assert client is not None
        if client.is_server and not again:
            self.unacknowledged.append(flight)
        client.receive(flight)

    def lose(self, index: int) -> None:
        """Lose a flight; on a retained topic MQTT would break the link with it."""
        flight = self.flights[index]
        if flight.client is None:
            return
        if flight.channel in RETAINED:
            self.disconnect(flight.client)
        else:
            del self.flights[index]

    def _arrive(self, flight: Flight) -> None:
        channel, device = flight.channel, flight.device
        if channel in RETAINED:
            self.retained[channel, device] = flight.message
        to_server = channel in FROM_DEVICE
        for client in self.clients:
            wanted = client.is_server is to_server and (to_server or not device or device == client.name)
            if wanted and client.online:
                self.flights.append(Flight(client, False, channel, device, flight.message))
            elif wanted and client.keeps_session:
                client.held.append(Flight(client, False, channel, device, flight.message))
