"""The run's key: an Ed25519 key pair (RFC 8032) that signs what boards must not take from anybody else.

What is signed and how it travels is ``protocol/wire/signed.py``; boards verify with ``protocol/wire/ed25519.py``.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ...protocol.errors import ConfigError
from ...protocol.wire.signed import attach, is_signed, signed_bytes
from ...protocol.wire.topics import Channel
from ..brokers.private_files import read_private
from .certificates import need_library

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = ["RUN_KEY_NAME", "RunSigner"]

RUN_KEY_NAME = "run.key"
_MAX_BYTES = 4096


class RunSigner:
    """Signs the documents of one federation's runs.

    Args:
        key: The private key.

    Attributes:
        public_key: 32 bytes, what boards pin.
    """

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes_raw()

    @classmethod
    def open(cls, path: Path) -> RunSigner:
        """Read a key, or make one: PEM, mode 0600.

        Raises:
            ConfigError: The file cannot be read or written, or holds no Ed25519 key; or the library is missing.
        """
        need_library()
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        if not path.exists():
            _create(path)
        try:
            key = serialization.load_pem_private_key(read_private(path, _MAX_BYTES), None)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path} holds no private key: {error}") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(f"{path} holds no Ed25519 key")
        return cls(key)

    def sign(self, federation: str, channel: Channel, device: str, payload: bytes) -> bytes:
        """The payload as it travels: signed on the channels that carry signatures, else as it is."""
        if not is_signed(channel, payload):
            return payload
        signature = self._key.sign(signed_bytes(federation, channel, device, payload))
        return attach(channel, payload, self.public_key, signature)


def _create(path: Path) -> None:
    """Two servers that start at once must end up with one key: the link decides who was first."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    data = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
