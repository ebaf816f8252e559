"""The byte counters against the wire."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedzo.edge_runtime.connection.traffic import Traffic, publish_packet_bytes
from fedzo.edge_runtime.connection.transport import (
    Arrived,
)
from tests.broker_fixtures import Client, Proxy, RunningBroker, needs_mosquitto, wait_until

Connect = Callable[..., Client]


@needs_mosquitto
@pytest.mark.parametrize("payload_bytes", [0, 100, 20_000])
def test_counted_bytes_are_those_on_the_wire(payload_bytes: int, mosquitto: RunningBroker, connect: Connect) -> None:
    proxy = Proxy(mosquitto.address)
    client = connect(proxy.url, "client", subscriptions=["loop"])
    time.sleep(0.2)
    up, down, traffic = proxy.bytes_up, proxy.bytes_down, client.transport.traffic
    for _ in range(10):
        client.transport.publish("loop", bytes(payload_bytes))
    client.transport.publish("other", b"with expiry", expiry_s=60)
    client.transport.publish("other", b"at most once", qos=0)
    for _ in range(10):
        client.wait(Arrived)
    # Nobody is told of the last acknowledgements.
    wait_until(lambda: (traffic.bytes_up, traffic.bytes_down) == (proxy.bytes_up - up, proxy.bytes_down - down))
    time.sleep(0.2)
    assert (traffic.bytes_up, traffic.bytes_down) == (proxy.bytes_up - up, proxy.bytes_down - down)
    sent, received = traffic.by_topic()["loop"]
    assert (sent.messages, sent.payload_bytes) == (10, 10 * payload_bytes)
    assert (received.messages, received.payload_bytes) == (10, 10 * payload_bytes)
    client.transport.close()
    proxy.close()


@given(topic=st.text(st.characters(codec="ascii"), min_size=1, max_size=300), size=st.integers(0, 3_000_000))
def test_packet_lengths_are_those_of_the_specification(topic: str, size: int) -> None:
    for qos in (0, 1):
        for properties in (None, 0, 5):
            remaining = 2 + len(topic) + 2 * qos + (0 if properties is None else 1 + properties) + size
            digits = 1
            while remaining >> (7 * digits):
                digits += 1
            assert publish_packet_bytes(topic, size, qos, properties) == 1 + digits + remaining


def test_invented_topics_do_not_fill_the_memory() -> None:
    traffic = Traffic()
    for number in range(10_000):
        traffic.received(f"a/{number}", 1, 10)
    assert len(traffic.by_topic()) == 4097
    assert traffic.by_topic()["(other)"][1].messages == 10_000 - 4096
    assert traffic.down.messages == 10_000
