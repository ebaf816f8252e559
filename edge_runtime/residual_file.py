"""What an estimator keeps between rounds, in one file: a device that is killed goes on to the same bits.

The file holds the state before and after the latest round, and is written before the report goes to the outbox. A
device that dies in between computes the round again, from the state before it; one that dies later goes on from the
state after it. ``FZR1``, 32 bytes of SHA-256 over the rest, 32 bytes that name run and mask, the round (4 bytes), the
length of the first state (4 bytes), both states.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from dataclasses import dataclass
from pathlib import Path

from ..protocol.documents import RunDocument
from .durable import write_durably

__all__ = ["Residual", "ResidualFile", "residual_key"]

_log = logging.getLogger(__name__)
_MAGIC = b"FZR1"
_HASH_BYTES = 32
_HEADER = struct.Struct("<32sII")


def residual_key(run: RunDocument, mask_sha256: str) -> bytes:
    """Names a run, with all its settings, and a mask: 32 bytes. States of other runs mean nothing."""
    return hashlib.sha256(run.encode() + mask_sha256.encode()).digest()


@dataclass(frozen=True, slots=True)
class Residual:
    """The states around one round.

    Attributes:
        key: From :func:`residual_key`.
        round: The latest round that an estimator measured.
        before: Its state before that round.
        after: Its state after it.
    """

    key: bytes
    round: int
    before: bytes
    after: bytes

    def state_for(self, round_: int) -> bytes:
        """The state from which a round is measured; empty if this is of a run that was further than that."""
        if round_ < self.round:
            return b""  # the same settings, begun again
        return self.before if round_ == self.round else self.after


class ResidualFile:
    """At most one residual on the disk.

    Args:
        path: Its file; the folder exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, residual: Residual) -> None:
        """Keep a residual in place of the one before. A full disk is only logged: the run goes on from memory."""
        body = _HEADER.pack(residual.key, residual.round, len(residual.before)) + residual.before + residual.after
        try:
            write_durably(self.path, _MAGIC + hashlib.sha256(body).digest() + body)
        except OSError as error:
            _log.warning("%s cannot be written: %s", self.path, error.strerror or error)

    def load(self, key: bytes) -> Residual | None:
        """The residual that was kept for this run and mask; None if there is none, or it is damaged."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("%s cannot be read: %s", self.path, error.strerror or error)
            return None
        start = len(_MAGIC) + _HASH_BYTES
        body = data[start:]
        if (
            data[: len(_MAGIC)] != _MAGIC
            or len(body) < _HEADER.size
            or hashlib.sha256(body).digest() != data[len(_MAGIC) : start]
        ):
            _log.warning("%s is damaged: what had not been sent is dropped", self.path)
            return None
        found, round_, length = _HEADER.unpack_from(body)
        states = body[_HEADER.size :]
        return Residual(key, round_, states[:length], states[length:]) if found == key else None
