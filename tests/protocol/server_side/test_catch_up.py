"""Devices that are far behind: the log, or a snapshot where the operator allows it and it is cheaper."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import pytest

from fedzo.protocol.device_side.device_events import Compute
from fedzo.protocol.errors import ProtocolError
from fedzo.protocol.replay.optimisers import OptimiserConfig
from fedzo.protocol.replay.update import largest_snapshot, snapshot_place
from fedzo.protocol.server_side.catch_up import CatchUp
from fedzo.protocol.server_side.coordinator_events import OfferBlob, Send, ServeLog, WithdrawBlob
from fedzo.protocol.settings import RunSettings, TrainingSettings
from fedzo.protocol.wire.codec import decode
from fedzo.protocol.wire.messages import UpdateRecord
from fedzo.protocol.wire.topics import Channel
from fedzo.protocol.wire.transfers import BlobBlock, BlobRequest, LogRequest, LogSlice, SnapshotOffer
from tests.protocol.simulation.bench import RETRY_S, Bench, change_settings
from tests.protocol.simulation.desk import SETTINGS, Desk, change
from tests.protocol.simulation.world import World, check_end

LONG = change(SETTINGS, rounds=60, snapshots=True)


def played(desk: Desk, updates: int) -> Desk:
    while desk.machine.replica.index < updates:
        desk.report("a", "b", "c", "d")
    return desk


def snapshot_bytes(desk: Desk) -> int:
    return desk.machine.replica.snapshot_bytes


# --- the server -----------------------------------------------------------------------------------------------------


def test_the_cheaper_of_both_is_served() -> None:
    desk = played(Desk(LONG).connect().join(), 20)
    record = sum(len(payload) for kind, _, _, payload in desk.journal if kind == "update") / 20
    edge = int(snapshot_bytes(desk) / record)
    assert 2 < edge < 18
    desk.say("a", LogRequest(20 - edge, 100))
    assert desk.out == [ServeLog("a", LogRequest(20 - edge, edge))]
    desk.say("a", LogRequest(20 - edge - 1, 100))
    offer, send = desk.out
    assert isinstance(offer, OfferBlob)
    assert isinstance(send, Send)
    assert (send.channel, send.device) == (Channel.BLOCK, "a")
    assert send.message == SnapshotOffer(20, desk.head.round, len(offer.data), hashlib.sha256(offer.data).digest())
    assert offer.data == desk.machine.replica.snapshot()
    desk.say("b", LogRequest(0, 1))
    assert [type(command) for command in desk.out] == [Send]  # the same one again


@pytest.mark.parametrize(
    ("settings", "request_"),
    [(dataclasses.replace(LONG, snapshots=False), LogRequest(0, 9)), (LONG, LogRequest(0, 9, records_only=True))],
)
def test_no_weights_travel_unless_both_sides_want_them(settings: RunSettings, request_: LogRequest) -> None:
    desk = played(Desk(settings).connect().join(), 40)
    desk.say("a", request_)
    assert desk.out == [ServeLog("a", LogRequest(0, 9))]


def test_snapshots_are_made_anew_now_and_then_and_old_ones_go() -> None:
    desk = Desk(LONG).connect().join()
    offers: list[SnapshotOffer] = []
    withdrawn: list[bytes] = []
    made = 0
    for updates in range(10, 60):
        played(desk, updates).say("a", LogRequest(0, 1))
        offers += desk.sent(SnapshotOffer)
        made += sum(isinstance(command, OfferBlob) for command in desk.out)
        withdrawn += [command.sha256 for command in desk.out if isinstance(command, WithdrawBlob)]
    assert 2 < made <= len(offers) / 2
    ages = [10 + number - offer.index for number, offer in enumerate(offers)]
    assert max(ages) <= 5
    kinds = list(dict.fromkeys(offer.sha256 for offer in offers))
    assert withdrawn == kinds[:-2]


def test_a_restarted_server_knows_what_records_cost() -> None:
    desk = played(Desk(LONG).connect().join(), 20)
    again = Desk(LONG, journal=desk.journal).connect().join()
    again.say("a", LogRequest(0, 100))
    assert again.sent(SnapshotOffer)


def test_nothing_is_known_of_costs_before_the_first_record() -> None:
    found = CatchUp(True).answer("a", LogRequest(0, 5), played(Desk(LONG).connect().join(), 9).machine.replica, 3)
    assert found == [ServeLog("a", LogRequest(0, 5))]


# --- the device -----------------------------------------------------------------------------------------------------


def behind(updates: int = 12, *, allowed: bool = True) -> Bench:
    """A device that has asked for the records that it misses."""
    bench = Bench(settings=change_settings(snapshots=allowed)).plan()
    for round_ in range(1, updates + 1):
        bench.update(round_)
    bench.announce(round_=updates + 5)
    assert [(each.first, each.records_only) for each in bench.sent(LogRequest)] == [(0, False)]
    return bench


def offered(bench: Bench, **changes: Any) -> tuple[SnapshotOffer, bytes]:
    data = bench.server.snapshot()
    fields: dict[str, Any] = {
        "index": bench.server.index,
        "round": 17,
        "size": len(data),
        "sha256": hashlib.sha256(data).digest(),
    }
    return SnapshotOffer(**(fields | changes)), data


def answer(bench: Bench, data: bytes) -> None:
    for request in bench.sent(BlobRequest):
        part = data[request.offset : request.offset + request.length]
        bench.hear(Channel.BLOCK, BlobBlock(request.sha256, request.offset, len(data), part))


def test_a_snapshot_takes_a_device_to_the_round() -> None:
    bench = behind()
    offer, data = offered(bench)
    bench.hear(Channel.BLOCK, offer)
    assert bench.device.stage == "following"
    answer(bench, data)
    assert bench.only(Compute).task.weights_digest == bench.server.digest
    assert bench.store.keys() == Bench().store.keys()  # nothing of it is kept on the disk
    # The log goes on from there.
    bench.hear(Channel.LOG, bench.update(17))
    assert bench.device.replica is not None
    assert bench.device.replica.head == bench.server.head


def test_records_behind_the_snapshot_follow() -> None:
    bench = Bench(settings=change_settings(snapshots=True)).plan()
    for round_ in range(1, 9):
        bench.update(round_)
    offer, data = offered(bench, round=8)
    for round_ in range(9, 12):
        bench.update(round_)
    bench.announce(round_=12)
    bench.hear(Channel.BLOCK, offer)
    answer(bench, data)
    assert [(each.first, each.count) for each in bench.sent(LogRequest)] == [(8, 3)]
    bench.hear(Channel.BLOCK, LogSlice(8, tuple(bench.log[8:])))
    assert bench.only(Compute).task.round == 12


def test_records_that_overtake_a_snapshot_win() -> None:
    """Going back to it would lose nothing but time, and again and again."""
    bench = behind()
    offer, data = offered(bench)
    bench.hear(Channel.BLOCK, offer)
    wanted = bench.sent(BlobRequest)
    for record in bench.log:
        bench.hear(Channel.LOG, record)
    assert bench.only(Compute).task.weights_digest == bench.server.digest
    for round_ in (30, 31):
        bench.hear(Channel.LOG, bench.update(round_))
    bench.hear(Channel.BLOCK, BlobBlock(wanted[0].sha256, 0, len(data), data))
    assert bench.device.replica is not None
    assert bench.device.replica.head == bench.server.head


def test_a_snapshot_far_beyond_the_run_is_not_waited_for() -> None:
    """To count the optimiser's steps up to there would take for ever."""
    bench = behind()
    bench.hear(Channel.BLOCK, offered(bench, index=2**32 - 1)[0])
    assert bench.sent(BlobRequest) == []
    offer, data = offered(bench, index=13)
    bench.wait(RETRY_S)
    bench.hear(Channel.BLOCK, offer)
    answer(bench, data)
    assert not any(isinstance(command, Compute) for command in bench.out)


@pytest.mark.parametrize("case", ["not allowed", "nobody asked", "behind us"])
def test_offers_out_of_place_change_nothing(case: str) -> None:
    bench = behind(allowed=case != "not allowed")
    offer, _ = offered(bench, **({"index": 0} if case == "behind us" else {}))
    if case == "nobody asked":
        bench.hear(Channel.BLOCK, LogSlice(0, tuple(bench.log)))
    bench.hear(Channel.BLOCK, offer)
    assert bench.sent(BlobRequest) == []


@pytest.mark.parametrize("case", ["size", "withdrawn", "damaged"])
def test_a_snapshot_that_cannot_be_had_is_done_without(case: str) -> None:
    bench = behind()
    for attempt in range(3):
        if attempt:
            assert [each.records_only for each in bench.sent(LogRequest)] == [False]
        offer, data = offered(bench, **({"size": 77} if case == "size" else {}))
        bench.hear(Channel.BLOCK, offer)
        if case == "withdrawn":
            bench.hear(Channel.BLOCK, BlobBlock(offer.sha256, 0, 0, b""))
        elif case == "damaged":
            answer(bench, bytes(len(data)))
    bench.wait(0.0)
    asked = bench.sent(LogRequest) or (bench.wait(RETRY_S), bench.sent(LogRequest))[1]
    assert [each.records_only for each in asked][-1:] == [True]
    bench.hear(Channel.BLOCK, LogSlice(0, tuple(bench.log)))
    assert bench.only(Compute).task.weights_digest == bench.server.digest


def test_a_snapshot_of_other_weights_is_found_out() -> None:
    """Whoever serves it: the announcement names the head of the log."""
    bench = behind()
    liar = Bench(settings=change_settings(snapshots=True))
    for round_ in range(2, 14):
        liar.update(round_)
    data = liar.server.snapshot()
    bench.hear(Channel.BLOCK, offered(bench, sha256=hashlib.sha256(data).digest())[0])
    answer(bench, data)
    assert not any(isinstance(command, Compute) for command in bench.out)
    bench.wait(RETRY_S)
    asked = [(each.first, each.records_only) for each in bench.sent(LogRequest)]
    assert asked[-1:] == [(0, True)]  # from the start again, and by records alone
    bench.hear(Channel.BLOCK, LogSlice(0, tuple(bench.log)))
    assert bench.only(Compute).task.weights_digest == bench.server.digest


@pytest.mark.parametrize("estimator", ["stein", "node"])
@pytest.mark.parametrize("optimiser", [OptimiserConfig("sgd"), OptimiserConfig("adam", ema=0.9)])
def test_plans_know_the_largest_snapshot(estimator: Any, optimiser: OptimiserConfig) -> None:
    replica = Desk(change(SETTINGS, estimator=estimator, optimiser=optimiser)).machine.replica
    size = replica.weights.size
    assert replica.snapshot_bytes <= largest_snapshot(optimiser, size) <= replica.snapshot_bytes + 8 * size


def test_the_place_of_a_snapshot() -> None:
    desk = played(Desk(LONG).connect().join(), 3)
    assert snapshot_place(desk.machine.replica.snapshot()) == (3, desk.machine.replica.head)
    for wrong in (b"", b"FZS1", bytes(200)):
        with pytest.raises(ProtocolError):
            snapshot_place(wrong)


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("snapshots", [False, True])
@pytest.mark.parametrize("estimator", ["stein", "node"])
def test_devices_that_come_late_and_come_back_end_with_the_same_weights(estimator: Any, snapshots: bool) -> None:
    settings = RunSettings(
        seed=5,
        sparsity=0.5,
        training=TrainingSettings(rounds=40, k=4, tail_k=6, estimator=estimator, k_max=8),
        devices=3,
        quorum=2,
        deadline_s=8.0,
        evaluate_every=15,
        snapshots=snapshots,
    )
    world = World(settings, 5, seed=3, has_test_set=True)
    late, sleeper = world.devices["dev-3"], world.devices["dev-1"]
    world.server.start()
    for name in ("dev-0", "dev-1", "dev-2"):
        world.devices[name].start()
    world.run(lambda: world.server.coordinator.replica.index >= 5)
    world.break_link(sleeper, 3.0)
    world.run(lambda: world.server.coordinator.replica.index >= 25)
    late.start()
    world.devices["dev-4"].alive = False
    world.finish()
    check_end(world)
    heads = [decode(payload) for kind, _, _, payload in world.server.journal if kind == "update"]
    assert all(isinstance(record, UpdateRecord) for record in heads)
    assert late.computed  # it took part
    sent = {type(c.message) for c in world.server.trace if isinstance(c, Send)}
    assert (SnapshotOffer in sent) == snapshots
