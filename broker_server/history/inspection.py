"""Who sent what in a run, what was refused, and why: read off its journal."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from ...protocol.errors import ConfigError
from ...protocol.server_side.closings import Closing
from ...protocol.wire.codec import decode
from ...protocol.wire.documents import Announcement, parse, unpack_participants
from ...protocol.wire.messages import Decline, Report, UpdateRecord
from ..journal import Entry, Journal
from .summary import held_out_accuracy

__all__ = ["DeviceInRound", "RoundInspection", "RunInspection", "inspect_round", "inspect_run"]

_REASONS = 1_000
Word = Literal["reported", "declined", "refused", "garbled", "silent"]


@dataclass
class RoundInspection:
    """One round.

    Attributes:
        round: Its number.
        phase: What it was for.
        updates: Updates before it.
        asked: Devices that it asked.
        reports: Reports accepted, those without scalars included.
        refused: Devices of which a report was refused.
        garbled: Devices that sent what is no message.
        usable: Reports that counted when it closed; None while it is open.
        ending: How it closed: ``close`` when it had what it needed, see ``open_round.Ending``; empty while it is open.
        in_time: Whether that was before its deadline.
        outcome: What it decided, in words.
        report_bytes: Payloads of its reports.
        began_at: Unix time in seconds.
        seconds: From its announcement to its end; None while it is open.
    """

    round: int
    phase: str
    updates: int
    asked: int
    began_at: float
    reports: int = 0
    refused: int = 0
    garbled: int = 0
    usable: int | None = None
    ending: str = ""
    in_time: bool = True
    outcome: str = ""
    report_bytes: int = 0
    seconds: float | None = None


@dataclass
class RunInspection:
    """A whole run.

    Attributes:
        devices: Enrolled devices.
        entries: Entries of the journal by kind.
        payload_bytes: Their payloads by kind.
        rounds: Oldest first.
        refusals: How often a report was refused, by reason; the 1,000 most frequent, in that order.
        stops: Why the run was stopped before its end, each time.
    """

    devices: int = 0
    entries: dict[str, int] = field(default_factory=dict)
    payload_bytes: dict[str, int] = field(default_factory=dict)
    rounds: list[RoundInspection] = field(default_factory=list)
    refusals: dict[str, int] = field(default_factory=dict)
    stops: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class DeviceInRound:
    """What one device did in a round.

    Attributes:
        device: Its id.
        what: The word for it.
        detail: Why, if there is a reason.
        scalars: Scalars of its report.
        samples: Samples behind them.
        queries: Forward passes spent.
        mean_loss: At the unperturbed weights.
        payload_bytes: Size of the entry.
        seconds: After the round's announcement; None if there is no entry.
    """

    device: str
    what: Word
    detail: str = ""
    scalars: int = 0
    samples: int = 0
    queries: int = 0
    mean_loss: float | None = None
    payload_bytes: int = 0
    seconds: float | None = None


def inspect_run(journal: Journal) -> RunInspection:
    """Add up a run; reports are counted, not read."""
    out, rounds = RunInspection(), dict[int, RoundInspection]()
    refusals = Counter[str]()
    tallies = journal.tally()
    for tally in tallies:
        out.entries[tally.kind] = out.entries.get(tally.kind, 0) + tally.count
        out.payload_bytes[tally.kind] = out.payload_bytes.get(tally.kind, 0) + tally.payload_bytes
    for _, entry in journal.read({"announce", "close", "update", "mask", "evaluation", "refusal", "garbled", "phase"}):
        if entry.kind == "announce":
            head = parse(Announcement, entry.payload)
            asked = int(unpack_participants(head.participants).size)
            rounds[entry.round] = RoundInspection(entry.round, head.phase, head.log_length, asked, entry.at)
        elif entry.kind == "phase" and not entry.device:
            out.stops += [entry.payload.decode()] if entry.payload != b"done" else []
        elif entry.kind == "refusal":
            refusals[entry.payload.decode(errors="replace")] += 1
        if entry.kind != "announce" and entry.round in rounds:
            _take(rounds[entry.round], entry)
    for tally in tallies:
        if tally.kind == "report" and tally.round in rounds:
            rounds[tally.round].reports = tally.count
            rounds[tally.round].report_bytes = tally.payload_bytes
    out.devices, out.rounds = out.entries.get("enrolment", 0), list(rounds.values())
    out.refusals = dict(refusals.most_common(_REASONS))
    return out


def _take(found: RoundInspection, entry: Entry) -> None:
    """What an entry says of its round."""
    if entry.kind == "close":
        closing = Closing.decode(entry.payload)
        found.usable, found.ending, found.in_time = closing.usable, closing.ending, closing.in_time
        found.seconds = round(entry.at - found.began_at, 3)
    elif entry.kind == "update":
        record = decode(entry.payload)
        assert isinstance(record, UpdateRecord)
        found.outcome = f"update {record.index + 1}: {record.coefficients.size} scalars, weights {record.digest.hex()}"
    elif entry.kind == "mask":
        found.outcome = f"mask of {len(entry.payload)} bytes"
    elif entry.kind == "evaluation":
        accuracy = held_out_accuracy(json.loads(entry.payload))
        found.outcome = "evaluated" if accuracy is None else f"accuracy {accuracy:.4f}"
    elif entry.kind == "refusal":
        found.refused += 1
    elif entry.kind == "garbled":
        found.garbled += 1


def inspect_round(journal: Journal, round_: int) -> tuple[RoundInspection, list[DeviceInRound]]:
    """Look into one round.

    Returns:
        The round; what came of devices in the order in which it was recorded, then the devices that were asked and sent
        nothing, by ordinal.

    Raises:
        ConfigError: There is no such round.
    """
    found: RoundInspection | None = None
    asked: list[str] = []
    rows: list[DeviceInRound] = []
    for sequence, entry in journal.read(round_=round_):
        if entry.kind == "announce":
            head = parse(Announcement, entry.payload)
            names = _names(journal, sequence)
            asked = [names[ordinal] for ordinal in unpack_participants(head.participants).tolist()]
            found = RoundInspection(round_, head.phase, head.log_length, len(asked), entry.at)
        elif found is not None:
            _take(found, entry)
            if entry.kind in ("report", "refusal", "garbled"):
                rows.append(_row(entry, found))
    if found is None:
        last = [journal.get(sequence).round for sequence in journal.sequences("announce")[-1:]]
        ends = f"it ends with round {last[0]}" if last else "no round has begun"
        raise ConfigError(f"the journal has no round {round_}: {ends}", hint="see fedzo inspect without --round")
    heard = {row.device for row in rows}
    return found, [*rows, *(DeviceInRound(name, "silent") for name in asked if name not in heard)]


def _row(entry: Entry, found: RoundInspection) -> DeviceInRound:
    size, seconds = len(entry.payload), round(entry.at - found.began_at, 3)
    if entry.kind != "report":
        word: Word = "refused" if entry.kind == "refusal" else "garbled"
        why = entry.payload.decode(errors="replace")
        return DeviceInRound(entry.device, word, why, payload_bytes=size, seconds=seconds)
    found.reports += 1
    found.report_bytes += size
    report = decode(entry.payload)
    assert isinstance(report, Report)
    declined = report.decline is not Decline.NONE
    reason = report.decline.name.lower() if declined else "after the round had closed" if found.ending else ""
    return DeviceInRound(
        entry.device,
        "declined" if declined else "reported",
        reason,
        sum(block.size for block in report.blocks),
        report.samples,
        report.queries,
        report.mean_loss,
        size,
        seconds,
    )


def _names(journal: Journal, announced: int) -> list[str]:
    """Device ids by ordinal at an announcement: all that came before the first round by name, then as they came."""
    first = journal.sequences("announce")[0]
    early, late = list[str](), list[str]()
    for sequence, entry in journal.read({"enrolment"}):
        if sequence < announced:
            (early if sequence < first else late).append(entry.device)
    return [*sorted(early), *late]
