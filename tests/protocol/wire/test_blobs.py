"""Pulling blobs: whatever happens to single blocks, the blob arrives and is the one that its hash names."""

from __future__ import annotations

import hashlib
import random

import pytest

from fedzo.protocol.device_side.device_events import BlobFound, DeviceCommand, FindBlob, Send, StoreBlob
from fedzo.protocol.wire.blobs import BLOCK_BYTES, MAX_SETBACKS, WINDOW, BlobDownload, BlobFetcher
from fedzo.protocol.wire.topics import Channel
from fedzo.protocol.wire.transfers import BlobBlock, BlobRequest

RETRY_S = 5.0


def blob(size: int, seed: int = 1) -> tuple[bytes, bytes]:
    data = random.Random(seed).randbytes(size)
    return hashlib.sha256(data).digest(), data


def serve(data: bytes, request: BlobRequest) -> BlobBlock:
    part = data[request.offset : request.offset + request.length]
    return BlobBlock(request.sha256, request.offset, len(data), part)


@pytest.mark.parametrize("size", [1, 2, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 7 * BLOCK_BYTES + 5])
def test_a_blob_of_any_size_is_pulled_in_blocks(size: int) -> None:
    sha256, data = blob(size)
    download = BlobDownload(sha256, size, retry_s=RETRY_S)
    requested, found, waiting = [], None, download.requests(0.0)
    while waiting:
        assert len(waiting) <= WINDOW
        request = waiting.pop(0)
        requested.append(request.offset)
        found = download.add(serve(data, request))
        waiting += download.requests(0.0)
    assert found == data
    assert requested == list(range(0, size, BLOCK_BYTES))
    assert download.wakeup is None


@pytest.mark.parametrize("seed", range(20))
def test_lost_repeated_and_reordered_blocks(seed: int) -> None:
    source, now = random.Random(seed), 0.0
    sha256, data = blob(9 * BLOCK_BYTES + 17, seed)
    download = BlobDownload(sha256, len(data), retry_s=RETRY_S)
    flying: list[BlobBlock] = []
    for _ in range(1_000):
        for request in download.requests(now):
            copies = source.choice([0, 1, 1, 2])
            flying += [serve(data, request)] * copies
        assert download.wakeup is not None
        assert download.wakeup > now
        source.shuffle(flying)
        if flying and source.random() < 0.7:
            found = download.add(flying.pop())
            if found is not None:
                assert found == data
                return
        else:
            now = download.wakeup
    pytest.fail("the blob never arrived")


def test_requests_are_repeated_only_when_they_are_due() -> None:
    sha256, data = blob(2 * BLOCK_BYTES)
    download = BlobDownload(sha256, len(data), retry_s=RETRY_S)
    first = download.requests(1.0)
    assert [request.offset for request in first] == [0, BLOCK_BYTES]
    assert download.requests(1.0) == []
    assert download.requests(5.9) == []
    wakeups = [download.wakeup]
    download.add(serve(data, first[0]))
    assert [request.offset for request in download.requests(6.0)] == [BLOCK_BYTES]
    download.forget_requests()
    wakeups.append(download.wakeup)
    assert wakeups == [6.0, None]
    assert [request.offset for request in download.requests(6.1)] == [BLOCK_BYTES]


def test_foreign_and_misplaced_blocks_change_nothing() -> None:
    sha256, data = blob(2 * BLOCK_BYTES + 9)
    other, _ = blob(10, 2)
    download = BlobDownload(sha256, len(data), retry_s=RETRY_S)
    download.requests(0.0)
    for block in (
        BlobBlock(other, 0, len(data), data[:BLOCK_BYTES]),
        BlobBlock(sha256, 0, len(data) + 1, data[:BLOCK_BYTES]),
        BlobBlock(sha256, 1, len(data), data[1:BLOCK_BYTES]),
        BlobBlock(sha256, 0, len(data), data[: BLOCK_BYTES - 1]),
        BlobBlock(sha256, 0, len(data), data[: BLOCK_BYTES + 1]),
        BlobBlock(sha256, 2 * BLOCK_BYTES, len(data), data[-8:]),
        BlobBlock(sha256, 5, len(data), bytes(BLOCK_BYTES)),
    ):
        assert download.add(block) is None
    found = None
    for offset in range(0, len(data), BLOCK_BYTES):
        assert found is None
        found = download.add(serve(data, BlobRequest(sha256, offset, BLOCK_BYTES)))
    assert found == data


def test_a_blob_with_a_wrong_hash_is_pulled_again_after_a_pause() -> None:
    sha256, data = blob(3 * BLOCK_BYTES)
    download = BlobDownload(sha256, len(data), retry_s=RETRY_S)
    requests = download.requests(50.0)
    bad = bytearray(data)
    bad[BLOCK_BYTES] ^= 1
    assert [download.add(serve(bytes(bad), request)) for request in requests] == [None] * 3
    assert download.requests(50.1) == []
    assert download.wakeup == 50.0 + RETRY_S
    again = download.requests(50.0 + RETRY_S)
    assert again == requests
    assert [download.add(serve(data, request)) for request in again] == [None, None, data]


class Store:
    """A local store that answers at once."""

    def __init__(self, *kept: bytes) -> None:
        self.blobs = {hashlib.sha256(data).digest(): data for data in kept}

    def do(self, command: object) -> BlobFound:
        if isinstance(command, StoreBlob):
            assert hashlib.sha256(command.data).digest() == command.sha256
            self.blobs[command.sha256] = command.data
        assert isinstance(command, (FindBlob, StoreBlob))
        data = self.blobs.get(command.sha256)
        return BlobFound(command.sha256, data is not None, data if data and command.read else b"")


@pytest.mark.parametrize("read", [True, False])
def test_a_blob_in_the_local_store_is_not_pulled(read: bool) -> None:
    sha256, data = blob(100)
    fetcher, store = BlobFetcher(retry_s=RETRY_S), Store(data)
    (command,) = fetcher.fetch(sha256, 100, 0.0, read=read)
    assert command == FindBlob(sha256, read)
    assert fetcher.fetch(sha256, 100, 9.0, read=read) == []
    assert not fetcher.has(sha256)
    answer = store.do(command)
    assert answer.data == (data if read else b"")
    fetcher.found(answer)
    assert fetcher.has(sha256)
    assert fetcher.wakeup is None


def test_a_blob_that_is_missing_is_pulled_and_stored() -> None:
    sha256, data = blob(BLOCK_BYTES + 1)
    fetcher, store = BlobFetcher(retry_s=RETRY_S), Store()
    fetcher.found(store.do(*fetcher.fetch(sha256, len(data), 0.0, read=True)))
    sends = fetcher.fetch(sha256, len(data), 0.0, read=True)
    requests = [command.message for command in sends if isinstance(command, Send)]
    assert [(r.offset, r.length) for r in requests if isinstance(r, BlobRequest)] == [
        (0, BLOCK_BYTES),
        (BLOCK_BYTES, 1),
    ]
    stored = []
    for request in requests:
        assert isinstance(request, BlobRequest)
        stored += fetcher.add(serve(data, request))
    assert stored == [StoreBlob(sha256, data, read=True)]
    assert fetcher.fetch(sha256, len(data), 0.0, read=True) == []
    fetcher.found(store.do(stored[0]))
    assert fetcher.has(sha256)
    assert fetcher.add(serve(data, BlobRequest(sha256, 0, BLOCK_BYTES))) == []


def test_a_blob_that_cannot_be_stored_is_pulled_again() -> None:
    sha256, data = blob(5)
    fetcher = BlobFetcher(retry_s=RETRY_S)
    fetcher.fetch(sha256, 5, 0.0, read=False)
    fetcher.found(BlobFound(sha256, present=False))
    fetcher.fetch(sha256, 5, 0.0, read=False)
    fetcher.add(BlobBlock(sha256, 0, 5, data))
    fetcher.found(BlobFound(sha256, present=False))
    assert fetcher.fetch(sha256, 5, 1.0, read=False) == [Send(Channel.GET, BlobRequest(sha256, 0, 5))]


def test_a_download_that_nobody_wants_any_more_does_not_wake_the_device() -> None:
    old, _ = blob(2 * BLOCK_BYTES)
    new, data = blob(10, 2)
    fetcher, store = BlobFetcher(retry_s=RETRY_S), Store(data)
    fetcher.fetch(old, 2 * BLOCK_BYTES, 0.0, read=True)
    fetcher.found(BlobFound(old, present=False))
    fetcher.fetch(old, 2 * BLOCK_BYTES, 0.0, read=True)
    wakeups = [fetcher.wakeup]
    (command,) = fetcher.fetch(new, 10, 1.0, read=True)
    wakeups.append(fetcher.wakeup)
    fetcher.found(store.do(command))
    assert fetcher.has(new)
    assert [*wakeups, fetcher.wakeup] == [RETRY_S, None, None]


def test_the_bytes_of_a_blob_that_is_there_are_read_again() -> None:
    """For example a mask that came while another one was announced."""
    sha256, data = blob(10)
    fetcher, store = BlobFetcher(retry_s=RETRY_S), Store(data)
    fetcher.found(store.do(*fetcher.fetch(sha256, 10, 0.0, read=False)))
    assert fetcher.fetch(sha256, 10, 0.0, read=True) == [FindBlob(sha256, read=True)]


# --- blobs that one can do without ----------------------------------------------------------------------------------


def pulling(sha256: bytes, size: int) -> BlobFetcher:
    """A fetcher that has asked the server for an optional blob, at 0 s."""
    fetcher = BlobFetcher(retry_s=RETRY_S)
    fetcher.fetch(sha256, size, 0.0, read=False, optional=True)
    fetcher.found(BlobFound(sha256, present=False))
    assert fetcher.fetch(sha256, size, 0.0, read=False, optional=True)
    assert not fetcher.is_abandoned(sha256)
    return fetcher


def test_a_blob_that_the_server_does_not_have_is_abandoned_at_once() -> None:
    sha256, data = blob(10)
    fetcher = pulling(sha256, 10)
    assert fetcher.add(BlobBlock(blob(10, 2)[0], 0, 0, b"")) == []
    assert not fetcher.is_abandoned(sha256)  # said of another one
    assert fetcher.add(BlobBlock(sha256, 0, 0, b"")) == []
    assert fetcher.is_abandoned(sha256)
    assert fetcher.wakeup is None
    assert fetcher.add(BlobBlock(sha256, 0, 10, data)) == []
    assert fetcher.is_abandoned(sha256)


def test_a_server_that_does_not_answer_is_waited_for_some_time() -> None:
    sha256, _ = blob(10)
    fetcher = pulling(sha256, 10)
    for _ in range(MAX_SETBACKS):
        assert not fetcher.is_abandoned(sha256)
        assert fetcher.wakeup is not None
        fetcher.fetch(sha256, 10, fetcher.wakeup, read=False, optional=True)
    assert fetcher.is_abandoned(sha256)


def test_blocks_that_come_start_the_patience_again() -> None:
    sha256, data = blob(4 * BLOCK_BYTES)
    fetcher, stored = pulling(sha256, len(data)), list[DeviceCommand]()
    for number in range(4):
        for _ in range(MAX_SETBACKS - 1):
            assert fetcher.wakeup is not None
            fetcher.fetch(sha256, len(data), fetcher.wakeup, read=False, optional=True)
        stored = fetcher.add(serve(data, BlobRequest(sha256, number * BLOCK_BYTES, BLOCK_BYTES)))
        assert not fetcher.is_abandoned(sha256)
    assert stored == [StoreBlob(sha256, data, read=False, optional=True)]


@pytest.mark.parametrize("fault", ["other bytes", "not kept"])
def test_a_blob_that_comes_wrong_or_cannot_be_kept_is_abandoned(fault: str) -> None:
    sha256, data = blob(10)
    fetcher = pulling(sha256, 10)
    stored = fetcher.add(BlobBlock(sha256, 0, 10, bytes(10) if fault == "other bytes" else data))
    if fault == "not kept":
        assert stored
        fetcher.found(BlobFound(sha256, present=False))
    assert fetcher.is_abandoned(sha256)
    assert not fetcher.has(sha256)


def test_a_blob_that_is_needed_is_asked_for_for_ever() -> None:
    sha256, data = blob(10)
    download = BlobDownload(sha256, 10, retry_s=RETRY_S)
    download.requests(0.0)
    assert download.add(BlobBlock(sha256, 0, 0, b"")) is None
    for turn in range(1, 20):
        assert download.requests(turn * RETRY_S) == [BlobRequest(sha256, 0, 10)]
    assert download.add(BlobBlock(sha256, 0, 10, data)) == data
