"""What an estimator keeps between rounds, in one file: a device that is killed goes on where its last report left it.

The file is ``FZR1``, 32 bytes of SHA-256 over the rest, 32 bytes that name run and mask, the state. It is written
before the report goes to the outbox: if a device dies in between, what that report carried is lost, as with any lost
report, and nothing is sent twice.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from .durable import write_durably

__all__ = ["ResidualFile"]

_log = logging.getLogger(__name__)
_MAGIC = b"FZR1"
_HASH_BYTES = 32


class ResidualFile:
    """At most one state on the disk.

    Args:
        path: Its file; the folder exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, run: str, mask_sha256: str, state: bytes) -> None:
        """Keep a state in place of the one before. A full disk is only logged: the run goes on from memory."""
        body = _key(run, mask_sha256) + state
        try:
            write_durably(self.path, _MAGIC + hashlib.sha256(body).digest() + body)
        except OSError as error:
            _log.warning("%s cannot be written: %s", self.path, error.strerror or error)

    def load(self, run: str, mask_sha256: str) -> bytes:
        """The state that was kept for this run and mask; empty if there is none, or it is damaged."""
        try:
            with self.path.open("rb") as file:
                data = file.read()
        except FileNotFoundError:
            return b""
        except OSError as error:
            _log.warning("%s cannot be read: %s", self.path, error.strerror or error)
            return b""
        start = len(_MAGIC) + _HASH_BYTES
        body = data[start:]
        if data[: len(_MAGIC)] != _MAGIC or hashlib.sha256(body).digest() != data[len(_MAGIC) : start]:
            _log.warning("%s is damaged: what had not been sent is dropped", self.path)
            return b""
        return body[_HASH_BYTES:] if body[:_HASH_BYTES] == _key(run, mask_sha256) else b""


def _key(run: str, mask_sha256: str) -> bytes:
    return hashlib.sha256(f"{run}\n{mask_sha256}".encode()).digest()
