"""The device's state machine, one event at a time."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import CUT_GRAPHS, GRAPHS, TAIL_GRAPHS
from fedzo.protocol.device_side.device_events import (
    Compute,
    Connected,
    DeviceCommand,
    Disconnected,
    Failed,
    FindBlob,
    Finish,
    Plan,
    Planned,
    Prepare,
    Prepared,
    Send,
    Tick,
)
from fedzo.protocol.errors import ArtifactError, ConfigError, FedzoError, MemoryBudgetError, ProtocolError
from fedzo.protocol.pruning.mask import Mask, threshold
from fedzo.protocol.wire.blobs import BLOCK_BYTES, MAX_SETBACKS
from fedzo.protocol.wire.documents import Hello, Presence, ServerPresence
from fedzo.protocol.wire.messages import Receipt, Report, Verdict
from fedzo.protocol.wire.topics import Channel
from fedzo.protocol.wire.transfers import BlobBlock, BlobRequest, LogRequest
from tests.protocol.simulation.bench import NAMES, RETRY_S, SESSION, SETTINGS, Bench, hello
from tests.protocol.simulation.desk import change
from tests.protocol.simulation.fakes import TAG, optional_graph, tiny_manifest


def half_mask() -> Mask:
    layout = tiny_manifest().layout
    return threshold(layout, np.abs(initial_weights(layout, 1)), 0.5)


def offline(bench: Bench) -> None:
    bench.plan()
    bench.give(Disconnected())


def fetching(bench: Bench) -> None:
    bench.store.clear()
    bench.join()


def preparing(bench: Bench) -> None:
    bench.plan()
    bench.hear(Channel.HEAD, bench.head())


def following(bench: Bench) -> None:
    bench.update(1)
    bench.plan()
    bench.announce(round_=2)


def done(bench: Bench) -> None:
    bench.plan()
    bench.hear(Channel.HEAD, bench.head("done"))


STAGES: dict[str, Callable[[Bench], object]] = {
    "offline": offline,
    "waiting": lambda bench: bench.connect(),
    "greeting": lambda bench: (bench.connect(), bench.hear(Channel.RUN, bench.run)),
    "fetching": fetching,
    "planning": lambda bench: bench.join(),
    "preparing": preparing,
    "following": following,
    "computing": lambda bench: bench.compute(),
    "reporting": lambda bench: bench.report(),
    "idle": lambda bench: (bench.report(), bench.hear(Channel.ACK, Receipt(TAG, 1, Verdict.ACCEPTED))),
    "done": done,
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_reached(stage: str) -> None:
    bench = Bench()
    STAGES[stage](bench)
    assert bench.device.stage == stage
    assert bench.device.finished == (stage == "done")


def test_the_stages_are_those_of_the_modules_table() -> None:
    import fedzo.protocol.device_side.device as module

    assert module.__doc__ is not None
    table = module.__doc__.split("=\n")
    assert {line.split("``")[1] for line in table[2].splitlines() if line.startswith("``")} == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_time_alone_never_spins(stage: str) -> None:
    """A Tick at the wakeup sends something or moves the wakeup on; without a wakeup only an event can help."""
    bench = Bench()
    STAGES[stage](bench)
    for _ in range(50):
        wakeup = bench.device.wakeup
        if wakeup is None:
            break
        assert wakeup > bench.now
        bench.now = wakeup
        commands = bench.give(Tick())
        after = bench.device.wakeup
        assert commands or after is None or after > wakeup


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        ("greeting", Hello),
        ("fetching", BlobRequest),
        ("following", LogRequest),
        ("reporting", Report),
        ("idle", Presence),
        ("computing", Presence),
    ],
)
def test_what_is_not_answered_is_sent_again(stage: str, kind: type) -> None:
    bench = Bench()
    STAGES[stage](bench)
    period = 60.0 if kind is Presence else RETRY_S
    bench.now = np.nextafter(bench.now + period, 0.0)
    assert bench.give(Tick()) == []
    for _ in range(3):
        bench.now += period
        bench.give(Tick())
        assert len(bench.sent(kind)) == 1


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in ("offline", "waiting", "done")])
def test_a_new_link_repeats_what_may_be_lost_at_once(stage: str) -> None:
    bench = Bench()
    STAGES[stage](bench)
    asked = [type(c.message) for c in bench.out if isinstance(c, Send) and not isinstance(c.message, Presence)]
    assert bench.give(Disconnected()) == []
    assert bench.device.wakeup is None
    assert bench.device.stage == "offline"
    bench.give(Connected())
    assert bench.device.stage == stage
    assert len(bench.sent(Presence)) == 1
    assert not any(isinstance(c, (Plan, Prepare, Compute, FindBlob)) for c in bench.out)
    if stage in ("greeting", "fetching", "following", "reporting"):
        assert [type(c.message) for c in bench.out if isinstance(c, Send)][1:] == asked


# --- joining --------------------------------------------------------------------------------------------------------


def test_a_lost_welcome_is_asked_for_again() -> None:
    bench = Bench().connect()
    bench.hear(Channel.RUN, bench.run)
    assert bench.sent(Hello) == [hello()]
    bench.wait(3 * RETRY_S)
    assert bench.sent(Hello) == [hello()] * 3
    bench.welcome()
    assert bench.device.stage == "planning"
    bench.hear(Channel.HEAD, bench.head())
    assert not any(isinstance(c, Send) and isinstance(c.message, Hello) for c in bench.wait(100.0))


@pytest.mark.parametrize("changes", [{"run": "run-9"}, {"session": SESSION - 1}, {"session": SESSION + 1}])
def test_orders_to_somebody_else_are_ignored(changes: dict[str, Any]) -> None:
    for action in ("welcome", "enrol", "refuse"):
        bench = Bench().connect()
        bench.hear(Channel.RUN, bench.run)
        assert bench.welcome(action=action, **changes) == []
        assert bench.device.stage == "greeting"


def test_a_device_without_a_number_gets_ready_and_asks_once_the_run_starts() -> None:
    bench = Bench().connect()
    bench.hear(Channel.RUN, bench.run)
    bench.hear(Channel.HEAD, bench.head("enrol", 0))
    bench.welcome(action="enrol")
    bench.give(Planned(bench.run.run, 1.0, 8))
    assert bench.presence().status == "ready"
    assert bench.sent(Hello) == []
    bench.hear(Channel.HEAD, bench.head())
    assert bench.device.stage == "greeting"
    assert bench.sent(Hello) == [hello()]
    bench.welcome()
    bench.prepare()
    assert bench.device.stage == "computing"


def test_a_refusal_ends_the_device() -> None:
    bench = Bench().connect()
    bench.hear(Channel.RUN, bench.run)
    bench.welcome(action="refuse", detail="too many")
    assert bench.presence().status == "refused"
    error = bench.only(Finish).error
    assert isinstance(error, ProtocolError)
    assert "too many" in error.message
    assert bench.give(Connected(), Tick()) == []
    assert bench.device.wakeup is None


def test_documents_may_come_in_any_order() -> None:
    bench = Bench().connect()
    bench.hear(Channel.HEAD, bench.head())
    assert bench.device.stage == "waiting"
    bench.hear(Channel.SERVER, ServerPresence(True, 5))
    bench.hear(Channel.RUN, bench.run)
    bench.welcome()
    bench.give(Planned(bench.run.run, 1.0, 8))
    bench.prepare()
    assert bench.device.stage == "computing"


def test_a_device_without_documents_knocks_ever_more_rarely() -> None:
    """A broker that did not keep what is retained, or not on this node of a cluster."""
    bench = Bench().connect()
    assert bench.sent(Hello) == []  # What is retained is on its way.
    times: list[float] = []
    while len(times) < 7:
        bench.now = bench.device.wakeup or 0.0
        bench.give(Tick())
        times += [bench.now - 100.0] * len(bench.sent(Hello))
    assert np.allclose(np.diff(times, prepend=0.0), np.minimum(RETRY_S * 2.0 ** np.arange(7), 60.0))
    bench.hear(Channel.RUN, bench.run)
    bench.welcome()
    bench.give(Planned(bench.run.run, 1.0, 8))
    bench.wait(60.0)
    assert len(bench.sent(Hello)) == 1  # The open round is missing yet.
    bench.hear(Channel.HEAD, bench.head())
    bench.wait(200.0)
    assert bench.sent(Hello) == []


def test_a_server_that_is_back_hears_of_the_device() -> None:
    bench = Bench().plan()
    for birth, answers in ((5, 1), (5, 0), (6, 1)):
        bench.hear(Channel.SERVER, ServerPresence(True, birth))
        assert len(bench.sent(Presence)) == answers
    bench.hear(Channel.SERVER, ServerPresence(False, 7))
    assert bench.sent(Presence) == []


# --- files ----------------------------------------------------------------------------------------------------------


def fetch_everything(bench: Bench) -> list[str]:
    """Serve blocks until there is nothing left to fetch; gives the names of the files in order."""
    order: list[str] = []
    while bench.device.stage in ("fetching", "planning"):
        if bench.device.stage == "planning":
            order.append("plan")
            bench.give(Planned(bench.run.run, 1.0, 8))
            continue
        blocks = bench.blocks()
        assert blocks
        order += [NAMES[block.sha256] for block in blocks]
        commands: list[DeviceCommand] = []
        for block in blocks:
            commands += bench.hear(Channel.BLOCK, block)
        bench.out = commands
    return list(dict.fromkeys(order))


@pytest.mark.parametrize(
    ("changes", "files"),
    [
        ({}, ["manifest", "plan", *GRAPHS[:2]]),
        ({"sparsity": 0.5}, ["manifest", "plan", *GRAPHS]),
        ({"estimator": "split"}, ["cut manifest", "plan", *GRAPHS[:2], *CUT_GRAPHS]),
        ({"estimator": "coordinate"}, ["cut manifest", "plan", *GRAPHS[:2], *CUT_GRAPHS]),
        ({"estimator": "node"}, ["cut manifest", "plan", *GRAPHS[:2], CUT_GRAPHS[0], TAIL_GRAPHS[1]]),
        ({"estimator": "node", "sparsity": 0.5}, ["cut manifest", "plan", *GRAPHS, CUT_GRAPHS[0], TAIL_GRAPHS[1]]),
    ],
)
def test_what_the_run_needs_is_fetched_in_order_and_a_plan_comes_before_any_graph(
    changes: dict[str, Any], files: list[str]
) -> None:
    bench = Bench(kept={}, settings=change(SETTINGS, **changes))
    bench.join()
    assert fetch_everything(bench) == files
    assert {NAMES[sha256] for sha256 in bench.store} == set(files) - {"plan"}
    assert bench.presence().status == "ready"
    bench.announce()
    assert bench.device.stage == "computing"


def test_files_that_are_there_are_not_fetched() -> None:
    bench = Bench().plan()
    assert bench.sent(BlobRequest) == []
    assert bench.presence().status == "ready"
    assert bench.presence().planned_peak_mib == 12.5


def wants(bench: Bench) -> BlobRequest:
    """Plan with an optional graph, up to the request for it."""
    bench.join()
    bench.give(Planned(bench.run.run, 12.5, 8, (optional_graph()[0],)))
    assert bench.device.stage == "fetching"
    first, *_ = bench.sent(BlobRequest)
    assert first.sha256 == optional_graph()[0].sha256
    return first


def test_an_optional_graph_is_pulled_after_the_artifact() -> None:
    graph, data = optional_graph()
    bench = Bench()
    wants(bench)
    bench.hear(
        Channel.BLOCK,
        BlobBlock(graph.sha256, BLOCK_BYTES, graph.size, data[BLOCK_BYTES:]),
        BlobBlock(graph.sha256, 0, graph.size, data[:BLOCK_BYTES]),
    )
    assert bench.store[graph.sha256] == data
    assert bench.presence().status == "ready"


def test_without_an_optional_graph_the_device_goes_on() -> None:
    graph, data = optional_graph()
    bench = Bench()
    wants(bench)
    bench.hear(Channel.BLOCK, BlobBlock(graph.sha256, 0, 0, b""))
    assert bench.presence().status == "ready"
    bench.announce()
    assert bench.device.stage == "computing"
    bench.hear(Channel.BLOCK, BlobBlock(graph.sha256, 0, graph.size, data[:BLOCK_BYTES]))
    assert graph.sha256 not in bench.store


def test_a_server_that_is_silent_about_an_optional_graph_is_not_waited_for_long() -> None:
    bench = Bench()
    wants(bench)
    bench.give(Disconnected())
    bench.wait(100 * RETRY_S)  # no time for an answer
    bench.give(Connected())
    assert bench.device.stage == "fetching"
    bench.wait((MAX_SETBACKS + 1) * RETRY_S)
    assert bench.device.stage == "waiting"
    assert bench.device._presence.status == "ready"


def test_lost_repeated_and_damaged_blocks() -> None:
    bench = Bench(kept={})
    bench.join()
    (block,) = bench.blocks()
    damaged = BlobBlock(block.sha256, 0, block.total, bytes(len(block.data)))
    bench.hear(Channel.BLOCK, damaged)
    assert bench.device.stage == "fetching"
    assert not any(isinstance(c, Send) and isinstance(c.message, BlobRequest) for c in bench.out)
    bench.wait(RETRY_S)
    assert bench.blocks() == [block]
    bench.hear(Channel.BLOCK, block, block)
    assert bench.device.stage == "planning"
    bench.hear(Channel.BLOCK, block)
    assert bench.device.stage == "planning"


def test_a_manifest_that_cannot_be_used_refuses_the_run() -> None:
    bench = Bench()
    bench.store[bytes.fromhex(bench.run.manifest_sha256)] = b"{}"
    bench.join()
    assert isinstance(bench.only(Finish).error, ArtifactError)
    assert bench.presence().status == "refused"


@pytest.mark.parametrize("estimator", ["split", "node"])
def test_an_estimator_that_the_model_cannot_have_refuses_the_run(estimator: str) -> None:
    """The server should not have started it; the device says so and leaves instead of breaking down."""
    bench = Bench(settings=change(SETTINGS, estimator=estimator))
    bench.store[bytes.fromhex(bench.run.manifest_sha256)] = tiny_manifest().encode()
    bench.join()
    bench.give(Planned(bench.run.run, 12.5, 8))
    if estimator == "node":
        assert bench.presence().status == "ready"
        bench.hear(Channel.HEAD, bench.head("train"))
    assert isinstance(bench.only(Finish).error, (ArtifactError, ConfigError))
    assert bench.presence().status == "refused"


def test_a_plan_that_does_not_fit_loads_nothing() -> None:
    bench = Bench(kept={})
    bench.join()
    bench.hear(Channel.BLOCK, *bench.blocks())
    bench.only(Plan)
    bench.give(Failed(MemoryBudgetError("needs 99 MiB, has 64 MiB")))
    assert bench.presence().detail == "does not fit: needs 99 MiB, has 64 MiB"
    assert isinstance(bench.only(Finish).error, MemoryBudgetError)
    assert len(bench.store) == 1


def test_a_failure_of_another_run_is_ignored() -> None:
    bench = Bench().join()
    assert bench.give(Failed(FedzoError("old"), "run-0")) == []
    bench.give(Failed(FedzoError("new"), bench.run.run))
    assert bench.device.finished


def test_a_mask_is_pulled_and_prepared() -> None:
    bench = Bench().plan()
    bench.follow(half_mask())
    bench.hear(Channel.HEAD, bench.head())
    assert bench.device.stage == "fetching"
    bench.hear(Channel.BLOCK, *bench.blocks())
    prepare = bench.only(Prepare)
    assert prepare.mask == bench.mask
    assert prepare.mask_sha256 == bench.head().mask_sha256
    bench.prepare()
    task = bench.only(Compute).task
    assert np.array_equal(task.weights, bench.server.weights)
    assert task.weights_digest == bench.server.digest


def test_an_engine_is_opened_again_when_the_mask_changed_meanwhile() -> None:
    bench = Bench().plan()
    bench.store |= {}
    bench.hear(Channel.HEAD, bench.head("saliency"))
    first = bench.only(Prepare)
    bench.follow(half_mask())
    data = bench.mask.encode()
    bench.store[bytes.fromhex(bench.head().mask_sha256)] = data
    bench.hear(Channel.HEAD, bench.head(round_=2))
    assert not any(isinstance(c, Prepare) for c in bench.out)
    bench.give(Prepared(bench.run.run, first.mask_sha256))
    assert bench.only(Prepare).mask == bench.mask
    bench.prepare()
    assert bench.only(Compute).task.round == 2


@pytest.mark.parametrize("what", ["damaged", "other layout", "too large"])
def test_a_mask_that_cannot_be_used_is_said_once_and_the_next_one_taken(what: str) -> None:
    bench = Bench().plan()
    bench.follow(half_mask())
    good = bench.head()
    data = {"damaged": b"FZM1" + bytes(60), "other layout": b"FZM1" + b"\xff" * 40, "too large": bytes(5_000)}[what]
    bad = dataclasses.replace(good, mask_sha256=hashlib.sha256(data).hexdigest(), mask_size=len(data))
    bench.store[hashlib.sha256(data).digest()] = data
    bench.hear(Channel.HEAD, bad)
    said = bench.sent(Presence)
    assert [p.status for p in said] == ["ready"]
    assert "mask" in said[0].detail
    assert bench.give(Tick(), Tick()) == []
    bench.store[bytes.fromhex(good.mask_sha256)] = bench.mask.encode()
    bench.announce(round_=2)
    assert bench.device.stage == "computing"
