"""Hostile payloads, by name and by the thousand; ``python -m tests.fuzz`` throws as many as it is told to."""

from __future__ import annotations

import dataclasses
import json
import resource
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedzo.broker_server.intake import Drops, Intake
from fedzo.edge_runtime.connection.inbound import read_message
from fedzo.edge_runtime.connection.mqtt_types import Arrived
from fedzo.protocol.errors import ProtocolError
from fedzo.protocol.pruning.layer_densities import read_mask
from fedzo.protocol.server_side.coordinator_events import DeviceSaid, Garbled, Send
from fedzo.protocol.wire import messages
from fedzo.protocol.wire.codec import decode
from fedzo.protocol.wire.documents import Announcement, Hello, RunDocument, parse, unpack_participants
from fedzo.protocol.wire.messages import Receipt, Report, ReportKind, Verdict
from fedzo.protocol.wire.topics import Channel, topic
from fedzo.protocol.wire.transfers import BlobBlock, BlobRequest
from tests.board_fixture import ROOT
from tests.fuzz.targets import VICTIM, Federation
from tests.protocol.builders import small_layout
from tests.protocol.golden.message_cases import DOCUMENTS, MESSAGES
from tests.protocol.simulation.desk import Desk
from tests.protocol.simulation.network import FEDERATION

PAYLOADS = 4_000
BOMB = zlib.compress(bytes(64 << 20), 9)


def test_thousands_of_payloads_leave_both_sides_alive() -> None:
    """And the honest devices with the right weights, see `Federation.under_fire`."""
    counts: Counter[str] = Counter()
    Federation(3, counts).under_fire(PAYLOADS)
    assert counts["payloads"] >= PAYLOADS
    assert counts["runs"] == 1
    for what in ("to the server, understood", "to the server, dropped", "to the board, understood",
                 "to the board, dropped", "reports of hostile devices that counted"):  # fmt: skip
        assert counts[what] > 0, f"the payloads do not reach far enough: {counts}"


@pytest.mark.slow
def test_the_program_counts_and_stays_small() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--payloads", "20000", "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["payloads"] == 20_000
    assert found["peak_rss_mib"] < 200


# --- one by one: what reaches the coordinator ------------------------------------------------------------------------


def training_desk() -> Desk:
    """A coordinator in its first round of training, with four devices."""
    desk = Desk().connect().join()
    assert desk.head.phase == "train"
    return desk


def verdict(desk: Desk, payload: bytes, device: str = "a") -> Verdict | str:
    """What the coordinator says to a payload on a device's report topic, ``dropped`` if it does not hear of it."""
    event = Intake(FEDERATION, Drops()).event(Arrived(topic(FEDERATION, Channel.REPORT, device), payload, False, None))
    if event is None:
        return "dropped"
    before = len(desk.journal)
    if isinstance(event, Garbled):
        assert not [command for command in desk.on(event) if isinstance(command, Send)]
        assert {entry[0] for entry in desk.journal[before:]} <= {"garbled"}
        return "dropped"
    assert isinstance(event, DeviceSaid)
    sent = [command.message for command in desk.on(event) if hasattr(command, "message")]
    receipts = [message for message in sent if isinstance(message, Receipt)]
    recorded = {entry[0] for entry in desk.journal[before:]}
    if not receipts:
        return "ignored"
    assert ("report" in recorded) == (receipts[0].verdict is Verdict.ACCEPTED)
    return receipts[0].verdict


def changed(**fields: object) -> Callable[[Report], bytes]:
    return lambda report: dataclasses.replace(report, **fields).encode()  # type: ignore[arg-type]


def with_scalar(value: float) -> Callable[[Report], bytes]:
    """The last scalar of an honest payload becomes something else."""
    return lambda report: report.encode()[:-4] + struct.pack("<f", value)


def with_count(count: int) -> Callable[[Report], bytes]:
    """The number of scalars of the first block becomes another one; it stands behind the header."""

    def make(report: Report) -> bytes:
        payload, start = report.encode(), messages._REPORT.size
        assert payload[start : start + 4] == struct.pack("<I", report.blocks[0].size)
        return payload[:start] + struct.pack("<I", count) + payload[start + 4 :]

    return make


def with_loss(value: float) -> Callable[[Report], bytes]:
    """The mean loss of an honest payload becomes something else."""

    def make(report: Report) -> bytes:
        payload, loss = report.encode(), struct.pack("<d", report.mean_loss)
        assert payload.count(loss) == 1
        return payload.replace(loss, struct.pack("<d", value))

    return make


CASES: dict[str, tuple[Callable[[Report], bytes], Verdict | str]] = {
    "the honest one": (lambda report: report.encode(), Verdict.ACCEPTED),
    "a byte less": (lambda report: report.encode()[:-1], "dropped"),
    "half": (lambda report: report.encode()[: len(report.encode()) // 2], "dropped"),
    "a byte more": (lambda report: report.encode() + b"\0", "dropped"),
    "nothing": (lambda _: b"", "dropped"),
    "another version": (lambda report: b"\xff" + report.encode()[1:], "dropped"),
    "an unknown type": (lambda report: report.encode()[:1] + b"\xee" + report.encode()[2:], "dropped"),
    "not a number": (with_scalar(float("nan")), "dropped"),
    "infinite": (with_scalar(float("inf")), "dropped"),
    "an infinite loss": (with_loss(float("inf")), "dropped"),
    "a loss that is no number": (with_loss(float("nan")), "dropped"),
    "huge": (lambda report: report.encode() + bytes(8 << 20), "dropped"),
    "a count that lies": (with_count(2**31), "dropped"),
    "a bomb": (lambda _: BOMB, "dropped"),
    "more scalars than asked for": (changed(blocks=(np.zeros(3, np.float32),)), Verdict.REFUSED),
    "fewer scalars than asked for": (changed(blocks=(np.zeros(1, np.float32),)), Verdict.REFUSED),
    "more blocks than asked for": (changed(blocks=(np.zeros(2, np.float32),) * 2), Verdict.REFUSED),
    "of another kind": (changed(kind=ReportKind.SALIENCY), Verdict.REFUSED),
    "for a round to come": (changed(round=99), Verdict.LATE),
    "for a round that is over": (changed(round=0), Verdict.LATE),
    "of another run": (changed(run_tag=b"\0\1\2\3"), Verdict.LATE),
    "of other weights": (changed(weights_digest=bytes(16)), Verdict.REFUSED),
}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_report_changes_nothing(name: str) -> None:
    desk = training_desk()
    make, expected = CASES[name]
    assert verdict(desk, make(desk.measure("a"))) == expected
    assert not desk.machine.finished
    if expected is not Verdict.ACCEPTED:  # and the honest one counts all the same, unless the round has closed to it
        again = verdict(desk, desk.measure("b").encode(), "b")
        assert again is Verdict.ACCEPTED


def test_a_replay_counts_once() -> None:
    desk = training_desk()
    payload = desk.measure("a").encode()
    assert verdict(desk, payload) is Verdict.ACCEPTED
    assert [verdict(desk, payload) for _ in range(3)] == [Verdict.DUPLICATE] * 3
    assert sum(entry[0] == "report" for entry in desk.journal) == 1


def test_a_device_that_nobody_knows_is_not_heard() -> None:
    desk = training_desk()
    assert verdict(desk, desk.measure("a").encode(), "stranger") == "ignored"
    assert "stranger" not in desk.machine.roster.members


@pytest.mark.parametrize("channel", list(Channel))
def test_a_message_on_a_topic_of_another_kind_is_dropped(channel: Channel) -> None:
    """On the server's side by topic; on a board a message must be one of those that belong there."""
    for message in (*MESSAGES.values(), *DOCUMENTS.values()):
        place = topic(FEDERATION, channel, VICTIM)
        try:
            received = read_message(FEDERATION, VICTIM, place, message.encode())
        except ProtocolError:
            continue
        assert type(received.message) is type(message)
        assert received.channel is channel


@pytest.mark.parametrize("device", ["../etc", "a/b", "#", "+", "", "A", "x" * 49, "a\0", "ä"])
def test_a_topic_with_another_name_is_nobodys(device: str) -> None:
    drops = Drops()
    text = f"fedzo/v1/{FEDERATION}/d/{device}/report"
    hello = DOCUMENTS["hello"].encode()
    assert Intake(FEDERATION, drops).event(Arrived(text.replace("report", "hello"), hello, False, None)) is None
    assert Intake(FEDERATION, drops).event(Arrived(text, MESSAGES["receipt"].encode(), False, None)) is None
    assert drops.counts["undecodable"] == 2


def test_bombs_inflate_to_the_limit_and_no_further() -> None:
    """Every place that inflates: participants of an announcement, masks, rows of scalars."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    head = Announcement("run-1", 1, "train", participants=zlib.compress(bytes(17 << 20), 9))
    document = decode(head.encode())
    assert isinstance(document, Announcement), "small enough to come through"
    with pytest.raises(ProtocolError, match="too large"):
        unpack_participants(document.participants)
    for data in (BOMB, MESSAGES["receipt"].encode() + BOMB, b"\1\1" + BOMB):
        with pytest.raises(ProtocolError):
            read_mask(data, small_layout(), "zero")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10, "KiB"


@given(st.binary(max_size=600), st.sampled_from(list(Channel)))
@settings(max_examples=300, deadline=None)
def test_foreign_bytes_raise_nothing_on_the_server(payload: bytes, channel: Channel) -> None:
    place = topic(FEDERATION, channel, "a")
    Intake(FEDERATION, Drops()).event(Arrived(place, payload, False, None))


@given(st.binary(max_size=600) | st.sampled_from([m.encode() for m in (*MESSAGES.values(), *DOCUMENTS.values())]),
       st.sampled_from(list(Channel)))  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_foreign_bytes_raise_protocol_errors_on_a_board(payload: bytes, channel: Channel) -> None:
    with suppress(ProtocolError):
        read_message(FEDERATION, VICTIM, topic(FEDERATION, channel, VICTIM), payload)


def test_the_golden_payloads_are_understood() -> None:
    """The tests above would pass if everything were dropped."""
    assert isinstance(decode(MESSAGES["blob request"].encode()), BlobRequest)
    assert isinstance(decode(MESSAGES["blob block"].encode()), BlobBlock)
    assert isinstance(parse(Hello, DOCUMENTS["hello"].encode()), Hello)
    assert isinstance(parse(RunDocument, DOCUMENTS["run"].encode()), RunDocument)
