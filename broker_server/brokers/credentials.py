"""User names, passwords and topic rights of a federation: one for the server, one for each device."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from ...protocol.errors import ConfigError
from ...protocol.wire.topics import BROADCAST, FROM_DEVICE, Channel, check_name, device_subscriptions, topic

__all__ = ["SERVER_NAME", "Credentials", "Login", "hash_password"]

SERVER_NAME = "fedzo-server"

_FORMAT = 1
# Mosquitto's "$7$" entries: PBKDF2-HMAC-SHA512. Its own tool uses 101 rounds, and more would buy nothing here: the
# passwords are random, not chosen by people.
_PBKDF2_ROUNDS = 101
_HASHED = re.compile(r"\$7\$([0-9]{1,6})\$([A-Za-z0-9+/=]{1,128})\$([A-Za-z0-9+/=]{1,128})")


@dataclass(frozen=True)
class Login:
    """A user name, which is also the MQTT client id, and its password or the :func:`hash_password` of it."""

    username: str
    password: str = field(repr=False)

    def accepts(self, password: str) -> bool:
        """Whether this is the password; a hash is none."""
        hashed = _HASHED.fullmatch(self.password)
        if hashed is None:
            return secrets.compare_digest(self.password.encode(), password.encode())
        rounds, salt, digest = hashed.groups()
        try:
            found = hashlib.pbkdf2_hmac("sha512", password.encode(), base64.b64decode(salt), int(rounds))
            return secrets.compare_digest(found, base64.b64decode(digest))
        except (ValueError, binascii.Error):
            return False


@dataclass(frozen=True)
class Credentials:
    """All logins of a federation and the rights that follow from the names.

    The server may do everything below ``fedzo/v1/FEDERATION/``. A device writes its four topics below ``d/DEVICE/``,
    reads its three below ``s/DEVICE/`` and the broadcast topics, and nothing else.

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
        login = self._by_name.get(username or "")
        return login is not None and login.accepts(password or "")

    def knows(self, username: str | None) -> bool:
        """Whether this user exists."""
        return username in self._by_name

    def allows(self, username: str, topic_or_filter: str, *, write: bool) -> bool:
        """Whether a known user may publish on a topic, or subscribe to a filter (a topic is its own filter)."""
        if username == self.server.username:
            return topic_or_filter.startswith(f"{self._prefix}/")
        writes, reads = _rights(self.federation, username)
        return topic_or_filter in (writes if write else reads)

    def mosquitto_password_file(self) -> str:
        """Return the text of Mosquitto's ``password_file``; passwords are salted and hashed."""
        logins = (self.server, *self.devices)
        hashes = (
            login.password if _HASHED.fullmatch(login.password) else hash_password(login.password) for login in logins
        )
        return "".join(f"{login.username}:{hashed}\n" for login, hashed in zip(logins, hashes, strict=True))

    def mosquitto_acl_file(self) -> str:
        """Return the text of Mosquitto's ``acl_file``: the rule of `allows`."""
        prefix, own = self._prefix, "0"  # a name that stands for every device's
        writes = [topic(self.federation, channel, own) for channel in FROM_DEVICE]
        reads = [name for name in device_subscriptions(self.federation, own) if f"/s/{own}/" in name]
        lines = [
            f"user {self.server.username}",
            f"topic readwrite {prefix}/#",
            *(f"pattern write {name.replace(f'/{own}/', '/%u/')}" for name in writes),
            *(f"pattern read {name.replace(f'/{own}/', '/%u/')}" for name in reads),
            *(f"pattern read {topic(self.federation, channel)}" for channel in BROADCAST),
        ]
        return "\n".join(lines) + "\n"

    @cached_property
    def _by_name(self) -> dict[str, Login]:
        return {login.username: login for login in (self.server, *self.devices)}

    @property
    def _prefix(self) -> str:
        return topic(self.federation, Channel.SERVER).removesuffix(f"/{Channel.SERVER.value}")


@lru_cache(maxsize=4096)
def _rights(federation: str, device: str) -> tuple[frozenset[str], frozenset[str]]:
    """What a device may write and read; a broker asks for every message."""
    writes = frozenset(topic(federation, channel, device) for channel in FROM_DEVICE)
    return writes, frozenset(device_subscriptions(federation, device))


def _random_login(name: str) -> Login:
    return Login(name, secrets.token_urlsafe(24))


def hash_password(password: str) -> str:
    """An entry of Mosquitto's password file: ``$7$``, salted PBKDF2-HMAC-SHA512."""
    salt = secrets.token_bytes(12)
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, _PBKDF2_ROUNDS)
    return f"$7${_PBKDF2_ROUNDS}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"
