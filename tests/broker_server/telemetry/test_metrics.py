"""What Prometheus is told: of single turns, and that the number of series does not grow."""

from __future__ import annotations

import ast
import inspect
import json
import logging
import textwrap
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedzo.broker_server.server_state import DEVICE_STATES
from fedzo.broker_server.telemetry.metrics import ServerMetrics
from fedzo.broker_server.telemetry.observer import Queue, ServerState, Turn, Watchers
from fedzo.broker_server.telemetry.refusal_reasons import REASONS, refusal_reason
from fedzo.protocol.server_side import aggregation, open_round
from fedzo.protocol.server_side.closings import Closing
from fedzo.protocol.server_side.coordinator_events import (
    Connected,
    CoordinatorCommand,
    CoordinatorEvent,
    DeviceSaid,
    Record,
    Send,
)
from fedzo.protocol.wire.documents import Announcement, Phase
from fedzo.protocol.wire.messages import Decline, Receipt, Report, ReportKind, UpdateRecord, Verdict
from fedzo.protocol.wire.topics import Channel

TAG = b"abcd"


def report(round_: int, *, loss: float = 2.0, samples: int = 10, decline: Decline = Decline.NONE) -> Report:
    blocks = () if decline is not Decline.NONE else (np.ones(4, dtype=np.float32),)
    return Report(
        ReportKind.PROBE, TAG, round_, 1, samples, bytes(16), loss, 17, 250, 40 << 10, blocks, decline=decline
    )


class Play:
    """Turns of a server that never was, half a second each."""

    def __init__(self) -> None:
        self.metrics = ServerMetrics()
        self.now = 100.0

    def turn(self, events: Sequence[CoordinatorEvent], commands: Sequence[CoordinatorCommand]) -> None:
        self.now += 10.0
        self.metrics.turn(Turn(events, commands, self.now, self.now + 0.2, self.now + 0.25, self.now + 0.5))

    def announce(self, round_: int, phase: Phase = "train") -> None:
        self.turn([], [Record("announce", round_, "", Announcement("run-1", round_, phase).encode())])

    def report(self, device: str, said: Report, verdict: Verdict = Verdict.ACCEPTED, why: str = "") -> None:
        commands: list[CoordinatorCommand] = [Send(Channel.ACK, Receipt(TAG, said.round, verdict), device)]
        if verdict is Verdict.ACCEPTED:
            commands.insert(0, Record("report", said.round, device, said.encode()))
        if why:
            commands.insert(0, Record("refusal", said.round, device, why.encode()))
        self.turn([DeviceSaid(device, Channel.REPORT, said)], commands)

    def close(self, round_: int) -> None:
        update = UpdateRecord(
            0, round_, 0.5, ((0, 4),), np.ones(4, dtype=np.float32), bytes(16), bytes(16)
        )  # fmt: skip
        closing = Closing("close", 3, 2, 2, True)
        self.turn([], [Record("close", round_, "", closing.encode()), Record("update", round_, "", update.encode())])

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"fedzo_{name}", labels)


@pytest.fixture
def play() -> Play:
    return Play()


def test_a_round_from_its_announcement_to_its_end(play: Play) -> None:
    play.turn([Connected()], [])
    play.announce(4)
    play.report("a", report(4, loss=1.0, samples=30))
    play.report("b", report(4, loss=2.0, samples=10))
    play.report("b", report(4), Verdict.DUPLICATE)
    play.report("c", report(4, decline=Decline.OVER_BUDGET))
    play.close(4)
    play.report("d", report(4), Verdict.LATE)
    assert play.value("broker_connects_total") == 1
    assert play.value("announcements_total", phase="train") == 1
    assert play.value("rounds_total", phase="train") == 1
    assert play.value("round_endings_total", ending="close") == 1
    found = {v.name.lower(): play.value("reports_total", verdict=v.name.lower()) for v in Verdict}
    assert found == {"accepted": 3, "duplicate": 1, "late": 1, "refused": 0}
    assert play.value("declined_reports_total", reason="over_budget") == 1
    assert play.value("queries_total") == 3 * 17
    assert play.value("training_loss") == pytest.approx(1.25)
    assert play.value("learning_rate") == 0.5
    assert play.value("device_peak_bytes") == 40 << 20
    # The announcement was out at 120.5; reports came at 130, 140, 160, the end was decided at 170.2.
    assert play.value("report_arrival_seconds_sum", phase="train") == pytest.approx(9.5 + 19.5 + 39.5)
    assert play.value("round_seconds_sum", phase="train") == pytest.approx(49.7)
    assert play.value("device_seconds_count", phase="train") == 3
    assert play.value("close_seconds_sum") == pytest.approx(0.5)
    assert (play.value("commit_seconds_count"), play.value("journal_entries_total")) == (5, 6)
    assert play.value("commit_seconds_sum") == pytest.approx(5 * 0.05)
    assert play.value("turn_seconds_count") == 8


def test_refusals_by_reason(play: Play) -> None:
    play.report("a", report(4), Verdict.REFUSED, "made with other weights")
    play.report("b", report(4), Verdict.REFUSED, "something new")
    play.turn([], [Record("garbled", 4, "c", b"a message of 3 bytes")])
    found = {reason: play.value("refusals_total", reason=reason) for reason in REASONS}
    assert found == {**dict.fromkeys(REASONS, 0), "weights": 1, "other": 1, "garbled": 1}


def test_a_round_that_an_earlier_process_announced(play: Play) -> None:
    """It is counted, but nobody knows how long it took."""
    play.report("a", report(4))
    play.close(4)
    assert play.value("rounds_total", phase="train") == 1
    assert play.value("round_seconds_count", phase="train") == 0
    assert play.value("report_arrival_seconds_count", phase="train") == 0


def test_a_mask_without_a_round_is_no_round(play: Play) -> None:
    play.turn([], [Record("mask", 0, "", b"mask")])
    assert play.value("rounds_total", phase="saliency") == 0


def test_evaluations(play: Play) -> None:
    result = {"accuracy": 0.5, "loss": 1.5, "server_accuracy": None, "server_loss": None}
    play.turn([], [Record("evaluation", 9, "", json.dumps(result).encode())])
    assert play.value("accuracy_ratio", on="devices") == 0.5
    assert play.value("accuracy_ratio", on="server") is None
    play.turn(
        [], [Record("evaluation", 12, "", json.dumps({**result, "server_accuracy": 0.75, "server_loss": 1.0}).encode())]
    )
    assert play.value("accuracy_ratio", on="server") == 0.75


def test_the_number_of_series_grows_neither_with_devices_nor_with_rounds(play: Play) -> None:
    def season(rounds: range, devices: int) -> int:
        for round_ in rounds:
            play.announce(round_)
            for number in range(devices):
                play.report(f"device-{number}", report(round_))
                play.report(f"device-{number}", report(round_), Verdict.REFUSED, f"a new reason, {number}")
            play.close(round_)
        return len(play.metrics.exposition("")[0].splitlines())

    assert season(range(1, 3), 3) == season(range(3, 40), 30)
    assert len(play.metrics._announced) <= 16


def test_the_format_is_prometheus_own(play: Play) -> None:
    play.metrics.attach(state)
    body, content_type = play.metrics.exposition("")
    assert content_type.startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    assert all(family.documentation for family in families.values())
    assert not [name for name in families if name.endswith("_created")]
    devices = {sample.labels["state"]: sample.value for sample in families["fedzo_devices"].samples}
    assert devices == {**dict.fromkeys(DEVICE_STATES, 0), "ready": 7, "lost": 1}
    assert families["fedzo_phase"].samples[2].labels == {"phase": "train"}
    assert families["fedzo_phase"].samples[2].value == 1
    assert families["fedzo_dropped"].samples[0].value == 3
    body, content_type = play.metrics.exposition("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def state() -> ServerState:
    devices = {**dict.fromkeys(DEVICE_STATES, 0), "ready": 7, "lost": 1}
    queues = (Queue("inbound", 1, 10, 100, 1000), Queue("passes", 2, 0))
    return ServerState(
        "run-1", "train", 5, 4, 9, devices, True, False, 0.1, queues, {"undecodable": 3}, 1, 1000, 2000, 10, 20
    )


# ---------------------------------------------------------------------- refusals


def refusals_in(source: Callable[..., object]) -> list[str]:
    """Every text with which a function refuses a report, with a number in place of what is filled in."""
    texts = []
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(source)))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            (argument,) = node.exc.args
            parts = argument.values if isinstance(argument, ast.JoinedStr) else [argument]
            texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in parts))
    return texts


def test_every_refusal_has_a_word_of_its_own() -> None:
    texts = [*refusals_in(aggregation.check_report), *refusals_in(open_round.OpenRound.check)]
    assert len(texts) >= 8
    words = {text: refusal_reason(text) for text in texts}
    assert "other" not in words.values(), words
    assert (
        refusal_reason("its scores differ from the server's by 1e-1, the limit is 1e-3: they do not count") == "scores"
    )
    assert refusal_reason("who knows") == "other"
    assert set(words.values()) <= set(REASONS)


# ---------------------------------------------------------------------- watchers


def test_a_watcher_that_fails_is_left_out(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        calls = 0

        def turn(self, _: Turn) -> None:
            self.calls += 1
            raise ZeroDivisionError

    broken, watchers = Broken(), None
    watchers = Watchers(broken, play.metrics)
    with caplog.at_level(logging.ERROR, "fedzo"):
        for _ in range(3):
            watchers.turn(Turn([Connected()], [], 0, 0, 0, 0))
    assert broken.calls == 1
    assert play.value("broker_connects_total") == 3
    assert len([record for record in caplog.records if "Broken" in record.message]) == 1
