"""One system call for many packets: nothing is lost, reordered or held back."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator

import pytest
from paho.mqtt.enums import CallbackAPIVersion

from fedzo.edge_runtime.connection.buffered_client import BufferedClient
from fedzo.edge_runtime.connection.wake import Wake

DISCONNECT = b"\xe0\x00"


class Counted:
    """A socket that counts its calls."""

    def __init__(self, inner: socket.socket) -> None:
        self._inner = inner
        self.reads = self.writes = 0

    def recv(self, size: int) -> bytes:
        self.reads += 1
        return self._inner.recv(size)

    def send(self, data: bytes) -> int:
        self.writes += 1
        return self._inner.send(data)


@pytest.fixture
def pair() -> Iterator[tuple[BufferedClient, Counted, socket.socket]]:
    here, there = socket.socketpair()
    for end in (here, there):
        end.setblocking(False)
    client = BufferedClient(CallbackAPIVersion.VERSION2)
    counted = Counted(here)
    client._sock = counted  # type: ignore[assignment]
    yield client, counted, there
    client._sock = None
    here.close()
    there.close()


def test_one_read_serves_many(pair: tuple[BufferedClient, Counted, socket.socket]) -> None:
    client, counted, there = pair
    data = bytes(range(256)) * 20
    there.send(data)
    client.refill()
    found = b"".join(client._sock_recv(size) for size in (1, 1, 0, 500) for _ in range(2))
    assert found == data[: len(found)]
    assert counted.reads == 1
    while client.has_unread:
        found += client._sock_recv(700)
    assert found == data


def test_the_socket_is_read_once_a_turn(pair: tuple[BufferedClient, Counted, socket.socket]) -> None:
    """Else a broker that never pauses would keep the client from writing."""
    client, _, there = pair
    with pytest.raises(BlockingIOError):
        client._sock_recv(1)
    there.send(b"ab")
    client.refill()
    assert client._sock_recv(1) + client._sock_recv(1) == b"ab"
    there.send(b"c")
    with pytest.raises(BlockingIOError):
        client._sock_recv(1)
    client.refill()
    assert client._sock_recv(9) == b"c"


def test_the_end_of_the_link_is_seen(pair: tuple[BufferedClient, Counted, socket.socket]) -> None:
    client, _, there = pair
    there.send(b"z")
    there.close()
    client.refill()
    assert client._sock_recv(5) == b"z"
    client.refill()
    assert client._sock_recv(5) == b""


def test_packets_share_a_write(pair: tuple[BufferedClient, Counted, socket.socket]) -> None:
    client, counted, there = pair
    for number in range(100):
        assert client._sock_send(bytes([number, 1])) == 2
    assert (counted.writes, client.has_unsent) == (0, True)
    client.flush()
    assert (counted.writes, client.has_unsent) == (1, False)
    assert there.recv(1000) == b"".join(bytes([number, 1]) for number in range(100))


def test_what_the_socket_does_not_take_is_kept_in_order(pair: tuple[BufferedClient, Counted, socket.socket]) -> None:
    client, _, there = pair
    packets = [number.to_bytes(4, "big") * 500 for number in range(1, 2_000)]
    found, waiting = bytearray(), list(packets)
    while len(found) < sum(map(len, packets)):
        try:
            while waiting:
                client._sock_send(waiting[0])
                waiting.pop(0)
        except BlockingIOError:
            pass
        client.flush()
        assert len(client._unsent) < 100_000
        while select.select([there], [], [], 0)[0]:
            found += there.recv(30_000)
    assert bytes(found) == b"".join(packets)
    assert not client.has_unsent


def test_a_goodbye_goes_behind_everything_else(pair: tuple[BufferedClient, Counted, socket.socket]) -> None:
    client, _, there = pair
    client._sock_send(b"\x30\x00")
    client._sock_send(DISCONNECT)
    assert there.recv(100) == b"\x30\x00" + DISCONNECT


def test_a_goodbye_waits_for_a_socket_that_is_full(pair: tuple[BufferedClient, Counted, socket.socket]) -> None:
    client, _, there = pair
    large = b"\x30" + bytes(4 << 20)
    client._sock_send(large)
    with pytest.raises(BlockingIOError):
        client._sock_send(DISCONNECT)
    found = bytearray()
    while len(found) < len(large):
        found += there.recv(1 << 20)
        client.flush()
    client._sock_send(DISCONNECT)
    assert bytes(found) + there.recv(10) == large + DISCONNECT


def is_awake(wake: Wake) -> bool:
    return bool(select.select([wake.receiver], [], [], 0)[0])


def test_many_wake_ups_are_one_byte_and_the_next_one_another() -> None:
    wake = Wake()
    try:
        for _ in range(3):
            assert not is_awake(wake)
            for _ in range(1000):
                wake.set()
            assert is_awake(wake)
            assert wake.receiver.recv(100, socket.MSG_PEEK) == b"\0"
            wake.clear()
    finally:
        wake.close()


def test_no_wake_up_is_lost_between_two_threads() -> None:
    """Whoever is woken looks at the work; work that came before a wake-up is always seen."""
    wake, work, done, n = Wake(), [0], [0], 20_000

    def produce() -> None:
        for _ in range(n):
            work[0] += 1
            wake.set()

    producer = threading.Thread(target=produce)
    producer.start()
    try:
        while done[0] < n:
            assert select.select([wake.receiver], [], [], 10.0)[0], f"asleep at {done[0]} of {work[0]}"
            wake.clear()
            done[0] = work[0]
    finally:
        producer.join()
        wake.close()
