"""Health and metrics over HTTP, also for those who are slow, many or rude."""

from __future__ import annotations

import dataclasses
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fedzo.broker_server.telemetry import health as health_module
from fedzo.broker_server.telemetry import http_endpoint
from fedzo.broker_server.telemetry.health import Health
from fedzo.broker_server.telemetry.http_endpoint import HttpEndpoint, is_loopback, parse_address
from fedzo.broker_server.telemetry.observer import ServerState
from fedzo.protocol.errors import ConfigError

STATE = ServerState(
    run="run-1", phase="train", round=5, updates=4, updates_total=9, devices={}, is_connected=True, is_leaving=False,
    turned_s_ago=0.5, queues=(), dropped={}, pauses=0, bytes_in=0, bytes_out=0, messages_in=0, messages_out=0,
)  # fmt: skip


def server_state(**changed: Any) -> ServerState:
    return dataclasses.replace(STATE, **changed)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    path = tmp_path / "journal.sqlite"
    path.touch()
    return path


@pytest.fixture
def endpoint(journal: Path) -> Iterator[HttpEndpoint]:
    health = Health()
    health.attach(server_state, journal)
    with HttpEndpoint(("127.0.0.1", 0), health, lambda _: (b"metric 1\n", "text/plain")) as running:
        yield running


def get(endpoint: HttpEndpoint, path: str, **request: Any) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint.url + path, **request), timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def raw(endpoint: HttpEndpoint) -> socket.socket:
    host, _, port = endpoint.url.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def is_closed(link: socket.socket) -> bool:
    """Whether the other end closes it, after whatever it says."""
    try:
        while link.recv(4096):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/metrics", 200, b"metric 1"),
        ("/metrics?x=1", 200, b"metric 1"),
        ("/healthz", 200, b'"loop"'),
        ("/readyz", 200, b'"train 5"'),
        ("/", 404, b"/readyz"),
        ("/../etc/passwd", 404, b"/readyz"),
    ],
)
def test_what_there_is(endpoint: HttpEndpoint, path: str, status: int, words: bytes) -> None:
    found, body = get(endpoint, path)
    assert found == status
    assert words in body


def test_head_has_no_body_and_nothing_can_be_written(endpoint: HttpEndpoint) -> None:
    assert get(endpoint, "/healthz", method="HEAD") == (200, b"")
    assert get(endpoint, "/healthz", method="POST", data=b"x")[0] == 501


@pytest.mark.parametrize(
    "line", [b"\r\n", b"\0\xff\r\n\r\n", b"GET\r\n\r\n", b"GET /healthz HTTP/9.9\r\n\r\n", b"x" * 70_000]
)
def test_rude_words_close_the_connection(endpoint: HttpEndpoint, line: bytes) -> None:
    with raw(endpoint) as link:
        link.sendall(line)
        link.shutdown(socket.SHUT_WR)
        assert is_closed(link)
    assert get(endpoint, "/healthz")[0] == 200


def test_a_slow_client_is_cut_off(endpoint: HttpEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that sends a byte now and then, which no time-out of a single read notices."""
    monkeypatch.setattr(http_endpoint, "REQUEST_S", 0.5)
    started = time.monotonic()
    with raw(endpoint) as link, suppress(ConnectionError):
        while time.monotonic() - started < 20:
            link.sendall(b"G")
            time.sleep(0.05)
    assert time.monotonic() - started < 15


def test_many_connections_are_refused_and_the_server_goes_on(
    endpoint: HttpEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_endpoint, "REQUEST_S", 3.0)
    held = [raw(endpoint) for _ in range(http_endpoint.MAX_CONNECTIONS)]
    deadline = time.monotonic() + 10
    while len(endpoint._server._open) < len(held) and time.monotonic() < deadline:
        time.sleep(0.01)
    with raw(endpoint) as further:
        assert is_closed(further)
    for link in held:
        assert is_closed(link), "whoever says nothing is cut off"
        link.close()
    while endpoint._server._open and time.monotonic() < deadline + 20:
        time.sleep(0.01)
    assert get(endpoint, "/healthz")[0] == 200


def test_a_bug_is_an_answer(journal: Path) -> None:
    def broken(_: str) -> tuple[bytes, str]:
        raise RuntimeError("oops")

    with HttpEndpoint(("127.0.0.1", 0), Health(), broken) as running:
        assert get(running, "/metrics") == (500, b"RuntimeError: oops\n")


def test_an_address_that_is_taken_is_named(endpoint: HttpEndpoint) -> None:
    _, _, port = endpoint.url.rpartition(":")
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
        HttpEndpoint(("127.0.0.1", int(port)), Health())


@pytest.mark.parametrize(
    ("address", "loopback"),
    [("http://127.0.0.1:1", True), ("http://[::1]:1", True), ("http://0.0.0.0:1", False), ("http://[::]:1", False)],
)
def test_who_can_reach_it(address: str, loopback: bool) -> None:
    assert is_loopback(address) == loopback


def test_after_the_end_nobody_answers(journal: Path) -> None:
    with HttpEndpoint(("127.0.0.1", 0), Health()) as running:
        assert get(running, "/healthz")[0] == 200
    with pytest.raises(urllib.error.URLError):
        get(running, "/healthz")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9464", ("127.0.0.1", 9464)),
        ("9464", ("127.0.0.1", 9464)),
        ("[::1]:0", ("::1", 0)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        (" host:1 ", ("host", 1)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "host", "host:", ":9464", "host:65536", "host:-1", "host:9 4", "a:b", "host:٣"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="no address"):
        parse_address(text)


# ---------------------------------------------------------------------- health


def test_a_server_that_starts_is_alive_and_not_ready() -> None:
    health = Health()
    assert all(check.ok for check in health.live())
    assert not all(check.ok for check in health.ready())


@pytest.mark.parametrize(
    ("changed", "live", "failing"),
    [
        ({}, True, []),
        ({"is_connected": False}, True, ["broker"]),
        ({"is_leaving": True}, True, ["run"]),
        ({"turned_s_ago": 1000.0}, False, ["loop"]),
    ],
)
def test_what_makes_a_server_unready(changed: dict[str, Any], live: bool, failing: list[str], journal: Path) -> None:
    health = Health()
    health.attach(lambda: server_state(**changed), journal)
    assert all(check.ok for check in health.live()) == live
    assert [check.name for check in health.ready() if not check.ok] == failing


def test_a_journal_that_cannot_grow(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    health = Health()
    health.attach(server_state, journal)
    monkeypatch.setattr(health_module, "FREE_BYTES", 1 << 62)
    assert [check.name for check in health.ready() if not check.ok] == ["journal"]
    monkeypatch.undo()
    health.attach(server_state, journal.with_name("gone"))
    (check,) = [check for check in health.ready() if not check.ok]
    assert (check.name, check.detail) == ("journal", "No such file or directory")


def test_the_answer_says_what_is_wrong(journal: Path) -> None:
    health = Health()
    health.attach(lambda: server_state(is_connected=False), journal)
    with HttpEndpoint(("127.0.0.1", 0), health) as running:
        status, body = get(running, "/readyz")
        assert status == 503
        assert json.loads(body)["checks"][1] == {"name": "broker", "ok": False, "detail": "no link"}
        assert get(running, "/healthz")[0] == 200
        assert get(running, "/metrics")[0] == 404
