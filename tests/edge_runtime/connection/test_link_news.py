"""What a device says of its link, and how often."""

from __future__ import annotations

import logging

import pytest

from fedzo.edge_runtime.connection import link_news
from fedzo.edge_runtime.connection.link_news import LinkNews
from fedzo.edge_runtime.connection.mqtt_types import Disconnected

REVOKED = Disconnected("the broker did not answer CONNECT", "fedzo credentials issue pi-1", refused=True)
NOBODY = Disconnected("nobody listens there", "start the broker")


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def news(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> LinkNews:
    monkeypatch.setattr(link_news, "LONELY_S", 0.0)
    return LinkNews(lines.append, "mqtt://b", "default", "pi-1")


def test_an_outage_is_told_once(news: LinkNews, lines: list[str]) -> None:
    news.connected()
    for event in (Disconnected("cut"), NOBODY, NOBODY):
        news.disconnected(event)
    news.connected()
    assert lines == ["connected to mqtt://b", "no link to mqtt://b (cut); trying again", "connected again to mqtt://b"]


def test_a_broker_that_was_never_reached_is_told_with_its_hint(news: LinkNews, lines: list[str]) -> None:
    for _ in range(3):
        news.disconnected(NOBODY)
    assert lines == ["no link to mqtt://b (nobody listens there); trying again", "hint: start the broker"]


def test_a_board_that_is_revoked_while_it_works_is_told_once(news: LinkNews, lines: list[str]) -> None:
    news.connected()
    for event in (Disconnected("cut"), REVOKED, NOBODY, REVOKED):
        news.disconnected(event)
    assert lines[2:] == [
        "no link to mqtt://b (the broker did not answer CONNECT); trying again",
        "hint: fedzo credentials issue pi-1",
    ]


def test_a_link_that_breaks_again_and_again_is_warned_of(news: LinkNews, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fedzo"):
        for _ in range(5):
            news.connected()
            news.disconnected(Disconnected("cut"))
            news.disconnected(NOBODY)
    warning = "the link breaks again and again: has another device the id pi-1?"
    assert [record.message for record in caplog.records] == [warning]


def test_a_server_that_is_not_there_yet_is_waited_for_once(news: LinkNews, lines: list[str]) -> None:
    news.look()
    assert news.wait_s is None
    for _ in range(2):
        news.connected()
        news.heard_of_server(online=False)
        assert news.wait_s in (0.0, None)
        news.look()
        news.look()
        news.disconnected(Disconnected("cut"))
    assert [line for line in lines if "server" in line] == ["no server of federation 'default' is there yet; waiting"]


def test_a_server_that_is_there_is_not_waited_for(news: LinkNews, lines: list[str]) -> None:
    news.connected()
    news.heard_of_server(online=True)
    assert news.wait_s is None
    news.look()
    assert lines == ["connected to mqtt://b"]
