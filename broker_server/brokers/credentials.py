"""User names, passwords and topic rights of a federation: one for the server, one for each device."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...protocol.errors import ConfigError
from ...protocol.topics import BROADCAST, Channel, check_name, topic
from .private_files import read_private, write_private

__all__ = ["SERVER_NAME", "Credentials", "Login"]

SERVER_NAME = "fedzo-server"

_FORMAT = 1
_MAX_FILE_BYTES = 64 << 20
# Mosquitto's "$7$" entries: PBKDF2-HMAC-SHA512. Its own tool uses 101 rounds, and more would buy nothing here: the
# passwords are random, not chosen by people.
_PBKDF2_ROUNDS = 101


@dataclass(frozen=True)
class Login:
    """A user name, which is also the MQTT client id, and its password."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True)
class Credentials:
    """All logins of a federation and the rights that follow from the names.

    The server may do everything below ``fedzo/v1/FEDERATION/``. A device writes below ``d/DEVICE/``, reads below
    ``s/DEVICE/`` and the broadcast topics, and nothing else.

    Attributes:
        federation: Its name.
        server: Login of the server.
        devices: Logins of the devices; the user name is the device's id.
    """

    federation: str
    server: Login
    devices: tuple[Login, ...] = ()

    def __post_init__(self) -> None:
        check_name("federation", self.federation)
        names = [check_name("user", login.username) for login in (self.server, *self.devices)]
        doubled = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
        if doubled:
            raise ConfigError(f"the name {min(doubled)!r} has more than one login")
        for login in (self.server, *self.devices):
            if not login.password or any(ord(character) < 32 for character in login.password):
                raise ConfigError(f"the password of {login.username!r} is empty or has control characters")

    @classmethod
    def generate(cls, federation: str, devices: Iterable[str]) -> Credentials:
        """Make random passwords (192 bits).

        Raises:
            ConfigError: A name is invalid or occurs twice.
        """
        return cls(federation, _random_login(SERVER_NAME), tuple(map(_random_login, devices)))

    def with_devices(self, devices: Iterable[str]) -> Credentials:
        """Return a copy with further devices; known ones keep their password."""
        known = {login.username for login in self.devices}
        added = tuple(_random_login(name) for name in devices if name not in known)
        return Credentials(self.federation, self.server, self.devices + added)

    def save(self, path: Path) -> None:
        """Write a JSON file that only its owner can read.

        Raises:
            ConfigError: The file cannot be written.
        """
        write_private(path, json.dumps(self.to_document(), indent=1).encode() + b"\n")

    @classmethod
    def load(cls, path: Path) -> Credentials:
        """Read what `save` wrote.

        Raises:
            ConfigError: The file cannot be read or is not what `save` writes.
        """
        data = read_private(path, _MAX_FILE_BYTES)
        try:
            return cls.from_document(json.loads(data))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ConfigError(f"{path} is not a credentials file", hint="make one with: fedzo credentials") from None

    def to_document(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        devices = {login.username: login.password for login in self.devices}
        server = {self.server.username: self.server.password}
        return {"format": _FORMAT, "federation": self.federation, "server": server, "devices": devices}

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Credentials:
        """Inverse of `to_document`; raises what a wrong shape leads to."""
        if document["format"] != _FORMAT or not isinstance(document["federation"], str):
            raise ValueError
        pairs = [*document["server"].items(), *document["devices"].items()]
        if len(document["server"]) != 1 or not all(isinstance(password, str) for _, password in pairs):
            raise ValueError
        logins = [Login(name, password) for name, password in pairs]
        return cls(document["federation"], logins[0], tuple(logins[1:]))

    def check_password(self, username: str | None, password: str | None) -> bool:
        """Whether this user exists and the password is right."""
        for login in (self.server, *self.devices):
            if login.username == username:
                return secrets.compare_digest(login.password.encode(), (password or "").encode())
        return False

    def allows(self, username: str, topic_or_filter: str, *, write: bool) -> bool:
        """Whether a known user may publish on a topic, or subscribe to a filter (a topic is its own filter)."""
        prefix = self._prefix
        if username == self.server.username:
            return topic_or_filter.startswith(f"{prefix}/")
        if write:
            return topic_or_filter.startswith(f"{prefix}/d/{username}/")
        broadcast = topic_or_filter in {topic(self.federation, channel) for channel in BROADCAST}
        return broadcast or topic_or_filter.startswith(f"{prefix}/s/{username}/")

    def mosquitto_password_file(self) -> str:
        """Return the text of Mosquitto's ``password_file``; passwords are salted and hashed."""
        return "".join(f"{login.username}:{_hash(login.password)}\n" for login in (self.server, *self.devices))

    def mosquitto_acl_file(self) -> str:
        """Return the text of Mosquitto's ``acl_file``: the rule of `allows`."""
        prefix = self._prefix
        broadcast = [f"pattern read {topic(self.federation, channel)}" for channel in BROADCAST]
        lines = [
            f"user {self.server.username}",
            f"topic readwrite {prefix}/#",
            f"pattern write {prefix}/d/%u/#",
            f"pattern read {prefix}/s/%u/#",
            *broadcast,
        ]
        return "\n".join(lines) + "\n"

    @property
    def _prefix(self) -> str:
        return topic(self.federation, Channel.SERVER).removesuffix(f"/{Channel.SERVER.value}")


def _random_login(name: str) -> Login:
    return Login(name, secrets.token_urlsafe(24))


def _hash(password: str) -> str:
    salt = secrets.token_bytes(12)
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, _PBKDF2_ROUNDS)
    return f"$7${_PBKDF2_ROUNDS}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"
