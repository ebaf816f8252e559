"""Who belongs to a federation: the one file that everything else in a credentials folder follows from."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...protocol.errors import ConfigError
from ...protocol.wire.topics import check_name
from ..brokers.credentials import SERVER_NAME, Credentials, Login

__all__ = ["DeviceEntry", "Registry"]

_FORMAT = 1


@dataclass(frozen=True)
class DeviceEntry:
    """One device.

    Attributes:
        password: As its folder holds it, for a renewal that changes nothing else.
        hashed: The same as brokers get it.
        serials: Certificates that it was given and that may not have ended.
        expires: End of the latest, UTC.
        revoked: When it lost its rights, UTC; empty while it has them.
    """

    password: str = field(repr=False)
    hashed: str = field(repr=False)
    serials: tuple[int, ...]
    expires: str
    revoked: str = ""

    def __post_init__(self) -> None:
        for text in (self.expires, self.revoked):
            if text:
                dt.datetime.fromisoformat(text)
        if any(not isinstance(serial, int) or serial < 1 for serial in self.serials):
            raise ValueError("a serial number is no positive number")


@dataclass(frozen=True)
class Registry:
    """Everything about a federation's credentials that is not a key file. Immutable: changes give another one.

    Attributes:
        federation: Its name.
        hosts: Names and addresses of the broker; the first is the one that devices are told.
        server_password: Of the server at its broker.
        server_expires: End of the broker's certificate, UTC.
        list_number: Of the latest revocation list.
        devices: By id, revoked ones too.
        revoked_serials: When each certificate was revoked, UTC, by serial number.
    """

    federation: str
    hosts: tuple[str, ...]
    server_password: str = field(repr=False)
    server_expires: str
    list_number: int = 1
    devices: Mapping[str, DeviceEntry] = field(default_factory=dict)
    revoked_serials: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name("federation", self.federation)
        for name in self.devices:
            check_name("device id", name)
        if not self.hosts:
            raise ValueError("a broker needs a host")

    def admitted(self) -> frozenset[str]:
        """Devices that have rights."""
        return frozenset(name for name, entry in self.devices.items() if not entry.revoked)

    def credentials(self) -> Credentials:
        """Logins as brokers check them."""
        devices = tuple(Login(name, self.devices[name].hashed) for name in sorted(self.admitted()))
        return Credentials(self.federation, Login(SERVER_NAME, self.server_password), devices)

    def with_device(self, name: str, entry: DeviceEntry) -> Registry:
        """With a device added or replaced.

        Raises:
            ConfigError: The name cannot be a topic level, a user and a folder, or is the server's.
        """
        if check_name("device id", name) == SERVER_NAME:
            raise ConfigError(f"{SERVER_NAME} is the server's name", hint="choose another device id")
        return dataclasses.replace(self, devices={**self.devices, name: entry})

    def without_rights(self, name: str, when: str) -> Registry:
        """With a device revoked, and all its certificates.

        Raises:
            ConfigError: There is no such device, or it is revoked already.
        """
        entry = self.devices.get(name)
        if entry is None:
            raise ConfigError(f"no device {name[:60]!r} was issued credentials", hint="fedzo credentials list")
        if entry.revoked:
            raise ConfigError(f"the device {name} was revoked on {entry.revoked[:10]}", hint="nothing is left to do")
        serials = {**self.revoked_serials, **dict.fromkeys(entry.serials, when)}
        devices = {**self.devices, name: dataclasses.replace(entry, revoked=when, serials=())}
        return dataclasses.replace(self, devices=devices, revoked_serials=serials, list_number=self.list_number + 1)

    def encode(self) -> bytes:
        """As JSON; serial numbers are hexadecimal, as other programs print them."""
        devices = {
            name: {**dataclasses.asdict(entry), "serials": [f"{serial:x}" for serial in entry.serials]}
            for name, entry in self.devices.items()
        }
        document: dict[str, Any] = {
            "format": _FORMAT,
            **{name: getattr(self, name) for name in ("federation", "hosts", "server_password", "server_expires")},
            "list_number": self.list_number,
            "devices": devices,
            "revoked_serials": {f"{serial:x}": when for serial, when in self.revoked_serials.items()},
        }
        return json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> Registry:
        """Inverse of :meth:`encode`.

        Raises:
            ConfigError: It is not what :meth:`encode` gives.
        """
        try:
            raw = json.loads(data)
            if raw.pop("format") != _FORMAT:
                raise ValueError("another format")
            devices = {
                name: DeviceEntry(**{**entry, "serials": tuple(int(serial, 16) for serial in entry["serials"])})
                for name, entry in raw.pop("devices").items()
            }
            serials = {int(serial, 16): when for serial, when in raw.pop("revoked_serials").items()}
            for when in serials.values():
                dt.datetime.fromisoformat(when)
            registry = cls(**{**raw, "hosts": tuple(raw["hosts"]), "devices": devices, "revoked_serials": serials})
            registry.credentials()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ConfigError) as error:
            raise ConfigError(
                f"the registry of the credentials is damaged: {str(error)[:200]}", hint="take it from a backup"
            ) from None
        return registry
