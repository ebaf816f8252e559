"""One open round: what is announced, who has answered, who may still answer."""

from __future__ import annotations

from collections.abc import Sequence

from .aggregation import check_report
from .blocks import Deal
from .coordinator_events import ServerEvaluated
from .documents import Announcement
from .errors import ProtocolError, QuorumError
from .manifest import Manifest
from .messages import KINDS, Decline, Report
from .roster import Roster
from .settings import RunSettings

__all__ = ["OpenRound"]


class OpenRound:
    """One open round.

    Args:
        head: Its announcement.
        roster: All devices.
        deals: The positions that it hands out; none unless weights are trained.

    Attributes:
        deadline: When it is over; None until it is set, or until the first event after a restart.
        participants: Device ids in the order of ordinals.
        reports: Accepted reports by device id, those that declined included.
        n_usable: How many of them have scalars.
        server_result: The server's own evaluation.
        is_overdue: The deadline is over and only the server's own evaluation is waited for.
    """

    def __init__(self, head: Announcement, roster: Roster, deals: Sequence[Deal] = ()) -> None:
        self._head = head
        self._deals = tuple(deals)
        self._roster = roster
        self.deadline: float | None = None
        self.participants = tuple(roster.names_of(head.participants))
        self._ranks = {name: rank for rank, name in enumerate(self.participants)}
        self._unanswered = dict.fromkeys(self.participants)
        self.n_usable = 0
        self.reports: dict[str, Report] = {}
        self.server_result: ServerEvaluated | None = None
        self.is_overdue = False

    def check(
        self, device: str, report: Report, manifest: Manifest, settings: RunSettings, weights_digest: bytes
    ) -> None:
        """Whether the report may count.

        Raises:
            ProtocolError: It may not; the text says why.
        """
        if device not in self._ranks:
            raise ProtocolError("not a participant of this round")
        check_report(report, KINDS[self._head.phase], manifest, settings, self._deals, weights_digest)

    def rank(self, device: str) -> int:
        """The device's place among the participants."""
        return self._ranks[device]

    def accept(self, device: str, report: Report) -> None:
        """Count a report that was checked and recorded."""
        self.reports[device] = report
        self._unanswered.pop(device, None)
        self.n_usable += bool(report.blocks)
        self._roster.members[device].take_report(report)

    def usable(self) -> list[tuple[str, Report]]:
        """Device ids and reports with scalars, in the order of ordinals."""
        pairs = ((name, self.reports.get(name)) for name in self.participants)
        return [(name, report) for name, report in pairs if report is not None and report.blocks]

    def is_waiting(self) -> bool:
        """Whether a participant has not answered and may still do."""
        members, round_ = self._roster.members, self._head.round
        return any(members[name].may_answer(round_) for name in self._unanswered)

    def silence(self) -> None:
        """Those that could have answered and have not are not waited for again until they are heard of."""
        for name in self._unanswered:
            if self._roster.members[name].may_answer(self._head.round):
                self._roster.members[name].silent = True

    def all_answered(self) -> bool:
        """Whether nobody is left who could answer later."""
        return bool(self.participants) and not self._unanswered

    def is_lowered(self) -> bool:
        """Whether somebody's plan did not hold in this round; its micro-batch ends at 1, so this ends too."""
        return any(report.decline is Decline.OVER_BUDGET for report in self.reports.values())

    def is_short_of_memory(self) -> bool:
        """Whether somebody who is not back yet has to plan with a smaller micro-batch."""
        return any(member.is_over_limit and member.is_alive for member in self._roster.members.values())

    def too_few(self, quorum: int, deadlines: int) -> QuorumError:
        """The error for a round that never got its quorum."""
        return QuorumError(
            f"round {self._head.round}: {self.n_usable} reports after {deadlines} deadlines, the quorum is {quorum}",
            hint="start more devices and resume the run",
        )

    def nobody_could(self, quorum: int) -> QuorumError:
        """The error for a round in which everybody answered and too few could compute."""
        reasons = sorted({r.decline.name.lower() for r in self.reports.values() if r.decline is not Decline.NONE})
        hint = "lower --learning-rate or --sigma" if "non_finite" in reasons else "see the devices' own logs"
        usable, count = self.n_usable, len(self.participants)
        detail = f" ({', '.join(reasons)})" if reasons else ""
        return QuorumError(
            f"round {self._head.round}: {usable} of {count} devices could answer{detail}, the quorum is {quorum}",
            hint=hint,
        )
