"""The transport against brokers that misbehave, and against a real one."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedzo.edge_runtime.connection import retry as retry_module
from fedzo.edge_runtime.connection import transport as transport_module
from fedzo.edge_runtime.connection.endpoint import Endpoint, TlsConfig
from fedzo.edge_runtime.connection.mqtt_link import Link, LinkSettings
from fedzo.edge_runtime.connection.transport import (
    Arrived,
    Connected,
    Delivered,
    Disconnected,
    MqttTransport,
    Publication,
    Rejected,
    Token,
    TransportEvent,
    Will,
)
from fedzo.protocol.errors import BrokerError, ConfigError
from tests.broker_fixtures import Client, Proxy, RunningBroker, needs_mosquitto, wait_until
from tests.edge_runtime.fake_broker import PUBACK, PUBLISH, SUBSCRIBE, FakeBroker, FakeLink, accept, serve

Connect = Callable[..., Client]
Script = Callable[[FakeLink], None]
PUBACK_BYTES = 4


# ---------------------------------------------------------------------- which version of MQTT


def hang(link: FakeLink) -> None:
    link.wait_for_end()


def drop(link: FakeLink) -> None:
    link.cut()


def refuse_as_3_1_1(link: FakeLink) -> None:
    link.send(b"\x20\x02\x00\x01")


def refuse_as_5(link: FakeLink) -> None:
    link.connack(0x84)


def only(level: int, refusal: Script) -> Script:
    return lambda link: accept(link) if link.level == level else refusal(link)


@pytest.mark.parametrize("refusal", [hang, drop, refuse_as_3_1_1, refuse_as_5])
def test_a_broker_without_mqtt_5_gets_3_1_1(refusal: Script, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_module, "_FIRST_V5_CONNACK_TIMEOUT_S", 0.3)
    with FakeBroker(only(4, refusal)) as broker:
        client = connect(broker.url, "client", subscriptions=["a"], will=Will("w", b"lost"))
        assert client.wait(Connected) == Connected(False, "3.1.1", 1)
        assert not [event for event in client.seen if isinstance(event, Disconnected)], "falling back is no failure"
        client.wait(Delivered, message_id=client.transport.publish("a", b"x", expiry_s=60))
        assert broker.levels == [5, 4]


# ---------------------------------------------------------------------- the first connection


def refuse(code: int) -> Script:
    return lambda link: link.connack(code)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (refuse(0x86), "Bad user name or password"),
        (refuse(0x87), "Not authorized"),
        (refuse(0x85), "Client identifier not valid"),
        (only(9, lambda link: link.connack(5) if link.level == 4 else refuse_as_3_1_1(link)), "Not authorized"),
        (only(9, lambda link: link.connack(4) if link.level == 4 else refuse_as_3_1_1(link)), "Bad user name"),
    ],
)
def test_a_refused_login_fails_at_once(script: Script, words: str) -> None:
    with FakeBroker(script) as broker:
        transport = MqttTransport(
            broker.url, "dev-1", username="dev-1", password="hunter2", on_event=lambda event: None
        )
        started = time.monotonic()
        with pytest.raises(BrokerError, match=words) as caught:
            transport.connect(20.0)
        assert time.monotonic() - started < 5.0
        assert f"127.0.0.1:{broker.port}" in caught.value.message
    assert "password" in caught.value.hint
    assert "hunter2" not in caught.value.message + repr(transport.endpoint)


def test_a_refused_subscription_fails_at_once() -> None:
    def script(link: FakeLink) -> None:
        link.connack()
        while True:
            kind, _, body = link.read()
            if kind == SUBSCRIBE:
                link.suback(body, 0x87)

    with FakeBroker(script) as broker:
        transport = MqttTransport(broker.url, "c", subscriptions=["a/secret"], on_event=lambda event: None)
        with pytest.raises(BrokerError, match="refused the subscription to a/secret"):
            transport.connect(20.0)


def test_a_busy_broker_is_asked_again(connect: Connect) -> None:
    with FakeBroker(refuse(0x89), refuse(0x88), accept) as broker:
        client = connect(broker.url, "client")
        assert client.wait(Connected).generation == 1
        assert len(broker.levels) == 3


@pytest.mark.parametrize(
    ("url", "words", "hint"),
    [
        ("mqtt://127.0.0.1:{free}", r"127.0.0.1:\d+ within 1 s: nobody listens there", "start the broker"),
        ("mqtt://no-such-host.invalid", "no-such-host.invalid:1883 within 1 s: the host name", "check the host name"),
        ("mqtt://" + "a" * 70 + ".example", "the host name", "check the host name"),
    ],
)
def test_a_broker_that_cannot_be_reached_is_named(url: str, words: str, hint: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    transport = MqttTransport(url.format(free=free), "client", on_event=lambda event: None)
    with pytest.raises(BrokerError, match=words) as caught:
        transport.connect(1.0)
    assert hint in caught.value.hint
    assert caught.value.exit_code == 5


def test_a_host_that_never_answers_ends_with_the_time_out() -> None:
    with FakeBroker(hang) as broker:
        transport = MqttTransport(broker.url, "client", on_event=lambda event: None)
        started = time.monotonic()
        with pytest.raises(BrokerError, match=r"within 0\.5 s: no answer so far"):
            transport.connect(0.5)
        assert time.monotonic() - started < 3.0


@pytest.mark.parametrize(
    "settings",
    [
        {"url": "http://broker"},
        {"client_id": ""},
        {"keepalive_s": 0},
        {"keepalive_s": 70_000},
        {"max_packet_bytes": 10},
        {"session_expiry_s": -1},
        {"max_inflight": 0},
        {"max_queued": 0},
        {"will": Will("w", bytes(70_000))},
        {"tls": TlsConfig()},
        {"url": "mqtts://broker", "tls": TlsConfig(ca=Path("/no/such/file"))},
    ],
)
def test_bad_settings_are_refused_before_anything_is_sent(settings: dict[str, object]) -> None:
    arguments: dict[str, object] = {"url": "mqtt://broker", "client_id": "client"} | settings
    with pytest.raises(ConfigError):
        MqttTransport(on_event=lambda event: None, **arguments)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- losing the connection


def test_a_refusal_after_the_first_success_is_retried_for_ever(connect: Connect) -> None:
    def accept_and_cut(link: FakeLink) -> None:
        link.connack()
        link.suback(link.read()[2])
        time.sleep(0.1)

    with FakeBroker(accept_and_cut, refuse(0x86), refuse(0x87), accept) as broker:
        client = connect(broker.url, "client", subscriptions=["a"])
        assert client.wait(Connected).generation == 1
        client.wait(Disconnected, reason="the broker refused the connection: Bad user name or password")
        client.wait(Disconnected, reason="the broker refused the connection: Not authorized")
        assert client.wait(Connected).generation == 2


NONSENSE = [
    b"\x00\x00",  # reserved packet type
    b"\xf0\x00",  # AUTH, never asked for
    b"\x40\xff\xff\xff\xff\x7f",  # a length of five bytes
    b"\x30\x01\x00",  # a topic longer than its packet
    b"\x32\x05\x00\x01a\x00",  # a packet id cut short
    b"\x36\x05\x00\x01a\x00\x01",  # QoS 3
    b"\x40\x02\xff\xfe",  # an acknowledgement for nothing
    b"\x40\x03\x00\x01\x77",  # with a reason code that does not exist
    b"\x90\x03\x00\x01\x00",  # SUBACK without codes
    b"\x30\x05\x00\x02\xff\xfex",  # a topic that is not UTF-8
    b"\x32\x08\x00\x02\xff\xfe\x00\x09\x00x",  # the same with QoS 1
    b"\x30\x06\x00\x01a\x02\x7f\x00",  # an unknown property
    b"\xe0\x01\x8e",  # DISCONNECT: session taken over
    b"\xe0\x01\x01",  # DISCONNECT with a reason that does not exist
    b"\x20\x03\x00\x00\x00",  # a second CONNACK
    b"\x10\x00",  # CONNECT, from a broker
    bytes(range(64)),
]


@pytest.mark.parametrize("nonsense", NONSENSE, ids=lambda data: data[:8].hex())
@pytest.mark.parametrize("level", [4, 5])
def test_nonsense_from_the_broker_never_ends_the_network_thread(nonsense: bytes, level: int, connect: Connect) -> None:
    def talk(link: FakeLink) -> None:
        if link.level != level:
            refuse_as_3_1_1(link)
            return
        link.connack()
        link.suback(link.read()[2])
        link.send(nonsense)
        time.sleep(0.1)  # then the link is cut

    scripts = [talk, talk, accept] if level == 4 else [talk, accept]
    with FakeBroker(*scripts) as broker:
        client = connect(broker.url, "client", subscriptions=["a"])
        client.wait(Disconnected)
        client.wait(Connected)
        client.wait(Delivered, message_id=client.transport.publish("a", b"still here"))


def test_a_failing_handler_loses_its_event_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[TransportEvent] = []

    def handler(event: TransportEvent) -> None:
        seen.append(event)
        raise RuntimeError("a bug of the user")

    with FakeBroker(accept) as broker:
        transport = MqttTransport(broker.url, "client", on_event=handler)
        with caplog.at_level(logging.CRITICAL, logger="fedzo"):
            transport.connect(10.0)
            ids = [transport.publish("a", b"x") for _ in range(3)]
            transport.close()
    assert seen == [Connected(False, "5", 1), *map(Delivered, ids)]


def test_a_peer_that_stops_answering_is_left(connect: Connect) -> None:
    def deaf(link: FakeLink) -> None:
        link.connack()
        link.wait_for_end()

    with FakeBroker(deaf, accept) as broker:
        client = connect(broker.url, "client", keepalive_s=1)
        assert "Keep alive timeout" in client.wait(Disconnected, timeout_s=60.0).reason
        client.wait(Connected, generation=2)
        assert not [event for event in client.idle(2.5) if isinstance(event, Disconnected)], "pings keep it up"


def test_a_broker_that_acknowledges_nothing_is_left(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "_PUBACK_TIMEOUT_S", 0.5)

    def sink(link: FakeLink) -> None:
        link.connack()
        link.wait_for_end()

    with FakeBroker(sink, accept) as broker:
        client = connect(broker.url, "client")
        message_id = client.transport.publish("a", b"x")
        assert "acknowledged nothing" in client.wait(Disconnected).reason
        client.wait(Delivered, message_id=message_id)


def test_the_brokers_own_words_are_passed_on(connect: Connect) -> None:
    def throw_out(link: FakeLink) -> None:
        link.connack()
        link.suback(link.read()[2])
        link.send(b"\xe0\x06\x8e\x04\x1f\x00\x01x")  # with a reason string: paho 2.0 skips shorter ones

    with FakeBroker(throw_out, accept) as broker:
        client = connect(broker.url, "twin", subscriptions=["a"])
        assert client.wait(Disconnected).reason == "the broker closed the link: Session taken over"
        client.wait(Connected, generation=2)


@needs_mosquitto
def test_reconnecting_leaks_nothing(mosquitto: RunningBroker, connect: Connect) -> None:
    others = threading.enumerate()
    proxy = Proxy(mosquitto.address)
    client = connect(proxy.url, "client", subscriptions=["a"])
    client.wait(Connected)

    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = open_files()
    for generation in range(2, 8):
        proxy.cut()
        client.wait(Connected, generation=generation)
    wait_until(lambda: open_files() <= before + 1)  # the relay closes its ends on a thread of its own
    client.transport.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "mqtt-client" and thread not in others]
    proxy.close()


# ---------------------------------------------------------------------- publishing


@pytest.mark.parametrize("topic", ["", "a/+/b", "a/#", "a\0", "a" * 70_000])
def test_topics_that_cannot_be_published_on(topic: str) -> None:
    transport = MqttTransport("mqtt://127.0.0.1:1", "client", on_event=lambda event: None)
    with pytest.raises(ValueError, match="topic"):
        transport.publish(topic, b"")
    with pytest.raises(ValueError, match="QoS 2"):
        transport.publish("a", b"", qos=2)
    transport.close()


def test_the_window_is_the_smaller_of_both_sides(connect: Connect) -> None:
    arrived: list[bytes] = []
    go_on = threading.Event()

    def slow(link: FakeLink) -> None:
        link.connack(properties=b"\x21\x00\x02")  # Receive Maximum 2
        while True:
            kind, _, body = link.read()
            assert kind == PUBLISH
            arrived.append(body[3:5])
            if len(arrived) == 2:
                assert go_on.wait(60)
                link.puback(arrived[0])
                link.puback(arrived[1])
            elif len(arrived) > 2:
                link.puback(body[3:5])

    with FakeBroker(slow) as broker:
        client = connect(broker.url, "client", max_inflight=4)
        ids = [client.transport.publish("a", b"x") for _ in range(6)]
        wait_until(lambda: len(arrived) >= 2)
        time.sleep(0.3)
        assert len(arrived) == 2
        go_on.set()
        for message_id in ids:
            assert client.wait(Delivered).message_id == message_id


def test_what_needs_no_answer_waits_in_the_queue_for_a_broker_that_does_not_read(connect: Connect) -> None:
    """Receipts are such messages: the queue has a limit, what is behind it in the library has none."""
    arrived: list[int] = []
    go_on = threading.Event()

    def slow(link: FakeLink) -> None:
        link.connack()
        assert go_on.wait(60)
        while True:
            kind, _, body = link.read()
            assert kind == PUBLISH
            arrived.append(int.from_bytes(body[4:8], "big"))

    with FakeBroker(slow) as broker:
        client = connect(broker.url, "client", max_queued=10_000, max_queued_bytes=64 << 20)
        for number in range(5_000):
            client.transport.publish("a", number.to_bytes(4, "big") + bytes(8_000), qos=0)
        time.sleep(1.0)
        assert len(client.transport.queue) > 1_000
        go_on.set()
        wait_until(lambda: len(arrived) == 5_000, 60.0)
        assert arrived == list(range(5_000))
        assert len(client.transport.queue) == 0


def test_a_message_over_the_brokers_limit_is_rejected_not_lost_in_silence(connect: Connect) -> None:
    def small(link: FakeLink) -> None:
        link.connack(properties=b"\x27\x00\x00\x00\x64")  # Maximum Packet Size 100
        serve(link)

    with FakeBroker(small) as broker:
        client = connect(broker.url, "client")
        large, fits = client.transport.publish("a", bytes(93)), client.transport.publish("a", bytes(92))
        reason = client.wait(Rejected, message_id=large).reason
        assert reason == "a packet of 101 bytes exceeds the broker's limit of 100"
        client.wait(Delivered, message_id=fits)


def test_a_refused_publish_is_rejected_once(connect: Connect) -> None:
    def forbid(link: FakeLink) -> None:
        link.connack()
        while True:
            kind, _, body = link.read()
            if kind == PUBLISH:
                link.puback(body[3:5], 0x87)

    with FakeBroker(forbid) as broker:
        client = connect(broker.url, "client")
        message_id = client.transport.publish("a", b"x")
        assert client.wait(Rejected).message_id == message_id
        assert not client.transport.is_pending(message_id)
        assert client.idle() == []


def test_a_full_queue_rejects_and_keeps_what_it_has(connect: Connect) -> None:
    with FakeBroker(drop, drop, drop, drop, accept) as broker:
        client = connect(broker.url, "client", connected=False, max_queued=3)
        ids = [client.transport.publish("a", b"%d" % n) for n in range(5)]
        dropped = client.transport.publish("a", b"qos 0 while offline", qos=0)
        client.transport.connect(15.0)
        outcome = [client.wait(Rejected).message_id for _ in ids[3:]]
        assert outcome == ids[3:]
        for message_id in ids[:3]:
            client.wait(Delivered, message_id=message_id)
        assert not client.transport.is_pending(dropped)


def test_a_message_that_expired_is_not_sent(connect: Connect) -> None:
    with FakeBroker(drop, drop, accept) as broker:
        client = connect(broker.url, "client", connected=False)
        stale = client.transport.publish("a", b"x", expiry_s=0.0)
        fresh = client.transport.publish("a", b"y", expiry_s=60.0)
        client.transport.connect(15.0)
        assert "expired" in client.wait(Rejected, message_id=stale).reason
        client.wait(Delivered, message_id=fresh)


def test_publishing_waits_for_the_subscriptions(connect: Connect) -> None:
    order: list[int] = []

    def watch(link: FakeLink) -> None:
        link.connack()
        kind, _, body = link.read()
        order.append(kind)
        time.sleep(0.3)
        order.append(0)
        link.suback(body)
        kind, _, body = link.read()
        order.append(kind)
        link.puback(body[3:5])
        link.wait_for_end()

    with FakeBroker(watch) as broker:
        client = connect(broker.url, "client", connected=False, subscriptions=["a"])
        client.transport.publish("a", b"x")
        client.transport.connect(10.0)
        client.wait(Delivered)
        assert order == [SUBSCRIBE, 0, PUBLISH]


@needs_mosquitto
def test_threads_may_publish_at_once(mosquitto: RunningBroker, connect: Connect) -> None:
    listener = connect(mosquitto.url, "listener", subscriptions=["a/+"])
    client = connect(mosquitto.url, "client")

    def work(number: int) -> None:
        for index in range(50):
            client.transport.publish(f"a/{number}", b"%d" % index)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    got: dict[str, list[int]] = {}
    for _ in range(200):
        arrived = listener.wait(Arrived)
        got.setdefault(arrived.topic, []).append(int(arrived.payload))
    assert got == {f"a/{n}": list(range(50)) for n in range(4)}
    for thread in threads:
        thread.join()


# ---------------------------------------------------------------------- acknowledging by hand


@needs_mosquitto
def test_what_is_not_acknowledged_comes_again(mosquitto: RunningBroker, connect: Connect) -> None:
    proxy = Proxy(mosquitto.address)
    server = connect(proxy.url, "server", subscriptions=["a"], manual_ack=True, clean_start=False, session_expiry_s=60)
    speaker = connect(mosquitto.url, "speaker")
    tokens = {}
    for payload in (b"1", b"2", b"3"):
        speaker.transport.publish("a", payload)
        tokens[payload] = server.wait(Arrived, payload=payload).token
    first, second = tokens[b"1"], tokens[b"2"]
    assert isinstance(first, Token)
    assert isinstance(second, Token)
    relayed = proxy.bytes_up
    assert server.transport.acknowledge(first)
    wait_until(lambda: proxy.bytes_up >= relayed + PUBACK_BYTES)
    time.sleep(0.3)  # the broker reads it
    proxy.cut()
    assert server.wait(Connected, generation=2).session_present
    again = [server.wait(Arrived) for _ in range(2)]
    assert [event.payload for event in again] == [b"2", b"3"]
    assert not server.transport.acknowledge(second), "a token of the old connection"
    relayed = proxy.bytes_up
    for event in again:
        assert event.token is not None
        assert server.transport.acknowledge(event.token)
    wait_until(lambda: proxy.bytes_up >= relayed + 2 * PUBACK_BYTES)
    time.sleep(0.3)
    proxy.cut()
    server.wait(Connected, generation=3)
    assert not [event for event in server.idle(0.5) if isinstance(event, Arrived)]
    server.transport.close()
    proxy.close()


def test_a_stale_token_does_not_acknowledge_the_message_that_took_its_number(connect: Connect) -> None:
    acknowledged: list[int] = []
    done = threading.Event()

    def first(link: FakeLink) -> None:
        link.connack()
        link.publish("a", b"old", mid=7)
        time.sleep(0.2)

    def second(link: FakeLink) -> None:
        link.connack()
        link.publish("a", b"new", mid=7)
        while True:
            kind, _, body = link.read()
            if kind == PUBACK:
                acknowledged.append(int.from_bytes(body[:2], "big"))
                done.set()

    with FakeBroker(first, second) as broker:
        client = connect(broker.url, "client", manual_ack=True)
        old = client.wait(Arrived, payload=b"old").token
        new = client.wait(Arrived, payload=b"new").token
        assert old is not None
        assert new is not None
        assert not client.transport.acknowledge(old)
        assert not done.wait(0.3)
        assert client.transport.acknowledge(new)
        assert done.wait(60)
        assert acknowledged == [7]


def test_acknowledgements_are_sent_before_the_goodbye() -> None:
    acknowledged: list[int] = []

    def script(link: FakeLink) -> None:
        link.connack()
        for mid in range(1, 6):
            link.publish("a", b"x", mid=mid)
        while True:
            kind, _, body = link.read()
            if kind == PUBACK:
                acknowledged.append(int.from_bytes(body[:2], "big"))

    with FakeBroker(script) as broker:
        client = Client(broker.url, "client", manual_ack=True)
        client.transport.connect(10.0)
        for _ in range(5):
            token = client.wait(Arrived).token
            assert token is not None
            client.transport.acknowledge(token)
        client.transport.close()
        wait_until(lambda: len(acknowledged) >= 5)
    assert acknowledged == [1, 2, 3, 4, 5]


# ---------------------------------------------------------------------- ending


def test_closing(connect: Connect) -> None:
    with FakeBroker(accept) as broker:
        client = connect(broker.url, "client")
        client.transport.close(Publication("a", b"off"))
        client.transport.close(Publication("a", b"off"))
        assert [event for event in client.idle() if isinstance(event, Delivered)] == [Delivered(1)]
        assert not client.transport.connected
        with pytest.raises(BrokerError, match="closed"):
            client.transport.publish("a", b"x")
        MqttTransport(broker.url, "never connected", on_event=lambda event: None).close()


def test_closing_from_the_handler() -> None:
    ended = threading.Event()

    def handler(event: TransportEvent) -> None:
        if isinstance(event, Connected):
            transport.close()
            ended.set()

    with FakeBroker(accept) as broker:
        transport = MqttTransport(broker.url, "client", on_event=handler, subscriptions=["a"])
        with pytest.raises(BrokerError):
            transport.connect(5.0)
        assert ended.is_set()


def test_closing_does_not_wait_for_a_broker_that_is_gone(connect: Connect) -> None:
    broker = FakeBroker(accept)
    with broker:
        client = connect(broker.url, "client")
    client.wait(Disconnected)
    client.transport.publish("a", b"x")
    started = time.monotonic()
    client.transport.close(Publication("a", b"off"))
    assert time.monotonic() - started < 4.0  # less than the wait for acknowledgements


@needs_mosquitto
def test_small_packets_do_not_wait_for_company(mosquitto: RunningBroker) -> None:
    settings = LinkSettings(
        Endpoint.parse(mosquitto.url), "client", None, None, None, None, 30, True, 0, False, 65_536, ()
    )
    link = Link(
        settings, "5", connack_timeout_s=5.0,
        on_accepted=lambda *_: None, on_message=lambda *_: None, on_acknowledged=lambda *_: None,
    )  # fmt: skip
    link.open()
    sock = link._socket()
    assert sock is not None
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    link.close()
