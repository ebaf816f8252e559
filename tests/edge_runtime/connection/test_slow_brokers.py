"""A broker that sends and does not read: what it would have to be told does not pile up here."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import pytest

from fedzo.edge_runtime.connection import buffered_client, mqtt_link
from fedzo.edge_runtime.connection.endpoint import Endpoint
from fedzo.edge_runtime.connection.mqtt_link import Link, LinkSettings
from fedzo.edge_runtime.connection.wake import Wake

MESSAGES = 60_000
PINGREQ = b"\xc0\x00"


def publish(mid: int, qos: int = 1) -> bytes:
    """MQTT 3.1.1, to the topic ``t``, without a payload."""
    return bytes([0x30 | qos << 1, 5, 0, 1]) + b"t" + mid.to_bytes(2, "big")


@dataclass
class Peer:
    """A link, and the test's end of it with small buffers in the kernel."""

    link: Link
    there: socket.socket
    wake: Wake
    told: list[int] = field(default_factory=list)
    unsent: bytes = b""

    def turn(self) -> None:
        """Give the link what it takes, and one step."""
        with suppress(BlockingIOError):
            while self.unsent:
                self.unsent = self.unsent[self.there.send(self.unsent[:50_000]) :]
        self.link.step(self.wake, 0.0)

    @property
    def waiting(self) -> int:
        """Packets that wait in paho's queue."""
        return len(self.link._client._out_packet)


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    monkeypatch.setattr(mqtt_link, "_PAUSE_S", 0.001)
    wake = Wake()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        settings = LinkSettings(
            Endpoint.parse(f"mqtt://127.0.0.1:{listener.getsockname()[1]}"),
            "board-1", None, None, None, None, 60, True, 0, False, 4096, (),
        )  # fmt: skip
        told: list[int] = []
        link = Link(
            settings,
            "3.1.1",
            connack_timeout_s=30.0,
            on_accepted=lambda _: None,
            on_message=lambda _topic, _payload, _qos, _retain, mid, _size: told.append(mid),
            on_acknowledged=lambda *_: None,
        )
        link.open()
        there, _ = listener.accept()
        with there:
            link.step(wake, 0.0)
            there.recv(1000)
            there.send(b"\x20\x02\x00\x00")
            here = link._socket()
            assert here is not None
            here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            while not link.ready:
                link.step(wake, 0.1)
            there.setblocking(False)
            yield Peer(link, there, wake, told)
            link.close()
    wake.close()


def test_acknowledgements_that_nobody_reads_end_the_reading(peer: Peer) -> None:
    peer.unsent = b"".join(publish(1 + number % 65_535) for number in range(MESSAGES))
    most, before = 0, -1
    while len(peer.told) > before:
        before = len(peer.told)
        for _ in range(20):
            peer.turn()
            most = max(most, peer.waiting)
    assert peer.link.loss is None
    assert most <= buffered_client._MAX_ANSWERS + 10
    assert len(peer.told) < MESSAGES  # the rest waits in the sockets
    # Once the broker reads, all goes on, in order.
    found = bytearray()
    while len(found) < 4 * MESSAGES:
        peer.turn()
        assert peer.link.loss is None
        with suppress(BlockingIOError):
            found += peer.there.recv(100_000)
    assert peer.told == [1 + number % 65_535 for number in range(MESSAGES)]
    assert found == b"".join(b"\x40\x02" + mid.to_bytes(2, "big") for mid in peer.told)


def test_a_broker_that_pings_for_ever_is_not_answered_for_ever(peer: Peer) -> None:
    """A broker must not ask; paho answers it all the same."""
    peer.unsent = PINGREQ * MESSAGES
    while peer.unsent and not peer.link._client.is_clogged:
        peer.turn()
    for _ in range(50):
        peer.turn()
        assert peer.waiting <= buffered_client._MAX_ANSWERS + 10
    assert peer.link._client.is_clogged
    assert peer.link.loss is None


@pytest.mark.parametrize("qos", [2, 3])
def test_a_message_that_would_wait_for_its_release_ends_the_link(peer: Peer, qos: int) -> None:
    peer.unsent = publish(7, qos)
    for _ in range(100):
        peer.turn()
        if peer.link.loss is not None:
            break
    assert peer.link.loss is not None
    assert not peer.told
    assert not peer.link._client._in_messages


def test_many_acknowledgements_at_once_cost_no_pause(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server acknowledges thousands of reports in one turn; a broker that reads takes them at once."""
    monkeypatch.setattr(mqtt_link, "_PAUSE_S", 3600.0)
    peer.link._client._manual_ack = True
    peer.there.settimeout(30)
    for number in range(3000):
        peer.link.acknowledge(1 + number)
    peer.turn()
    found = b""
    while len(found) < 12_000:
        found += peer.there.recv(12_000)
        peer.turn()
    assert peer.waiting == 0
