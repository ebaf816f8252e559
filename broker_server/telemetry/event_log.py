"""What a server does, as records of ``logging`` with an event's name and its numbers: for JSON lines."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict
from typing import Any

from ...protocol.server_side.closings import Closing
from ...protocol.server_side.coordinator_events import Connected, DeviceSaid, Record
from ...protocol.wire.documents import Announcement, parse, unpack_participants
from ...protocol.wire.messages import Report
from .observer import Turn

__all__ = ["EventLog"]

_log = logging.getLogger(__name__)
_CLOSINGS = ("mask", "update", "evaluation")
_RESULTS = ("log_length", "accuracy", "loss", "server_accuracy", "server_loss")


class EventLog:
    """Watches a server; see :class:`~.observer.Telemetry`.

    Rounds, enrolments and evaluations are at level info, single reports at debug.
    """

    def __init__(self) -> None:
        self._announced: tuple[int, float] | None = None

    def turn(self, turn: Turn) -> None:
        """See :meth:`.observer.Telemetry.turn`."""
        for event in turn.events:
            if isinstance(event, Connected):
                _tell(logging.INFO, "connected", "connected to the broker")
        reports: dict[str, Report] | None = None
        for command in turn.commands:
            if not isinstance(command, Record):
                continue
            if command.kind == "report":
                if _log.isEnabledFor(logging.DEBUG):
                    reports = _reports(turn) if reports is None else reports
                    self._reported(command, reports.get(command.device))
            elif _log.isEnabledFor(logging.INFO):
                self._recorded(command)

    def _recorded(self, record: Record) -> None:
        number, device = record.round, record.device
        if record.kind == "announce":
            head = parse(Announcement, record.payload)
            count = len(unpack_participants(head.participants))
            self._announced = number, time.monotonic()
            text = f"{head.phase}: round {number} with {count} devices"
            _tell(logging.INFO, "announced", text, round=number, fields={"phase": head.phase, "devices": count})
        elif record.kind == "enrolment":
            _tell(logging.INFO, "enrolled", f"{device} is enrolled", device=device)
        elif record.kind == "close":
            closing = Closing.decode(record.payload)
            if closing.ending != "close":
                text = f"round {number} gave nothing ({closing.ending}): {closing.answered} of {closing.asked} answered"
                _tell(logging.INFO, "ended", text, round=number, fields=asdict(closing))
        elif record.kind in _CLOSINGS:
            fields: dict[str, Any] = {"what": record.kind}
            if self._announced is not None and self._announced[0] == number:
                fields["seconds"] = round(time.monotonic() - self._announced[1], 3)
            if record.kind == "evaluation":
                found = json.loads(record.payload)
                fields |= {name: found[name] for name in _RESULTS if found.get(name) is not None}
            _tell(logging.INFO, "closed", f"round {number} gave: {record.kind}", round=number, fields=fields)
        elif record.kind == "phase":
            _tell(logging.INFO, "phase", record.payload.decode(errors="replace"), round=number, device=device)

    def _reported(self, record: Record, report: Report | None) -> None:
        fields = {} if report is None else {
            "queries": report.queries, "samples": report.samples, "elapsed_ms": report.elapsed_ms,
            "mean_loss": report.mean_loss, "decline": report.decline.name.lower(),
        }  # fmt: skip
        text = f"report of {record.device}"
        _tell(logging.DEBUG, "report", text, round=record.round, device=record.device, fields=fields)


def _reports(turn: Turn) -> dict[str, Report]:
    said = (event for event in turn.events if isinstance(event, DeviceSaid))
    return {event.device: event.message for event in said if isinstance(event.message, Report)}


def _tell(level: int, event: str, text: str, **known: Any) -> None:
    _log.log(level, "%s", text, extra={"event": event, **known})
