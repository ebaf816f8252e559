"""Pulling a blob in blocks: the device names what it misses, so nothing depends on order or on single messages."""

from __future__ import annotations

import hashlib

from ..device_side.device_events import BlobFound, DeviceCommand, FindBlob, Send, StoreBlob
from .topics import Channel
from .transfers import BlobBlock, BlobRequest

__all__ = ["BLOCK_BYTES", "MAX_SETBACKS", "BlobDownload", "BlobFetcher"]

BLOCK_BYTES = 64 << 10
WINDOW = 4
MAX_SETBACKS = 3


class BlobDownload:
    """One blob on its way.

    Args:
        sha256: Hash of the whole, 32 bytes.
        size: Its length in bytes, from a document that is already trusted.
        retry_s: A block that has not come after this time is asked for again.

    Attributes:
        setbacks: Times in a row that a request was not answered; :data:`MAX_SETBACKS` once the server has said that
            it has no such blob, or has given another one.
    """

    def __init__(self, sha256: bytes, size: int, *, retry_s: float) -> None:
        self.sha256 = sha256
        self.size = size
        self.setbacks = 0
        self._retry_s = retry_s
        self._data = bytearray(size)
        self._missing = set(range(0, size, BLOCK_BYTES))
        self._asked: dict[int, float] = {}
        self._latest = 0.0

    @property
    def wakeup(self) -> float | None:
        """When :meth:`requests` may have something to repeat."""
        return min(self._asked.values()) + self._retry_s if self._asked else None

    def forget_requests(self) -> None:
        """After a reconnect: whatever was asked for may never come."""
        self._asked.clear()

    def requests(self, now: float) -> list[BlobRequest]:
        """What to ask for now: at most :data:`WINDOW` blocks are on their way."""
        overdue = [offset for offset, asked in self._asked.items() if now >= asked + self._retry_s]
        self.setbacks += bool(overdue)
        for offset in overdue:
            del self._asked[offset]
        wanted = sorted(self._missing - self._asked.keys())[: max(0, WINDOW - len(self._asked))]
        for offset in wanted:
            self._asked[offset] = self._latest = now
        return [BlobRequest(self.sha256, o, min(BLOCK_BYTES, self.size - o)) for o in wanted]

    def add(self, block: BlobBlock) -> bytes | None:
        """Take a block; a foreign, repeated or misplaced one changes nothing.

        Returns:
            The whole blob once it is complete and has its hash. One with a wrong hash is pulled again, ``retry_s``
            after the last request.
        """
        if block.sha256 == self.sha256 and block.total == 0:
            self.setbacks = MAX_SETBACKS
            return None
        expected = min(BLOCK_BYTES, self.size - block.offset)
        if block.sha256 != self.sha256 or block.total != self.size or block.offset not in self._missing:
            return None
        if len(block.data) != expected:
            return None
        self._data[block.offset : block.offset + expected] = block.data
        self._missing.discard(block.offset)
        self._asked.pop(block.offset, None)
        self.setbacks = 0
        if self._missing:
            return None
        data = bytes(self._data)
        if hashlib.sha256(data).digest() == self.sha256:
            return data
        self.setbacks = MAX_SETBACKS
        self._missing = set(range(0, self.size, BLOCK_BYTES))
        self._asked = dict.fromkeys(self._missing, self._latest)
        return None


class BlobFetcher:
    """Gets blobs one after another: first out of the local store, then block by block from the server.

    Args:
        retry_s: See :class:`BlobDownload`.
    """

    def __init__(self, *, retry_s: float) -> None:
        self._retry_s = retry_s
        self._present: dict[bytes, bool] = {}
        self._looking: set[bytes] = set()
        self._download: BlobDownload | None = None
        self._read = self._optional = False
        self._stored: set[bytes] = set()
        self._abandoned: set[bytes] = set()

    @property
    def wakeup(self) -> float | None:
        """When :meth:`fetch` may have something to repeat."""
        return self._download.wakeup if self._download else None

    def forget_requests(self) -> None:
        """After a reconnect: whatever was asked for may never come."""
        if self._download:
            self._download.forget_requests()

    def has(self, sha256: bytes) -> bool:
        """Whether the blob is in the local store."""
        return self._present.get(sha256, False)

    def is_abandoned(self, sha256: bytes) -> bool:
        """Whether to go on without a blob that one can do without.

        True for good once the server has said that it has none or has not answered for some time, or the local store
        could not keep it.
        """
        download = self._download
        if download is not None and download.sha256 == sha256 and download.setbacks >= MAX_SETBACKS:
            self._abandoned.add(sha256)
            self._download = None
        return sha256 in self._abandoned

    def fetch(self, sha256: bytes, size: int, now: float, *, read: bool, optional: bool = False) -> list[DeviceCommand]:
        """The next step towards a blob; a download of another one is given up.

        Args:
            sha256: Of the blob.
            size: Its length in bytes.
            now: The time.
            read: Whether its bytes are wanted when it is there.
            optional: Whether one can do without it, see :meth:`is_abandoned`.
        """
        self._read, self._optional = read, optional
        if self._download is not None and self._download.sha256 != sha256:
            self._download = None
        if sha256 in self._looking:
            return []
        if self._present.get(sha256, True):
            self._looking.add(sha256)
            return [FindBlob(sha256, read)]
        if self._download is None:
            self._download = BlobDownload(sha256, size, retry_s=self._retry_s)
        return [Send(Channel.GET, request) for request in self._download.requests(now)]

    def add(self, block: BlobBlock) -> list[DeviceCommand]:
        """Take a block from the server."""
        data = self._download.add(block) if self._download else None
        if data is None:
            return []
        self._download = None
        self._looking.add(block.sha256)
        self._stored.add(block.sha256)
        return [StoreBlob(block.sha256, data, self._read, self._optional)]

    def found(self, event: BlobFound) -> None:
        """Take the local store's answer."""
        self._looking.discard(event.sha256)
        self._present[event.sha256] = event.present
        if not event.present and event.sha256 in self._stored:
            self._abandoned.add(event.sha256)
