"""What a server says of its turns, as JSON lines."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fedzo.broker_server.telemetry.event_log import EventLog
from fedzo.broker_server.telemetry.observer import Turn
from fedzo.edge_runtime.logs import Logs
from fedzo.protocol.server_side.closings import Closing
from fedzo.protocol.server_side.coordinator_events import Connected, CoordinatorEvent, DeviceSaid, Record
from fedzo.protocol.wire.documents import Announcement, Hello, pack_participants
from fedzo.protocol.wire.messages import Decline, Report, ReportKind
from fedzo.protocol.wire.topics import Channel

HEAD = Announcement("run-1", 4, "train", pack_participants(np.array([0, 2], dtype=np.int64)))
REPORT = Report(ReportKind.PROBE, b"abcd", 4, 1, 0, bytes(16), 1.5, 17, 250, 1000, (), Decline.NO_DATA)
EVALUATION = {"accuracy": 0.5, "loss": 1.5, "server_accuracy": None, "log_length": 3, "weights_digest": "ab"}


def said(
    level: Any, events: list[CoordinatorEvent], records: list[Record], capsys: pytest.CaptureFixture[str]
) -> list[dict[str, Any]]:
    logs = Logs("json", None, level)
    EventLog().turn(Turn(events, records, 0.0, 0.0, 0.0, 0.0))
    logs.close()
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


@pytest.mark.parametrize(
    ("record", "event", "known"),
    [
        (
            Record("announce", 4, "", HEAD.encode()),
            "announced",
            {"round": 4, "fields": {"phase": "train", "devices": 2}},
        ),
        (Record("enrolment", 0, "pi-1", Hello(1, "", 1.0, 1, 0, "", "").encode()), "enrolled", {"device": "pi-1"}),
        (Record("update", 4, "", b""), "closed", {"round": 4, "fields": {"what": "update"}}),
        (
            Record("evaluation", 5, "", json.dumps(EVALUATION).encode()),
            "closed",
            {"round": 5, "fields": {"what": "evaluation", "log_length": 3, "accuracy": 0.5, "loss": 1.5}},
        ),
        (
            Record("close", 4, "", Closing("missed", 3, 1, 1, False).encode()),
            "ended",
            {"fields": {"ending": "missed", "asked": 3, "answered": 1, "usable": 1, "in_time": False}},
        ),
        (Record("phase", 9, "pi-1", b"done abcd"), "phase", {"round": 9, "device": "pi-1", "message": "done abcd"}),
    ],
    ids=lambda value: value.kind if isinstance(value, Record) else "",
)
def test_what_is_recorded_is_said(
    record: Record, event: str, known: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = said(None, [], [record], capsys)
    assert line["event"] == event
    assert {name: line[name] for name in known} == known


def test_a_round_that_gave_something_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    closing = Record("close", 4, "", Closing("close", 3, 3, 3, True).encode())
    lines = said(None, [Connected()], [closing, Record("update", 4, "", b"")], capsys)
    assert [line["event"] for line in lines] == ["connected", "closed"]


def test_single_reports_are_for_debugging(capsys: pytest.CaptureFixture[str]) -> None:
    events: list[CoordinatorEvent] = [DeviceSaid("pi-1", Channel.REPORT, REPORT)]
    records = [Record("report", 4, "pi-1", REPORT.encode()), Record("report", 4, "pi-2", REPORT.encode())]
    assert said(None, events, records, capsys) == []
    known, unknown = said("debug", events, records, capsys)
    assert known["fields"] == {
        "queries": 17, "samples": 0, "elapsed_ms": 250, "mean_loss": 1.5, "decline": "no_data"
    }  # fmt: skip
    assert (unknown["device"], "fields" in unknown) == ("pi-2", False)


def test_nothing_is_made_for_a_log_of_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    assert said("warning", [Connected()], [Record("announce", 4, "", b"is not even read")], capsys) == []
