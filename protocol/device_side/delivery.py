"""The report that has no receipt yet: saved by the shell, sent again until the server has answered or goes on."""

from __future__ import annotations

from ..repeater import Repeater
from ..wire.documents import Announcement, RunDocument
from ..wire.messages import Receipt, Report, ReportKind, Verdict
from ..wire.topics import Channel
from .device_events import DeviceCommand, DropReport, GiveBack, SaveReport, Send

__all__ = ["Delivery"]

LATE_TRIES = 10


class Delivery:
    """At most one report on its way.

    Args:
        outbox: One that an earlier session could not deliver, with its run id.
        retry_s: Time after which it is sent again.

    Attributes:
        answered: The latest round whose report has a receipt; -1 for none in this run.
    """

    def __init__(self, outbox: tuple[str, Report] | None, *, retry_s: float) -> None:
        self.answered = -1
        self._outbox, self._late_tries, self._has_server = outbox, 0, True
        self._run: RunDocument | None = None
        self._repeater = Repeater(retry_s)

    @property
    def wakeup(self) -> float | None:
        """When it may have to be sent again."""
        return self._repeater.wakeup

    @property
    def is_waiting(self) -> bool:
        """Whether a report has no receipt yet."""
        return self._outbox is not None

    def forget_requests(self) -> None:
        """After a reconnect: what was sent may never have arrived."""
        self._repeater.forget()

    def start_run(self, run: RunDocument) -> list[DeviceCommand]:
        """Another run: nobody waits for a report of the one before."""
        self.answered = -1
        self._run = run
        return self._drop() if self._outbox is not None and self._outbox[0] != run.run else []

    def put(self, run: RunDocument, report: Report) -> list[DeviceCommand]:
        """A new report; it is saved before it is sent."""
        self._outbox = (run.run, report)
        self._repeater.forget()
        return [SaveReport(run.run, report)]

    def take(self, receipt: Receipt) -> list[DeviceCommand]:
        """The server's answer; one to another report means nothing."""
        report = self._outbox[1] if self._outbox is not None else None
        if report is None or (report.run_tag, report.round) != (receipt.run_tag, receipt.round):
            return []
        self.answered = max(self.answered, receipt.round)  # also by an earlier session
        counts = bool(report.blocks) and receipt.verdict in (Verdict.ACCEPTED, Verdict.DUPLICATE)
        returned = [] if counts else self.give_back(report.kind, report.round)
        return [*returned, *self._drop(is_lost=bool(returned))]

    def hear_server(self, is_online: bool) -> None:
        """Whether there is a server that could answer; what was sent while there was none says nothing of it."""
        self._has_server, self._late_tries = is_online, 0

    def give_back(self, kind: ReportKind, round_: int) -> list[DeviceCommand]:
        """What a round's scalars carried did not count: where a sketch keeps a residual it goes back into that."""
        keeps = self._run is None or self._run.training.keeps_residual  # a receipt may come before the run does
        return [GiveBack(round_)] if keeps and kind is ReportKind.PROBE else []

    def steps(self, head: Announcement | None, now: float) -> list[DeviceCommand]:
        """Send it if that is due; drop it if its round is over and nothing depends on what became of it.

        A late report may still count, and what is in a residual depends on whether it did: then only the receipt tells.
        """
        if self._outbox is None:
            return []
        report = self._outbox[1]
        is_over = head is not None and head.round > report.round
        if is_over and head is not None and not self._must_know(head, report):
            return self._drop()
        if not self._repeater.is_due(now):
            return []
        self._late_tries += is_over and self._has_server
        if self._late_tries > LATE_TRIES:  # A server that cannot read it never answers.
            return self._drop()  # Nothing goes back: the broker may hold it for a server that counts it later.
        return [Send(Channel.REPORT, report)]

    def _must_know(self, head: Announcement, report: Report) -> bool:
        if self._run is None or head.phase == "done" or report.kind is not ReportKind.PROBE:
            return False
        return self._run.settings.staleness > 0 or self._run.training.keeps_residual

    def _drop(self, *, is_lost: bool = False) -> list[DeviceCommand]:
        self._outbox, self._late_tries = None, 0
        self._repeater.forget()
        return [DropReport(is_lost)]
