"""What the machines of one process share: the manifest, the masks, and one replica for all that follow one log."""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from ..protocol.documents import RunDocument
from ..protocol.errors import ProtocolError
from ..protocol.layout import Layout
from ..protocol.manifest import Manifest
from ..protocol.mask import Mask
from ..protocol.messages import UpdateRecord
from ..protocol.parts import Parts
from ..protocol.update import Replica, chain_digest

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
    """One replica that has gone furthest, and the places of the log where somebody still is.

    Args:
        parts: Knows how to build a replica.
        run: The run.
        manifest: Its artifact.
        mask: Its survivors.
    """

    def __init__(self, parts: SharedParts, run: RunDocument, manifest: Manifest, mask: Mask) -> None:
        self._origin = parts, run, manifest, mask
        self._leader = self._make()
        self._laggard: Replica | None = None
        self._records: list[UpdateRecord] = []
        self._heads: list[bytes] = []
        self._states: WeakValueDictionary[int, _State] = WeakValueDictionary()
        self._latest = self._start = self._note(self._leader)
        self.blocks = self._leader.blocks

    @property
    def start(self) -> _State:
        """The initial weights."""
        return self._start

    def _make(self) -> Replica:
        return Parts.replica(*self._origin)

    def next(self, state: _State, record: UpdateRecord) -> _State:
        """The place behind ``state`` once ``record`` is applied; the first who asks does the work.

        Raises:
            ProtocolError: The record is not the next one of this log, or gives other weights than it says.
        """
        index = state.index
        if index == self._leader.index:
            self._leader.apply(record)
            self._records.append(record)
            self._heads.append(self._leader.head)
            self._latest = self._note(self._leader)
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
        if index == self._leader.index:
            return self._leader
        if self._laggard is None or self._laggard.index > index:
            self._laggard = self._make()
        while self._laggard.index < index:
            self._laggard.apply(self._records[self._laggard.index])
        return self._laggard

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

    def apply(self, record: UpdateRecord) -> None:
        """See :class:`Replica`."""
        self._move(self._log.next(self._state, record))


class SharedParts(Parts):
    """Gives all machines the same objects."""

    def __init__(self) -> None:
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
            self._logs[key] = SharedLog(self, run, manifest, mask)
        return SharedReplica(self._logs[key])


def _head_of(record: UpdateRecord) -> bytes:
    return chain_digest(record.parent, record.encode())
