"""What a device that is far behind gets: the records that it misses, or a snapshot where that is cheaper.

A log of scalars brings everybody to the same weights, and by default it is all that travels: no weights cross the
broker. It grows without end, though, and a snapshot does not: 4 bytes for every surviving weight, and as many for each
array that the optimiser keeps. An operator who allows snapshots (``--snapshots``) lets the server offer one to a device
that misses records worth more bytes than that. It is pulled in blocks under its SHA-256, like a mask. The offer that
names the hash is signed with the run's key (``wire/signed.py``): else a broker could let a board measure its data at
weights of the broker's choice.

One snapshot serves many devices: it is made when the first one asks, and used until the records behind it cost a
quarter of it.
"""

from __future__ import annotations

import hashlib

from ..replay.update import Replica
from ..wire.topics import Channel
from ..wire.transfers import LogRequest, SnapshotOffer
from .coordinator_events import CoordinatorCommand, OfferBlob, Send, ServeLog, WithdrawBlob

__all__ = ["CatchUp"]

_SHARE = 4
_KEPT = 2  # a device may still pull the one before


class CatchUp:
    """Answers devices that ask for records.

    Args:
        snapshots: Whether the operator allows them.
    """

    def __init__(self, snapshots: bool) -> None:
        self._allowed = snapshots
        self._records = self._bytes = 0
        self._offers: list[SnapshotOffer] = []

    def count(self, kind: str, payload: bytes) -> None:
        """Take an entry of the journal: records cost what those that were seen cost on average."""
        if kind == "update":
            self._records += 1
            self._bytes += len(payload)

    def answer(self, device: str, request: LogRequest, replica: Replica, round_: int) -> list[CoordinatorCommand]:
        """What the device gets.

        Args:
            device: Its id.
            request: What it asks for.
            replica: The server's.
            round_: The latest that was announced.
        """
        missing = replica.index - request.first
        if missing < 1:
            return []
        if not self._allowed or request.records_only or self._cost(missing) <= replica.snapshot_bytes:
            return [ServeLog(device, LogRequest(request.first, min(request.count, missing)))]
        out: list[CoordinatorCommand] = []
        latest = self._offers[-1] if self._offers else None
        if latest is None or self._cost(replica.index - latest.index) > latest.size / _SHARE:
            data = replica.snapshot()
            latest = SnapshotOffer(replica.index, round_, len(data), hashlib.sha256(data).digest())
            out.append(OfferBlob(latest.sha256, data))
            self._offers.append(latest)
            if len(self._offers) > _KEPT:
                out.append(WithdrawBlob(self._offers.pop(0).sha256))
        if latest.index <= request.first:  # It has been there; what follows is short.
            return [ServeLog(device, LogRequest(request.first, min(request.count, missing)))]
        return [*out, Send(Channel.BLOCK, latest, device)]

    def _cost(self, n_records: int) -> float:
        """Bytes of so many records, about; nothing while none was seen."""
        return n_records * self._bytes / self._records if self._records else 0.0
