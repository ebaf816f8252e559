"""What an estimator keeps between rounds, in one file: a device that is killed goes on to the same bits.

The file holds the state before and after the latest round, and is written before the report goes to the outbox. A
device that dies in between computes the round again, from the state before it; one that dies later goes on from the
state after it. That state lacks what the report carries. If the report does not count in any update, it comes back:
when the server says so, or when the log shows that another round made the update.

``FZR2``, 32 bytes of SHA-256 over the rest, 32 bytes that name run and mask, the round, the updates before it, whether
its report is lost, and the lengths of the first state and of what was carried (4 bytes each); the first state, what was
carried (place and scalar, 4 bytes each), the second state.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..protocol.documents import RunDocument
from .durable import write_durably

__all__ = ["Residual", "ResidualFile", "carried_by", "residual_key"]

_log = logging.getLogger(__name__)
_MAGIC = b"FZR2"
_HASH_BYTES = 32
_HEADER = struct.Struct("<32sIIIII")
_CARRIED = np.dtype([("place", "<u4"), ("scalar", "<f4")])


def residual_key(run: RunDocument, mask_sha256: str) -> bytes:
    """Names a run, with all its settings, and a mask: 32 bytes. States of other runs mean nothing."""
    return hashlib.sha256(run.encode() + mask_sha256.encode()).digest()


def carried_by(places: Sequence[NDArray[np.int64]], scalars: Sequence[NDArray[np.float32]]) -> bytes:
    """What a report took out of a state, for :class:`Residual`.

    Args:
        places: Entries of the state, ``int64[n]`` for every sketch.
        scalars: What of them travels, ``float32[n]`` each.
    """
    found = np.empty(sum(each.size for each in scalars), _CARRIED)
    if found.size:
        found["place"], found["scalar"] = np.concatenate(places), np.concatenate(scalars)
    return found.tobytes()


@dataclass(frozen=True, slots=True)
class Residual:
    """The states around one round.

    Attributes:
        key: From :func:`residual_key`.
        round: The latest round that an estimator measured.
        before: Its state before that round.
        after: Its state after it.
        log_length: Updates before that round.
        carried: From :func:`carried_by`: what ``after`` lacks because it travels.
        is_lost: Whether the report did not count.
    """

    key: bytes
    round: int
    before: bytes
    after: bytes
    log_length: int = 0
    carried: bytes = b""
    is_lost: bool = False

    def state_for(self, round_: int, log_length: int = -1, recent: Sequence[tuple[int, int]] = ()) -> bytes:
        """The state from which a round is measured; empty if this is of a run that was further than that.

        Args:
            round_: The round.
            log_length: Updates before it.
            recent: Place in the log and round of the latest updates: another round may have made the one that this
                round's report was for.
        """
        if round_ < self.round:
            return b""  # the same settings, begun again
        if round_ == self.round:
            return self.before
        came_to_nothing = log_length == self.log_length or dict(recent).get(self.log_length, self.round) != self.round
        return self.given_back() if self.is_lost or came_to_nothing else self.after

    def given_back(self) -> bytes:
        """The state after the round as if nothing had travelled."""
        state, carried = np.frombuffer(self.after, "<f4").copy(), np.frombuffer(self.carried, _CARRIED)
        state[carried["place"]] += carried["scalar"]
        return state.tobytes()


class ResidualFile:
    """At most one residual on the disk.

    Args:
        path: Its file; the folder exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, residual: Residual) -> None:
        """Keep a residual in place of the one before. A full disk is only logged: the run goes on from memory."""
        numbers = (
            residual.round,
            residual.log_length,
            int(residual.is_lost),
            len(residual.before),
            len(residual.carried),
        )
        body = _HEADER.pack(residual.key, *numbers) + residual.before + residual.carried + residual.after
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
        found, round_, log_length, is_lost, first, carried = _HEADER.unpack_from(body)
        if found != key:
            return None
        states, second = body[_HEADER.size :], first + carried
        before, after = states[:first], states[second:]
        return Residual(key, round_, before, after, log_length, states[first:second], bool(is_lost))
