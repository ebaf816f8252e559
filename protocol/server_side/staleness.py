"""Late reports that still count: the scalars of rounds that have made their update already.

A report may be late by at most ``--staleness`` updates. Its scalars stand for directions of its own round, measured at
the weights of that time, and go into the update that the open round makes: a segment of an update record names the age
of its round, so every side sums it along the right directions (:mod:`..replay.past_rounds`).

An update is then the mean over all its reports, fresh and late, in which a report of age ``a`` is scaled by
``(1 + a) ** -power`` and still counts in full in what the sum is divided by: late reports make the step smaller, they
do not make the others count more. This is buffered asynchronous aggregation as in FedBuff (Nguyen et al., AISTATS
2022, arXiv 2106.06639, with its scaling ``1 / sqrt(1 + staleness)``): with ``--close-at M`` an update is made of every
``M`` reports, whatever weights they were measured with.

A report is known by (run, round, device) and counts once, however late it is and however often it is sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..artifact.manifest import Manifest
from ..errors import ProtocolError
from ..perturbation.blocks import Deal
from ..settings import RunSettings
from ..wire.documents import Announcement, parse
from ..wire.messages import Report, ReportKind, Verdict
from .aggregation import block_estimates, check_report, round_block
from .aggregation_rules import AggregationSettings
from .roster import Member

if TYPE_CHECKING:
    from .open_round import OpenRound

__all__ = ["Group", "LateReports", "combine_groups"]


@dataclass(frozen=True, eq=False)
class Group:
    """Usable reports of one round.

    Attributes:
        age: Updates since that round's own; 0 for the open round.
        deals: What the round handed out.
        reports: ``(rank, report)``, in any order; at least one.
    """

    age: int
    deals: tuple[Deal, ...]
    reports: tuple[tuple[int, Report], ...]


def combine_groups(
    groups: Sequence[Group], rule: AggregationSettings, power: float
) -> tuple[tuple[tuple[int, int], ...], NDArray[np.float32], tuple[int, ...]]:
    """Segments, coefficients and ages of an update.

    Args:
        groups: At least one, of different ages.
        rule: How the reports of a round become one.
        power: A report of age ``a`` is scaled by ``(1 + a) ** -power``.

    Returns:
        Segments ``(first position, count)`` in the order of an update record, ``float32[sum of counts]``, and the age
        of every segment; no ages if all are 0.

    Raises:
        QuorumError: A round has fewer reports than the rule needs.
    """
    ordered = sorted(groups, key=lambda group: group.age)
    found = [block_estimates(group.deals, group.reports, rule) for group in ordered]
    segments: list[tuple[int, int]] = []
    ages: list[int] = []
    parts: list[NDArray[np.float32]] = []
    for number, deal in enumerate(ordered[0].deals):
        is_dealt = any(group.deals[number].n_slots > 1 for group in ordered)
        weights = [_weight(group, number, is_dealt) for group in ordered]
        values = []
        for group, estimates, weight in zip(ordered, found, weights, strict=True):
            places, estimate = estimates[number]
            segments += places
            ages += [group.age] * len(places)
            scale = weight / sum(weights) * (1.0 + group.age) ** -power
            values.append(estimate if len(ordered) == 1 and group.age == 0 else estimate * scale)
        parts.append(round_block(deal.block, np.concatenate(values)))
    return tuple(segments), np.concatenate(parts), tuple(ages) if any(ages) else ()


def _weight(group: Group, number: int, is_dealt: bool) -> float:
    """What an estimate counts in the mean: the positions behind dealt directions, else the samples."""
    if is_dealt:  # in one of the rounds at least: one that asked a single device shows no difference
        return float(sum(report.blocks[number].size for _, report in group.reports))
    return float(sum(report.samples for _, report in group.reports))


@dataclass(frozen=True, eq=False)
class _Closed:
    """A round that has made its update.

    Attributes:
        head: Its announcement.
        deals: What it handed out.
        ranks: Places of its participants by device id.
        counted: Who has a report that counts in some update; grows.
    """

    head: Announcement
    deals: tuple[Deal, ...]
    ranks: dict[str, int]
    counted: set[str]


class LateReports:
    """The late reports that the next update will count.

    Args:
        settings: Of the run.
        manifest: Its artifact.

    Attributes:
        devices: Those that the next update will hear of by a late report.
    """

    def __init__(self, settings: RunSettings, manifest: Manifest) -> None:
        self._settings, self._manifest = settings, manifest
        self._closed: deque[_Closed] = deque(maxlen=settings.staleness)
        self._waiting: list[tuple[_Closed, str, Report]] = []
        self.devices: set[str] = set()

    def close(self, current: OpenRound) -> None:
        """A round has made its update, with everything that was waiting."""
        self._waiting, self.devices = [], set()
        ranks = {name: rank for rank, name in enumerate(current.participants)}
        self._closed.append(_Closed(current.head, current.deals, ranks, set(current.reports)))
        if current.head.log_length + 1 >= self._settings.training.rounds:
            self._closed.clear()  # No update follows.

    def take(self, member: Member, report: Report) -> tuple[Verdict, str]:
        """Check a report that is not of the open round, and count it if it may.

        Returns:
            What it is told, and why not.
        """
        closed = self._of(report.round)
        if report.round == member.counted_round or (closed is not None and member.name in closed.counted):
            return member.verdict_again(report), ""
        if closed is None or not report.blocks:
            return Verdict.LATE, ""
        try:
            if member.name not in closed.ranks:
                raise ProtocolError("not a participant of this round")
            digest = bytes.fromhex(closed.head.weights_digest)
            rank, manifest = closed.ranks[member.name], self._manifest
            check_report(report, ReportKind.PROBE, manifest, self._settings, closed.deals, digest, rank)
        except ProtocolError as error:
            # What is refused is recorded once a round, and rounds ascend: a device must not fill the disk.
            return Verdict.REFUSED if member.refused_round <= report.round else Verdict.LATE, error.message
        self.accept(member, report)
        return Verdict.ACCEPTED, ""

    def accept(self, member: Member, report: Report) -> None:
        """Count a report that was checked and recorded."""
        closed = self._of(report.round)
        member.take_report(report)
        if closed is not None and member.name not in closed.counted:
            closed.counted.add(member.name)
            self.devices.add(member.name)
            self._waiting.append((closed, member.name, report))

    def groups(self, index: int) -> tuple[Group, ...]:
        """What is waiting, by round.

        Args:
            index: Of the update that will count it.
        """
        found = []
        for closed in self._closed:
            mine = [(closed.ranks[device], report) for one, device, report in self._waiting if one is closed]
            if mine:
                found.append(Group(index - closed.head.log_length, closed.deals, tuple(mine)))
        return tuple(found)

    def _of(self, round_: int) -> _Closed | None:
        return next((closed for closed in self._closed if closed.head.round == round_), None)

    # --- snapshots --------------------------------------------------------------------------------------------------

    def state(self) -> list[dict[str, Any]]:
        """What a snapshot right after an update says of it, as JSON types: nothing is waiting then."""
        return [{"head": each.head.encode().hex(), "counted": sorted(each.counted)} for each in self._closed]

    def restore(self, state: Sequence[Mapping[str, Any]], open_again: Callable[[Announcement], OpenRound]) -> None:
        """Go to a :meth:`state`.

        Args:
            state: As it was.
            open_again: Gives a round of this run, by its announcement.

        Raises:
            KeyError, TypeError, ValueError: It is nothing of the kind; a ProtocolError if that is an announcement.
        """
        self._waiting, self.devices = [], set()
        self._closed.clear()
        for each in state:
            current = open_again(parse(Announcement, bytes.fromhex(each["head"])))
            ranks = {name: rank for rank, name in enumerate(current.participants)}
            self._closed.append(_Closed(current.head, current.deals, ranks, set(map(str, each["counted"]))))
