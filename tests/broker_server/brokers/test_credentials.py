"""Logins, their file, and the rights that follow from a name."""

from __future__ import annotations

import base64
import hashlib

import pytest

from fedzo.broker_server.brokers import Credentials, Login
from fedzo.broker_server.brokers.credentials import hash_password
from fedzo.protocol.errors import ConfigError
from fedzo.protocol.wire.topics import Channel, device_subscriptions, server_subscriptions, topic


def test_generated_passwords_are_long_and_differ() -> None:
    credentials = Credentials.generate("farm", [f"dev-{n}" for n in range(50)])
    passwords = [login.password for login in (credentials.server, *credentials.devices)]
    assert len(set(passwords)) == 51
    assert min(map(len, passwords)) >= 32
    assert not any(password in repr(credentials) for password in passwords)


@pytest.mark.parametrize(
    ("federation", "devices"),
    [("Farm", []), ("farm", ["dev/1"]), ("farm", ["dev", "dev"]), ("farm", ["fedzo-server"]), ("farm", ["#"])],
)
def test_names_that_cannot_be_used(federation: str, devices: list[str]) -> None:
    with pytest.raises(ConfigError):
        Credentials.generate(federation, devices)


@pytest.mark.parametrize("password", ["", "two\nlines"])
def test_passwords_that_cannot_be_used(password: str) -> None:
    with pytest.raises(ConfigError, match="password of 'dev-1'"):
        Credentials("farm", Login("fedzo-server", "x"), (Login("dev-1", password),))


def test_everybody_may_do_what_the_protocol_needs_and_no_more() -> None:
    credentials = Credentials.generate("farm", ["dev-1", "dev-2"])
    own = {topic("farm", channel, "dev-1") for channel in (Channel.HELLO, Channel.STATE, Channel.REPORT, Channel.GET)}
    for name in own:
        assert credentials.allows("dev-1", name, write=True)
        assert not credentials.allows("dev-2", name, write=True)
        assert not credentials.allows("dev-1", name, write=False)
    for name in device_subscriptions("farm", "dev-1"):
        assert credentials.allows("dev-1", name, write=False)
        assert not credentials.allows("dev-1", name, write=True)
        assert credentials.allows("dev-2", name, write=False) == ("/s/" not in name)
        assert credentials.allows("fedzo-server", name, write=True)
    for name in server_subscriptions("farm"):
        assert credentials.allows("fedzo-server", name, write=False)
        assert not credentials.allows("dev-1", name, write=False)
    for name in ("#", "+/v1/farm/head", "fedzo/v1/+/head", "fedzo/v1/other/head", "fedzo/v1/farm", "$SYS/#"):
        for user in ("dev-1", "fedzo-server"):
            assert not credentials.allows(user, name, write=False)
            assert not credentials.allows(user, name, write=True)


def test_passwords_are_compared_exactly() -> None:
    credentials = Credentials.generate("farm", ["dev-1"])
    password = credentials.devices[0].password
    assert credentials.check_password("dev-1", password)
    for username, wrong in (
        ("dev-1", password[:-1]),
        ("dev-1", ""),
        ("dev-1", None),
        ("dev-2", password),
        (None, None),
    ):
        assert not credentials.check_password(username, wrong)
    hashed = Credentials("farm", credentials.server, (Login("dev-1", hash_password(password)),))
    assert hashed.check_password("dev-1", password)
    assert not hashed.check_password("dev-1", hashed.devices[0].password), "a hash that leaked is no password"
    assert hashed.devices[0].password in hashed.mosquitto_password_file()
    assert [hashed.knows(name) for name in ("dev-1", "fedzo-server", "dev-2", None)] == [True, True, False, False]


def test_the_password_file_has_mosquittos_format() -> None:
    credentials = Credentials.generate("farm", ["dev-1"])
    for line, login in zip(
        credentials.mosquitto_password_file().splitlines(), (credentials.server, *credentials.devices), strict=True
    ):
        name, entry = line.split(":")
        _, kind, rounds, salt, digest = entry.split("$")
        assert (name, kind) == (login.username, "7")
        expected = hashlib.pbkdf2_hmac("sha512", login.password.encode(), base64.b64decode(salt), int(rounds))
        assert base64.b64decode(digest) == expected
