"""The queue between network and loop, alone and under a flood over a real broker."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from fedzo.edge_runtime.connection.inbox import Inbox
from fedzo.edge_runtime.connection.mqtt_types import Publication
from fedzo.edge_runtime.connection.send_queue import SendQueue
from fedzo.edge_runtime.connection.transport import (
    Arrived,
    Connected,
    Delivered,
    MqttTransport,
    Rejected,
    TransportEvent,
)
from fedzo.protocol.errors import BrokerError
from tests.broker_fixtures import Client, RunningBroker

Connect = Callable[..., Client]


def message(size: int = 1) -> Arrived:
    return Arrived("a", b"x" * size, False, None)


def wait_until_it_pauses(inbox: Inbox[TransportEvent]) -> None:
    deadline = time.monotonic() + 20.0
    while not inbox.pauses:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("size", "count"), [(1, 10), (50, 2)], ids=["messages", "bytes"])
def test_full_at_its_limit_and_open_again_at_half(size: int, count: int) -> None:
    inbox: Inbox[Arrived] = Inbox(10, 100)
    for _ in range(count):
        assert inbox.has_room()
        inbox.put(message(size))
    assert not inbox.has_room()
    assert (len(inbox), inbox.bytes, inbox.pauses) == (count, size * count, 1)
    inbox.get()
    while inbox.bytes * 2 >= 100 or len(inbox) * 2 >= 10:
        assert not inbox.has_room()
        inbox.get()
    assert inbox.has_room()
    assert (inbox.pauses, inbox.peak) == (1, count)


def test_own_events_are_always_taken_and_the_order_is_kept() -> None:
    inbox: Inbox[object] = Inbox(2, 10)
    for number in range(5):
        inbox.put(number)
    assert [inbox.get() for _ in range(5)] == list(range(5))
    assert inbox.empty()
    with pytest.raises(queue.Empty):
        inbox.get(timeout=0.01)


def test_a_flood_waits_in_the_broker_and_nothing_is_lost(mosquitto: RunningBroker, connect: Connect) -> None:
    """The reader stands still while thousands of reports come, then it gets each of them once and in order."""
    limit, total = 100, 3000
    inbox: Inbox[TransportEvent] = Inbox(limit, 1 << 20)
    reader = MqttTransport(mosquitto.url, "reader", on_event=inbox.put, subscriptions=["reports"], manual_ack=True,
                           may_read=inbox.has_room)  # fmt: skip
    reader.connect(15.0)
    writer = connect(mosquitto.url, "writer", max_inflight=20, max_queued=total)
    last = 0
    for number in range(total):
        last = writer.transport.publish("reports", number.to_bytes(4, "big"))
    wait_until_it_pauses(inbox)
    deepest = 0
    for _ in range(50):
        deepest = max(deepest, len(inbox))
        time.sleep(0.01)
    assert deepest < 2 * limit, "what waits in this process stays near the limit"
    seen: list[int] = []
    while len(seen) < total:
        event = inbox.get(timeout=15.0)
        if isinstance(event, Arrived) and event.token is not None:
            seen.append(int.from_bytes(event.payload, "big"))
            reader.acknowledge(event.token)
    assert seen == list(range(total))
    writer.wait(Delivered, message_id=last)
    assert inbox.pauses >= 1
    assert inbox.peak < 2 * limit
    reader.close()


def test_messages_without_acknowledgement_are_held_back_too(mosquitto: RunningBroker, connect: Connect) -> None:
    """QoS 0 has no window: only the unread socket slows the broker down."""
    inbox: Inbox[TransportEvent] = Inbox(50, 1 << 20)
    reader = MqttTransport(mosquitto.url, "reader", on_event=inbox.put, subscriptions=["telemetry"],
                           may_read=inbox.has_room)  # fmt: skip
    reader.connect(15.0)
    writer = connect(mosquitto.url, "writer", max_queued=5000, max_queued_bytes=1 << 30)
    for _ in range(2000):
        writer.transport.publish("telemetry", b"x" * 2000, qos=0)
    wait_until_it_pauses(inbox)
    time.sleep(0.3)
    assert len(inbox) < 100
    assert inbox.pauses == 1
    reader.close()


def test_a_reader_that_waits_still_sends(mosquitto: RunningBroker, connect: Connect) -> None:
    may_read = threading.Event()
    held = connect(mosquitto.url, "held", may_read=may_read.is_set, connected=False)
    may_read.set()
    held.transport.connect(15.0)
    may_read.clear()
    listener = connect(mosquitto.url, "listener", subscriptions=["out"])
    held.transport.publish("out", b"said while held")
    listener.wait(Arrived, payload=b"said while held")
    may_read.set()
    held.wait(Delivered)


def test_a_reader_that_waits_for_very_long_loses_its_link_and_nothing_else(
    mosquitto: RunningBroker, connect: Connect
) -> None:
    may_read = threading.Event()
    may_read.set()
    held = connect(
        mosquitto.url, "held", subscriptions=["in"], may_read=may_read.is_set, keepalive_s=1, manual_ack=True,
        clean_start=False, session_expiry_s=60,
    )  # fmt: skip
    writer = connect(mosquitto.url, "writer")
    may_read.clear()
    writer.transport.publish("in", b"patience")
    time.sleep(3.0)
    may_read.set()
    held.wait(Arrived, payload=b"patience")


# ---------------------------------------------------------------------- what is to be sent


def test_what_finds_no_room_is_counted_and_refused() -> None:
    waiting = SendQueue(3, 100, threading.Condition())
    numbers = [waiting.add(Publication("a", b"x" * size), None, connected=False) for size in (40, 40, 40, 20, 1, 1)]
    assert [number in waiting for number in numbers] == [True, True, False, True, False, False]
    assert (len(waiting), waiting.bytes, waiting.overflowed) == (3, 100, 3)
    assert [waiting.take_overflow() for _ in range(4)] == [numbers[2], numbers[4], numbers[5], None]
    waiting.add(Publication("a", b"x", qos=0), None, connected=True)
    assert (waiting.overflowed, waiting.forgotten) == (4, 1)
    waiting.finish(numbers[0])
    assert waiting.bytes == 60
    waiting.link_lost()
    assert (len(waiting), waiting.bytes) == (2, 60)


def test_one_message_may_be_larger_than_the_queue() -> None:
    waiting = SendQueue(3, 100, threading.Condition())
    assert waiting.add(Publication("a", bytes(500)), None, connected=False) in waiting
    assert waiting.add(Publication("a", b"x"), None, connected=False) not in waiting


def keep_trying(transport: MqttTransport) -> None:
    with suppress(BrokerError):
        transport.connect(5.0)


def test_a_client_without_a_broker_keeps_a_bounded_queue(connect: Connect) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"mqtt://127.0.0.1:{unused.getsockname()[1]}"
        client = connect(url, "client", connected=False, max_queued=1000, max_queued_bytes=50_000)
        threading.Thread(target=keep_trying, args=(client.transport,), daemon=True).start()
        for _ in range(2000):
            client.transport.publish("a", bytes(100))
        assert client.transport.queue.bytes == 50_000
        assert client.transport.queue.overflowed == 1500
        client.wait(Rejected)
        assert not [event for event in client.seen if isinstance(event, Connected)]
