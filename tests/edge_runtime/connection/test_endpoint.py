"""Broker URLs and password files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedzo.edge_runtime.connection.endpoint import Endpoint, read_password
from fedzo.protocol.errors import ConfigError


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("mqtt://broker", Endpoint("broker", 1883, False)),
        ("mqtts://broker", Endpoint("broker", 8883, True)),
        ("MQTT://Broker:1884/", Endpoint("broker", 1884, False)),
        ("mqtt://dev-1:s%40c%2Fr:t@broker", Endpoint("broker", 1883, False, "dev-1", "s@c/r:t")),
        ("mqtt://dev-1@broker", Endpoint("broker", 1883, False, "dev-1", None)),
        ("mqtts://[fe80::1]:8884", Endpoint("fe80::1", 8884, True)),
    ],
)
def test_urls(url: str, expected: Endpoint) -> None:
    assert Endpoint.parse(url) == expected


@pytest.mark.parametrize(
    ("endpoint", "text"),
    [
        (Endpoint("broker", 1, False, "user", "hunter2"), "mqtt://broker:1"),
        (Endpoint("fe80::1", 8883, True), "mqtts://[fe80::1]:8883"),
    ],
)
def test_text_can_be_parsed_again_and_has_no_password(endpoint: Endpoint, text: str) -> None:
    assert str(endpoint) == text
    assert Endpoint.parse(text).address == endpoint.address
    assert "hunter2" not in repr(endpoint)


@pytest.mark.parametrize(
    "url",
    [
        "", "broker", "broker:1883", "http://broker", "mqtt://", "mqtt://:1883", "mqtt://broker:0", "mqtt://broker:99999",
        "mqtt://broker:abc", "mqtt://broker/topic", "mqtt://broker?x=1", "mqtt://broker#x", "mqtt://bro ker",
        "mqtt://[::1", "mqtt://:hunter2@broker", "http://user:hunter2@broker", "user:hunter2@broker",
        "mqtt://user:hunter2@broker:99999", "mqtt://user:hun@ter2@broker:0", "mqtt://user:hun/ter2@broker",
    ],
)  # fmt: skip
def test_bad_urls_are_refused_without_showing_a_password(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Endpoint.parse(url)
    assert "ter2" not in caught.value.message + caught.value.hint
    assert caught.value.hint


@given(st.text(max_size=60))
def test_any_text_parses_or_is_refused(text: str) -> None:
    for url in (text, f"mqtt://{text}"):
        try:
            endpoint = Endpoint.parse(url)
        except ConfigError:
            continue
        assert endpoint.host
        assert 1 <= endpoint.port <= 65_535


def test_passwords_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "password"
    file.write_bytes("pässword with space \r\nsecond line\n".encode())
    assert read_password(file) == "pässword with space "
    monkeypatch.setenv("FEDZO_PASSWORD", "from the environment")
    assert read_password(file) == "pässword with space "
    assert read_password(None) == "from the environment"
    monkeypatch.delenv("FEDZO_PASSWORD")
    assert read_password(None) is None


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe\n", b"x" * 70_000])
def test_bad_password_files(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="password"):
        read_password(file)
    with pytest.raises(ConfigError, match="FileNotFoundError"):
        read_password(tmp_path / "none")
