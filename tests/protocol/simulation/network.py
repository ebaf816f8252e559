"""Virtual time, nodes with clocks of their own, and a broker that loses, repeats and reorders what it may."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedzo.protocol.wire.codec import BinaryMessage, decode
from fedzo.protocol.wire.documents import (
    Announcement,
    Document,
    Hello,
    Order,
    Presence,
    RunDocument,
    ServerPresence,
    parse,
)
from fedzo.protocol.wire.topics import BROADCAST, FROM_DEVICE, RETAINED, Channel, parse_topic, topic

FEDERATION = "test"
SERVER = "server"
LATENCY_S = 0.01
IN_ORDER = (Channel.SERVER, Channel.RUN, Channel.STATE)  # MQTT keeps the order within a topic, and here it matters
DOCUMENTS: dict[Channel, type[Document]] = {
    Channel.SERVER: ServerPresence,
    Channel.RUN: RunDocument,
    Channel.HEAD: Announcement,
    Channel.COMMAND: Order,
    Channel.HELLO: Hello,
    Channel.STATE: Presence,
}


@dataclass
class Faults:
    """What goes wrong on the way.

    Attributes:
        drop: Chance that a message is lost. On a retained topic the link breaks with it, as MQTT would have it.
        duplicate: Chance that a message comes twice.
        delay_s: Largest extra delay; messages overtake each other.
        crash: Chance that a node dies before a command is carried out.
    """

    drop: float = 0.0
    duplicate: float = 0.0
    delay_s: float = 0.0
    crash: float = 0.0


class Simulation:
    """Virtual time; everything that happens by chance comes from one seed."""

    def __init__(self, seed: int, faults: Faults) -> None:
        self.now = 0.0
        self.random = random.Random(seed)
        self.faults = faults
        self.events = 0
        self.broker = Broker(self)
        self._queue: list[tuple[float, int, Callable[[], object]]] = []
        self._number = itertools.count()

    def nodes(self) -> Sequence[Node]:
        """Every client of the broker."""
        raise NotImplementedError

    def describe(self) -> str:
        """Where everybody is, for a failed test."""
        raise NotImplementedError

    def later(self, delay_s: float, action: Callable[[], object]) -> None:
        """Do something at a later time; equal times keep their order."""
        heapq.heappush(self._queue, (self.now + delay_s, next(self._number), action))

    def run(self, until: Callable[[], bool], *, limit_s: float = 10_000.0, limit_events: int = 300_000) -> None:
        """Let time pass until something is true; fails when that takes too long."""
        end = self.now + limit_s
        while not until():
            assert self._queue, f"nothing is left to happen at {self.now:.2f} s: {self.describe()}"
            time, _, action = heapq.heappop(self._queue)
            assert time <= end, f"too slow: {self.describe()}"
            self.now, self.events = max(self.now, time), self.events + 1
            assert self.events < limit_events, f"too many events: {self.describe()}"
            action()

    def pass_time(self, seconds: float) -> None:
        """Let some time pass."""
        end = self.now + seconds
        while self._queue and self._queue[0][0] <= end:
            self.now, _, action = heapq.heappop(self._queue)
            self.events += 1
            action()
        self.now = end

    def crashes(self) -> bool:
        """Whether a node dies now."""
        return self.faults.crash > 0 and self.random.random() < self.faults.crash

    def crash(self, node: Node) -> None:
        """Kill a node and start it again after some seconds."""
        node.crash()

        def restart() -> None:
            if not node.alive:
                node.start()

        self.later(self.random.uniform(0.1, 8), restart)

    def break_link(self, node: Node, seconds: float | None = None) -> None:
        """Take a node's link away and give it back after some seconds."""
        self.broker.disconnect(node)
        seconds = self.random.uniform(0.1, 3) if seconds is None else seconds

        def mend() -> None:
            if not node.online:
                self.broker.connect(node)

        node.later(seconds, mend)

    def restart_broker(self, *, keep_retained: bool) -> None:
        """Everybody loses the link, and the broker perhaps its memory."""
        for node in self.nodes():
            if node.alive and node.online:
                self.broker.disconnect(node, will=False)
                self.break_link(node)
        if not keep_retained:
            self.broker.retained.clear()


class Node:
    """A client of the broker with a clock of its own.

    Attributes:
        name: Device id, or ``server``.
        clock_ahead_s: What its clock shows more than the world's time; only ever grows.
        alive: Whether the process runs.
        online: Whether it has a link.
        link: Number of the current link; what was sent over an older one is lost.
    """

    def __init__(self, world: Simulation, name: str) -> None:
        self.world = world
        self.name = name
        self.clock_ahead_s = 0.0
        self.alive = self.online = False
        self.link = 0
        self.life = 0
        self._tick = itertools.count()
        self._last_tick = -1

    @property
    def clock(self) -> float:
        """What its clock shows."""
        return self.world.now + self.clock_ahead_s

    @property
    def wakeup(self) -> float | None:
        """Of its state machine."""
        raise NotImplementedError

    def start(self) -> None:
        """Boot, and connect a little later."""
        raise NotImplementedError

    def tick(self) -> None:
        """Give the state machine a Tick."""
        raise NotImplementedError

    def receive(self, channel: Channel, device: str, message: Document | BinaryMessage) -> None:
        """Take a message from the network."""
        raise NotImplementedError

    def on_link(self, up: bool) -> None:
        """The link came or went."""
        raise NotImplementedError

    def will(self) -> tuple[str, bytes]:
        """What the broker publishes when the link breaks."""
        raise NotImplementedError

    def crash(self) -> None:
        """Lose everything but the disk."""
        self.alive = False
        self.life += 1
        self.world.broker.disconnect(self)

    def later(self, delay_s: float, action: Callable[[], object]) -> None:
        """Something that happens in this process, unless it dies before."""
        life = self.life

        def guarded() -> None:
            if self.alive and self.life == life:
                action()

        self.world.later(delay_s, guarded)

    def sleep(self) -> None:
        """Arrange the next Tick; a wakeup that lies in the past would be a busy loop."""
        self._last_tick = number = next(self._tick)
        if not self.alive or (wakeup := self.wakeup) is None:
            return
        assert wakeup > self.clock, f"{self.name} wants to wake up at {wakeup}, it is {self.clock}"

        def due() -> None:
            if number == self._last_tick:
                if self.clock >= wakeup:
                    self.tick()
                else:  # rounding
                    self.later(1e-6, due)

        self.later(wakeup - self.clock, due)


class Broker:
    """Keeps what is retained, and loses, repeats and reorders the rest."""

    def __init__(self, world: Simulation) -> None:
        self._world = world
        self.retained: dict[str, bytes] = {}
        self._latest: dict[tuple[str, str], float] = {}

    def connect(self, node: Node) -> None:
        """Give a node a link, its subscriptions and what is retained on them."""
        node.online, node.link = True, node.link + 1
        node.on_link(True)
        for text, payload in list(self.retained.items()):
            self._deliver(text, payload, node)

    def disconnect(self, node: Node, *, will: bool = True) -> None:
        """Break a node's link."""
        if node.online:
            node.online, node.link = False, node.link + 1
            if will:
                text, payload = node.will()
                self._world.later(self._world.random.uniform(0, 1), lambda: self._arrive(text, payload))
            if node.alive:
                node.on_link(False)

    def publish(self, node: Node, channel: Channel, message: Document | BinaryMessage, device: str = "") -> None:
        """A node publishes; without a link the message is lost."""
        if node.online:
            text, payload = topic(FEDERATION, channel, device), message.encode()
            self._hop(node, text, lambda: self._arrive(text, payload))

    def _arrive(self, text: str, payload: bytes) -> None:
        place = parse_topic(text)
        if place.channel in RETAINED:
            self.retained[text] = payload
        for node in self._world.nodes():
            self._deliver(text, payload, node)

    def _deliver(self, text: str, payload: bytes, node: Node) -> None:
        place = parse_topic(text)
        if place.channel in FROM_DEVICE:
            wanted = node.name == SERVER
        else:
            wanted = node.name != SERVER and (place.channel in BROADCAST or place.device == node.name)
        if wanted and node.online:
            kind = DOCUMENTS.get(place.channel)
            message = decode(payload) if kind is None else parse(kind, payload)
            self._hop(node, text, lambda: node.receive(place.channel, place.device, message))

    def _hop(self, node: Node, text: str, action: Callable[[], None]) -> None:
        """One way between a node and the broker, over the node's present link."""
        faults, source, link = self._world.faults, self._world.random, node.link

        def guarded() -> None:
            if node.link == link:
                action()

        def broken() -> None:
            if node.link == link:
                self._world.break_link(node)

        if source.random() < faults.drop:
            if parse_topic(text).channel in RETAINED:
                self._world.later(source.uniform(0, 1), broken)
            return
        for _ in range(2 if source.random() < faults.duplicate else 1):
            delay = LATENCY_S + source.uniform(0, faults.delay_s)
            if parse_topic(text).channel in IN_ORDER:
                delay = max(delay, self._latest.get((node.name, text), 0.0) - self._world.now)
                self._latest[node.name, text] = self._world.now + delay
            self._world.later(delay, guarded)
