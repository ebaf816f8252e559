"""Slow boards get fewer directions, and everybody agrees on which."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedzo.protocol.device_side.device_events import Compute
from fedzo.protocol.errors import ConfigError, ProtocolError
from fedzo.protocol.perturbation.blocks import Block, deal
from fedzo.protocol.perturbation.dealing import deals_of
from fedzo.protocol.server_side.aggregation import combine_probes
from fedzo.protocol.server_side.aggregation_rules import AggregationSettings
from fedzo.protocol.server_side.pace import paced_levels, pack_levels, unpack_levels
from fedzo.protocol.server_side.roster import Member
from fedzo.protocol.settings import RunSettings, TrainingSettings
from fedzo.protocol.wire.codec import decode
from fedzo.protocol.wire.documents import Announcement, Hello, parse
from fedzo.protocol.wire.messages import Receipt, Report, ReportKind, UpdateRecord, Verdict
from tests.protocol.simulation.bench import SETTINGS as BENCH
from tests.protocol.simulation.bench import Bench
from tests.protocol.simulation.desk import NAMES, SETTINGS, Desk, change
from tests.protocol.simulation.fakes import TAG
from tests.protocol.simulation.world import World, check_end

FRONT = Block(0, 0, 64, "probe", "hadamard", 8)
BEHIND = Block(1, 64, 128, "probe", "hadamard", 24)
TAIL = Block(1, 64, 128, "sketch", "ranked", 6)


def members(*query_ms: float) -> list[Member]:
    hello = Hello(1, "tests", 64.0, 1, 0, "", "")
    return [Member(f"dev-{i}", i, hello, query_ms=each) for i, each in enumerate(query_ms)]


@pytest.mark.parametrize(
    ("query_ms", "k", "k_min", "levels"),
    [
        ((1.0, 1.0, 8.0), 64, 0, [0, 0, 0]),
        ((1.0, 1.0, 8.0), 64, 4, [0, 0, 3]),
        ((1.0, 1.0, 8.0), 64, 16, [0, 0, 2]),
        ((1.0, 1.0, 8.0), 64, 33, [0, 0, 0]),
        ((1.0, 1.0, 1.2), 64, 1, [0, 0, 0]),  # times vary
        ((1.0, 1.0, 1.3), 64, 1, [0, 0, 1]),
        ((0.0, 2.0, 2.0, 20.0), 64, 1, [0, 0, 0, 3]),  # nothing is known of the first
        ((0.0, 0.0, 20.0), 64, 1, [0, 0, 0]),
        ((1.0, 1.0, 1.0, 1e9), 60_000, 1, [0, 0, 0, 15]),
        ((5e-324, 5e-324, 100.0), 60_000, 1, [0, 0, 15]),  # their quotient is no float any more
        ((5e-324, 1e9, 1e9), 64, 1, [0, 0, 0]),
        ((1.0, 1.0, float("inf")), 64, 1, [0, 0, 6]),
    ],
)
def test_boards_that_are_slower_than_the_median_get_less(
    query_ms: tuple[float, ...], k: int, k_min: int, levels: list[int]
) -> None:
    assert paced_levels(members(*query_ms), k, k_min) == levels


@given(st.lists(st.integers(0, 15), min_size=1, max_size=300))
def test_levels_travel(levels: list[int]) -> None:
    found = unpack_levels(pack_levels(levels), len(levels))
    assert found == (tuple(levels) if any(levels) else ())


@pytest.mark.parametrize("packed", [b"x", pack_levels([1, 2]), pack_levels([1, 2, 3, 4]), pack_levels([1, 2, 16])])
def test_levels_that_fit_no_participants_are_refused(packed: bytes) -> None:
    with pytest.raises(ProtocolError, match="participants"):
        unpack_levels(packed, 3)


def test_an_announcement_carries_them_at_no_cost_when_there_are_none() -> None:
    without = Announcement("run-1", 3, "train", participants=b"abc")
    paced = dataclasses.replace(without, pace=pack_levels([0, 2, 1]))
    assert parse(Announcement, paced.encode()) == paced
    assert parse(Announcement, without.encode()) == without
    assert len(paced.encode()) == len(without.encode()) + 2 + len(paced.pace)
    with pytest.raises(ProtocolError):
        parse(Announcement, paced.encode()[: -len(paced.pace)])
    with pytest.raises(ProtocolError):
        parse(Announcement, without.encode() + b"x")


@pytest.mark.parametrize("step", range(5))
@pytest.mark.parametrize("levels", [(0, 1, 3, 2), (0, 0, 0, 3), (1, 1, 1, 1)])
def test_slots_of_different_sizes_are_disjoint_and_without_gaps(levels: tuple[int, ...], step: int) -> None:
    for block in (FRONT, BEHIND):
        (one,) = deal((block,), "dealt", step, 4, k_min=1, levels=levels)
        taken = [one.positions(one.slot(rank)) for rank in range(4)]
        assert [part.size for part in taken] == [block.k >> level for level in levels]
        together = np.sort(np.concatenate(taken))
        assert np.array_equal(together, np.arange(one.first, one.first + together.size))
        following = deal((block,), "dealt", step + 1, 4, k_min=1, levels=(0, 0, 0, 0))[0]
        assert following.first == (step + 1) * 4 * block.k % one.block.n_positions


def test_the_least_holds_for_every_block_in_proportion_and_sketches_are_left_alone() -> None:
    front, behind = deal((FRONT, BEHIND), "dealt", 0, 2, k_min=3, levels=(0, 3))
    assert [front.size(0), front.size(1)] == [8, 3]
    assert [behind.size(0), behind.size(1)] == [24, 9]
    _, tail = deal((FRONT, TAIL), "dealt", 0, 2, k_min=3, levels=(0, 3))
    assert (tail.n_slots, tail.size(0), tail.starts) == (1, 6, ())


def test_every_direction_of_a_round_counts_alike() -> None:
    deals = deal((FRONT,), "dealt", 3, 3, k_min=2, levels=(0, 2, 1))
    rows = {rank: np.arange(deals[0].size(deals[0].slot(rank)), dtype=np.float32) + 10 * rank for rank in range(3)}
    reports = [
        (rank, Report(ReportKind.PROBE, TAG, 1, 1, 5, bytes(16), 0.5, 3, 10, 100, (row,))) for rank, row in rows.items()
    ]
    segments, coefficients = combine_probes(deals, reports)
    assert segments == ((deals[0].first, 8 + 2 + 4),)
    order = sorted(rows, key=deals[0].slot)
    expected = np.concatenate([rows[rank] for rank in order]) / 14
    assert coefficients == pytest.approx(expected, rel=2**-12)
    segments, coefficients = combine_probes(deals, reports[1:])
    assert sum(count for _, count in segments) == coefficients.size == 6
    assert float(coefficients.sum()) == pytest.approx(float(rows[1].sum() + rows[2].sum()) / 6, rel=2**-10)


# --- machines -------------------------------------------------------------------------------------------------------

PACED = change(SETTINGS, k=8, k_min=2, rounds=6)


def slow_round(desk: Desk, slow: str = "d", factor: int = 4) -> Desk:
    for name in desk.waiting():
        desk.report(name, queries=9, elapsed_ms=900 * (factor if name == slow else 1))
    return desk


def test_a_slow_device_gets_less_in_the_next_round() -> None:
    desk = slow_round(Desk(PACED).connect().join())
    assert unpack_levels(desk.head.pace, 4) == (0, 0, 0, 2)
    sizes = {name: desk.measure(name).blocks[0].size for name in NAMES}
    assert sizes == {"a": 8, "b": 8, "c": 8, "d": 2}
    slow_round(desk)
    (update,) = desk.sent(UpdateRecord)
    assert update.coefficients.size == 26
    assert [receipt.verdict for receipt in desk.sent(Receipt)] == [Verdict.ACCEPTED]
    assert desk.report("d", blocks=desk.measure("a").blocks) == [Verdict.REFUSED]


def test_a_device_that_is_fast_again_gets_as_much_as_the_others() -> None:
    desk = slow_round(Desk(PACED).connect().join())
    for _ in range(4):
        slow_round(desk, factor=1)
    assert desk.head.pace == b""


def test_a_device_that_always_says_0_ms_stops_nobody() -> None:
    """Halved again and again its time would be no float any more, nor would what the others take of it."""
    desk = Desk(change(PACED, rounds=2000)).connect().join()
    for _ in range(3):
        for name in desk.waiting():
            desk.report(name, queries=2**32 - 1 if name == "a" else 9, elapsed_ms=0 if name == "a" else 900)
    member = desk.machine.roster.members["a"]
    message = Report(ReportKind.PROBE, TAG, 9, 1, 5, bytes(16), 0.5, 9, 0, 100, (np.ones(2, np.float32),))
    for _ in range(2000):
        member.take_report(message)
    assert member.query_ms > 0.01
    slow_round(desk)
    assert unpack_levels(desk.head.pace, 4)[3] > 0


@pytest.mark.parametrize("cut", [1, 2])
def test_a_restarted_server_knows_the_speeds(cut: int) -> None:
    desk = slow_round(Desk(PACED).connect().join())
    again = Desk(PACED, journal=desk.journal[:-cut]).connect().join()
    assert again.head == desk.head
    slow_round(again)
    slow_round(desk)
    assert again.head == desk.head
    assert unpack_levels(again.head.pace, 4) == (0, 0, 0, 2)


def test_a_device_evaluates_what_the_announcement_gives_it() -> None:
    settings = change(BENCH, k=8, k_min=1)
    bench = Bench(settings=settings).plan()
    bench.announce(round_=1, pace=pack_levels([0, 2, 1]))
    task = bench.only(Compute).task
    head = bench.head(round_=1, pace=pack_levels([0, 2, 1]))
    (one,) = deals_of(bench.run.settings, bench.server.blocks, head)
    assert np.array_equal(task.positions[0], one.positions(one.slot(1)))
    assert task.positions[0].size == 2


def test_levels_that_cannot_be_read_are_said_and_change_nothing() -> None:
    bench = Bench(settings=change(BENCH, k=8, k_min=1)).plan()
    bench.announce(round_=1, pace=b"nonsense")
    assert "levels" in bench.presence().detail
    bench.announce(round_=2)
    assert bench.device.stage == "computing"


@pytest.mark.parametrize("estimator", ["stein", "node", "split"])
def test_whole_runs_with_slow_devices_end_with_the_same_weights(estimator: Any) -> None:
    settings = RunSettings(
        seed=3,
        sparsity=0.5,
        training=TrainingSettings(rounds=10, k=6, k_min=1, k_max=12, tail_k=8, estimator=estimator),
        devices=4,
        quorum=2,
        deadline_s=60.0,
        evaluate_every=5,
    )
    world = World(settings, 4, seed=2, has_test_set=True)
    slow = world.devices["dev-3"]
    for node in world.devices.values():
        factor = 6 if node is slow else 1
        node.alter = lambda _, outcome, factor=factor: dataclasses.replace(  # type: ignore[misc]
            outcome, queries=8, elapsed_ms=100 * factor
        )
    world.start().finish()
    check_end(world)
    updates = [decode(payload) for kind, _, _, payload in world.server.journal if kind == "update"]
    heads = [parse(Announcement, payload) for kind, _, _, payload in world.server.journal if kind == "announce"]
    assert any(head.pace for head in heads)
    assert len(updates) == 10


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_min": 9}, "k min is 9, it must be 0 to k, 8"),
        ({"k_min": -1}, "k min"),
        ({"assignment": "shared"}, "only of dealt directions"),
        ({"estimator": "local"}, "only of dealt directions"),
        ({"local_steps": 2, "local_rate": 0.1}, "need equal parts"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    base: dict[str, Any] = {"k": 8, "k_min": 2}
    TrainingSettings(**base)
    with pytest.raises(ConfigError, match=message):
        TrainingSettings(**{**base, **changes})


def test_clipping_compares_rows_of_one_length() -> None:
    with pytest.raises(ConfigError, match="cannot be clipped"):
        RunSettings(training=TrainingSettings(k=8, k_min=2), aggregation=AggregationSettings(clip="norm"))
