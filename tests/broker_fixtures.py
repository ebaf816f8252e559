"""Brokers, clients and a breakable link, for every test that needs the network."""

from __future__ import annotations

import queue
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import pytest

from fedzo.broker_server.brokers import Broker
from fedzo.broker_server.brokers.embedded import EmbeddedBroker
from fedzo.broker_server.brokers.external import ExternalBroker
from fedzo.broker_server.brokers.mosquitto import MosquittoBroker, find_mosquitto
from fedzo.edge_runtime.connection.transport import MqttTransport, TransportEvent

__all__ = ["Client", "Proxy", "RunningBroker", "broker", "connect", "mosquitto", "proxy", "wait_until"]

Event = TypeVar("Event")

needs_mosquitto = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")


def wait_until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Poll until a condition holds; a busy machine may take long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)


class Client:
    """A transport whose events wait in a list."""

    def __init__(self, url: str, client_id: str, **settings: Any) -> None:
        self._arrived: queue.Queue[TransportEvent] = queue.Queue()
        self.seen: list[TransportEvent] = []
        self.transport = MqttTransport(url, client_id, on_event=self._arrived.put, **settings)

    def wait(self, kind: type[Event], timeout_s: float = 60.0, **wanted: object) -> Event:
        """The next event of a kind whose attributes are as wanted; earlier others are kept in ``seen``."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                event = self._arrived.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {kind.__name__} {wanted} within {timeout_s} s; seen: {self.seen}") from None
            self.seen.append(event)
            if isinstance(event, kind) and all(getattr(event, name) == value for name, value in wanted.items()):
                return event

    def idle(self, seconds: float = 0.3) -> list[TransportEvent]:
        """Everything that comes in a while."""
        time.sleep(seconds)
        events = []
        with suppress(queue.Empty):
            while True:
                events.append(self._arrived.get_nowait())
        self.seen += events
        return events


class Proxy:
    """A TCP relay that counts bytes and can be cut or frozen, as cables and radio links do."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._closed = False
        self.frozen = False  # relay nothing
        self.refusing = False  # accept nothing
        self.bytes_up = 0
        self.bytes_down = 0
        self.links = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def is_linked(self) -> bool:
        """Whether somebody is connected through it."""
        return bool(self._pairs)

    def cut(self) -> None:
        """Break all links at once, without goodbye."""
        for pair in list(self._pairs):
            self._break(pair)

    def close(self) -> None:
        self._closed = True
        self._thread.join()
        self.cut()
        self._listener.close()

    def _break(self, pair: tuple[socket.socket, socket.socket]) -> None:
        with suppress(ValueError):
            self._pairs.remove(pair)
        for end in pair:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _run(self) -> None:
        while not self._closed:
            pairs = list(self._pairs)
            ends = [end for pair in pairs for end in pair if end.fileno() >= 0]
            with suppress(OSError, ValueError):  # cut from another thread meanwhile
                readable, _, _ = select.select([self._listener, *([] if self.frozen else ends)], [], [], 0.02)
                if self._listener in readable:
                    self._accept()
                for pair in pairs:
                    for source, sink in (pair, pair[::-1]):
                        if source in readable:
                            self._relay(pair, source, sink)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        if self.refusing:
            client.close()
            return
        try:
            server = socket.create_connection(self._target, timeout=5)
        except OSError:
            client.close()
            return
        self.links += 1
        for end in (client, server):
            end.settimeout(5)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._pairs.append((client, server))

    def _relay(self, pair: tuple[socket.socket, socket.socket], source: socket.socket, sink: socket.socket) -> None:
        try:
            data = source.recv(65536)
            if not data:
                raise ConnectionError
            if source is pair[0]:
                self.bytes_up += len(data)
            else:
                self.bytes_down += len(data)
            sink.sendall(data)
        except OSError:
            self._break(pair)


class RunningBroker:
    """A broker that a test may restart, also when it only plays an external one."""

    def __init__(self, broker: Broker, behind: Broker | None = None) -> None:
        self.broker = broker
        self._process = behind or broker

    @property
    def url(self) -> str:
        return self.broker.url

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("mqtt://").rpartition(":")
        return host, int(port)

    def start(self) -> None:
        self._process.start()
        self.broker.start()

    def stop(self) -> None:
        self.broker.stop()
        self._process.stop()


@pytest.fixture(
    params=[
        pytest.param("mosquitto", marks=needs_mosquitto),
        "embedded",
        pytest.param("external", marks=needs_mosquitto),
    ]
)
def broker(request: pytest.FixtureRequest) -> Iterator[RunningBroker]:
    """Each kind of broker, started, on a free port."""
    running = _make(request.param)
    yield running
    running.stop()


@pytest.fixture
def mosquitto() -> Iterator[RunningBroker]:
    """A started mosquitto for tests that need only one good broker."""
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    running = _make("mosquitto")
    yield running
    running.stop()


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Client]]:
    """``connect(url, client_id, **settings)``: a connected client, closed at the end of the test."""
    monkeypatch.setattr("fedzo.edge_runtime.connection.retry._BASE_S", 0.1)  # tests have no fleet to spread
    monkeypatch.setattr("fedzo.edge_runtime.connection.retry._CAP_S", 1.0)
    clients: list[Client] = []

    def factory(url: str, client_id: str, *, connected: bool = True, **settings: Any) -> Client:
        client = Client(url, client_id, **settings)
        clients.append(client)
        if connected:
            client.transport.connect(15.0)
        return client

    yield factory
    for client in clients:
        client.transport.close(timeout_s=0.5)


@pytest.fixture
def proxy(broker: RunningBroker) -> Iterator[Proxy]:
    """A breakable link to ``broker``."""
    relay = Proxy(broker.address)
    yield relay
    relay.close()


def _make(kind: str) -> RunningBroker:
    if kind == "embedded":
        running = RunningBroker(EmbeddedBroker(port=0))
        running.start()
        return running
    process = MosquittoBroker(port=0)
    process.start()
    if kind == "mosquitto":
        return RunningBroker(process)
    running = RunningBroker(ExternalBroker(process.url), behind=process)
    running.start()
    return running
