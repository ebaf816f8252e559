"""Devices come in any order, at any time, twice under one id; strangers write nonsense on every topic."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from fedzo.broker_server.journal import Entry
from fedzo.edge_runtime.connection.transport import MqttTransport
from fedzo.protocol.wire.codec import decode
from fedzo.protocol.wire.messages import Report, ReportKind
from fedzo.protocol.wire.topics import BROADCAST, FROM_DEVICE, TO_DEVICE, topic
from tests.broker_fixtures import Proxy
from tests.end_to_end.conftest import Finished, MakeFleet
from tests.end_to_end.fleet import agree, wait_for

LONG = ("--rounds", 100, "--k", 24, "--evaluate-every", 0)


def probed(entries: list[Entry], device: str) -> list[int]:
    """Rounds of training in which a device's report counted."""
    reports = [(entry.round, decode(entry.payload)) for entry in entries if entry.device == device]
    return [round_ for round_, report in reports if isinstance(report, Report) and report.kind is ReportKind.PROBE]


def test_devices_may_be_there_before_server_and_broker(undisturbed: Finished, fleets: MakeFleet) -> None:
    fleet = fleets()
    fleet.devices()
    for board in fleet.boards:
        board.until("no link to")
    answer = fleet.serve().answer()
    assert agree(answer, [board.answer() for board in fleet.boards]) == undisturbed.digest


def test_a_late_device_takes_part_from_then_on(fleets: MakeFleet) -> None:
    fleet = fleets(4)
    server = fleet.serve("--devices", 3, "--quorum", 3, *LONG)
    boards = [fleet.device(number) for number in range(3)]
    fleet.await_entries("update", 10)
    boards[1].signal(signal.SIGSTOP)  # So the run cannot end before the late device is there.
    late = fleet.device(3)
    late.until("run small fits")
    boards[1].signal(signal.SIGCONT)
    answer = server.answer()
    agree(answer, [board.answer() for board in (*boards, late)])
    assert (answer["devices"], answer["refused"]) == (4, 0)
    entries = fleet.entries("report")
    rounds, every = probed(entries, "board-3"), probed(entries, "board-0")
    assert len(every) == 100
    assert 0 < len(rounds) <= 90
    assert rounds == every[-len(rounds) :]


def test_a_second_device_on_the_same_state_is_refused(undisturbed: Finished, fleets: MakeFleet) -> None:
    fleet = fleets()
    server = fleet.serve("--deadline", 100)
    first = fleet.device(0)
    first.until("device board-0")
    second = fleet.device(0)
    assert second.wait() == 3, second.stderr
    assert f"process {first.pid}" in second.error["message"]
    boards = [first, fleet.device(1), fleet.device(2)]
    assert agree(server.answer(), [board.answer() for board in boards]) == undisturbed.digest


def test_of_two_devices_with_one_id_the_later_one_stays(fleets: MakeFleet) -> None:
    """Two boards, two states, one id: the broker lets in one at a time, the server knows which one is right."""
    fleet = fleets()
    server = fleet.serve(*LONG)
    fleet.devices(rig="hasty")
    older = fleet.boards[0]
    fleet.await_entries("update", 5)
    fleet.boards[1].signal(signal.SIGSTOP)  # The run waits for it, with a quorum of all.
    session = int((fleet.folder / "state-board-0" / "session").read_text())
    wait_for(lambda: time.time() >= session + 1, "the next second, which makes the next session")
    twin = fleet.device(0, state="state-twin", rig="hasty")
    assert older.wait() == 6, older.stderr
    assert "a device with the same id has started later" in older.error["message"]
    fleet.boards[1].signal(signal.SIGCONT)
    answer = server.answer()
    agree(answer, [board.answer() for board in (twin, *fleet.boards[1:])])
    assert answer["reports"] == 3 * (1 + 100 + 1)


def test_two_devices_with_one_id_and_one_session_do_no_harm(fleets: MakeFleet) -> None:
    """Copies of one memory card, without a clock: nobody can tell them apart, but each of them says what it sees."""
    fleet = fleets()
    for name in ("state-board-0", "state-twin"):
        (fleet.folder / name).mkdir()
        (fleet.folder / name / "session").write_text("4000000000\n")
    server = fleet.serve(*LONG)
    fleet.devices(rig="hasty")
    fleet.await_entries("update", 5)
    fleet.boards[1].signal(signal.SIGSTOP)
    twins = [fleet.boards[0], fleet.device(0, state="state-twin", rig="hasty")]
    warning = "the link breaks again and again: has another device the id board-0?"
    wait_for(lambda: all(warning in twin.stderr for twin in twins), "both to warn", logs=fleet.logs)
    fleet.boards[1].signal(signal.SIGCONT)
    answer = server.answer()
    assert (answer["phase"], answer["refused"], answer["reports"]) == ("done", 0, 3 * (1 + 100 + 1))
    others = [board.answer()["weights_digest"] for board in fleet.boards[1:]]
    assert others == [answer["weights_digest"]] * 2
    assert answer["digests_agree"] is True


def test_links_are_cut_again_and_again(undisturbed: Finished, fleets: MakeFleet, mosquitto_url: str) -> None:
    """All at once, after every update: nothing is lost, nothing counts twice."""
    relay = Proxy(("127.0.0.1", int(mosquitto_url.rpartition(":")[2])))
    try:
        fleet = fleets(url=relay.url)
        server, boards = fleet.serve(rig="hasty"), fleet.devices(rig="hasty")
        for number in range(1, 6):
            fleet.await_entries("update", number)
            relay.cut()
        answer = server.answer()
        assert agree(answer, [board.answer() for board in boards]) == undisturbed.digest
        assert answer["refused"] == 0
        # An evaluation does not wait for devices that are away; training, with a quorum of all, does.
        reports = fleet.entries("report")
        assert all(len(probed(reports, f"board-{number}")) == 6 for number in range(3))
        assert relay.links >= 4 + 4  # everybody came back at least once
    finally:
        relay.close()


def test_two_federations_share_a_broker(undisturbed: Finished, fleets: MakeFleet, mosquitto_url: str) -> None:
    both = [fleets(url=mosquitto_url, federation=name) for name in ("left", "right")]
    servers = [fleet.serve() for fleet in both]
    for fleet in both:
        fleet.devices()
    for fleet, server in zip(both, servers, strict=True):
        assert agree(server.answer(), [board.answer() for board in fleet.boards]) == undisturbed.digest


def test_nonsense_on_every_topic_changes_nothing(undisturbed: Finished, fleets: MakeFleet, mosquitto_url: str) -> None:
    fleet = fleets(url=mosquitto_url)
    with nonsense(mosquitto_url, [f"board-{number}" for number in range(3)]) as sent:
        server, boards = fleet.serve(), fleet.devices()
        answer, answers = server.answer(), [board.answer() for board in boards]
    assert agree(answer, answers) == undisturbed.digest
    assert answer["reports"] == undisturbed.server["reports"]
    assert all(device["dropped"] > 50 for device in answers)
    # Every program says so, and none fills its log with it.
    assert all(0 < program.stderr.count("dropped a payload") < 20 for program in (server, *boards))
    assert len(sent) > 1000


@contextmanager
def nonsense(url: str, devices: list[str]) -> Iterator[list[str]]:
    """Publish it as long as the block lasts, some of it retained."""
    topics = [topic("default", channel) for channel in BROADCAST]
    topics += [topic("default", channel, d) for channel in (*FROM_DEVICE, *TO_DEVICE) for d in (*devices, "nobody")]
    topics += ["fedzo/v1/default/d/BAD NAME/report", "fedzo/v1/default/d/board-0/report/more", "fedzo/v1/other/head"]
    random = np.random.default_rng(7)
    payloads = [
        b"",
        b"\x00",
        b"\x01\x01",  # the first two bytes of a report
        b"\x01\x02" + random.bytes(200),  # of an update
        b"\x01\x05" + random.bytes(2000),  # of a block
        b"\x02\x01" + random.bytes(60),  # of another version
        random.bytes(5000),
        b"{}",
        b'{"kind":"head","run":"small","round":99999}',
        b'{"kind":"run"}',
        b'{"kind":"state","session":1e999}',
        b'{"kind":"order","run":"small","action":"refuse","session":-1,"ordinal":0,"detail":""}',
        b"[" * 50_000,
        b'"\xff\xfe"',
    ]
    publisher = MqttTransport(url, "nonsense", on_event=lambda _: None)
    publisher.connect(15.0)
    over, sent = threading.Event(), list[str]()

    def publish() -> None:
        for number, (payload, place) in enumerate(itertools.cycle(itertools.product(payloads, topics))):
            if over.is_set():
                return
            # Not on what is retained by others: who can write there can make late devices wait, without any harm else.
            publisher.publish(place, payload, qos=number % 2, retain=place.endswith("nobody/state"))
            sent.append(place)
            time.sleep(0.0005)

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        yield sent
    finally:
        over.set()
        thread.join()
        publisher.close(timeout_s=1.0)
