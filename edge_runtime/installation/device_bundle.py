"""What ``fedzo credentials issue`` makes for a board: a folder with certificates, password and the run's public key."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ...protocol.errors import ConfigError
from ...protocol.wire.ed25519 import is_public_key
from ...protocol.wire.topics import check_name
from ..connection.endpoint import TlsConfig

__all__ = ["BUNDLE_NAMES", "DeviceBundle"]

BUNDLE_NAMES: Final = ("ca.pem", "device.pem", "device.key", "device.json")
_FORMAT: Final = 1
_MAX_BYTES: Final = 64 << 10


@dataclass(frozen=True)
class DeviceBundle:
    """A board's credentials.

    Attributes:
        folder: Where the files of :data:`BUNDLE_NAMES` lie.
        federation: Whose.
        device: The device id, which is also the user name and the certificate's common name.
        password: Of the user.
        run_key: Public key that runs must be signed with, 32 bytes.
    """

    folder: Path
    federation: str
    device: str
    password: str = field(repr=False)
    run_key: bytes

    def __post_init__(self) -> None:
        check_name("federation", self.federation)
        check_name("device id", self.device)
        if not self.password or not self.password.isprintable():
            raise ValueError("the password is empty or holds control characters")
        if not is_public_key(self.run_key):
            raise ValueError("the run key is no public key")

    @classmethod
    def load(cls, folder: Path) -> DeviceBundle:
        """Read a folder.

        Raises:
            ConfigError: A file is missing or is not what ``fedzo credentials issue`` writes.
        """
        hint = "copy the folder devices/DEVICE that fedzo credentials issue wrote, with all its files"
        for name in BUNDLE_NAMES:
            if not (folder / name).is_file():
                raise ConfigError(f"the credentials folder {folder} has no {name}", hint=hint)
        path = folder / BUNDLE_NAMES[-1]
        try:
            with path.open("rb") as file:
                raw = json.loads(file.read(_MAX_BYTES))
            if raw.pop("format") != _FORMAT:
                raise ValueError("another format")
            return cls(folder, **{**raw, "run_key": bytes.fromhex(raw["run_key"])})
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, ConfigError) as error:
            raise ConfigError(f"{path} cannot be used: {str(error)[:200]}", hint=hint) from None

    def to_document(self) -> dict[str, Any]:
        """Plain data for the JSON file."""
        return {
            "format": _FORMAT,
            "federation": self.federation,
            "device": self.device,
            "password": self.password,
            "run_key": self.run_key.hex(),
        }

    @property
    def tls(self) -> TlsConfig:
        """Files for ``mqtts://``."""
        ca, certificate, key = (self.folder / name for name in BUNDLE_NAMES[:3])
        return TlsConfig(ca, certificate, key)
