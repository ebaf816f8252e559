"""What an estimator keeps between rounds, on the disk: a device that is killed goes on to the same bits.

The disk holds the state before and after the latest round, which is written before the report goes to the outbox. A
device that dies in between computes the round again, from the state before it; one that dies later goes on from the
state after it. That state lacks what the report carries. If the report does not count in any update, it comes back:
when the server says so, when the log shows that another round made the update, or when the outbox shows after a start
that the report never got there, or was given up. Residual and outbox are two files, but no order of deaths between
their writes loses what a report carried, or counts it twice: the outbox alone decides, and it changes in one step.

A state has four bytes a weight, and flash wears out by what is written to it. So two files take turns: each has the
state after its round, and the state before it is what the other file gives. A file holds that one too only where the
other does not give it, as in a device's first round.

``FZR3``, 32 bytes of SHA-256 over the rest, a number that grows with every write (8 bytes), 32 bytes that name run and
mask, the SHA-256 of the first state, the round, the updates before it, whether its report is lost, and the lengths of
the first state as far as it is here and of what was carried (4 bytes each); that first state, what was carried (place
and scalar, 4 bytes each), the second state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...protocol.wire.documents import RunDocument
from .durable import write_durably

__all__ = ["Residual", "ResidualFile", "carried_by", "residual_key"]

_log = logging.getLogger(__name__)
_MAGIC = b"FZR3"
_HASH_BYTES = 32
_HEADER = struct.Struct("<Q32s32sIIIII")
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


@dataclass(frozen=True, slots=True)
class _Known:
    """What this process knows of one of the files.

    Attributes:
        number: Of the write that made it; 0 for no file, or one that is not whole.
        gives: SHA-256 of the state from which the next round begins.
    """

    number: int = 0
    gives: bytes = b""


class ResidualFile:
    """At most one residual on the disk, in two files that take turns.

    Args:
        path: What their names begin with; the folder exists.
        may_count: Of a run and a round, whether its report may count, see :meth:`~.outbox.Outbox.may_count`.

    Attributes:
        paths: The files.
    """

    def __init__(self, path: Path, may_count: Callable[[str, int], bool] = lambda _run, _round: True) -> None:
        self._may_count = may_count
        self.paths = (path.with_name(f"{path.name}-a"), path.with_name(f"{path.name}-b"))
        self._known: list[_Known] | None = None

    def save(self, residual: Residual) -> None:
        """Keep a residual in place of the one before. A full disk is only logged: the run goes on from memory."""
        if self._known is None:
            self._read()
        assert self._known is not None
        before = hashlib.sha256(residual.before).digest()
        # The one that gives the state before is kept; otherwise the newer one, as a half-written file counts for none.
        givers = [place for place in (0, 1) if self._known[place].number and self._known[place].gives == before]
        newest = max((0, 1), key=lambda place: self._numbers()[place])
        target = 1 - (givers[0] if givers else newest)
        number = max(self._numbers()) + 1
        own = b"" if givers else residual.before
        header = _HEADER.pack(
            number,
            residual.key,
            before,
            residual.round,
            residual.log_length,
            int(residual.is_lost),
            len(own),
            len(residual.carried),
        )
        body = header + own + residual.carried + residual.after
        try:
            write_durably(self.paths[target], _MAGIC + hashlib.sha256(body).digest() + body)
        except OSError as error:
            _log.warning("%s cannot be written: %s", self.paths[target], error.strerror or error)
            self._known = None  # Whether the old file is still there, the disk knows.
            return
        self._known[target] = _Known(number, hashlib.sha256(_given(residual)).digest())

    def load(self, key: bytes, run: str) -> Residual | None:
        """The residual that was kept for this run and mask, for a device that has just started.

        Args:
            key: From :func:`residual_key`.
            run: Id of the run.

        Returns:
            None if there is none, or it is damaged. If the report of its round cannot count, it is lost.
        """
        found = self._read()
        if not found:
            return None
        last, newest, before = max(found, key=lambda each: each[0])
        if newest.key != key:
            return None
        if hashlib.sha256(newest.before).digest() != before:
            states = [_given(other) for number, other, _ in found if number != last]
            known = [state for state in states if hashlib.sha256(state).digest() == before]
            if not known:
                _log.warning("%s has lost the state before round %d", self.paths[0].parent, newest.round)
            newest = dataclasses.replace(newest, before=known[0] if known else b"")
        if not newest.is_lost and not self._may_count(run, newest.round):
            newest = dataclasses.replace(newest, is_lost=True)
            self.save(newest)  # what the outbox says of a later round says nothing of this one
        return newest

    def _numbers(self) -> list[int]:
        return [0, 0] if self._known is None else [each.number for each in self._known]

    def _read(self) -> list[tuple[int, Residual, bytes]]:
        """Number, content and digest of the first state of every file; none if one of them is damaged."""
        found: list[tuple[int, Residual, bytes]] = []
        self._known = [_Known(), _Known()]
        for place, path in enumerate(self.paths):
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                continue
            except OSError as error:
                _log.warning("%s cannot be read: %s", path, error.strerror or error)
                return []
            content = _content(data)
            if content is None:
                _log.warning("%s is damaged: what had not been sent is dropped", path)
                self._forget()
                return []
            found.append(content)
            self._known[place] = _Known(content[0], hashlib.sha256(_given(content[1])).digest())
        return found

    def _forget(self) -> None:
        """Which of two files was the newer one cannot be told any more: neither counts."""
        for path in self.paths:
            with contextlib.suppress(OSError):
                path.unlink()
        self._known = [_Known(), _Known()]


def _given(residual: Residual) -> bytes:
    """The state from which the next round begins, as far as the file knows."""
    return residual.given_back() if residual.is_lost else residual.after


def _content(data: bytes) -> tuple[int, Residual, bytes] | None:
    """Number, residual and digest of the first state; None if the file is damaged."""
    start = len(_MAGIC) + _HASH_BYTES
    body = data[start:]
    if (
        data[: len(_MAGIC)] != _MAGIC
        or len(body) < _HEADER.size
        or hashlib.sha256(body).digest() != data[len(_MAGIC) : start]
    ):
        return None
    number, key, before, round_, log_length, is_lost, first, carried = _HEADER.unpack_from(body)
    states, second = body[_HEADER.size :], first + carried
    residual = Residual(key, round_, states[:first], states[second:], log_length, states[first:second], bool(is_lost))
    return number, residual, before
