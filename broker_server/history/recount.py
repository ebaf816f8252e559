"""Make the decisions of a run again out of the reports that the journal holds."""

from __future__ import annotations

from ...protocol.errors import ProtocolError
from ...protocol.server_side.coordinator_events import RecordKind
from ...protocol.server_side.journaled_run import JournaledRun

__all__ = ["Recount"]


class Recount(JournaledRun):
    """A run that trusts reports only: an update or a federated mask that does not follow from them is refused.

    Sums over reports are made in double precision and rounded; another numpy or processor may add in another order, so
    this is to be done where the run was served, or on a machine of the same kind.

    Attributes:
        recounted: Decisions that were made again.
    """

    recounted = 0

    def _adopt(self, kind: RecordKind, payload: bytes) -> None:
        current = self._round
        if kind == "mask" and current is not None:
            self._compare(self._progress.choose_mask([report for _, report in current.usable()]), payload)
        if kind != "update" or current is None:
            super()._adopt(kind, payload)
            return
        late = self._late.groups(self.replica.index)
        self._compare(self._progress.make_update(self.head, current.ranked(), late).encode(), payload)
        self._late.close(current)

    def _compare(self, made: bytes, recorded: bytes) -> None:
        if made != recorded:
            raise ProtocolError("the reports of its round give another one")
        self.recounted += 1
