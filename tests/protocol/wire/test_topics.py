"""Topics: every channel round trips, nothing else parses, subscriptions are exact and disjoint."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedzo.protocol.errors import ConfigError, ProtocolError
from fedzo.protocol.wire.topics import (
    BROADCAST,
    FROM_DEVICE,
    RETAINED,
    TO_DEVICE,
    Channel,
    Topic,
    check_name,
    device_subscriptions,
    parse_topic,
    server_subscriptions,
    topic,
)
from tests.protocol.strategies import names

EXPECTED = {
    Channel.SERVER: "fedzo/v1/home/srv",
    Channel.RUN: "fedzo/v1/home/run",
    Channel.HEAD: "fedzo/v1/home/head",
    Channel.LOG: "fedzo/v1/home/log",
    Channel.HELLO: "fedzo/v1/home/d/pi-7/hello",
    Channel.STATE: "fedzo/v1/home/d/pi-7/state",
    Channel.REPORT: "fedzo/v1/home/d/pi-7/report",
    Channel.GET: "fedzo/v1/home/d/pi-7/get",
    Channel.ACK: "fedzo/v1/home/s/pi-7/ack",
    Channel.BLOCK: "fedzo/v1/home/s/pi-7/block",
    Channel.COMMAND: "fedzo/v1/home/s/pi-7/cmd",
}


@pytest.mark.parametrize("channel", Channel)
def test_topic_texts(channel: Channel) -> None:
    text = topic("home", channel, "pi-7")
    assert text == EXPECTED[channel]
    assert parse_topic(text) == Topic("home", channel, "" if channel in BROADCAST else "pi-7")


def test_every_channel_has_one_direction() -> None:
    assert sorted(c.value for c in (*BROADCAST, *FROM_DEVICE, *TO_DEVICE)) == sorted(c.value for c in Channel)
    assert set(RETAINED) == {Channel.SERVER, Channel.RUN, Channel.HEAD, Channel.STATE}


@given(federation=names, device=names, channel=st.sampled_from(Channel))
def test_round_trip(federation: str, device: str, channel: Channel) -> None:
    found = parse_topic(topic(federation, channel, device))
    assert found == Topic(federation, channel, "" if channel in BROADCAST else device)


@given(
    text=st.text(max_size=60)
    | st.lists(st.sampled_from(["fedzo", "v1", "d", "s", "a", "run", "ack", ""])).map("/".join)
)
def test_other_texts_are_refused_or_canonical(text: str) -> None:
    try:
        found = parse_topic(text)
    except ProtocolError:
        return
    assert topic(found.federation, found.channel, found.device) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fedzo/v1/home",
        "fedzo/v1/home/hello",
        "fedzo/v1/home/d/pi/run",
        "fedzo/v1/home/d/pi/ack",
        "fedzo/v1/home/s/pi/report",
        "fedzo/v1/home/x/pi/report",
        "fedzo/v1/home/d/pi/report/",
        "fedzo/v1/home/d//report",
        "fedzo/v1/home/d/+/report",
        "fedzo/v1/Home/run",
        "fedzo/v2/home/run",
        "other/v1/home/run",
        "/fedzo/v1/home/run",
        "fedzo/v1/home/run\n",
        "fedzo/v1/home/d/pi\n/report",
        f"fedzo/v1/{'a' * 49}/run",
    ],
)
def test_what_is_no_topic_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError):
        parse_topic(text)


@pytest.mark.parametrize("name", ["", "A", "a b", "a/b", "+", "#", "ä", "a\n", "a" * 49, "$sys"])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_name("device", name)
    assert caught.value.hint
    for channel, federation, device in ((Channel.RUN, name, ""), (Channel.ACK, "home", name)):
        with pytest.raises(ConfigError):
            topic(federation, channel, device)
    with pytest.raises(ConfigError):
        server_subscriptions(name)


def test_a_device_listens_to_exact_topics_of_its_own() -> None:
    found = device_subscriptions("home", "pi-7")
    assert len(set(found)) == len(found) == 7
    assert not any(character in text for text in found for character in "+#")
    assert {parse_topic(text).channel for text in found} == {*BROADCAST, *TO_DEVICE}
    assert {parse_topic(text).device for text in found} == {"", "pi-7"}


def test_a_server_listens_to_what_devices_write() -> None:
    assert server_subscriptions("home") == tuple(f"fedzo/v1/home/d/+/{c.value}" for c in FROM_DEVICE)
