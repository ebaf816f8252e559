"""Late reports: which of them count, how much, and that every side replays them alike."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from fedzo.protocol.device_side.device_events import Cancel, Compute, DropReport, GiveBack, SaveReport
from fedzo.protocol.errors import ConfigError, ProtocolError
from fedzo.protocol.perturbation.blocks import Block, deal, directions_of
from fedzo.protocol.perturbation.directions import MAX_POSITION, Directions
from fedzo.protocol.perturbation.ranking import CoordinateRanking
from fedzo.protocol.replay.past_rounds import PastRound, PastRounds
from fedzo.protocol.replay.update import estimate_gradient
from fedzo.protocol.server_side.aggregation import combine_probes
from fedzo.protocol.server_side.aggregation_rules import AggregationSettings
from fedzo.protocol.server_side.coordinator_events import Record, Send
from fedzo.protocol.server_side.staleness import Group, combine_groups
from fedzo.protocol.settings import RunSettings, TrainingSettings
from fedzo.protocol.wire.codec import decode
from fedzo.protocol.wire.documents import ServerPresence
from fedzo.protocol.wire.messages import Decline, Receipt, Report, ReportKind, UpdateRecord, Verdict
from fedzo.protocol.wire.topics import Channel
from fedzo.protocol.wire.transfers import LogSlice
from tests.protocol.simulation.bench import RETRY_S, Bench
from tests.protocol.simulation.bench import SETTINGS as BENCH
from tests.protocol.simulation.desk import SETTINGS, Desk, change, check_order
from tests.protocol.simulation.fakes import TAG
from tests.protocol.simulation.world import World, check_end

PLAIN = AggregationSettings()
FRONT = Block(0, 0, 16, "probe", "hadamard", 2)
TAIL = Block(1, 16, 24, "sketch", "ranked", 3)


def report(samples: int, *blocks: list[float]) -> Report:
    arrays = tuple(np.array(values, np.float32) for values in blocks)
    return Report(ReportKind.PROBE, TAG, 1, 1, samples, bytes(16), 0.5, 3, 10, 100, arrays)


# --- what an update is made of --------------------------------------------------------------------------------------


@pytest.mark.parametrize("assignment", ["dealt", "shared"])
def test_without_late_reports_an_update_is_what_it_was(assignment: Any) -> None:
    deals = deal((FRONT, TAIL), assignment, 5, 2)
    reports = [(0, report(3, [1.0, 0.3], [0.1, 0.2, 0.3])), (1, report(5, [-1.0, 0.7], [0.5, -0.2, 0.3]))]
    segments, coefficients = combine_probes(deals, reports)
    found = combine_groups([Group(0, deals, tuple(reports))], PLAIN, 0.5)
    assert (found[0], found[1].tobytes(), found[2]) == (segments, coefficients.tobytes(), ())


@pytest.mark.parametrize(("power", "scale"), [(0.5, 0.5), (0.0, 1.0), (1.0, 0.25)])
def test_a_dealt_late_report_is_scaled_and_counts_in_full_in_what_is_divided_by(power: float, scale: float) -> None:
    now, then = deal((FRONT,), "dealt", 5, 2), deal((FRONT,), "dealt", 2, 3)
    fresh = [(0, report(3, [8.0, 16.0])), (1, report(3, [32.0, 64.0]))]
    late = [(2, report(3, [12.0, 24.0]))]
    groups = [Group(3, then, tuple(late)), Group(0, now, tuple(fresh))]
    segments, coefficients, ages = combine_groups(groups, PLAIN, power)
    assert segments == ((now[0].first, 4), (then[0].first + 2 * then[0].slot(2), 2))
    assert ages == (0, 3)
    first = [8.0, 16.0] if now[0].slot(0) == 0 else [32.0, 64.0]
    second = [32.0, 64.0] if now[0].slot(0) == 0 else [8.0, 16.0]
    assert coefficients[:4] == pytest.approx(np.array(first + second) / 6, rel=2**-12)
    assert coefficients[4:] == pytest.approx(np.array([12.0, 24.0]) / 6 * scale, rel=2**-12)


def test_a_dealt_round_of_one_device_counts_by_its_positions_too() -> None:
    now, then = deal((FRONT,), "dealt", 5, 1), deal((FRONT,), "dealt", 4, 2)
    groups = [Group(0, now, ((0, report(9, [4.0, 8.0])),)), Group(1, then, ((1, report(1, [16.0, 32.0])),))]
    _, coefficients, _ = combine_groups(groups, PLAIN, 0.0)
    assert coefficients.tolist() == [1.0, 2.0, 4.0, 8.0]


def test_shared_scalars_and_sketches_weigh_by_samples() -> None:
    now, then = deal((FRONT, TAIL), "shared", 5, 2), deal((FRONT, TAIL), "shared", 4, 2)
    fresh = ((0, report(1, [4.0, 8.0], [1.0, 2.0, 3.0])), (1, report(3, [8.0, 16.0], [5.0, 6.0, 7.0])))
    late = ((1, report(4, [16.0, 32.0], [8.0, 16.0, 32.0])),)
    segments, coefficients, ages = combine_groups([Group(0, now, fresh), Group(1, then, late)], PLAIN, 1.0)
    assert ages == (0, 1, 0, 1)
    assert [first // MAX_POSITION for first, _ in segments] == [0, 0, 1, 1]
    assert [count for _, count in segments] == [2, 2, 3, 3]
    mean = np.array([(4 + 24) / 4, (8 + 48) / 4])
    assert coefficients[:2] == pytest.approx(mean / 2 * 0.5, rel=2**-12)
    assert coefficients[2:4] == pytest.approx(np.array([16.0, 32.0]) / 2 * 0.5 * 0.5, rel=2**-12)
    assert coefficients[4:7] == pytest.approx(np.array([4.0, 5.0, 6.0]) * 0.5, rel=2**-10)
    assert coefficients[7:] == pytest.approx(np.array([8.0, 16.0, 32.0]) * 0.25, rel=2**-10)


def test_an_update_of_late_reports_alone_is_small() -> None:
    then = deal((FRONT,), "dealt", 2, 1)
    _, coefficients, ages = combine_groups([Group(3, then, ((0, report(2, [2.0, 4.0])),))], PLAIN, 0.5)
    assert ages == (3,)
    assert coefficients.tolist() == [0.5, 1.0]


def test_groups_in_any_order_and_reports_in_any_order_give_the_same_bits() -> None:
    deals = {age: deal((FRONT, TAIL), "dealt", 9 - age, 3) for age in (0, 1, 2)}
    rows = {age: [(r, report(r + 1, [0.1 * r, age / 3], [r / 7, 0.2, 0.9])) for r in range(3)] for age in deals}
    found = [
        combine_groups([Group(age, deals[age], tuple(rows[age][::step])) for age in order], PLAIN, 0.5)
        for order, step in (((0, 1, 2), 1), ((2, 0, 1), -1))
    ]
    assert found[0][0] == found[1][0]
    assert found[0][1].tobytes() == found[1][1].tobytes()
    assert found[0][2] == found[1][2]


# --- the record -----------------------------------------------------------------------------------------------------


def record(segments: tuple[tuple[int, int], ...], ages: tuple[int, ...], **changes: Any) -> UpdateRecord:
    count = sum(n for _, n in segments)
    fields: dict[str, Any] = {"index": 4, "round": 9, "learning_rate": 0.5, "parent": bytes(16), "digest": bytes(16)}
    coefficients = np.arange(1, count + 1, dtype=np.float32)
    return UpdateRecord(**{**fields, **changes}, segments=segments, coefficients=coefficients, ages=ages)


def test_ages_travel_and_cost_nothing() -> None:
    segments = ((0, 2), (4, 3), (0, 2), (MAX_POSITION, 5), (MAX_POSITION, 5))
    with_ages = record(segments, (0, 0, 2, 1, 3))
    again = decode(with_ages.encode())
    assert isinstance(again, UpdateRecord)
    assert (again.segments, again.ages) == (with_ages.segments, with_ages.ages)
    assert again.encode() == with_ages.encode()
    assert len(record(segments[:2], (0, 1)).encode()) == len(record(segments[:2], ()).encode())


@pytest.mark.parametrize(
    ("segments", "ages"),
    [
        (((0, 2),), (0,)),  # the other spelling of no ages
        (((0, 2), (4, 2)), (1,)),
        (((0, 2), (4, 2)), (1, 0)),
        (((0, 2), (1, 2)), (1, 1)),
        (((0, 2), (MAX_POSITION, 2), (8, 2)), (0, 0, 1)),
        (((0, 2),), (101,)),
        (((0, 2),), (-1,)),
    ],
)
def test_segments_out_of_order_are_refused(segments: Any, ages: Any) -> None:
    with pytest.raises(ProtocolError):
        record(segments, ages)


def test_late_scalars_move_the_weights_along_the_directions_of_their_round() -> None:
    blocks = (FRONT, TAIL)
    directions = directions_of(blocks, 7)
    front, ranking = directions
    assert isinstance(front, Directions)
    assert isinstance(ranking, CoordinateRanking)
    past = PastRounds(2, (3,))
    then = np.array([1, 5, 20])
    past.note(PastRound(5, (np.array([0, 1, 2]),)))
    past.note(PastRound(6, (then,)))
    segments = ((2, 2), (8, 2), (MAX_POSITION, 3), (MAX_POSITION, 3))
    update = record(segments, (0, 2, 0, 1))
    found = estimate_gradient(blocks, directions, update, past)
    expected = front.combine(9, np.array([2, 3]), update.coefficients[:2])
    expected += front.combine(5, np.array([8, 9]), update.coefficients[2:4])
    assert np.array_equal(found[:16], expected)
    sketch = np.zeros(24, np.float32)
    sketch[ranking.chosen(3)] = update.coefficients[4:7]
    sketch[then] += update.coefficients[7:]
    assert np.array_equal(found[16:], sketch)
    with pytest.raises(ProtocolError, match="scalars of 3 updates ago"):
        estimate_gradient(blocks, directions, record(((2, 2),), (3,)), past)


@pytest.mark.parametrize("estimator", ["stein", "node", "split"])
def test_a_snapshot_remembers_the_rounds_before(estimator: Any) -> None:
    desk = Desk(change(SETTINGS, staleness=2, close_at=3, rounds=9, estimator=estimator)).connect().join()
    for _ in range(2):
        desk.report("a", "b", "c")
    late = desk.measure("d")
    desk.report("a", "b", "c")
    snapshot, now = desk.machine.replica.snapshot(), desk.machine.replica
    assert len(snapshot) == now.snapshot_bytes
    again = Desk(desk.settings).machine.replica
    again.restore(snapshot)
    desk.say("d", late, Channel.REPORT)
    desk.report("a", "b")
    (update,) = desk.sent(UpdateRecord)
    assert 1 in update.ages
    again.apply(update)
    assert again.head == desk.machine.replica.head
    for length in (len(snapshot) - 1, len(snapshot) + 1):
        with pytest.raises(ProtocolError):
            again.restore((snapshot + b"x")[:length])


# --- the coordinator ------------------------------------------------------------------------------------------------

LATE = change(SETTINGS, staleness=1, close_at=3, rounds=8)


def test_a_late_report_counts_in_the_next_update_once() -> None:
    desk = Desk(LATE).connect().join()
    late = desk.measure("d")
    desk.report("a", "b", "c")
    assert desk.head.round == 2
    desk.say("d", late, Channel.REPORT)
    entry, receipt = desk.out
    assert entry == Record("report", 1, "d", late.encode())
    assert receipt == Send(Channel.ACK, Receipt(TAG, 1, Verdict.ACCEPTED), "d")
    for _ in range(3):
        desk.say("d", late, Channel.REPORT)
        assert desk.out == [Send(Channel.ACK, Receipt(TAG, 1, Verdict.DUPLICATE), "d")]
    desk.report("a", "b")  # with the late one enough
    (update,) = desk.sent(UpdateRecord)
    assert update.ages == (0, 1)
    desk.say("d", late, Channel.REPORT)
    assert desk.sent(Receipt) == [Receipt(TAG, 1, Verdict.DUPLICATE)]
    desk.report("a", "b", "c")
    (update,) = desk.sent(UpdateRecord)
    assert update.ages == ()
    check_order(desk.trace)


def test_a_device_with_a_late_and_a_fresh_report_is_one_of_the_quorum() -> None:
    desk = Desk(change(LATE, quorum=3)).connect().join()
    late = desk.measure("d")
    desk.report("a", "b", "c")
    desk.say("d", late, Channel.REPORT)
    desk.report("d", "a")
    assert desk.head.round == 2  # two devices, three reports
    desk.report("b")
    assert desk.head.round == 3


@pytest.mark.parametrize("updates", [1, 2])
def test_who_is_too_late_does_not_count(updates: int) -> None:
    desk = Desk(LATE).connect().join()
    late = desk.measure("d")
    for _ in range(updates):
        desk.report("a", "b", "c")
    desk.say("d", late, Channel.REPORT)
    assert desk.sent(Receipt) == [Receipt(TAG, 1, Verdict.ACCEPTED if updates == 1 else Verdict.LATE)]


def test_late_reports_wait_through_an_evaluation() -> None:
    desk = Desk(change(LATE, evaluate_every=1)).connect().join()
    late = desk.measure("d")
    desk.report("a", "b", "c")
    assert desk.head.phase == "evaluate"
    desk.say("d", late, Channel.REPORT)
    assert desk.sent(Receipt)[0].verdict is Verdict.ACCEPTED
    desk.report()
    assert desk.phases()[-1] == "train"
    desk.report("a", "b")
    assert desk.sent(UpdateRecord)[0].ages == (0, 1)


def test_nothing_is_late_for_a_run_that_is_trained() -> None:
    desk = Desk(change(LATE, rounds=1)).connect().join()
    late = desk.measure("d")
    desk.report("a", "b", "c")
    desk.say("d", late, Channel.REPORT)
    assert desk.sent(Receipt)[0].verdict is Verdict.LATE


HOSTILE: dict[str, dict[str, Any]] = {
    "digest": {"weights_digest": bytes(16)},
    "count": {"blocks": (np.ones(3, dtype=np.float32),)},
    "kind": {"kind": ReportKind.EVALUATE},
    "huge": {"blocks": (np.array([1, 3e38], dtype=np.float32),)},
    "weight": {"samples": 2**32 - 1},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_late_reports_are_refused_once(name: str) -> None:
    desk = Desk(LATE).connect().join()
    late = desk.measure("d")
    desk.report("a", "b", "c")
    for _ in range(5):
        desk.say("d", dataclasses.replace(late, **HOSTILE[name]), Channel.REPORT)
        assert desk.sent(Receipt)[0].verdict is Verdict.REFUSED
    assert desk.kinds().count("refusal") == 1
    desk.say("d", late, Channel.REPORT)
    assert desk.sent(Receipt)[0].verdict is Verdict.ACCEPTED
    check_order(desk.trace)


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("is_restarted", [True, False])
def test_scalars_after_a_decline_are_late(staleness: int, is_open: bool, is_restarted: bool) -> None:
    """Not a duplicate: that would tell the device that its scalars have counted."""
    desk = Desk(change(SETTINGS, staleness=staleness, rounds=9)).connect().join()
    late = desk.measure("d")
    desk.decline("d", why=Decline.NO_DATA)
    desk.report(*(("a",) if is_open else ("a", "b", "c")))
    if is_restarted:
        desk = Desk(desk.settings, journal=desk.journal).connect().join()
    assert (desk.head.round == 1) == is_open
    again = dataclasses.replace(late, blocks=(), decline=Decline.NO_DATA)
    for message, verdict in ((late, Verdict.LATE), (again, Verdict.DUPLICATE)):
        desk.say("d", message, Channel.REPORT)
        assert desk.sent(Receipt) == [Receipt(TAG, 1, verdict)]
    assert sum(kind == "report" and name == "d" for kind, _, name, _ in desk.journal) == 1


def test_a_late_report_that_declines_leaves_no_trace() -> None:
    desk = Desk(LATE).connect().join()
    late = desk.measure("d")
    desk.report("a", "b", "c")
    desk.say("d", dataclasses.replace(late, blocks=(), decline=Decline.OVER_BUDGET), Channel.REPORT)
    assert desk.out == [Send(Channel.ACK, Receipt(TAG, 1, Verdict.LATE), "d")]


def script(desk: Desk) -> Desk:
    """Rounds with late reports, played from wherever the run stands; some devices are always one update behind."""
    for _ in range(40):
        if desk.machine.finished or desk.head.phase == "done":
            break
        behind = ("c", "d") if desk.head.round % 2 else ("d",)
        late = {name: desk.measure(name) for name in behind if name in desk.participants()}
        desk.report(*(name for name in desk.waiting() if name not in behind))
        for name, each in late.items():
            desk.say(name, each, Channel.REPORT)
    return desk


@pytest.mark.parametrize("estimator", ["stein", "node"])
def test_any_beginning_of_the_journal_leads_to_the_same_end(estimator: Any) -> None:
    settings = change(SETTINGS, staleness=2, quorum=2, close_at=2, rounds=6, evaluate_every=4, estimator=estimator)
    desk = script(Desk(settings).connect().join())
    updates = [decode(payload) for kind, _, _, payload in desk.journal if kind == "update"]
    assert any(isinstance(update, UpdateRecord) and update.ages for update in updates)
    for cut in range(1, len(desk.journal) + 1):
        again = Desk(settings, journal=desk.journal[:cut])
        copy = Desk(settings, journal=again.journal)
        assert copy.machine.replica.digest == again.machine.replica.digest
        if cut == len(desk.journal):
            assert again.machine.replica.head == desk.machine.replica.head
        # What was accepted before the cut counts after it: the next update is the same one.
        if desk.journal[cut - 1][0] in ("report", "announce"):
            rest = [entry for entry in desk.journal[cut:] if entry[0] in ("report", "update")]
            again.connect().join()
            for kind, _, device, payload in rest:
                if kind == "update":
                    assert payload in [entry[3] for entry in again.journal]
                    break
                message = decode(payload)
                assert isinstance(message, Report)
                again.say(device, message, Channel.REPORT)
                assert again.sent(Receipt)[0].verdict in (Verdict.ACCEPTED, Verdict.DUPLICATE)


# --- the device -----------------------------------------------------------------------------------------------------

STALE = change(BENCH, staleness=2, quorum=2)


def late_bench(estimator: Any = "stein") -> Bench:
    return Bench(settings=change(STALE, estimator=estimator))


def test_a_task_goes_on_while_its_report_may_still_count() -> None:
    bench = late_bench()
    task = bench.compute()
    for round_ in (2, 3):
        bench.hear(Channel.LOG, bench.update(round_ - 1))
        bench.hear(Channel.HEAD, bench.head(round_=round_))
        assert bench.device.stage == "computing"
        assert bench.out == []
    bench.answer(task)
    saved = bench.only(SaveReport).report
    assert (saved.round, saved.weights_digest) == (1, task.weights_digest)
    assert bench.device.stage == "reporting"
    bench.hear(Channel.ACK, Receipt(TAG, 1, Verdict.ACCEPTED))
    assert bench.only(Compute).task.round == 3


@pytest.mark.parametrize("why", ["too old", "void", "done"])
def test_a_task_that_cannot_count_any_more_is_cancelled(why: str) -> None:
    bench = late_bench()
    bench.compute()
    for round_ in range(1, 4 if why == "too old" else 1 if why == "void" else 2):
        bench.hear(Channel.LOG, bench.update(round_))
    bench.hear(Channel.HEAD, bench.head("done" if why == "done" else "train", round_=9, **finished(why, bench)))
    assert any(isinstance(c, Cancel) for c in bench.out)


def finished(why: str, bench: Bench) -> dict[str, Any]:
    return {"log_length": bench.run.training.rounds} if why == "done" else {}


def test_a_late_report_waits_for_its_receipt() -> None:
    bench = late_bench()
    bench.report()
    bench.hear(Channel.LOG, bench.update(1))
    bench.hear(Channel.HEAD, bench.head(round_=2))
    assert bench.device.stage == "reporting"
    bench.wait(RETRY_S)
    assert [each.round for each in bench.sent(Report)] == [1]
    bench.hear(Channel.ACK, Receipt(TAG, 1, Verdict.LATE))
    assert bench.only(Compute).task.round == 2


@pytest.mark.parametrize(
    ("verdict", "given_back"), [("ACCEPTED", []), ("DUPLICATE", []), ("LATE", [1]), ("REFUSED", [1])]
)
def test_what_did_not_count_goes_back_into_the_residual(verdict: str, given_back: list[int]) -> None:
    """Also where nothing may be late: a sketch has taken out of the residual what it sends."""
    bench = Bench(settings=change(BENCH, estimator="node"))
    task = bench.compute()
    bench.answer(task, blocks=(np.ones(3, np.float32), np.ones(12, np.float32)))
    bench.hear(Channel.HEAD, bench.head(round_=2, log_length=0))
    assert bench.device.stage == "reporting"
    bench.hear(Channel.ACK, Receipt(TAG, 1, Verdict[verdict]))
    assert [c.round for c in bench.out if isinstance(c, GiveBack)] == given_back


def test_a_server_that_never_answers_does_not_keep_a_device_for_ever() -> None:
    bench = Bench(settings=change(BENCH, estimator="node"))
    bench.answer(bench.compute(), blocks=(np.ones(3, np.float32), np.ones(12, np.float32)))
    bench.hear(Channel.HEAD, bench.head(round_=2))
    bench.wait(9 * RETRY_S)
    assert bench.device.stage == "reporting"
    bench.wait(2 * RETRY_S)
    bench.only(DropReport)
    assert not any(isinstance(c, GiveBack) for c in bench.out)  # The broker may still hand it to the server.
    assert bench.only(Compute).task.round == 2


def test_a_server_that_is_down_may_take_its_time() -> None:
    bench = Bench(settings=change(BENCH, estimator="node"))
    bench.answer(bench.compute(), blocks=(np.ones(3, np.float32), np.ones(12, np.float32)))
    bench.hear(Channel.HEAD, bench.head(round_=2))
    bench.wait(8 * RETRY_S)
    bench.hear(Channel.SERVER, ServerPresence(False, 1))
    for _ in range(30):
        bench.wait(RETRY_S)
        assert [each.round for each in bench.sent(Report)] == [1]
    bench.hear(Channel.SERVER, ServerPresence(True, 2))
    bench.wait(9 * RETRY_S)
    assert bench.device.stage == "reporting"
    bench.hear(Channel.ACK, Receipt(TAG, 1, Verdict.LATE))
    kinds = [type(c) for c in bench.out]
    assert kinds.index(GiveBack) < kinds.index(DropReport)  # A crash in between only asks again.
    assert bench.only(Compute).task.round == 2


def test_a_measurement_that_nobody_wants_goes_back_as_well() -> None:
    bench = Bench(settings=change(BENCH, estimator="node"))
    task = bench.compute()
    bench.hear(Channel.HEAD, bench.head(round_=2))
    bench.answer(task)
    assert bench.only(GiveBack).round == 1


def test_directions_keep_nothing_to_give_back() -> None:
    bench = Bench()
    bench.report()
    bench.hear(Channel.ACK, Receipt(TAG, 1, Verdict.REFUSED))
    assert not any(isinstance(c, GiveBack) for c in bench.out)


def test_a_task_knows_which_rounds_made_the_latest_updates() -> None:
    bench = Bench().plan()
    for round_ in (3, 4, 7):
        bench.update(round_)
    bench.announce(round_=9)
    bench.hear(Channel.BLOCK, LogSlice(0, tuple(bench.log)))
    task = bench.only(Compute).task
    assert (task.log_length, task.recent) == (3, ((0, 3), (1, 4), (2, 7)))


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["stein", "node", "split"])
@pytest.mark.parametrize("assignment", ["dealt", "shared"])
def test_slow_devices_count_late_and_everybody_ends_with_the_same_weights(estimator: Any, assignment: Any) -> None:
    """Buffered asynchronous rounds: every update is made of three reports, whatever weights they were measured with."""
    settings = RunSettings(
        seed=3,
        sparsity=0.5,
        training=TrainingSettings(rounds=12, k=3, tail_k=4, estimator=estimator, assignment=assignment),
        devices=5,
        quorum=2,
        close_at=3,
        staleness=6,
        deadline_s=60.0,
        evaluate_every=5,
    )
    world = World(settings, 5, seed=1, has_test_set=True)
    for number, node in enumerate(world.devices.values()):
        node.compute_s = 0.2 if number < 3 else 0.9
    world.start().finish()
    check_end(world)
    updates = [decode(payload) for kind, _, _, payload in world.server.journal if kind == "update"]
    ages = {age for update in updates if isinstance(update, UpdateRecord) for age in update.ages}
    assert max(ages) >= 2


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"staleness": -1}, "staleness is -1, it must be 0 to 100 updates"),
        ({"staleness": 101}, "staleness is 101"),
        ({"staleness_power": -0.5}, r"staleness power is -0\.5, it must be 0 to 10"),
        ({"staleness": 1, "aggregation": AggregationSettings("median")}, "late reports cannot be compared"),
        ({"staleness": 1, "training": TrainingSettings(k_max=100)}, "late ones tell nothing"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    base = {"training": TrainingSettings(assignment="shared")}
    RunSettings(**base, staleness=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        RunSettings(**{**base, **changes})


def test_the_scalars_of_all_rounds_that_may_count_fit_one_update() -> None:
    (alone,), (together,) = (deal((FRONT,), "dealt", 0, 20_000, n_rounds=n) for n in (1, 4))
    assert (alone.k, together.k) == (1, 1)
    block = dataclasses.replace(FRONT, size=1 << 20, k=60_000)
    found = [deal((block,), "shared", 0, 1, n_rounds=n)[0].k for n in (1, 2, 4)]
    assert found == [60_000, 30_000, 15_000]
