"""Two servers of one federation at one broker."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedzo.broker_server.brokers.external import ExternalBroker
from fedzo.broker_server.history.run_folder import RunFolder
from fedzo.broker_server.journal import MemoryJournal
from fedzo.broker_server.rivals import Rivals
from fedzo.broker_server.server import Server
from fedzo.edge_runtime.connection import retry
from fedzo.edge_runtime.connection.transport import Arrived, Connected, Disconnected
from fedzo.protocol.errors import BrokerError
from fedzo.protocol.settings import RunSettings
from fedzo.protocol.wire.documents import ServerPresence
from fedzo.protocol.wire.topics import Channel, topic
from tests.broker_fixtures import Client, Proxy, RunningBroker, wait_until
from tests.edge_runtime.conftest import write_artifact

SRV = "fedzo/v1/default/srv"
Start = Callable[[str, str], "Serving"]


class Serving:
    """A server on a thread."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.error: BrokerError | None = None
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()
        wait_until(lambda: server.state.is_connected and server._rivals._is_announced)

    def _serve(self) -> None:
        try:
            self.server.serve()
        except BrokerError as error:
            self.error = error


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """``start(url, run)``: a server that waits for a device."""
    monkeypatch.setattr(retry, "_CAP_S", 0.5)
    write_artifact(tmp_path / "artifact")
    begun: list[Serving] = []

    def begin(url: str, run: str) -> Serving:
        folder = RunFolder.create(tmp_path / "runs", tmp_path / "artifact", name=run)
        document = folder.document(RunSettings(devices=1, quorum=1))
        begun.append(Serving(Server(folder, document, ExternalBroker(url), MemoryJournal())))
        return begun[-1]

    yield begin
    for serving in begun:
        serving.server.stop()
        serving.thread.join(20.0)


def test_the_later_server_stays_and_the_older_one_says_why_it_ends(broker: RunningBroker, start: Start) -> None:
    older, later = start(broker.url, "run-1"), start(broker.url, "run-2")
    older.thread.join(20.0)
    assert older.error is not None
    assert older.error.message == "another fedzo serve took over federation 'default' at this broker"
    assert older.error.hint == "stop it, or give this one --federation NAME"
    assert older.error.exit_code == 5
    assert later.thread.is_alive()
    assert later.error is None


def test_the_later_server_has_the_boards(mosquitto: RunningBroker, start: Start) -> None:
    older, later = start(mosquitto.url, "run-1"), start(mosquitto.url, "run-2")
    older.thread.join(20.0)
    wait_until(lambda: later.server.state.is_connected)
    listener = Client(mosquitto.url, "listener", subscriptions=["fedzo/v1/default/run", SRV])
    listener.transport.connect(20.0)
    listener.wait(Arrived, payload=ServerPresence(True, later.server._rivals._birth).encode())
    runs = [event.payload for event in listener.seen if isinstance(event, Arrived) and event.topic != SRV]
    assert runs
    assert b"run-2" in runs[-1]
    sent, received = later.server.traffic[SRV]
    assert sent > 0
    assert received == 0, "what it said itself comes from no device"
    listener.transport.close()
    assert later.thread.is_alive()
    assert later.error is None


def test_a_server_that_comes_back_after_a_break_is_no_rival_of_its_own(proxy: Proxy, start: Start) -> None:
    serving = start(proxy.url, "run-1")
    for _ in range(2):
        before = proxy.links
        proxy.cut()
        wait_until(lambda: proxy.links > before)  # noqa: B023 (waits here)
        wait_until(lambda: serving.server.state.is_connected)
    assert serving.thread.is_alive()
    assert serving.error is None


def presence(birth: int, *, online: bool = True) -> Arrived:
    return Arrived(SRV, ServerPresence(online, birth).encode(), True, None)


@pytest.mark.parametrize(
    ("births", "ends"),
    [
        ([5, 10], False),  # of a server that was killed
        ([5, 10, 10], False),  # its own will
        ([5, 10, 4], False),  # a broker that lost power
        ([5, 10, 5], False),
        ([10, 20], True),
        ([5, 10, 7], True),  # a machine whose clock is behind
        ([30, 10, 40], True),
        ([30, 10, 30], False),  # one that it replaced, whose clock is ahead
    ],
)
def test_only_a_server_that_came_later_is_a_rival(births: list[int], ends: bool) -> None:
    events: list[object] = []
    rivals = Rivals("default", 10, events.append)
    for birth in births:
        rivals.hear(presence(birth))
    assert (rivals.error is not None) is ends
    assert (rivals.error in events) is ends
    assert sum(isinstance(event, Arrived) for event in events) == len(births), "the broker waits for each of them"


def test_nonsense_is_no_rival() -> None:
    rivals = Rivals("default", 10, lambda event: None)
    for payload in (presence(10).payload, b"", b"nonsense", b'{"kind": "server", "online": true}'):
        rivals.hear(Arrived(SRV, payload, True, None))
    assert rivals.error is None


def test_a_link_that_breaks_again_and_again_has_a_cause_to_look_for(caplog: pytest.LogCaptureFixture) -> None:
    rivals = Rivals("default", 10, lambda event: None)
    with caplog.at_level(logging.WARNING, "fedzo"):
        for generation in range(1, 7):
            rivals.hear(Connected(True, "5", generation))
            rivals.hear(Disconnected("cut"))
            rivals.hear(Disconnected("nobody listens there"))
    assert [record.message for record in caplog.records] == [
        "the link breaks again and again: does another fedzo serve the federation default at this broker?"
    ]


@pytest.mark.parametrize(
    ("found", "ends"),
    [(500, False), (10_000_000, True), (10_002_000, True), (9_000_000, True)],  # long gone; later; clocks may differ
)
def test_what_a_broker_remembers_of_long_ago_is_no_rival(found: int, ends: bool) -> None:
    """Another node of a cluster may have kept the presence of a server that ended before this one began."""
    events: list[object] = []
    rivals = Rivals("farm", 10_001_000, events.append)
    for birth in (10_001_000, found):
        payload = ServerPresence(birth != 500, birth).encode()
        rivals.hear(Arrived(topic("farm", Channel.SERVER), payload, True, None))
    assert (rivals.error is not None) is ends
    assert len(events) == 2 + ends
