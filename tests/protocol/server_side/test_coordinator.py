"""The coordinator's state machine: joining, phases, evaluation and the end."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from fedzo.protocol.errors import QuorumError
from fedzo.protocol.pruning.mask import Mask
from fedzo.protocol.server_side.coordinator_events import Finish, Record, Send, ServeLog, Tick
from fedzo.protocol.settings import SaliencySettings
from fedzo.protocol.wire.documents import Announcement, Order, Presence, RunDocument, ServerPresence
from fedzo.protocol.wire.messages import Decline, Receipt, UpdateRecord, Verdict
from fedzo.protocol.wire.transfers import BlobRequest, LogRequest
from tests.protocol.simulation.desk import NAMES, SETTINGS, Desk, change, check_order
from tests.protocol.simulation.fakes import TAG, tiny_manifest

SPARSE = change(SETTINGS, sparsity=0.5)


# --- joining --------------------------------------------------------------------------------------------------------


def test_a_run_is_recorded_before_it_is_told() -> None:
    desk = Desk().connect()
    assert isinstance(desk.out[0], Record)
    assert [type(c.message) for c in desk.out if isinstance(c, Send)] == [ServerPresence, RunDocument, Announcement]
    assert desk.kinds() == ["run"]
    desk.on(Tick())
    desk.connect()
    assert desk.kinds() == ["run"]


def test_a_device_is_enrolled_once_and_welcome_when_the_run_starts() -> None:
    desk = Desk().connect().hello("b", "b", "b")
    assert desk.kinds() == ["run", "enrolment"]
    assert [order.action for order in desk.orders("b")] == ["enrol"] * 3
    desk.join("c", "a", "d")
    assert desk.head.phase == "enrol"
    desk.presence("b")
    assert desk.phases() == ["train"]
    for ordinal, name in enumerate(NAMES):
        order = desk.orders(name)[-1]
        assert (order.action, order.session, order.ordinal) == ("welcome", 1, ordinal)
    check_order(desk.trace)


def test_ordinals_do_not_depend_on_who_came_first() -> None:
    desks = [Desk().connect().join(*order) for order in (NAMES, NAMES[::-1], ("c", "a", "d", "b"))]
    assert len({desk.head.participants for desk in desks}) == 1
    digests = {desk.play().machine.replica.digest for desk in desks}
    assert len(digests) == 1


def test_a_storm_of_hellos_fills_no_journal() -> None:
    desk = Desk().connect().join()
    before = len(desk.journal)
    for _ in range(500):
        desk.hello(*NAMES)
        assert len(desk.sent(Order)) == 1
    assert len(desk.journal) == before
    assert desk.report() == [Verdict.ACCEPTED] * 4


def test_who_repeats_its_hello_gets_the_documents_again() -> None:
    """Once in a while: everybody gets them."""
    desk = Desk().connect().hello("a")
    assert desk.sent(RunDocument) == []
    for seconds, again in ((5.0, 1), (5.0, 0), (30.0, 1)):
        desk.now += seconds
        desk.hello("a")
        assert len(desk.sent(RunDocument)) == len(desk.sent(Announcement)) == again
    desk.now += 30.0
    desk.sessions["a"] = 2
    desk.hello("a")
    assert desk.sent(RunDocument) == []  # It has just started, and will get what is retained.


def test_more_devices_than_a_round_takes_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedzo.protocol.server_side.run_progress.MAX_PARTICIPANTS", 3)
    desk = Desk(change(SETTINGS, rounds=8)).connect().join()
    seen = []
    for _ in range(8):
        seen.append("".join(desk.participants()))
        assert desk.report() == [Verdict.ACCEPTED] * 3
    assert set(seen) == {"abc", "abd", "acd", "bcd"}


def test_the_older_of_two_devices_with_one_id_is_refused() -> None:
    desk = Desk().connect().join()
    desk.sessions["a"] = 9
    desk.hello("a")
    desk.sessions["a"] = 8
    for talk in (desk.hello, desk.presence):
        talk("a")
        (order,) = desk.sent(Order)
        assert (order.action, order.session) == ("refuse", 8)
        assert "same id" in order.detail


def test_devices_above_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedzo.protocol.server_side.roster.MAX_DEVICES", 2)
    desk = Desk(change(SETTINGS, devices=2)).connect().hello("a", "b", "c", "a")
    assert [order.action for order in desk.orders("c")] == ["refuse"]
    assert desk.orders("c")[0].detail
    assert [order.action for order in desk.orders("a")] == ["enrol", "enrol"]
    assert desk.kinds().count("enrolment") == 2


def test_enrolment_ends_at_its_deadline_with_the_quorum() -> None:
    desk = Desk().connect().join("a", "b").hello("c")
    desk.wait(29.9)
    assert desk.head.phase == "enrol"
    desk.wait(0.1)
    assert desk.phases() == ["train"]
    assert desk.participants() == ["a", "b"]


def test_enrolment_without_a_quorum_stops_the_run() -> None:
    desk = Desk().connect().join("a").hello("b", "c")
    desk.wait(30.0)
    error = desk.finish().error
    assert isinstance(error, QuorumError)
    assert error.message == "1 device is ready, the quorum is 2"
    assert error.hint
    assert desk.kinds()[-1] == "phase"
    assert desk.on(Tick()) == []
    assert desk.machine.wakeup is None


def test_only_who_is_ready_takes_part() -> None:
    desk = Desk(change(SETTINGS, devices=2)).connect().hello(*NAMES)
    desk.presence("a", status="joining").presence("b", status="refused").presence("c", status="ready")
    desk.presence("d", status="ready", run="run-0")  # of another run
    assert desk.phases() == []
    desk.presence("a", session=0)  # of an older session
    assert desk.phases() == []
    desk.presence("d")
    assert desk.participants() == ["c", "d"]


def test_strangers_are_not_heard() -> None:
    desk = Desk().connect().join()
    for message in (desk.measure("a"), Presence(1, "ready"), LogRequest(0, 1), BlobRequest(bytes(32), 0, 1)):
        desk.say("stranger", message)
        assert desk.out == []
    assert "stranger" not in desk.machine.roster.members


def test_what_devices_do_not_say_is_ignored() -> None:
    desk = Desk().connect().join()
    for message in (desk.head, ServerPresence(False, 9), Order("run-1", "refuse", 1), Receipt(TAG, 1, Verdict.LATE)):
        desk.say("a", message)
        assert desk.out == []


# --- phases ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "phases"),
    [
        ({}, ["train"] * 3 + ["evaluate", "done"]),
        ({"rounds": 0}, ["evaluate", "done"]),
        ({"evaluate_every": 1}, ["train", "evaluate"] * 3 + ["done"]),
        ({"evaluate_every": 2}, ["train", "train", "evaluate", "train", "evaluate", "done"]),
        ({"evaluate_every": 3}, ["train"] * 3 + ["evaluate", "done"]),
        ({"sparsity": 0.5}, ["saliency"] + ["train"] * 3 + ["evaluate", "done"]),
        ({"sparsity": 0.5, "saliency": SaliencySettings(steps=3, samples=8, draws=2), "rounds": 1},
         ["saliency"] * 3 + ["train", "evaluate", "done"]),
        ({"sparsity": 0.5, "rounds": 0}, ["saliency", "evaluate", "done"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("assignment", ["dealt", "shared"])
def test_the_order_of_the_phases(changes: dict[str, Any], phases: list[str], assignment: str) -> None:
    desk = Desk(change(SETTINGS, assignment=assignment, **changes)).connect().join().play()
    assert desk.phases() == phases
    assert desk.finish() == Finish()
    assert [round_ for kind, round_, _, _ in desk.journal if kind == "announce"] == list(range(1, len(phases) + 1))
    check_order(desk.trace)
    assert desk.machine.replica.index == desk.settings.training.rounds
    assert [e["log_length"] for e in desk.machine.evaluations][-1] == desk.settings.training.rounds


def test_masks_grow_sparser_step_by_step() -> None:
    steps = SaliencySettings(steps=3, samples=8)
    desk = Desk(dataclasses.replace(SPARSE, sparsity=0.875, saliency=steps)).connect().join().play()
    layout = tiny_manifest().layout
    masks = [Mask.decode(payload, layout) for kind, _, _, payload in desk.journal if kind == "mask"]
    assert [mask.sparsity for mask in masks] == pytest.approx([0.5, 0.75, 0.875], abs=0.02)
    for before, after in itertools.pairwise(masks):
        assert not (after.kept & ~before.kept).any()
    assert desk.machine.mask == masks[-1]


def test_a_mask_never_brings_back_what_an_earlier_one_removed() -> None:
    """Not even when all scores are zero, and the order of the indices decides."""
    steps = SaliencySettings(steps=2, samples=8)
    desk = Desk(dataclasses.replace(SPARSE, saliency=steps)).connect().join()
    desk.report()
    first = desk.machine.mask
    blocks = desk.measure("a").blocks
    desk.report(*NAMES, blocks=tuple(np.zeros_like(block) for block in blocks))
    second = desk.machine.mask
    assert second.n_survivors < first.n_survivors
    assert not (second.kept & ~first.kept).any()


def test_an_announcement_says_where_the_run_is() -> None:
    desk = Desk(SPARSE).connect().join()
    assert (desk.head.phase, desk.head.log_head, desk.head.mask_sha256) == ("saliency", "", "")
    desk.report()
    head = desk.head
    assert (head.phase, head.log_length) == ("train", 0)
    assert head.mask_size > 0
    assert head.log_head == desk.machine.replica.head.hex()
    assert head.weights_digest == desk.machine.replica.digest.hex()
    desk.report()
    assert desk.head.log_length == 1


def test_rounds_walk_on_over_the_directions() -> None:
    """While the devices stay the same; others start at their own place, which everybody can tell from the log."""
    desk = Desk(change(SETTINGS, rounds=4)).connect().join()
    segments = []
    for _ in range(2):
        desk.report()
        segments += [update.segments for update in desk.sent(UpdateRecord)]
    desk.report("a", "b", "c")
    desk.presence("d", status="lost")
    segments += [update.segments for update in desk.sent(UpdateRecord)]
    assert desk.participants() == list(NAMES[:3])
    desk.report()
    segments += [update.segments for update in desk.sent(UpdateRecord)]
    assert segments[:2] == [((0, 8),), ((8, 8),)]
    assert segments[2] == ((16, 2), (20, 4))  # the last in rank had the second part
    assert segments[3] == ((18, 6),)


@pytest.mark.parametrize("assignment", ["dealt", "shared"])
def test_an_update_holds_what_was_reported(assignment: str) -> None:
    desk = Desk(change(SETTINGS, assignment=assignment)).connect().join()
    reports = {name: desk.measure(name) for name in NAMES}
    desk.report()
    (update,) = desk.sent(UpdateRecord)
    if assignment == "shared":
        assert update.segments == ((0, 2),)
        mean = np.mean([r.blocks[0] for r in reports.values()], axis=0)
    else:
        assert update.segments == ((0, 8),)
        mean = np.concatenate([reports[name].blocks[0] for name in NAMES])
    np.testing.assert_allclose(update.coefficients, mean / mean.size, rtol=2e-4)


@pytest.mark.parametrize("estimator", ["split", "node"])
def test_an_update_holds_the_scalars_of_both_blocks(estimator: str) -> None:
    desk = Desk(change(SETTINGS, estimator=estimator, tail_k=3)).connect().join()
    reports = [desk.measure(name) for name in NAMES]
    assert [block.size for block in reports[0].blocks] == [2, 3]
    desk.report()
    (update,) = desk.sent(UpdateRecord)
    front = np.concatenate([report.blocks[0] for report in reports]) / 8
    tails = [report.blocks[1] for report in reports]
    tail = np.concatenate(tails) / 12 if estimator == "split" else np.mean(tails, axis=0)
    assert update.segments == ((0, 8), (1 << 60, 12 if estimator == "split" else 3))
    np.testing.assert_allclose(update.coefficients, [*front, *tail], rtol=2e-4)


@pytest.mark.parametrize("estimator", ["split", "node"])
def test_scalars_of_a_missing_block_are_refused(estimator: str) -> None:
    desk = Desk(change(SETTINGS, estimator=estimator, tail_k=3)).connect().join()
    front, tail = desk.measure("a").blocks
    for blocks in ((front,), (tail, front), (front, tail, tail), (front, tail[:1])):
        assert desk.report("a", blocks=blocks) == [Verdict.REFUSED]
    assert desk.machine.replica.index == 0


# --- evaluation and the end -----------------------------------------------------------------------------------------


def at_evaluation(has_test_set: bool) -> Desk:
    desk = Desk(change(SETTINGS, rounds=1), has_test_set=has_test_set).connect().join()
    desk.report()
    assert desk.phases() == ["train", "evaluate"]
    return desk


def test_an_evaluation_waits_for_devices_and_server() -> None:
    desk = at_evaluation(True)
    (command,) = desk.asked_to_evaluate()
    assert command.round == 2
    assert np.array_equal(command.weights, desk.machine.replica.weights)
    desk.evaluate(round=1)
    desk.report()
    assert desk.phases() == ["train", "evaluate"]
    desk.connect()
    assert len(desk.asked_to_evaluate()) == 1
    desk.evaluate()
    assert desk.phases() == ["train", "evaluate", "done"]
    (result,) = desk.machine.evaluations
    assert (result["devices"], result["samples"]) == (4, 48)
    assert (result["server_accuracy"], result["server_samples"]) == (0.75, 8)
    assert result["weights_digest"] == desk.machine.replica.digest.hex()


def test_an_evaluation_needs_no_device() -> None:
    desk = at_evaluation(False)
    for name in NAMES:
        desk.decline(name, why=Decline.NO_DATA)
    assert desk.head.phase == "done"
    assert desk.machine.evaluations[0]["accuracy"] is None


def test_an_evaluation_ends_at_the_deadline_with_the_devices_that_there_are() -> None:
    desk = at_evaluation(True)
    desk.report("a")
    desk.evaluate()
    desk.wait(9.9)
    assert desk.phases() == ["train", "evaluate"]
    desk.wait(0.1)
    assert desk.phases() == ["train", "evaluate", "done"]
    result = desk.machine.evaluations[0]
    assert (result["devices"], result["server_samples"]) == (1, 8)


def test_an_evaluation_waits_for_a_slow_server_and_for_nobody_else() -> None:
    desk = at_evaluation(True)
    desk.report("a")
    desk.wait(25.0)
    assert desk.phases() == ["train", "evaluate"]
    assert desk.report("b") == [Verdict.ACCEPTED]  # too late to be waited for, and welcome
    desk.presence("c")
    desk.evaluate()
    assert desk.head.phase == "done"
    result = desk.machine.evaluations[0]
    assert (result["devices"], result["server_samples"]) == (2, 8)


def test_a_server_without_a_test_set_is_not_waited_for() -> None:
    desk = at_evaluation(False)
    desk.report("a")
    desk.wait(10.0)
    assert desk.head.phase == "done"
    assert desk.machine.evaluations[0]["server_loss"] is None


def test_the_end_waits_for_every_live_device() -> None:
    desk = at_evaluation(False)
    desk.report()
    assert desk.head.phase == "done"
    digest = desk.machine.replica.digest.hex()
    desk.presence("a", "b", status="done", weights_digest=digest).presence("c", status="left")
    desk.say("d", LogRequest(0, 1))
    assert desk.out == [ServeLog("d", LogRequest(0, 1))]
    assert not desk.machine.finished
    desk.presence("d", status="done", weights_digest=digest)
    assert desk.finish() == Finish()
    assert desk.kinds()[-1] == "phase"


def test_the_end_waits_for_devices_that_were_lost_just_before() -> None:
    desk = at_evaluation(False)
    desk.presence("c", status="lost")
    desk.report("a", "b", "d")
    assert desk.head.phase == "done"
    desk.presence("d", status="lost")
    assert desk.participants() == list(NAMES)
    digest = desk.machine.replica.digest.hex()
    desk.presence("a", "b", status="done", weights_digest=digest)
    for name in "dc":
        assert not desk.machine.finished
        desk.presence(name).presence(name, status="done", weights_digest=digest)
    assert desk.finish() == Finish()


def test_the_end_waits_for_devices_that_were_still_joining() -> None:
    desk = at_evaluation(False)
    desk.hello("e")
    desk.report(*NAMES)
    assert desk.head.phase == "done"
    digest = desk.machine.replica.digest.hex()
    desk.presence("e", status="lost").presence(*NAMES, status="done", weights_digest=digest)
    assert not desk.machine.finished
    desk.presence("e").presence("e", status="done", weights_digest=digest)
    assert desk.finish() == Finish()


def test_a_device_that_stays_lost_holds_the_end_until_its_deadline() -> None:
    desk = at_evaluation(False)
    desk.presence("c", status="lost")
    desk.report("a", "b", "d")
    desk.presence("a", "b", "d", status="done", weights_digest=desk.machine.replica.digest.hex())
    desk.wait(9.9)
    assert not desk.machine.finished
    desk.wait(0.2)
    assert desk.finish() == Finish()


def test_the_end_comes_at_the_deadline() -> None:
    desk = at_evaluation(False)
    desk.report()
    desk.wait(9.9)
    assert not desk.machine.finished
    desk.wait(0.2)
    assert desk.finish() == Finish()
