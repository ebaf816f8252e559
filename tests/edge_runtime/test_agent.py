"""The agent against a real broker and a server whose every word the test decides."""

from __future__ import annotations

import hashlib
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedzo.edge_runtime.agent import INBOX_MESSAGES, Agent
from fedzo.edge_runtime.connection import link_news
from fedzo.edge_runtime.connection.transport import Arrived, Connected, MqttTransport
from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.inference.variants import matching_variant, wanted_variants
from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.edge_runtime.storage.durable import write_durably
from fedzo.protocol.artifact.manifest import Manifest
from fedzo.protocol.device_side.run_files import needed_graphs
from fedzo.protocol.errors import (
    BrokerError,
    ConfigError,
    DataError,
    MemoryBudgetError,
    ProtocolError,
    SelfTestError,
)
from fedzo.protocol.perturbation.blocks import blocks_of
from fedzo.protocol.perturbation.directions import round_coefficients
from fedzo.protocol.pruning.mask import Mask, threshold
from fedzo.protocol.pruning.saliency import diagonal_scores
from fedzo.protocol.replay.update import Replica
from fedzo.protocol.settings import SaliencySettings, TrainingSettings
from fedzo.protocol.wire.blobs import MAX_SETBACKS
from fedzo.protocol.wire.documents import Announcement, Hello, Order, Presence, RunDocument, ServerPresence
from fedzo.protocol.wire.messages import Decline, Receipt, Report, ReportKind, Verdict
from fedzo.protocol.wire.topics import Channel
from fedzo.protocol.wire.transfers import BlobBlock, BlobRequest, LogRequest
from tests.edge_runtime.federation import (
    FakeServer,
    RunningAgent,
    export_lenet,
    run_document,
    start_agent,
    write_data,
)

K = 6
TRAINING = TrainingSettings(k=K, batch=8, rounds=4)
LONG = TrainingSettings(k=50_000, batch=8, rounds=4)
SALIENCY = SaliencySettings(samples=8)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_lenet(tmp_path_factory.mktemp("agent") / "lenet5")


@pytest.fixture(scope="module")
def manifest(artifact: Path) -> Manifest:
    return load_artifact(artifact).manifest


@pytest.fixture(scope="module")
def run(artifact: Path) -> RunDocument:
    return run_document(artifact, seed=5, training=TRAINING, saliency=SALIENCY)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data.npz")


@pytest.fixture
def server(mosquitto: Any, artifact: Path, run: RunDocument, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setattr("fedzo.edge_runtime.connection.retry._CAP_S", 0.3)
    made = FakeServer(mosquitto.url, artifact, run)
    yield made
    made.close()


@pytest.fixture
def start(mosquitto: Any, tmp_path: Path, data: Path) -> Iterator[Callable[..., RunningAgent]]:
    """``start(...)``: an agent on its thread; stopped at the end."""
    agents: list[RunningAgent] = []

    def factory(**settings: Any) -> RunningAgent:
        settings.setdefault("url", mosquitto.url)
        agents.append(start_agent(folder=tmp_path / "state", data=data, **settings))
        return agents[-1]

    yield factory
    for agent in agents:
        agent.stop()


def replica_of(run: RunDocument, manifest: Manifest, mask: Mask) -> Replica:
    blocks = blocks_of(run.training, manifest, mask)
    return Replica(manifest.layout, mask, manifest.seed, run.settings.seed, blocks, run.training.optimiser)


def dense_replica(run: RunDocument, manifest: Manifest) -> Replica:
    return replica_of(run, manifest, Mask.dense(manifest.layout))


def announce_training(server: FakeServer, replica: Replica, round_: int, **fields: Any) -> Announcement:
    values: dict[str, Any] = {
        "log_length": replica.index,
        "log_head": replica.head.hex(),
        "weights_digest": replica.digest.hex(),
        **fields,
    }
    return server.announce(round_, "train", **values)


def publish(server: FakeServer, run: RunDocument) -> RunDocument:
    """Another run takes the place of the server's."""
    server.run = run
    server.send(Channel.RUN, run)
    return run


def step(server: FakeServer, replica: Replica, round_: int, values: Any) -> None:
    """What a coordinator makes of one device's probe."""
    coefficients = round_coefficients(np.asarray(values, dtype=np.float64))
    server.append(replica.prepare(replica.index, round_, 0.5, ((0, len(coefficients)),), coefficients))


# --- a whole run --------------------------------------------------------------------------------------------------


def test_a_run_from_hello_to_done(
    server: FakeServer, start: Callable[..., RunningAgent], run: RunDocument, manifest: Manifest
) -> None:
    agent = start()
    hello = server.expect(Hello)
    assert (hello.session, hello.samples, hello.holdout) == (agent.state.session, 40, 10)
    ready = server.expect(Presence, status="ready")
    assert 0 < ready.planned_peak_mib < 200

    server.announce(1, "saliency")
    scored = server.expect(Report)
    assert (scored.kind, scored.round, scored.decline) == (ReportKind.SALIENCY, 1, Decline.NONE)
    dense = dense_replica(run, manifest)
    scores = diagonal_scores(manifest, dense.weights, scored.blocks[0], scored.blocks[1])
    mask = threshold(manifest.layout, scores, 0.8)
    encoded = mask.encode()
    chosen: dict[str, Any] = {"mask_sha256": server.offer(encoded), "mask_size": len(encoded)}

    replica = replica_of(run, manifest, mask)
    for round_ in (2, 3):
        announce_training(server, replica, round_, **chosen)
        probed = server.expect(Report)
        assert (probed.kind, probed.round, probed.decline) == (ReportKind.PROBE, round_, Decline.NONE)
        assert probed.weights_digest == replica.digest
        assert [block.shape for block in probed.blocks] == [(K,)]
        step(server, replica, round_, probed.blocks[0])

    log: dict[str, Any] = {
        "log_length": replica.index,
        "log_head": replica.head.hex(),
        "weights_digest": replica.digest.hex(),
    }
    server.announce(4, "evaluate", **chosen, **log)
    counted = server.expect(Report)
    assert (counted.kind, counted.samples) == (ReportKind.EVALUATE, 10)
    assert counted.blocks[0][2] == 10
    server.announce(5, "done", **chosen, **log)
    done = server.expect(Presence, status="done")
    assert (done.log_length, done.weights_digest) == (2, replica.digest.hex())
    agent.wait()
    assert agent.error is None

    summary = agent.agent.summary
    assert (summary.status, summary.run, summary.log_length) == ("done", "run-1", 2)
    assert summary.weights_digest == replica.digest.hex()
    assert (summary.reports, summary.declined, summary.dropped) == (4, 0, 0)
    assert summary.queries == scored.queries + 2 * (K + 1) + counted.queries
    assert summary.planned_peak_mib == ready.planned_peak_mib
    assert summary.bytes_down > 30_000  # the graphs
    assert 2_000 < summary.bytes_up < 20_000
    assert agent.state.outbox.load() is None
    words = " | ".join(agent.lines)
    assert words.index("connected") < words.index("fits") < words.index("scoring") < words.index("training")
    assert words.index("training") < words.index("evaluating")
    assert len(agent.lines) == 5


def test_a_second_start_fetches_nothing_again(
    server: FakeServer, start: Callable[..., RunningAgent], run: RunDocument, manifest: Manifest
) -> None:
    first = start()
    server.expect(Presence, status="ready")
    first.stop()
    server.expect(Presence, status="left")
    start()
    server.expect(Presence, status="ready")
    asked = [message for _, message, _ in server.heard if isinstance(message, BlobRequest)]
    optional = len(wanted_variants(manifest))
    wanted = 1 + len(needed_graphs(manifest, run.settings)) + optional
    assert len(asked) == len({request.sha256 for request in asked}) == wanted  # once


def test_a_damaged_blob_is_fetched_again(
    server: FakeServer, start: Callable[..., RunningAgent], manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    first = start()
    server.expect(Presence, status="ready")
    first.stop()
    graph = manifest.graph("probe.onnx")
    first.state.blobs.path(graph.sha256).write_bytes(b"x" * graph.size)
    with caplog.at_level(logging.WARNING):
        start()
        assert server.expect(BlobRequest, sha256=graph.sha256).offset == 0
        assert server.expect(Presence, status="ready").session > first.state.session
    assert "was damaged" in caplog.text


def test_missed_records_are_pulled(
    server: FakeServer, start: Callable[..., RunningAgent], run: RunDocument, manifest: Manifest
) -> None:
    replica = dense_replica(run, manifest)
    for round_ in (1, 2, 3):
        step(server, replica, round_, [0.5, -0.25, 1.0])
    start()
    server.expect(Presence, status="ready")
    announce_training(server, replica, 4)
    assert server.expect(LogRequest).first == 0
    assert server.expect(Report).weights_digest == replica.digest


# --- receipts and the outbox ----------------------------------------------------------------------------------------


def test_a_report_is_sent_until_its_receipt_comes(
    server: FakeServer, start: Callable[..., RunningAgent], run: RunDocument, manifest: Manifest
) -> None:
    server.acknowledge = False
    agent = start(retry_s=0.3)
    server.expect(Presence, status="ready")
    announce_training(server, dense_replica(run, manifest), 1)
    first, payload = server.expect_bytes(Report)
    assert server.expect_bytes(Report)[1] == payload
    kept = agent.state.outbox.load()
    assert kept is not None
    assert (kept[0], kept[1].encode()) == ("run-1", payload)
    server.send(Channel.ACK, Receipt(first.run_tag, first.round + 7, Verdict.ACCEPTED), "dev-a")  # for another round
    assert server.expect_bytes(Report)[1] == payload
    server.send(Channel.ACK, Receipt(first.run_tag, first.round, Verdict.DUPLICATE), "dev-a")
    deadline = time.monotonic() + 60
    while agent.state.outbox.load() is not None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    server.nothing(Report, 0.1)
    server.nothing(Report, 0.7)


def test_a_later_start_delivers_the_report_of_an_earlier_one(
    server: FakeServer, start: Callable[..., RunningAgent], run: RunDocument, manifest: Manifest
) -> None:
    server.acknowledge = False
    first = start()
    server.expect(Presence, status="ready")
    announce_training(server, dense_replica(run, manifest), 1)
    payload = server.expect_bytes(Report)[1]
    first.stop()
    server.expect(Presence, status="left")
    second = start()
    assert server.expect_bytes(Report)[1] == payload
    server.send(Channel.ACK, Receipt(run.tag, 1, Verdict.ACCEPTED), "dev-a")
    server.nothing(Report, 1.0)
    assert second.agent.summary.queries == 0  # the round was not measured twice
    assert second.state.outbox.load() is None


def test_a_report_of_another_run_is_not_sent(
    server: FakeServer, start: Callable[..., RunningAgent], run: RunDocument, manifest: Manifest, artifact: Path
) -> None:
    server.acknowledge = False
    first = start()
    server.expect(Presence, status="ready")
    announce_training(server, dense_replica(run, manifest), 1)
    server.expect(Report)
    first.stop()
    server.expect(Presence, status="left")
    server.run = run_document(artifact, "run-2", seed=6, training=TRAINING)
    server.send(Channel.RUN, server.run)
    second = start()
    server.expect(Presence, status="ready", run="run-2")
    server.nothing(Report, 0.8)
    assert second.state.outbox.load() is None


def test_a_full_disk_does_not_keep_a_report_back(
    server: FakeServer,
    start: Callable[..., RunningAgent],
    run: RunDocument,
    manifest: Manifest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    start()
    server.expect(Presence, status="ready")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedzo.edge_runtime.storage.outbox.write_durably", full)
    with caplog.at_level(logging.WARNING):
        announce_training(server, dense_replica(run, manifest), 1)
        assert server.expect(Report).decline is Decline.NONE
    assert "No space left" in caplog.text


def test_a_full_disk_while_fetching_ends_the_agent(
    server: FakeServer, start: Callable[..., RunningAgent], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedzo.edge_runtime.storage.artifact.write_durably", full)
    agent = start()
    assert "cannot keep a blob" in server.expect(Presence, status="refused").detail
    agent.wait()
    assert isinstance(agent.error, ConfigError)


@pytest.mark.parametrize("fault", ["full disk", "absent", "silent"])
def test_an_optional_graph_that_cannot_be_had_is_given_up(
    server: FakeServer,
    start: Callable[..., RunningAgent],
    run: RunDocument,
    manifest: Manifest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    variant = matching_variant(manifest, "probe.onnx")
    if variant is None:
        pytest.skip("onnxruntime has no blocked kernels on this machine")
    if fault == "full disk":
        original = write_durably

        def write(path: Path, data: bytes) -> None:
            if path.name == variant.file.sha256.hex():
                raise OSError(28, "No space left on device")
            original(path, data)

        monkeypatch.setattr("fedzo.edge_runtime.storage.artifact.write_durably", write)
    else:
        server.lacks[variant.file.sha256] = fault == "absent"
    agent = start()
    server.expect(Presence, status="ready")
    announce_training(server, dense_replica(run, manifest), 1)
    assert server.expect(Report).decline is Decline.NONE
    assert agent.agent.summary.layout == "portable"
    asked = [m for _, m, _ in server.heard if isinstance(m, BlobRequest) and m.sha256 == variant.file.sha256]
    assert len(asked) == (1 + MAX_SETBACKS if fault == "silent" else 1)
    assert ("going on without an optional file" in caplog.text) == (fault == "full disk")


# --- hostile and broken peers ---------------------------------------------------------------------------------------


def test_garbage_on_every_topic_is_dropped_and_counted(
    server: FakeServer, start: Callable[..., RunningAgent], run: RunDocument, manifest: Manifest
) -> None:
    agent = start()
    server.expect(Presence, status="ready")
    bits = random.Random(1)
    documents = [ServerPresence(True, 2), run, Announcement("run-1", 9, "train"), Order("run-1", "refuse", 1)]
    good = {
        Channel.SERVER: documents[0].encode(),
        Channel.RUN: documents[1].encode(),
        Channel.HEAD: documents[2].encode(),
        Channel.COMMAND: documents[3].encode(),
        Channel.LOG: b"\x01\x02" + bytes(60),
        Channel.ACK: Receipt(run.tag, 1, Verdict.ACCEPTED).encode(),
        Channel.BLOCK: BlobBlock(bytes(32), 0, 4, b"abcd").encode(),
    }
    sent = 0
    for channel, payload in good.items():
        device = "" if channel in (Channel.SERVER, Channel.RUN, Channel.HEAD, Channel.LOG) else "dev-a"
        for bad in (
            b"\0",
            b"{}",
            b"[" * 50_000,
            b"\xff" * 200,
            payload[: len(payload) // 2],
            payload + b"}",
            bits.randbytes(300),
            bits.randbytes(5000),
            good[Channel.ACK] if channel is not Channel.ACK else good[Channel.BLOCK],
            b'{"kind":"' + documents[0].KIND.encode() + b'","online":1e999,"birth":-1}',
        ):
            server.send_bytes(channel, bad, device, retain=False)
            sent += 1
    announce_training(server, dense_replica(run, manifest), 10)
    assert server.expect(Report).round == 10
    assert agent.agent.summary.dropped == sent


def test_a_flood_waits_in_the_broker_and_the_device_goes_on(
    server: FakeServer, start: Callable[..., RunningAgent], run: RunDocument, manifest: Manifest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    agent = start()
    server.expect(Presence, status="ready")
    read, inbox = agent.agent._read, agent.agent._events
    deadline = time.monotonic() + 30

    def slow(arrived: Arrived) -> Any:
        while not inbox.pauses and time.monotonic() < deadline:  # however slowly the flood comes
            time.sleep(0.003)
        return read(arrived)

    monkeypatch.setattr(agent.agent, "_read", slow)
    for _ in range(800):
        server.send_bytes(Channel.COMMAND, b"nonsense", "dev-a", retain=False)
    announce_training(server, dense_replica(run, manifest), 10)
    assert server.expect(Report).round == 10
    assert agent.agent.summary.dropped == 800
    assert inbox.pauses >= 1
    assert inbox.peak < 2 * INBOX_MESSAGES


def test_an_emptied_retained_topic_is_nothing(server: FakeServer, start: Callable[..., RunningAgent]) -> None:
    server.send_bytes(Channel.HEAD, b"")
    agent = start()
    server.expect(Presence, status="ready")
    assert agent.agent.summary.dropped == 0


@pytest.mark.parametrize("what", ["manifest", "mask", "blob"])
def test_a_server_that_serves_something_else(
    server: FakeServer,
    start: Callable[..., RunningAgent],
    run: RunDocument,
    manifest: Manifest,
    what: str,
) -> None:
    junk = b"no such thing" * 9
    name = server.offer(junk)
    if what == "manifest":
        server.run = RunDocument("run-2", name, len(junk), run.settings)
        server.send(Channel.RUN, server.run)
        agent = start()
        assert "not JSON" in server.expect(Presence, status="refused").detail
        agent.wait()
        assert agent.error is not None
        assert agent.error.exit_code == 6
        return
    if what == "mask":
        start()
        server.expect(Presence, status="ready")
        announce_training(server, dense_replica(run, manifest), 1, mask_sha256=name, mask_size=len(junk))
        assert "mask" in server.expect(Presence, status="ready", log_length=0, run="run-1").detail
    else:
        start()
        server.expect(Presence, status="ready")
        wrong = hashlib.sha256(b"other").digest()
        server.send(Channel.BLOCK, BlobBlock(wrong, 0, 5, b"other"), "dev-a")
    announce_training(server, dense_replica(run, manifest), 2)
    assert server.expect(Report).round == 2


def test_a_log_that_diverges_twice_ends_the_agent(
    server: FakeServer, start: Callable[..., RunningAgent], run: RunDocument, manifest: Manifest
) -> None:
    replica = dense_replica(run, manifest)
    record = replica.prepare(0, 1, 0.5, ((0, 2),), np.array([0.5, 0.25], dtype=np.float32))
    lying = type(record)(0, 1, 0.5, record.segments, record.coefficients, record.parent, bytes(16))
    server.append(lying)
    agent = start()
    announce_training(server, replica, 2)
    assert "replaying the log fails" in server.expect(Presence, status="refused").detail
    agent.wait()
    assert isinstance(agent.error, SelfTestError)


def test_a_refusal_of_the_server_ends_the_agent(
    server: FakeServer, start: Callable[..., RunningAgent], run: RunDocument
) -> None:
    server.welcome = False
    agent = start()
    session = server.expect(Hello).session
    server.send(Channel.COMMAND, Order("run-1", "refuse", session - 1, detail="for the start before"), "dev-a")
    server.send(Channel.COMMAND, Order("run-1", "refuse", session, detail="it is full"), "dev-a")
    agent.wait()
    assert isinstance(agent.error, ProtocolError)
    assert "it is full" in agent.error.message
    assert agent.agent.summary.status == "refused"


# --- refusals of the device -----------------------------------------------------------------------------------------


def test_a_run_over_budget_is_refused(server: FakeServer, start: Callable[..., RunningAgent]) -> None:
    agent = start(ram_budget_mib=30.0)
    assert "does not fit: lenet5 needs" in server.expect(Presence, status="refused").detail
    agent.wait()
    assert isinstance(agent.error, MemoryBudgetError)
    asked = {message.sha256 for _, message, _ in server.heard if isinstance(message, BlobRequest)}
    assert len(asked) == 1  # the manifest: no graph was fetched


def test_data_that_do_not_fit_the_model_are_refused(
    server: FakeServer, start: Callable[..., RunningAgent], data: Path
) -> None:
    np.savez(data, x=np.zeros((40, 7, 7), np.uint8), y=np.zeros(40, np.int64))
    agent = start()
    assert "(7, 7)" in server.expect(Presence, status="refused").detail
    agent.wait()
    assert isinstance(agent.error, DataError)


def test_a_declined_round_does_not_end_the_agent(
    server: FakeServer, start: Callable[..., RunningAgent], run: RunDocument, manifest: Manifest
) -> None:
    agent = start(holdout=0.0)
    server.expect(Presence, status="ready")
    replica = dense_replica(run, manifest)
    log: dict[str, Any] = {"log_head": replica.head.hex(), "weights_digest": replica.digest.hex()}
    server.announce(1, "evaluate", **log)
    assert "holds no samples" in server.expect(Presence, status="ready", run="run-1").detail
    declined = server.expect(Report)
    assert (declined.decline, declined.blocks) == (Decline.NO_DATA, ())
    announce_training(server, replica, 2)
    assert server.expect(Report).decline is Decline.NONE
    assert (agent.agent.summary.reports, agent.agent.summary.declined) == (2, 1)


# --- time and the network -------------------------------------------------------------------------------------------


def test_a_closed_round_is_given_up_for_the_next(
    server: FakeServer,
    start: Callable[..., RunningAgent],
    artifact: Path,
    manifest: Manifest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, losses = Engine.loss, []

    def slow(engine: Engine, *args: Any) -> float:
        losses.append(1)
        time.sleep(0.05)
        return original(engine, *args)

    run = publish(server, run_document(artifact, seed=5, training=LONG))
    start()
    server.expect(Presence, status="ready")
    replica = dense_replica(run, manifest)
    monkeypatch.setattr(Engine, "loss", slow)
    announce_training(server, replica, 1)  # three quarters of an hour
    deadline = time.monotonic() + 20
    while len(losses) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    step(server, replica, 1, [1.0])
    announce_training(server, replica, 2, ordinals=tuple(range(10_000)))  # among so many, a few directions each
    report = server.expect(Report)
    assert (report.round, report.weights_digest) == (2, replica.digest)
    assert report.blocks[0].size < 10
    assert len(losses) < 200


def test_a_new_run_replaces_the_old_one(
    server: FakeServer, start: Callable[..., RunningAgent], manifest: Manifest, artifact: Path
) -> None:
    run = publish(server, run_document(artifact, seed=5, training=LONG))
    agent = start()
    server.expect(Presence, status="ready", run="run-1")
    announce_training(server, dense_replica(run, manifest), 1)
    publish(server, run_document(artifact, "run-2", seed=6, training=TRAINING, saliency=SALIENCY))
    server.expect(Presence, status="ready", run="run-2")
    announce_training(server, dense_replica(server.run, manifest), 1)
    assert server.expect(Report).blocks[0].shape == (K,)
    assert agent.agent.summary.run == "run-2"


def test_a_broker_that_restarts_is_found_again(
    server: FakeServer,
    start: Callable[..., RunningAgent],
    run: RunDocument,
    manifest: Manifest,
    mosquitto: Any,
) -> None:
    agent = start()
    server.expect(Presence, status="ready")
    replica = dense_replica(run, manifest)
    announce_training(server, replica, 1)
    server.expect(Report, round=1)
    mosquitto.stop()
    time.sleep(0.5)
    mosquitto.start()  # it keeps nothing
    server.expect(Presence, status="ready", timeout_s=60)
    announce_training(server, replica, 2)
    assert server.expect(Report, round=2, timeout_s=60).weights_digest == replica.digest
    assert [line.split()[0] for line in agent.lines if "link" in line or "again" in line] == ["no", "connected"]


def test_a_device_without_a_server_says_that_it_waits(
    mosquitto: Any, start: Callable[..., RunningAgent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_news, "LONELY_S", 0.2)
    agent = start()
    deadline = time.monotonic() + 30.0
    while len(agent.lines) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    assert agent.lines == [
        f"connected to {mosquitto.url}", "no server of federation 'default' is there yet; waiting",
    ]  # fmt: skip


def test_waiting_costs_no_work(
    mosquitto: Any, start: Callable[..., RunningAgent], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[float] = []
    original = Agent._next

    def count(agent: Agent) -> Any:
        turns.append(time.monotonic())
        return original(agent)

    monkeypatch.setattr(Agent, "_next", count)
    agent = start(retry_s=0.05)  # no server, no run
    started = time.monotonic()
    time.sleep(1.5)
    assert len(turns) < 40 * (time.monotonic() - started)
    assert agent.thread.is_alive()


def test_without_a_broker_the_agent_gives_up_when_told_so(start: Callable[..., RunningAgent]) -> None:
    agent = start(url="mqtt://127.0.0.1:1", timeout_s=0.5)
    agent.wait()
    assert isinstance(agent.error, BrokerError)
    assert "within 0.5 s" in agent.error.message


def test_without_a_broker_the_agent_waits_and_can_be_stopped(start: Callable[..., RunningAgent]) -> None:
    agent = start(url="mqtt://127.0.0.1:1")
    deadline = time.monotonic() + 20
    while not agent.lines:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(1.0)
    assert agent.thread.is_alive()
    assert [line.split(":")[0] for line in agent.lines] == ["no link to mqtt", "hint"]  # once an outage
    started = time.monotonic()
    agent.stop()
    assert time.monotonic() - started < 5.0
    assert agent.error is None
    assert agent.agent.summary.status == "left"


def test_stop_in_the_middle_of_a_round_leaves_at_once(
    server: FakeServer, start: Callable[..., RunningAgent], artifact: Path, manifest: Manifest
) -> None:
    run = publish(server, run_document(artifact, seed=5, training=LONG))
    agent = start()
    server.expect(Presence, status="ready")
    announce_training(server, dense_replica(run, manifest), 1)
    deadline = time.monotonic() + 60
    while not any("training" in line for line in agent.lines):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    started = time.monotonic()
    agent.stop()
    assert time.monotonic() - started < 5.0
    assert server.expect(Presence, status="left").session == agent.state.session
    assert not any(thread.name == "fedzo-worker" for thread in threading.enumerate())


def test_a_connection_refused_after_it_was_accepted_ends_with_the_reason(
    start: Callable[..., RunningAgent], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a broker does that refuses the subscriptions: the first words find the transport closed."""

    def connect(transport: MqttTransport, _: float | None) -> None:
        transport._on_event(Connected(False, "5", 1))
        time.sleep(0.2)
        raise BrokerError("the broker refused the subscriptions", hint="check the rights")

    def publish(*_: object, **__: object) -> int:
        raise BrokerError("the connection is closed")

    monkeypatch.setattr(MqttTransport, "connect", connect)
    monkeypatch.setattr(MqttTransport, "publish", publish)
    agent = start()
    agent.wait()
    assert agent.error is not None
    assert agent.error.message == "the broker refused the subscriptions"
