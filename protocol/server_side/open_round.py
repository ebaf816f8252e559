"""One open round: what is announced, who has answered, who may still answer.

A round closes when every participant that is alive has answered and the quorum is met, at the deadline with the
quorum, or as soon as enough have answered, if the settings say how many that is (:mod:`.selection`). Under the quorum
the deadline starts again; participants that cannot come back are replaced by a new round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..artifact.manifest import Manifest
from ..errors import ProtocolError, QuorumError
from ..perturbation.blocks import Deal
from ..pruning.mask import Mask
from ..pruning.score_checks import checked_ranks
from ..settings import RunSettings
from ..wire.documents import Announcement
from ..wire.messages import KINDS, Decline, Report, Verdict
from .aggregation import check_report
from .coordinator_events import CheckScores, CoordinatorCommand, Evaluate, ServerEvaluated
from .roster import Roster
from .staleness import LateReports

__all__ = ["Ending", "OpenRound"]

Ending = Literal["wait", "close", "others", "lowered", "short", "nobody", "missed", "skipped"]
"""What a round has come to: it goes on; it can be closed; others who could answer have come; a board plans with less
memory; one still has to; nobody is left who could answer; the deadline is over without a quorum; devices know of later
rounds, as the journal is an older copy."""


class OpenRound:
    """One open round.

    Args:
        head: Its announcement.
        roster: All devices.
        settings: Of the run.
        deals: The positions that it hands out; none unless weights are trained.
        late: Reports of earlier rounds that count in its update.

    Attributes:
        head: Its announcement.
        deals: As given.
        deadline: When it is over; None until it is set, or until the first event after a restart.
        participants: Device ids in the order of ordinals.
        reports: Accepted reports by device id, those that declined included.
        n_usable: How many of them have scalars.
        server_result: The server's own evaluation.
        is_overdue: The deadline is over and only the server's own passes are waited for.
        unchecked: Devices whose scores the server is to compute again.
    """

    def __init__(
        self,
        head: Announcement,
        roster: Roster,
        settings: RunSettings,
        deals: Sequence[Deal] = (),
        late: LateReports | None = None,
    ) -> None:
        self.head = self._head = head
        self._settings = settings
        self.deals = self._deals = tuple(deals)
        self._late = late if head.phase == "train" else None
        self._roster = roster
        self.deadline: float | None = None
        self.participants = tuple(roster.names_of(head.participants))
        self._ranks = {name: rank for rank, name in enumerate(self.participants)}
        self._unanswered = dict.fromkeys(self.participants)
        self._waited_for = ""
        self.n_usable = 0
        self.reports: dict[str, Report] = {}
        self.server_result: ServerEvaluated | None = None
        self.is_overdue = False
        self._checked: frozenset[int] = frozenset()
        if head.phase == "saliency":
            self._checked = checked_ranks(settings, head.round, len(self.participants))
        self.unchecked: dict[str, None] = {}
        self._asked: set[str] = set()

    def check(self, device: str, report: Report, manifest: Manifest, weights_digest: bytes) -> None:
        """Whether the report may count.

        Raises:
            ProtocolError: It may not; the text says why.
        """
        if device not in self._ranks:
            raise ProtocolError("not a participant of this round")
        rank = self._ranks[device]
        check_report(report, KINDS[self._head.phase], manifest, self._settings, self._deals, weights_digest, rank)

    def take(self, device: str, report: Report, manifest: Manifest, weights_digest: bytes) -> tuple[Verdict, str]:
        """Check a report, and count it if it may.

        Returns:
            What it is told, and why not.
        """
        if device in self.reports:
            return self._roster.members[device].verdict_again(report), ""
        try:
            self.check(device, report, manifest, weights_digest)
        except ProtocolError as error:
            return Verdict.REFUSED, error.message
        self.accept(device, report)
        return Verdict.ACCEPTED, ""

    def rank(self, device: str) -> int:
        """The device's place among the participants."""
        return self._ranks[device]

    def accept(self, device: str, report: Report) -> None:
        """Count a report that was checked and recorded."""
        self.reports[device] = report
        self._unanswered.pop(device, None)
        self.n_usable += bool(report.blocks)
        if report.blocks and self._ranks[device] in self._checked:
            self.unchecked[device] = None
        self._roster.members[device].take_report(report)

    def judge(self, device: str, difference: float) -> str | None:
        """Take the outcome of a check.

        Returns:
            Why the device's scores do not count; None if they do.
        """
        limit = self._settings.saliency.check_limit
        if device not in self.unchecked or difference <= limit:
            self.unchecked.pop(device, None)
            return None
        self.drop(device)
        return f"its scores differ from the server's by {difference:.2e}, the limit is {limit:.0e}: they do not count"

    def drop(self, device: str) -> None:
        """A report that was accepted does not count after all."""
        report = self.reports.get(device)
        if report is not None and report.blocks:
            self.reports[device] = dataclasses.replace(report, blocks=(), decline=Decline.FAILED)
            self.n_usable -= 1
        self.unchecked.pop(device, None)

    def questions(self, mask: Mask, weights: NDArray[np.float32], has_test_set: bool) -> list[CoordinatorCommand]:
        """What the server has to compute for this round; scores are given once, an evaluation until it is done."""
        out: list[CoordinatorCommand] = []
        if self._head.phase == "evaluate" and has_test_set and self.server_result is None:
            out.append(Evaluate(self._head.round, mask, weights.copy()))
        for device in [name for name in self.unchecked if name not in self._asked]:
            self._asked.add(device)
            ordinal, blocks = self._roster.members[device].ordinal, self.reports[device].blocks
            out.append(CheckScores(self._head.round, device, ordinal, mask, weights, blocks))
        return out

    @property
    def has_new_scores(self) -> bool:
        """Whether the server has not been asked yet to compute somebody's scores again."""
        return any(name not in self._asked for name in self.unchecked)

    def usable(self) -> list[tuple[str, Report]]:
        """Device ids and reports with scalars, in the order of ordinals."""
        pairs = ((name, self.reports.get(name)) for name in self.participants)
        return [(name, report) for name, report in pairs if report is not None and report.blocks]

    def ranked(self) -> list[tuple[int, Report]]:
        """:meth:`usable` with the device's place among the participants in place of its id."""
        return [(self._ranks[name], report) for name, report in self.usable()]

    def is_waiting(self) -> bool:
        """Whether a participant has not answered and may still do, or a report has not been checked."""
        members, round_, name = self._roster.members, self._head.round, self._waited_for
        if self.unchecked or (name in self._unanswered and members[name].may_answer(round_)):
            return True
        # The last one: reports come roughly in the order of names, so that it will do for many of them.
        found = (name for name in reversed(self._unanswered) if members[name].may_answer(round_))
        self._waited_for = next(found, "")
        return bool(self._waited_for)

    def lacks(self, device: str) -> bool:
        """Whether nothing is known of a participant's report, not even that it was refused."""
        is_refused = device in self._ranks and self._roster.members[device].refused_round == self._head.round
        return device in self._unanswered and not is_refused

    def silence(self) -> None:
        """Those that had all the time and have not answered are not waited for again until they are heard of."""
        if not self.is_overdue:
            return
        for name in self._unanswered:
            if self._roster.members[name].may_answer(self._head.round):
                self._roster.members[name].silent = True

    def ending(self, now: float, has_test_set: bool) -> Ending:
        """Whether it is over, and how; the deadline bounds the devices' answers, not the server's own passes."""
        assert self.deadline is not None
        if now >= self.deadline:
            self.is_overdue, self.deadline = True, now + self._settings.deadline_s
        if self.unchecked or (self._head.phase == "evaluate" and has_test_set and self.server_result is None):
            return "wait"
        over, is_waiting, quorum = self.is_overdue, self.is_waiting(), self._settings.quorum
        if self._head.phase == "evaluate":
            return "close" if over or not is_waiting else "wait"
        least = quorum if over or not is_waiting else max(quorum, self._settings.close_at)
        if (over or not is_waiting or self._settings.close_at) and self.n_counted >= least:
            return "close"
        if self.all_answered():
            if any(member.name not in self._ranks for member in self._roster.ready()):
                return "others"
            return "lowered" if self.is_lowered() else "short" if self.is_short_of_memory() else "nobody"
        return "missed" if over else "wait"

    @property
    def n_counted(self) -> int:
        """Devices that its update would hear of, by a report of this round or a late one."""
        if self._late is None or not self._late.devices:
            return self.n_usable
        reports = self.reports
        return self.n_usable + sum(not (name in reports and reports[name].blocks) for name in self._late.devices)

    def all_answered(self) -> bool:
        """Whether nobody is left who could answer later."""
        return bool(self.participants) and not self._unanswered

    def is_lowered(self) -> bool:
        """Whether somebody's plan did not hold in this round; its micro-batch ends at 1, so this ends too."""
        return any(report.decline is Decline.OVER_BUDGET for report in self.reports.values())

    def is_diverged(self) -> bool:
        """Whether losses were infinite or NaN somewhere."""
        return any(report.decline is Decline.NON_FINITE for report in self.reports.values())

    def is_short_of_memory(self) -> bool:
        """Whether somebody who is not back yet has to plan with a smaller micro-batch."""
        return any(member.is_over_limit and member.is_alive for member in self._roster.members.values())

    def too_few(self, quorum: int, deadlines: int) -> QuorumError:
        """The error for a round that never got its quorum."""
        return QuorumError(
            f"round {self._head.round}: {self.n_counted} reports after {deadlines} deadlines, the quorum is {quorum}",
            hint="start more devices and resume the run",
        )

    def nobody_could(self, quorum: int) -> QuorumError:
        """The error for a round in which everybody answered and too few could compute."""
        reasons = sorted({r.decline.name.lower() for r in self.reports.values() if r.decline is not Decline.NONE})
        hint = "lower --learning-rate or --sigma" if "non_finite" in reasons else "see the devices' own logs"
        usable, count = self.n_counted, len(self.participants)
        detail = f" ({', '.join(reasons)})" if reasons else ""
        return QuorumError(
            f"round {self._head.round}: {usable} of {count} devices could answer{detail}, the quorum is {quorum}",
            hint=hint,
        )
