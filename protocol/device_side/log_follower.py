"""How a device keeps its weights at the head of the server's log: replay, ask for what is missing, start over.

Where the run allows it, the server may answer with a snapshot in place of many records (``server_side/catch_up.py``).
"""

from __future__ import annotations

from collections import deque

from ..errors import ProtocolError, SelfTestError
from ..repeater import Repeater
from ..replay.update import Replica, snapshot_place
from ..settings import RunSettings
from ..wire.blobs import MAX_SETBACKS, BlobDownload
from ..wire.documents import Announcement
from ..wire.messages import UpdateRecord
from ..wire.transfers import BlobBlock, BlobRequest, LogRequest, LogSlice, SnapshotOffer
from .device_events import DeviceCommand

__all__ = ["LogFollower"]

REMEMBERED = 32
SNAPSHOT_TRIES = 3
REQUEST_RECORDS = 1024
REQUEST_ENTRIES = 1 << 26
"""Weights that the records of one request may touch, counted once a record.

An answer is applied in one go, and nothing else of the device runs meanwhile, nor is a watchdog fed: large models ask
for fewer records at a time, from 65,537 survivors on.
"""


class LogFollower:
    """The replica of one run and mask.

    A record of another log is no proof of anything: it may be late, or of another run. What proves that this log went
    wrong is a record that was asked for, or an announcement that names another head; then the replica starts over from
    the seed, once. A second time in a row means that this machine computes something else than the server.

    Args:
        replica: At the start of the log.
        settings: Of the run: may a snapshot come in place of records?
        retry_s: A request that is not answered in this time is repeated.

    Attributes:
        replica: The weights; updated in place.
        recent: Place in the log and round of the latest records.
    """

    def __init__(self, replica: Replica, settings: RunSettings, *, retry_s: float) -> None:
        self.replica = replica
        self._retry_s, self._is_allowed, self._most = retry_s, settings.snapshots, settings.training.rounds
        self._failures, self._had_snapshot = 0, False
        self._offer: SnapshotOffer | None = None
        self._download: BlobDownload | None = None
        self._question = Repeater(retry_s)
        self._is_expecting = False
        self._latest_round = -1
        self._divergences = 0
        self.recent: deque[tuple[int, int]] = deque(maxlen=REMEMBERED)

    @property
    def wakeup(self) -> float | None:
        """When :meth:`requests` may have something to repeat."""
        return self._download.wakeup if self._download else self._question.wakeup

    def forget_requests(self) -> None:
        """After a reconnect: whatever was asked for may never come."""
        self._question.forget()
        self._is_expecting = False
        if self._download is not None:
            self._download.forget_requests()

    def hear(self, record: UpdateRecord) -> None:
        """Take an update as the server makes it; anything but the next one of this very log changes nothing.

        Raises:
            SelfTestError: See the class.
        """
        if record.index == self.replica.index and record.parent == self.replica.head:
            self._apply(record)

    def read(self, part: LogSlice | SnapshotOffer) -> None:
        """Take the answer to a request; one that nobody waits for changes nothing.

        Raises:
            SelfTestError: See the class.
        """
        if isinstance(part, SnapshotOffer):
            self._consider(part)
            return
        before = self.replica.index
        for record in part.records if self._is_expecting else ():
            if record.index == self.replica.index and not self._apply(record):
                return
        if self.replica.index > before:
            self.forget_requests()

    def has_reached(self, head: Announcement) -> bool:
        """Whether the weights are those that the announced round starts from.

        An update comes before the announcement that counts it, so that a replica which is ahead only waits; unless the
        announcement is of a later round: then the server has lost updates.

        Raises:
            SelfTestError: See the class.
        """
        if not head.log_head:
            return True
        replica = self.replica
        if replica.index > head.log_length and head.round > self._latest_round:
            self._start_over(f"the server's log has {head.log_length} records, this one {replica.index}")
        if replica.index == head.log_length:
            if replica.head.hex() == head.log_head:
                self._divergences = 0
                self.forget_requests()
                return True
            self._start_over(f"the log of {head.log_length} records has another head here")
        return False

    def is_ahead(self, head: Announcement) -> bool:
        """Whether the announcement is older than the weights."""
        return self.replica.index > head.log_length

    def requests(self, head: Announcement, now: float) -> list[LogRequest | BlobRequest]:
        """What to ask for now, if anything."""
        missing = head.log_length - self.replica.index
        if self._offer is not None and self._offer.index <= self.replica.index:
            self._offer = self._download = None  # Records have overtaken it.
        if missing < 1:
            return []
        if self._download is not None:
            if self._download.setbacks < MAX_SETBACKS:
                return list(self._download.requests(now))
            self._decline()
        if not self._question.is_due(now):
            return []
        self._is_expecting = True
        at_once = max(1, REQUEST_ENTRIES // self.replica.weights.size)
        return [
            LogRequest(self.replica.index, min(REQUEST_RECORDS, at_once, missing), self._failures >= SNAPSHOT_TRIES)
        ]

    def _consider(self, offer: SnapshotOffer) -> None:
        if not (self._is_expecting and self._is_allowed) or offer.index <= self.replica.index:
            return
        self.forget_requests()
        if offer.index > self._most or offer.size != self.replica.snapshot_bytes_at(offer.index):
            self._decline()
            return
        self._offer, self._download = offer, BlobDownload(offer.sha256, offer.size, retry_s=self._retry_s)

    def add(self, block: BlobBlock) -> list[DeviceCommand]:
        """Take a block of the snapshot; others change nothing.

        Returns:
            No commands: unlike a file, a snapshot is not stored.

        Raises:
            SelfTestError: See the class.
        """
        data = self._download.add(block) if self._download else None
        if data is not None and self._offer is not None:
            self._restore(self._offer, data)
        return []

    def _restore(self, offer: SnapshotOffer, data: bytes) -> None:
        self._offer = self._download = None
        if offer.index <= self.replica.index:
            return
        self._had_snapshot = True
        try:
            if snapshot_place(data)[0] != offer.index:
                raise ProtocolError("a snapshot is of another place than was offered")
            self.replica.restore(data)
        except ProtocolError as error:
            self._decline()
            self._start_over(error.message)
            return
        self._latest_round = offer.round
        self.recent.clear()

    def _decline(self) -> None:
        """A snapshot did not come, or cannot be used; after some of them only records are asked for."""
        self._offer = self._download = None
        self._failures += 1

    def _apply(self, record: UpdateRecord) -> bool:
        try:
            self.replica.apply(record)
        except ProtocolError as error:
            self._start_over(error.message)
            return False
        self._latest_round = record.round
        self.recent.append((record.index, record.round))
        return True

    def _start_over(self, detail: str) -> None:
        self._divergences += 1
        if self._divergences > 1:
            raise SelfTestError(f"replaying the log fails: {detail}", hint="run fedzo-device doctor")
        if self._had_snapshot:
            self._failures = SNAPSHOT_TRIES  # Whoever made it, records prove themselves.
        self.replica.restore_from_start()
        self._latest_round = -1
        self.recent.clear()
        # The next request waits for its time, so that a repeated answer does not count as a second failure.
        self._is_expecting = False
