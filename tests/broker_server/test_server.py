"""The server's shell, without a broker: its own evaluation, and what it says of boards that are short of memory."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedzo.broker_server.brokers.external import ExternalBroker
from fedzo.broker_server.history.run_folder import RunFolder
from fedzo.broker_server.journal import MemoryJournal
from fedzo.broker_server.server import BLOCKS_BYTES, Server
from fedzo.edge_runtime.connection.transport import Arrived, Token, TransportEvent
from fedzo.edge_runtime.datasets.data import load_dataset
from fedzo.edge_runtime.inference.engine import Engine
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.errors import BrokerError, FedzoError
from fedzo.protocol.pruning.mask import Mask
from fedzo.protocol.server_side import coordinator_events as machine
from fedzo.protocol.settings import RunSettings
from fedzo.protocol.wire.documents import Hello, Order, Presence
from fedzo.protocol.wire.topics import Channel
from fedzo.protocol.wire.transfers import BlobRequest
from tests.edge_runtime.conftest import INPUT_SHAPE, LAYOUT, N_CLASSES, SEED, Reference, write_artifact

SAMPLES = 640


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server that is not connected, with a test set."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(SAMPLES, *INPUT_SHAPE)).astype(np.float32)
    np.savez(tmp_path / "test.npz", x=x, y=rng.integers(0, N_CLASSES, SAMPLES))
    write_artifact(tmp_path / "artifact")
    folder = RunFolder.create(tmp_path / "runs", tmp_path / "artifact", name="run-1")
    test_set = load_dataset(tmp_path / "test.npz", INPUT_SHAPE, N_CLASSES, holdout=0.0).train
    broker = ExternalBroker("mqtt://127.0.0.1:1")
    run = folder.document(RunSettings(devices=1, quorum=1))
    made = Server(folder, run, broker, MemoryJournal(), test_set=test_set)
    yield made
    made._transport.close(timeout_s=0.1)


def evaluation(round_: int = 3) -> machine.Evaluate:
    return machine.Evaluate(round_, Mask.dense(LAYOUT), initial_weights(LAYOUT, SEED))


def results(server: Server) -> list[Any]:
    found = []
    while not server._events.empty():
        found.append(server._events.get())
    return found


def test_an_evaluation_counts_every_sample_and_is_made_once_a_round(server: Server) -> None:
    with ThreadPoolExecutor(1) as pool:
        for round_ in (3, 3, 3, 4):
            server._do(evaluation(round_), pool)
    first, second = results(server)
    assert (first.round, second.round, first.samples) == (3, 4, SAMPLES)
    assert server._passes._test_set is not None
    whole = server._passes._test_set.batch(np.arange(SAMPLES, dtype=np.int64))
    weights = initial_weights(LAYOUT, SEED)
    assert first.mean_loss == pytest.approx(Reference().loss(weights, whole.x, whole.y), abs=1e-6)
    expected = np.mean(Reference().logits(weights, whole.x).argmax(axis=1) == whole.y)
    assert first.accuracy == pytest.approx(expected)


def test_a_running_evaluation_does_not_keep_a_server_that_is_stopped(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, begun, calls = Engine.evaluate, threading.Event(), []

    def slow(*arguments: Any) -> Any:
        calls.append(1)
        begun.set()
        time.sleep(0.1)
        return original(*arguments)

    monkeypatch.setattr(Engine, "evaluate", slow)
    monkeypatch.setattr(server._transport, "connect", lambda _: server._events.put(machine.Tick()))
    monkeypatch.setattr(server.coordinator, "on", lambda *_: [evaluation()])
    thread = threading.Thread(target=server.serve)
    thread.start()
    assert begun.wait(10.0)
    started = time.monotonic()
    server.stop()
    thread.join(10.0)
    assert not thread.is_alive()
    assert time.monotonic() - started < 5.0
    assert len(calls) < SAMPLES / 64
    assert not any(isinstance(event, machine.ServerEvaluated) for event in results(server))


def test_layers_that_shifts_say_nothing_about_are_named(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    mask = machine.Record("mask", 1, "", Mask.dense(LAYOUT).encode())
    with caplog.at_level(logging.WARNING, "fedzo"):
        server._record([mask])
        server.coordinator._progress.unscored = ("conv.weight", "fc.weight")
        server._record([mask])
    (record,) = caplog.records
    assert record.message == "unit shifts do not show in conv.weight, fc.weight: see docs/pruning.md"


def test_what_becomes_of_a_board_that_is_short_of_memory_is_said_once(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    orders = [
        Order("run-1", "welcome", 1, 0),
        Order("run-1", "welcome", 1, 0, micro_batch=4),
        Order("run-1", "welcome", 1, 0, micro_batch=4),
        Order("run-1", "excuse", 1, detail="over the memory budget with a micro-batch of 1"),
        Order("run-1", "excuse", 1, detail="over the memory budget with a micro-batch of 1"),
    ]
    with ThreadPoolExecutor(1) as pool, caplog.at_level(logging.WARNING, "fedzo"):
        for order in orders:
            server._do(machine.Send(Channel.COMMAND, order, "pi-1"), pool)
    assert [record.message for record in caplog.records] == [
        "pi-1 may use a micro-batch of 4 at most: over its memory budget with a larger one",
        "pi-1 is excused from the run: over the memory budget with a micro-batch of 1",
    ]


# ---------------------------------------------------------------------- leaving, and floods


def arrived(channel: str, payload: bytes, number: int = 0) -> Arrived:
    return Arrived(f"fedzo/v1/default/d/board-0/{channel}", payload, False, Token(1, number))


def test_a_server_that_waits_for_its_broker_can_be_stopped(server: Server) -> None:
    thread = threading.Thread(target=server.serve)
    thread.start()
    time.sleep(0.2)
    started = time.monotonic()
    server.stop()
    thread.join(20.0)
    assert not thread.is_alive()
    assert time.monotonic() - started < 15.0, "half of what the first connection may take"


def test_a_server_that_leaves_records_and_acknowledges_what_is_there_and_announces_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    hello = Hello(1, "", 512.0, 8, 2, "", "x86_64").encode()
    acknowledged: list[Token] = []
    monkeypatch.setattr(server._transport, "connect", lambda _: None)
    monkeypatch.setattr(server._transport, "acknowledge", acknowledged.append)
    ready = Presence(1, "ready", "run-1", micro_batch=8).encode()
    server._events.put(arrived("hello", hello, 1))
    server._events.put(arrived("state", ready, 2))  # one device is all that the run waits for
    server._events.put(BrokerError("a connection that failed just now"))
    server._stop.set()
    server.serve()
    assert [token.mid for token in acknowledged] == [1, 2]
    kinds = [entry.kind for _, entry in server._journal.read()]
    assert kinds == ["run", "enrolment"]
    assert server.state.is_leaving


def test_the_state_of_a_server(server: Server) -> None:
    state = server.state
    assert (state.run, state.phase, state.updates) == ("run-1", "enrol", 0)
    assert [queue.name for queue in state.queues] == ["inbound", "outbound", "passes"]
    assert not state.is_connected
    server.coordinator.roster.enrol("a", Hello(1, "", 512.0, 8, 2, "", ""))
    assert server.state.devices["joining"] == 1


def test_a_flood_of_nonsense_is_counted_and_said_at_powers_of_two(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with ThreadPoolExecutor(1) as pool, caplog.at_level(logging.WARNING, "fedzo"):
        flood: list[TransportEvent | machine.CoordinatorEvent | FedzoError] = []
        flood += [arrived("report", b"nonsense")] * 1000
        server._carry_out(flood, pool)
    assert server.state.dropped["undecodable"] == 1000
    assert len(caplog.records) == 10


def test_the_journal_says_once_a_round_that_a_device_talks_nonsense(server: Server) -> None:
    """A stranger's is counted only: it has not enrolled, and could have any number of names."""
    hello = Hello(1, "desk", 64.0, 10, 5, "none", "none").encode()
    nonsense = [arrived("report", b"nonsense"), arrived("hello", b"{}"), arrived("state", bytes(9000))]
    with ThreadPoolExecutor(1) as pool:
        server._carry_out([*nonsense, arrived("hello", hello), *nonsense * 100], pool)
        server._carry_out(nonsense * 100, pool)
        told = [entry for _, entry in server._journal.read({"garbled"})]
        assert [(entry.device, entry.round) for entry in told] == [("board-0", 0)]
        assert 10 < len(told[0].payload) < 600
        again = Server(server._folder, server.coordinator.run, ExternalBroker("mqtt://127.0.0.1:1"), server._journal)
        again._carry_out(list(nonsense), pool)
        again._transport.close(timeout_s=0.1)
    assert len(server._journal.sequences("garbled")) == 1


def test_a_flood_of_questions_gets_as_many_blocks_as_fit(server: Server) -> None:
    """Devices that pull get nothing beyond the limit and ask again; what they must hear still finds room."""
    data = bytes(200_000)
    digest = hashlib.sha256(data).digest()
    server._blobs.offer(digest, data)
    ask = machine.ServeBlob("board-0", BlobRequest(digest, 0, 128 << 10))
    with ThreadPoolExecutor(1) as pool:
        for _ in range(1000):
            server._do(ask, pool)
        outbound = server._transport.queue
        assert BLOCKS_BYTES - (129 << 10) < outbound.bytes <= BLOCKS_BYTES
        assert server.state.dropped["blocks"] == 1000 - len(outbound)
        before = len(outbound)
        server._do(machine.Send(Channel.HEAD, server.coordinator.head), pool)
        assert len(outbound) == before + 1


def test_a_flood_of_answers_is_bounded_in_messages_and_the_rest_counted(server: Server) -> None:
    order = Order("run-1", "enrol", 1)
    waiting = server._transport.queue
    waiting.capacity = 100
    with ThreadPoolExecutor(1) as pool:
        for number in range(150):
            server._do(machine.Send(Channel.COMMAND, order, f"board-{number}"), pool)
    assert (len(waiting), waiting.overflowed) == (100, 50)


def test_passes_that_wait_are_shown(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go = threading.Event(), threading.Event()

    def wait(_: object) -> None:
        begun.set()
        go.wait(20.0)

    monkeypatch.setattr(server._passes, "answer", wait)
    with ThreadPoolExecutor(1) as pool:
        for round_ in range(5):
            server._do(evaluation(round_), pool)
            server._do(evaluation(round_), pool)  # asked for again: one is enough
        assert begun.wait(10.0)
        (passes,) = [queue for queue in server.state.queues if queue.name == "passes"]
        assert passes.depth == 5
        go.set()
    assert [queue.depth for queue in server.state.queues if queue.name == "passes"] == [0]


def test_nothing_is_said_or_acknowledged_before_the_batch_is_committed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    append, acknowledge = server._journal.append, server._transport.acknowledge

    def note(step: str, call: Any) -> Any:
        def noted(*arguments: Any, **options: Any) -> Any:
            steps.append(step)
            return call(*arguments, **options)

        return noted

    monkeypatch.setattr(server._journal, "append", note("commit", append))
    monkeypatch.setattr(server._transport, "acknowledge", note("acknowledge", acknowledge))
    monkeypatch.setattr(server._transport, "publish", note("publish", lambda *_, **__: 1))
    hello = Hello(1, "desk", 64.0, 10, 5, "none", "none").encode()
    batch = [Arrived(f"fedzo/v1/default/d/board-{n}/hello", hello, False, Token(1, n)) for n in range(3)]
    with ThreadPoolExecutor(1) as pool:
        server._carry_out(list(batch), pool)
    assert steps == ["commit", *["publish"] * 3, *["acknowledge"] * 3]
    assert [entry.kind for _, entry in server._journal.read()] == ["run", *["enrolment"] * 3]


def test_what_cannot_be_committed_is_not_acknowledged(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Any) -> Any:
        raise FedzoError("no space left for the journal")

    acknowledged: list[Any] = []
    monkeypatch.setattr(server._journal, "append", full)
    monkeypatch.setattr(server._transport, "acknowledge", acknowledged.append)
    monkeypatch.setattr(server._transport, "publish", acknowledged.append)
    hello = Hello(1, "desk", 64.0, 10, 5, "none", "none").encode()
    with ThreadPoolExecutor(1) as pool, pytest.raises(FedzoError, match="no space left"):
        server._carry_out([arrived("hello", hello)], pool)
    assert acknowledged == []
