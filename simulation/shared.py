"""What the machines of one process share: the manifest, the masks, and one replica for all that follow one log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from ..protocol.artifact.layout import Layout
from ..protocol.artifact.manifest import Manifest
from ..protocol.device_side.parts import Parts
from ..protocol.errors import ProtocolError
from ..protocol.pruning.mask import Mask
from ..protocol.replay.update import Replica, chain_digest, snapshot_place
from ..protocol.wire.documents import RunDocument
from ..protocol.wire.messages import UpdateRecord

__all__ = ["SharedLog", "SharedParts", "SharedReplica"]


@dataclass(frozen=True, eq=False)
class _State:
    """One place of the log.

    Attributes:
        index: Records applied.
        weights: ``float32[n_survivors]``, read-only.
        digest: Theirs.
        head: Chain digest of the log.
        evaluated: What evaluations take, and its digest.
        coordinates: What the next update moves of sketched blocks, by block and number; filled when asked for.
    """

    index: int
    weights: NDArray[np.float32]
    digest: bytes
    head: bytes
    evaluated: tuple[NDArray[np.float32], bytes]
    coordinates: dict[tuple[int, int], NDArray[np.int64]] = field(default_factory=dict)


class SharedLog:
    """The places of the log where somebody still is.

    The server has made every update before a device hears of it, so devices read its replica as long as their log ends
    with its digest; only what comes too late is applied again, by a replica of their own.

    Args:
        parts: Knows how to build a replica.
        run: The run.
        manifest: Its artifact.
        mask: Its survivors.
        server: Gives the server's replica, which is only read here; None if there is none.
    """

    def __init__(
        self, parts: SharedParts, run: RunDocument, manifest: Manifest, mask: Mask, server: Callable[[], Replica] | None
    ) -> None:
        self._origin, self._server = (parts, run, manifest, mask), server
        self._own: Replica | None = None
        self._records: list[UpdateRecord] = []
        self._heads: list[bytes] = []
        self._states: WeakValueDictionary[int, _State] = WeakValueDictionary()
        first = self._make()
        self._latest = self._start = self._note(first)
        self.blocks = first.blocks
        self.snapshot_bytes_at = first.snapshot_bytes_at

    @property
    def start(self) -> _State:
        """The initial weights."""
        return self._start

    def jump(self, index: int, head: bytes) -> _State:
        """A place of the log that somebody has been at.

        Raises:
            ProtocolError: Nobody has.
        """
        if not 0 < index <= len(self._records) or self._heads[index - 1] != head:
            raise ProtocolError(f"nobody has been at update {index} of this log")
        return self._states.get(index) or self._note(self._at(index))

    def _make(self) -> Replica:
        return Parts.replica(*self._origin)

    def next(self, state: _State, record: UpdateRecord) -> _State:
        """The place behind ``state`` once ``record`` is applied.

        Raises:
            ProtocolError: The record is not the next one of this log, or gives other weights than it says.
        """
        index = state.index
        if index == len(self._records):
            replica = self._servers(index + 1, _head_of(record))
            if replica is None:
                replica = self._replayed(index)
                replica.apply(record)
            self._records.append(record)
            self._heads.append(replica.head)
            self._latest = self._note(replica)
            return self._latest
        known = self._records[index] if record.index == index else None
        is_known = record is known or (record.parent == state.head and self._heads[index] == _head_of(record))
        if known is None or not is_known:
            raise ProtocolError(f"update {record.index} is none of the log that update {index} is next in")
        return self._states.get(index + 1) or self._note(self._at(index + 1))

    def coordinates(self, state: _State, block: int, k: int) -> NDArray[np.int64]:
        """See :meth:`Replica.coordinates`."""
        if (block, k) not in state.coordinates:
            state.coordinates[block, k] = self._at(state.index).coordinates(block, k).copy()
        return state.coordinates[block, k]

    def _at(self, index: int) -> Replica:
        """A replica at some place, to be read at once."""
        head = self._heads[index - 1] if index else self._start.head
        return self._servers(index, head) or self._replayed(index)

    def _servers(self, index: int, head: bytes) -> Replica | None:
        """The server's replica, if it is just there."""
        server = self._server() if self._server is not None else None
        return server if server is not None and (server.index, server.head) == (index, head) else None

    def _replayed(self, index: int) -> Replica:
        """A replica of our own at some place."""
        if self._own is None or self._own.index > index:
            self._own = self._make()
        while self._own.index < index:
            self._own.apply(self._records[self._own.index])
        return self._own

    def _note(self, replica: Replica) -> _State:
        weights = replica.weights.copy()
        weights.setflags(write=False)
        state = _State(replica.index, weights, replica.digest, replica.head, replica.evaluated())
        self._states[state.index] = state
        return state


class SharedReplica(Replica):
    """A device's place in a :class:`SharedLog`, in the shape of a replica of its own.

    Attributes:
        weights: ``float32[n_survivors]``, read-only, shared with all that are at the same place.
        blocks: The blocks.
    """

    def __init__(self, log: SharedLog) -> None:
        self._log = log
        self.blocks = log.blocks
        self._move(log.start)

    def _move(self, state: _State) -> None:
        self._state, self.weights = state, state.weights

    @property
    def index(self) -> int:
        """See :class:`Replica`."""
        return self._state.index

    @property
    def digest(self) -> bytes:
        """See :class:`Replica`."""
        return self._state.digest

    @property
    def head(self) -> bytes:
        """See :class:`Replica`."""
        return self._state.head

    def evaluated(self) -> tuple[NDArray[np.float32], bytes]:
        """See :class:`Replica`."""
        return self._state.evaluated

    def coordinates(self, block: int, k: int) -> NDArray[np.int64]:
        """See :class:`Replica`."""
        return self._log.coordinates(self._state, block, k)

    def restore_from_start(self) -> None:
        """See :class:`Replica`."""
        self._move(self._log.start)

    def snapshot_bytes_at(self, index: int) -> int:
        """See :class:`Replica`."""
        return self._log.snapshot_bytes_at(index)

    def restore(self, snapshot: bytes) -> None:
        """See :class:`Replica`; the process needs no other copy of the weights."""
        self._move(self._log.jump(*snapshot_place(snapshot)))

    def apply(self, record: UpdateRecord) -> None:
        """See :class:`Replica`."""
        self._move(self._log.next(self._state, record))


class SharedParts(Parts):
    """Gives all machines the same objects.

    Args:
        server: Gives the server's replica; None if there is none to read.
    """

    def __init__(self, server: Callable[[], Replica] | None = None) -> None:
        self._server = server
        self._manifests: dict[bytes, Manifest] = {}
        self._masks: dict[bytes, Mask] = {}
        self._logs: dict[tuple[str, bytes], SharedLog] = {}

    def manifest(self, data: bytes) -> Manifest:
        """See :class:`Parts`."""
        if data not in self._manifests:
            self._manifests[data] = super().manifest(data)
        return self._manifests[data]

    def mask(self, run: RunDocument, layout: Layout, data: bytes) -> Mask:
        """See :class:`Parts`."""
        if data not in self._masks:
            self._masks[data] = super().mask(run, layout, data)
        return self._masks[data]

    def replica(self, run: RunDocument, manifest: Manifest, mask: Mask) -> Replica:
        """See :class:`Parts`."""
        key = (run.run, mask.digest)
        if key not in self._logs:
            self._logs[key] = SharedLog(self, run, manifest, mask, self._server)
        return SharedReplica(self._logs[key])


def _head_of(record: UpdateRecord) -> bytes:
    return chain_digest(record.parent, record.encode())
