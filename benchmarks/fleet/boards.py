"""Boards without a computer: a TCP connection, the device's state machine and random losses each.

Everything that a board says is real: its own connection with a will, hello, presence, requests, reports with their
scalars, acknowledgements. What it does not do is compute (scalars are random numbers), check signatures, which takes a
board's own time, and keep files (its store holds the graphs from the start, its outbox is memory).
"""

from __future__ import annotations

import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedzo.edge_runtime.connection.inbound import read_message
from fedzo.protocol.device_side import device_events as machine
from fedzo.protocol.device_side.device import Device
from fedzo.protocol.device_side.parts import Parts
from fedzo.protocol.errors import FedzoError
from fedzo.protocol.wire.documents import Announcement, Hello, Presence, ServerPresence
from fedzo.protocol.wire.messages import Receipt, Report, ReportKind, UpdateRecord, Verdict
from fedzo.protocol.wire.signed import detach, is_signed
from fedzo.protocol.wire.topics import RETAINED, Channel, device_subscriptions, parse_topic, topic

from . import packets

__all__ = ["Board", "Fleet", "Seen"]

FEDERATION = "default"
SESSION = 1
RETRY_S = 60.0
"""A fleet of one machine is slow all at once; real boards ask again after 5 s."""
MOST_CONNECTING = 64
"""Mosquitto listens with a backlog of 100."""
_SHARED = (Channel.SERVER, Channel.RUN, Channel.HEAD, Channel.LOG)
_RECEIVE_BYTES = 1 << 16


@dataclass
class Seen:
    """What the fleet has seen so far.

    Attributes:
        receipts: Receipts of accepted reports.
        others: Receipts of any other verdict.
        updates: When the first board had an update record, by its round.
        heads: When the first board had an announcement, by its round.
        births: Servers that have announced themselves.
        online: Boards whose subscriptions are granted.
        error: What a board ended with.
    """

    receipts: int = 0
    others: int = 0
    updates: dict[int, float] = field(default_factory=dict)
    heads: dict[int, float] = field(default_factory=dict)
    births: int = 0
    online: int = 0
    error: FedzoError | None = None


class Board:
    """One board.

    Args:
        fleet: Where it lives.
        number: From 0.
    """

    __slots__ = ("_buffer", "_fleet", "_held", "_inbox", "_packet_id", "_topics", "machine", "name",
                 "number", "sock", "waiting")  # fmt: skip

    def __init__(self, fleet: Fleet, number: int) -> None:
        self._fleet, self.number = fleet, number
        self.name = f"board-{number:05d}"
        hello = Hello(SESSION, "rpi-zero-2w", 160.0, 500, 50, "fedzo 0.1.0, numpy 2.4.6, onnxruntime 1.32.0", "aarch64")
        self.machine = Device(hello, retry_s=RETRY_S, parts=fleet.parts)
        self._held: dict[bytes, bytes] = {}
        self._buffer, self._packet_id = bytearray(), 0
        self._topics: dict[Channel, bytes] = {}
        self.sock: socket.socket | None = None
        self.waiting = b""

    # --- the link -------------------------------------------------------------------------------------------------

    def open(self, address: tuple[str, int]) -> None:
        """Begin to connect."""
        self.sock = sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(BlockingIOError):
            sock.connect(address)
        state = topic(FEDERATION, Channel.STATE, self.name)
        self.waiting = packets.connect(self.name, state, Presence(SESSION, "lost").encode())

    def send(self, data: bytes) -> None:
        """Write what can be written now, and keep the rest."""
        if self.waiting:
            self.waiting += data
            return
        assert self.sock is not None
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self.waiting = data[sent:]
            self._fleet.watch(self, writing=True)

    def flush(self) -> None:
        """The socket can be written to."""
        data, self.waiting = self.waiting, b""
        self._fleet.watch(self, writing=False)
        self.send(data)

    def receive(self) -> None:
        """The socket can be read."""
        assert self.sock is not None
        try:
            data = self.sock.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        if not data:
            raise ConnectionError(f"the broker closed the link of {self.name}")
        self._buffer += data
        acknowledgements = b""
        for kind, flags, body in packets.split(self._buffer):
            if kind == packets.PUBLISH:
                name, payload, packet_id = packets.message(flags, body)
                if packet_id:
                    acknowledgements += packets.puback(packet_id)
                self._fleet.arrived(self, name, payload)
            elif kind == packets.CONNACK:
                if body[1]:
                    raise ConnectionError(f"the broker refuses {self.name}: reason {body[1]:#x}")
                self.send(packets.subscribe(device_subscriptions(FEDERATION, self.name)))
            elif kind == packets.SUBACK:
                self._fleet.seen.online += 1
                self.on(machine.Connected())
        if acknowledgements:
            self.send(acknowledgements)

    def publish(self, channel: Channel, payload: bytes) -> bytes:
        """The packet of a message."""
        self._packet_id = self._packet_id % 65_535 + 1
        if channel not in self._topics:
            self._topics[channel] = topic(FEDERATION, channel, self.name).encode()
        return packets.publish(self._topics[channel], payload, self._packet_id, retain=channel in RETAINED)

    # --- the machine ----------------------------------------------------------------------------------------------

    def on(self, event: machine.DeviceEvent) -> None:
        """Give an event to the machine, and carry out what it wants."""
        events = deque([event])
        while events:
            for command in self.machine.on(events.popleft(), time.monotonic()):
                self._carry_out(command, events)

    def _carry_out(self, command: machine.DeviceCommand, events: deque[machine.DeviceEvent]) -> None:
        if isinstance(command, machine.Send):
            packet = self.publish(command.channel, command.message.encode())
            if isinstance(command.message, Report):
                self._fleet.report(self, packet, command.message.round)
            else:
                self.send(packet)
        elif isinstance(command, (machine.FindBlob, machine.StoreBlob)):
            if isinstance(command, machine.StoreBlob):
                self._held[command.sha256] = self._fleet.kept(command.data)
            data = self._held.get(command.sha256, self._fleet.blobs.get(command.sha256))
            found = data is not None
            events.append(machine.BlobFound(command.sha256, found, data if data is not None and command.read else b""))
        elif isinstance(command, machine.Plan):
            events.append(machine.Planned(command.run.run, 56.0, 16))
        elif isinstance(command, machine.Prepare):
            events.append(machine.Prepared(command.run.run, command.mask_sha256))
        elif isinstance(command, machine.Compute):
            events.append(machine.Computed(command.task.number, self._fleet.outcome(self, command.task)))
        elif isinstance(command, machine.Finish) and command.error is not None:
            self._fleet.seen.error = command.error


class Fleet:
    """All boards, on one thread.

    Args:
        count: How many.
        address: Of the broker.
        parts: What their machines share.
        blobs: What each has in its store from the start.
        batch: Samples behind a scalar.
        check: Called while the fleet waits; raises if there is nothing left to wait for.

    Attributes:
        seen: What has arrived.
        held: Packets of reports that are kept back until :meth:`release`.
        holds_from: Reports from this round on are kept back: then all boards can begin to send at the same moment.
    """

    def __init__(
        self,
        count: int,
        address: tuple[str, int],
        parts: Parts,
        blobs: dict[bytes, bytes],
        *,
        batch: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.parts, self.blobs, self._address, self._batch, self.check = parts, blobs, address, batch, check
        self.boards = [Board(self, number) for number in range(count)]
        self.seen, self.held, self.holds_from = Seen(), list[tuple[Board, bytes]](), 1 << 32
        self._selector, self._checked = selectors.DefaultSelector(), 0.0
        self._rng = np.random.default_rng(1)
        self._parsed: dict[tuple[bytes, bytes], machine.Received] = {}
        self._kept: dict[bytes, bytes] = {}
        self._scalars: dict[tuple[int, ...], NDArray[np.float32]] = {}

    def connect(self, timeout_s: float) -> None:
        """Bring all boards online, a few at a time.

        Raises:
            TimeoutError: Not in time.
        """
        opened = 0
        deadline = time.monotonic() + timeout_s
        while self.seen.online < len(self.boards):
            while opened < len(self.boards) and opened - self.seen.online < MOST_CONNECTING:
                board = self.boards[opened]
                board.open(self._address)
                assert board.sock is not None
                self._selector.register(board.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, board)
                opened += 1
            self.turn(0.1)
            self._look()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.seen.online} of {len(self.boards)} boards are online after {timeout_s:g} s")

    def turn(self, timeout_s: float) -> None:
        """Do what is due at the sockets."""
        for key, mask in self._selector.select(timeout_s):
            board = key.data
            if mask & selectors.EVENT_WRITE:
                board.flush()
            if mask & selectors.EVENT_READ:
                board.receive()

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 120.0) -> None:
        """Let everything happen until a condition holds.

        Raises:
            TimeoutError: It does not.
            FedzoError: A board ended.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout_s:g} s for {what}: {self.seen}")
            self.turn(0.05)
            self._look()

    def _look(self) -> None:
        """Whether it is worth to go on; about once a second."""
        if self.seen.error is not None:
            raise self.seen.error
        if time.monotonic() > self._checked + 1.0:
            self._checked = time.monotonic()
            self.check()

    def release(self, count: int | None = None) -> float:
        """Let boards, or the first ``count`` of them, send their reports; when, by ``time.monotonic``."""
        held, self.held = self.held[:count], self.held[len(self.held) if count is None else count :]
        start = time.monotonic()
        for board, packet in held:
            board.send(packet)
        return start

    def close(self) -> None:
        """Say goodbye and hang up."""
        for board in self.boards:
            if board.sock is not None:
                with suppress(OSError):
                    board.sock.send(packets.disconnect())
                board.sock.close()
        self._selector.close()

    # --- for the boards -------------------------------------------------------------------------------------------

    def watch(self, board: Board, *, writing: bool) -> None:
        """Watch a board's socket."""
        assert board.sock is not None
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if writing else 0)
        self._selector.modify(board.sock, events, board)

    def arrived(self, board: Board, name: bytes, payload: bytes) -> None:
        """A message for a board; what is the same for all is parsed once."""
        key = (name, payload)
        received = self._parsed.get(key)
        if received is None:
            text = name.decode()
            channel = parse_topic(text).channel
            document = detach(channel, payload)[0] if is_signed(channel, payload) else payload
            received = read_message(FEDERATION, board.name, text, document)
            if received.channel in _SHARED:
                self._parsed[key] = received
                self._first(received)
        if isinstance(received.message, Receipt):
            if received.message.verdict is Verdict.ACCEPTED:
                self.seen.receipts += 1
            else:
                self.seen.others += 1
        board.on(received)

    def _first(self, received: machine.Received) -> None:
        now = time.monotonic()
        if isinstance(received.message, Announcement):
            self.seen.heads.setdefault(received.message.round, now)
        elif isinstance(received.message, ServerPresence):
            self.seen.births += received.message.online
        elif isinstance(received.message, UpdateRecord):
            self.seen.updates.setdefault(received.message.round, now)

    def report(self, board: Board, packet: bytes, round_: int) -> None:
        """A board's report is ready."""
        if round_ >= self.holds_from:
            self.held.append((board, packet))
        else:
            board.send(packet)

    def kept(self, data: bytes) -> bytes:
        """The one copy of a blob that many boards keep."""
        return self._kept.setdefault(data, data)

    def outcome(self, board: Board, task: machine.Task) -> machine.Outcome:
        """What a board would have measured."""
        if task.kind is not ReportKind.PROBE:
            return machine.Outcome((np.array([2.3, 5.0, 50.0], np.float32),), 50, 2.3, 50, 100, 57_000)
        sizes = tuple(part.size for part in task.positions)
        row = self._rows(sizes)[board.number]
        ends = np.cumsum(sizes)[:-1]
        return machine.Outcome(tuple(np.split(row, ends)), self._batch, 2.3, 1 + sum(sizes), 1500, 57_000)

    def _rows(self, sizes: Sequence[int]) -> NDArray[np.float32]:
        """Random scalars of all boards."""
        key = tuple(sizes)
        if key not in self._scalars:
            self._scalars[key] = self._rng.normal(size=(len(self.boards), sum(sizes))).astype(np.float32)
        return self._scalars[key]
