"""The report that has no receipt yet: saved by the shell, sent again until the server has answered or goes on."""

from __future__ import annotations

from .device_events import DeviceCommand, DropReport, SaveReport, Send
from .documents import Announcement, RunDocument
from .messages import Receipt, Report
from .repeater import Repeater
from .topics import Channel

__all__ = ["Delivery"]


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
        self._outbox = outbox
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
        return self._drop()

    def steps(self, head: Announcement | None, now: float) -> list[DeviceCommand]:
        """Send it if that is due; drop it if its round is over."""
        if self._outbox is None:
            return []
        report = self._outbox[1]
        if head is not None and head.round > report.round:
            return self._drop()
        return [Send(Channel.REPORT, report)] if self._repeater.is_due(now) else []

    def _drop(self) -> list[DeviceCommand]:
        self._outbox = None
        self._repeater.forget()
        return [DropReport()]
