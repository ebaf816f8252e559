"""Everything that a run sends is recorded and accounted for, byte by byte: no weights, gradients or data are in it."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedzo.broker_server.history.replay import replay_run
from fedzo.edge_runtime.connection.inbound import read_message
from fedzo.edge_runtime.connection.traffic import PUBACK_BYTES, Flow, publish_packet_bytes
from fedzo.edge_runtime.connection.transport import Arrived, MqttTransport
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import Manifest
from fedzo.protocol.perturbation.blocks import directions_of
from fedzo.protocol.replay.update import estimate_gradient
from fedzo.protocol.wire.codec import decode
from fedzo.protocol.wire.documents import Announcement, Hello, Presence, RunDocument, ServerPresence, parse
from fedzo.protocol.wire.messages import Report, ReportKind, UpdateRecord
from fedzo.protocol.wire.signed import detach, is_signed
from fedzo.protocol.wire.topics import BROADCAST, Channel, parse_topic
from fedzo.protocol.wire.transfers import BlobBlock
from tests.end_to_end.conftest import DEVICES, Finished, MakeFleet
from tests.end_to_end.fleet import Fleet, agree, wait_for

MARK = "end-of-recording"
WINDOW = 16  # bytes that nothing sent may have in common with a secret
ALLOWED = {
    Channel.SERVER: {"ServerPresence"},
    Channel.RUN: {"RunDocument"},
    Channel.HEAD: {"Announcement"},
    Channel.LOG: {"UpdateRecord"},
    Channel.HELLO: {"Hello"},
    Channel.STATE: {"Presence"},
    Channel.REPORT: {"Report"},
    Channel.GET: {"BlobRequest", "LogRequest"},
    Channel.ACK: {"Receipt"},
    Channel.BLOCK: {"BlobBlock", "LogSlice"},
    Channel.COMMAND: {"Order"},
}


@contextmanager
def recording(url: str, name: str) -> Iterator[list[Arrived]]:
    """Everything that the broker hands on while the block lasts, and what it retained before."""
    found: list[Arrived] = []
    recorder = MqttTransport(
        url,
        name,
        on_event=lambda event: found.append(event) if isinstance(event, Arrived) else None,
        subscriptions=("#",),
        max_packet_bytes=4 << 20,
    )
    recorder.connect(15.0)
    try:
        yield found
        recorder.publish(MARK, b"")  # behind everything that the broker has taken so far
        wait_for(lambda: found and found[-1].topic == MARK, "the end of the recording")
        found.pop()
    finally:
        recorder.close(timeout_s=2.0)


@dataclass(frozen=True)
class Recorded:
    """A run, with all that crossed the broker and all that was left on it."""

    fleet: Fleet
    server: dict[str, Any]
    devices: Sequence[dict[str, Any]]
    payloads: Sequence[tuple[str, bytes]]
    retained: Sequence[tuple[str, bytes]]


@pytest.fixture(scope="module")
def recorded(make_fleet: MakeFleet, module_mosquitto_url: str) -> Iterator[Recorded]:
    url = module_mosquitto_url
    fleet = make_fleet(url=url)
    try:
        with recording(url, "recorder") as live:
            server, boards = fleet.serve(), fleet.devices()
            answer, answers = server.answer(), [board.answer() for board in boards]
            agree(answer, answers)
        with recording(url, "late-recorder") as left:
            pass
        assert not any(event.retain for event in live)
        assert all(event.retain for event in left)
        yield Recorded(
            fleet,
            answer,
            answers,
            [(event.topic, event.payload) for event in live],
            [(event.topic, event.payload) for event in left],
        )
    finally:
        fleet.close()


def message_of(topic: str, payload: bytes) -> Any:
    """What a topic's reader makes of a payload; anything else raises."""
    place = parse_topic(topic)
    if is_signed(place.channel):
        payload = detach(place.channel, payload)[0]
    if place.channel is Channel.HELLO:
        return parse(Hello, payload)
    if place.channel is Channel.STATE:
        return parse(Presence, payload)
    if place.channel in (Channel.REPORT, Channel.GET):
        return decode(payload)
    return read_message("default", place.device, topic, payload).message


def test_every_byte_belongs_to_a_message_of_its_topic(recorded: Recorded) -> None:
    table: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for topic, payload in recorded.payloads:
        message = message_of(topic, payload)
        kind = type(message).__name__
        assert kind in ALLOWED[parse_topic(topic).channel]
        document = payload
        if is_signed(parse_topic(topic).channel):
            document, key, signature = detach(parse_topic(topic).channel, payload)
            assert document + key + signature == payload
        assert message.encode() == document  # One encoding: there is no room for anything else.
        table[kind][0] += 1
        table[kind][1] += len(payload)
    total = sum(len(payload) for _, payload in recorded.payloads)
    assert sum(size for _, size in table.values()) == total
    counts = {kind: count for kind, (count, _) in table.items()}
    assert counts["Report"] == counts["Receipt"] == recorded.server["reports"] == DEVICES * 9
    assert counts["UpdateRecord"] == 6
    assert counts["RunDocument"] == 1
    assert counts["ServerPresence"] == 2
    assert counts["Announcement"] == 1 + 9 + 1
    # What a whole run of three devices costs; graphs, masks and manifest are most of it.
    assert table["BlobBlock"][1] > 0.5 * total, table


def test_what_the_devices_count_is_what_was_sent(recorded: Recorded) -> None:
    """MQTT 5: header, topic, packet id, an empty list of properties; four bytes for every acknowledgement.

    Receipts have neither an id nor an acknowledgement.
    """
    for device in recorded.devices:
        up, down, receipts = Flow(), Flow(), 0
        for topic, payload in recorded.payloads:
            place = parse_topic(topic)
            is_receipt = place.channel is Channel.ACK
            length = publish_packet_bytes(topic, len(payload), 0 if is_receipt else 1, 0)
            receipts += is_receipt and place.device == device["device"]
            if place.device == device["device"] and "/d/" in topic:
                up.add(len(payload), length)
            elif place.channel in BROADCAST or place.device == device["device"]:
                down.add(len(payload), length)
        # It may have come after the first heads, of which only the last is retained, and left before the server did.
        assert 0 <= up.packet_bytes + (down.messages - receipts) * PUBACK_BYTES - device["bytes_up"] <= 4 * PUBACK_BYTES
        assert 0 <= down.packet_bytes + up.messages * PUBACK_BYTES - device["bytes_down"] < 800


def test_reports_hold_as_many_scalars_as_the_round_asks_for(recorded: Recorded) -> None:
    manifest = Manifest.decode((recorded.fleet.artifact / "manifest.json").read_bytes())
    wanted = {
        ReportKind.PROBE: (16,),
        ReportKind.SALIENCY: (manifest.n_units, manifest.n_moments),
        ReportKind.EVALUATE: (3,),
    }
    messages = [message_of(*item) for item in recorded.payloads]
    reports = [message for message in messages if isinstance(message, Report)]
    assert {report.kind for report in reports} == set(wanted)
    for report in reports:
        assert tuple(block.size for block in report.blocks) == wanted[report.kind]
    for update in (message for message in messages if isinstance(message, UpdateRecord)):
        assert update.coefficients.size == DEVICES * 16


def test_blobs_are_the_artifact_and_the_mask(recorded: Recorded) -> None:
    files = {path.name: path.read_bytes() for path in recorded.fleet.artifact.iterdir()}
    (mask,) = recorded.fleet.entries("mask")
    files["mask"] = mask.payload
    known = {hashlib.sha256(data).digest(): data for data in files.values()}
    names = {hashlib.sha256(data).digest(): name for name, data in files.items()}
    fetched: dict[bytes, set[int]] = collections.defaultdict(set)
    for topic, payload in recorded.payloads:
        message = message_of(topic, payload)
        if isinstance(message, BlobBlock):
            data = known[message.sha256]
            assert message.total == len(data)
            assert message.data == data[message.offset : message.offset + len(message.data)]
            fetched[message.sha256].update(range(message.offset, message.offset + len(message.data)))
    assert all(offsets == set(range(len(known[sha256]))) for sha256, offsets in fetched.items())
    assert {names[sha256] for sha256 in fetched} >= {"manifest.json", "probe.onnx", "saliency.onnx", "mask"}


def test_the_broker_keeps_only_the_documents(recorded: Recorded) -> None:
    kinds = collections.Counter(type(message_of(*item)) for item in recorded.retained)
    assert kinds == {ServerPresence: 1, RunDocument: 1, Announcement: 1, Presence: DEVICES}


# --- secrets --------------------------------------------------------------------------------------------------------


def windows(values: NDArray[Any], step: int) -> Iterator[bytes]:
    """Every piece of an array's bytes, except those that hold hardly anything, such as a run of zeros."""
    data = values.tobytes()
    for start in range(0, len(data) - WINDOW + 1, step):
        piece = data[start : start + WINDOW]
        if len(set(piece)) > 4:
            yield piece


def found(secrets: set[bytes], payload: bytes) -> bool:
    return any(payload[start : start + WINDOW] in secrets for start in range(len(payload) - WINDOW + 1))


def as_sent(values: NDArray[np.float32]) -> Iterable[bytes]:
    """The windows of floating-point numbers in the formats that somebody might choose."""
    for dtype in ("<f4", "<f2", "<f8", ">f4"):
        yield from windows(values.astype(dtype), np.dtype(dtype).itemsize)


def weights_and_gradients(fleet: Fleet) -> set[bytes]:
    """Of every step of the run, from the dense initial weights on."""
    _, coordinator = replay_run(fleet.path)
    manifest, replica = coordinator.manifest, coordinator.replica
    secrets = set(as_sent(initial_weights(manifest.layout, manifest.seed)))
    replica.restore_from_start()
    directions = directions_of(replica.blocks, coordinator.run.settings.seed)
    for entry in fleet.entries("update"):
        record = decode(entry.payload)
        assert isinstance(record, UpdateRecord)
        before = replica.weights.copy()
        secrets.update(as_sent(estimate_gradient(replica.blocks, directions, record)))
        replica.apply(record)
        secrets.update(as_sent(replica.weights))
        secrets.update(as_sent(replica.weights - before))
    return secrets


def examples(data: Iterable[Path]) -> set[bytes]:
    """Training and test images as they lie in the files and as the network sees them."""
    secrets: set[bytes] = set()
    for path in data:
        x = np.load(path)["x"]
        secrets.update(windows(x, 1))
        secrets.update(as_sent(x.astype(np.float32)))
        secrets.update(as_sent(x.astype(np.float32) / np.float32(255)))
    return secrets


def test_neither_weights_nor_gradients_nor_examples_are_in_any_payload(recorded: Recorded) -> None:
    fleet = recorded.fleet
    numbers, pixels = weights_and_gradients(fleet), examples([*fleet.data, fleet.test_data])
    assert len(numbers) > 50_000
    assert len(pixels) > 50_000
    # The search finds what it looks for, wherever it begins.
    _, coordinator = replay_run(fleet.path)
    x = np.load(fleet.data[0])["x"]
    assert found(numbers, b"abc" + coordinator.replica.weights[7:12].tobytes())
    assert found(pixels, b"a" + x[3, 0, 5].tobytes())
    assert found(pixels, (x[3, 0, 5, 2:7].astype(np.float32) / np.float32(255)).tobytes())
    for topic, payload in (*recorded.payloads, *recorded.retained):
        assert not found(numbers, payload), topic
        assert not found(pixels, payload), topic


def test_the_recorder_changes_nothing(recorded: Recorded, undisturbed: Finished) -> None:
    assert recorded.server["weights_digest"] == undisturbed.digest
