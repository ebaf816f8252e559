"""Replicas that replay the same log, and the gradient that the scalars carry."""

from __future__ import annotations

import dataclasses
import struct
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from fedzo.protocol.artifact.layout import Initialiser, Layout, Parameter, initial_weights
from fedzo.protocol.errors import ProtocolError
from fedzo.protocol.perturbation.blocks import Block, BlockKind, deal, directions_of, whole_block
from fedzo.protocol.perturbation.directions import (
    FAMILIES,
    MAX_BLOCKS,
    MAX_POSITION,
    Directions,
    Family,
    round_coefficients,
)
from fedzo.protocol.perturbation.ranking import CoordinateRanking
from fedzo.protocol.perturbation.sketch import GradientSketch
from fedzo.protocol.pruning.mask import Mask, threshold
from fedzo.protocol.replay.optimisers import OPTIMISERS, OptimiserConfig, OptimiserName
from fedzo.protocol.replay.update import Replica, chain_digest, empty_log_digest, estimate_gradient, weights_digest
from fedzo.protocol.server_side.aggregation import combine_probes
from fedzo.protocol.wire.codec import decode
from fedzo.protocol.wire.messages import Report, ReportKind, UpdateRecord
from tests.protocol.builders import seeded_coefficients, seeded_normals, small_layout

RATE = float(np.float32(0.01))


def small_mask(sparsity: float = 0.5) -> Mask:
    layout = small_layout()
    return threshold(layout, np.abs(initial_weights(layout, 11)), sparsity)


def whole(family: Family = "hadamard", mask: Mask | None = None) -> tuple[Block, ...]:
    return whole_block(family, (mask or small_mask()).n_survivors)


def make(family: Family = "hadamard", optimiser: OptimiserName = "adam") -> Replica:
    return Replica(small_layout(), small_mask(), 11, 12, whole(family), OptimiserConfig(optimiser))


def advance(replica: Replica, updates: int) -> list[UpdateRecord]:
    records = []
    for _ in range(updates):
        index = replica.index
        segments = ((7 * index % 50, 3), (60, 2))
        records.append(replica.prepare(index, 2 * index, RATE, segments, seeded_coefficients(5, index, 5)))
    return records


def state(replica: Replica) -> tuple[int, bytes, bytes, bytes]:
    """Everything that a refused call must leave alone."""
    return replica.index, replica.head, replica.digest, replica.snapshot()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_replay_of_the_wire_bytes_reaches_the_same_weights(family: Family, optimiser: OptimiserName) -> None:
    server, device = make(family, optimiser), make(family, optimiser)
    start = device.digest
    for record in advance(server, 12):
        message = decode(record.encode())
        assert isinstance(message, UpdateRecord)
        device.apply(message)
        assert device.digest == record.digest
    assert state(device) == state(server)
    assert device.index == 12
    assert device.digest != start
    assert device.digest == weights_digest(device.weights)


def test_weights_start_as_the_surviving_initial_weights() -> None:
    replica, mask = make(), small_mask()
    assert np.array_equal(replica.weights, initial_weights(small_layout(), 11)[mask.survivors()])
    assert replica.index == 0
    with pytest.raises(ValueError, match="read-only"):
        replica.weights[0] = 1.0


def test_weights_are_one_view_for_life() -> None:
    replica = make()
    view = replica.weights
    before = view.copy()
    advance(replica, 3)
    assert replica.weights is view
    assert not np.array_equal(view, before)
    replica.restore_from_start()
    assert np.array_equal(view, before)


def test_one_step_is_the_sum_of_coefficient_times_direction() -> None:
    replica = make("gaussian", "sgd")
    before = replica.weights.astype(np.float64)
    coefficients = round_coefficients(np.array([1.5, -2.0, 0.25]))
    replica.prepare(0, 9, 0.5, ((4, 2), (10, 1)), coefficients)
    expected = before.copy()
    directions = Directions("gaussian", 12, before.size)
    for position, coefficient in zip((4, 5, 10), coefficients.tolist(), strict=True):
        z = directions.direction(9, position, np.empty(before.size, dtype=np.float32))
        expected -= 0.5 * coefficient * z
    np.testing.assert_allclose(replica.weights, expected, rtol=0, atol=1e-6)


def test_chain_of_heads() -> None:
    replica = make()
    head = empty_log_digest(small_layout(), small_mask(), 11, 12, whole(), OptimiserConfig("adam"))
    assert replica.head == head
    for record in advance(replica, 3):
        assert record.parent == head
        head = chain_digest(head, record.encode())
    assert replica.head == head


def test_every_setting_changes_the_first_head() -> None:
    layout, mask, adam = small_layout(), small_mask(), OptimiserConfig("adam")
    renamed = Layout((dataclasses.replace(layout.parameters[0], name="other"), *layout.parameters[1:]))
    n = mask.n_survivors
    front = Block(0, 0, 20, "probe", "hadamard", 1)
    two = (front, Block(1, 20, n - 20, "probe", "hadamard", 1))
    sketched = (front, Block(1, 20, n - 20, "sketch", "ranked", 1))
    moved = (Block(0, 0, 21, "probe", "hadamard", 1), Block(1, 21, n - 21, "probe", "hadamard", 1))
    heads = [
        empty_log_digest(layout, mask, 11, 12, whole(), adam),
        empty_log_digest(renamed, Mask(renamed, mask.kept), 11, 12, whole(), adam),
        empty_log_digest(layout, small_mask(0.6), 11, 12, whole(mask=small_mask(0.6)), adam),
        empty_log_digest(layout, mask, 10, 12, whole(), adam),
        empty_log_digest(layout, mask, 11, 13, whole(), adam),
        empty_log_digest(layout, mask, 11, 12, whole("gaussian"), adam),
        empty_log_digest(layout, mask, 11, 12, whole(), OptimiserConfig("sgd")),
        empty_log_digest(layout, mask, 11, 12, whole(), OptimiserConfig("adam", beta2=0.999)),
        *(empty_log_digest(layout, mask, 11, 12, blocks, adam) for blocks in (two, sketched, moved)),
    ]
    assert len(set(heads)) == len(heads)
    assert all(len(head) == 16 for head in heads)


def test_refused_records_change_nothing() -> None:
    server, device = make(), make()
    records = advance(server, 4)
    device.apply(records[0])
    before = state(device)
    wrong_digest = dataclasses.replace(records[1], digest=bytes(16))
    other_coefficients = dataclasses.replace(records[1], coefficients=records[1].coefficients * 2)
    other_parent = dataclasses.replace(records[1], parent=bytes(16))
    for record, message in [
        (records[0], "update 0 was given, update 1 is next"),
        (records[2], "update 2 was given, update 1 is next"),
        (other_parent, "continues the log"),
        (wrong_digest, "have the digest"),
        (other_coefficients, "have the digest"),
    ]:
        with pytest.raises(ProtocolError, match=message) as caught:
            device.apply(record)
        assert caught.value.hint
        assert state(device) == before
    for record in records[1:]:
        device.apply(record)
    assert state(device) == state(server)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_an_overflow_is_refused_and_undone(optimiser: OptimiserName) -> None:
    replica, twin = make("gaussian", optimiser), make("gaussian", optimiser)
    advance(replica, 3)
    huge, coefficients = float(np.float32(3e38)), np.array([2.0**80], dtype=np.float32)
    if optimiser == "sign_momentum":  # a sign is bounded: its first step still fits
        replica.prepare(3, 3, huge, ((0, 1),), coefficients)
    before = state(replica)
    with pytest.raises(ProtocolError, match="not finite"):
        replica.prepare(replica.index, 3, huge, ((0, 1),), coefficients)
    assert state(replica) == before
    twin.restore(before[3])
    assert advance(replica, 2)[-1].encode() == advance(twin, 2)[-1].encode()


def test_prepare_refuses_what_it_could_not_send() -> None:
    replica = make()
    before = state(replica)
    good = seeded_coefficients(1, 0, 4)
    for index, rate, segments, coefficients in [
        (1, RATE, ((0, 4),), good),
        (0, 0.1, ((0, 4),), good),
        (0, 1e300, ((0, 4),), good),
        (0, float("nan"), ((0, 4),), good),
        (0, RATE, (), good[:0]),
        (0, RATE, ((0, 3),), good),
        (0, RATE, ((2, 2), (0, 2)), good),
        (0, RATE, ((0, 2), (1, 2)), good),
        (0, RATE, ((0, 4),), good + np.float32(1e-6)),
        (0, RATE, ((0, 4),), np.array([1, np.nan, 1, 1], dtype=np.float32)),
        (0, RATE, ((1 << 62, 4),), good),
    ]:
        with pytest.raises(ProtocolError):
            replica.prepare(index, 0, rate, segments, coefficients)
        assert state(replica) == before


def test_restore_from_start_replays_to_the_same_place() -> None:
    replica = make()
    start = state(replica)
    records = advance(replica, 6)
    end = state(replica)
    replica.restore_from_start()
    assert state(replica) == start
    for record in records:
        replica.apply(record)
    assert state(replica) == end


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_snapshots_go_forward_and_back(optimiser: OptimiserName) -> None:
    server, device = make(optimiser=optimiser), make(optimiser=optimiser)
    advance(server, 3)
    early = server.snapshot()
    records = advance(server, 4)
    device.restore(early)
    for record in records:
        device.apply(record)
    assert state(device) == state(server)
    server.restore(early)
    assert server.index == 3
    assert [r.encode() for r in advance(server, 4)] == [r.encode() for r in records]


def test_bad_snapshots_are_refused_and_change_nothing() -> None:
    server, device = make(), make()
    advance(server, 3)
    good = server.snapshot()
    other_run = Replica(small_layout(), small_mask(), 11, 13, whole(), OptimiserConfig("adam")).snapshot()
    not_finite = good[:-4] + struct.pack("<f", float("inf"))
    before = state(device)
    for data in (b"", good[:-1], good + b"x", b"FZS0" + good[4:], good[:70] + b"\x01" + good[71:], other_run,
                 make(optimiser="sgd").snapshot(), not_finite):  # fmt: skip
        with pytest.raises(ProtocolError, match="snapshot"):
            device.restore(data)
        assert state(device) == before


def test_a_mask_of_another_layout_is_refused() -> None:
    layout = Layout((Parameter("w", (134,), True, Initialiser("constant", 0.0)),))
    with pytest.raises(ProtocolError, match="another layout"):
        Replica(layout, small_mask(), 1, 1, whole(), OptimiserConfig())


def two_blocks(kind: BlockKind = "sketch") -> tuple[Block, ...]:
    """A front of 20 weights, and what is left of the small mask's survivors."""
    n = small_mask().n_survivors
    family: Family | Literal["ranked"] = "ranked" if kind == "sketch" else "hadamard"
    return Block(0, 0, 20, "probe", "rademacher", 3), Block(1, 20, n - 20, kind, family, 4)


def record_of(segments: tuple[tuple[int, int], ...], round_: int = 6) -> UpdateRecord:
    count = sum(n for _, n in segments)
    return UpdateRecord(0, round_, RATE, segments, seeded_coefficients(5, 0, count), bytes(16), bytes(16))


@pytest.mark.parametrize("kind", ["probe", "sketch"])
def test_every_block_has_its_own_sum(kind: BlockKind) -> None:
    blocks = two_blocks(kind)
    front, tail = directions_of(blocks, 12)
    first_position = 0 if kind == "sketch" else 5
    record = record_of(((2, 2), (9, 1), (MAX_POSITION + first_position, 3)))
    found = estimate_gradient(blocks, (front, tail), record)
    assert found.dtype == np.float32
    first = front.combine(6, np.array([2, 3, 9]), record.coefficients[:3])
    second = tail.combine(6, np.arange(first_position, first_position + 3), record.coefficients[3:])
    assert found.tobytes() == np.concatenate([first, second]).tobytes()
    assert first.any()
    assert second.any()


@pytest.mark.parametrize(("segments", "silent"), [(((2, 3),), 1), (((MAX_POSITION, 3),), 0)])
def test_a_block_without_coefficients_stays_as_it_is(segments: tuple[tuple[int, int], ...], silent: int) -> None:
    blocks = two_blocks()
    found = estimate_gradient(blocks, directions_of(blocks, 12), record_of(segments))
    parts = np.split(found, [20])
    assert not parts[silent].any()
    assert parts[1 - silent].any()


@pytest.mark.parametrize("position", [2 * MAX_POSITION, 7 * MAX_POSITION + 3, (1 << 63) - 1])
def test_coefficients_of_an_unknown_block_are_refused(position: int) -> None:
    blocks = two_blocks()
    record = record_of(((2, 2), (position, 1)))
    with pytest.raises(ProtocolError, match="more than 2 blocks"):
        estimate_gradient(blocks, directions_of(blocks, 12), record)
    replica = Replica(small_layout(), small_mask(), 11, 12, blocks, OptimiserConfig())
    before = state(replica)
    with pytest.raises(ProtocolError, match="more than 2 blocks"):
        replica.apply(dataclasses.replace(record, parent=replica.head))
    with pytest.raises(ProtocolError, match="more than 2 blocks"):
        replica.prepare(0, 6, RATE, record.segments, record.coefficients)
    assert state(replica) == before


def test_the_last_of_eight_blocks_is_reached() -> None:
    """Its positions end at 2**63 - 1, where float64 arithmetic would mix up its neighbours."""
    blocks = tuple(Block(b, 4 * b, 4, "probe", "rademacher", 1) for b in range(MAX_BLOCKS))
    record = record_of(((7 * MAX_POSITION - 1, 1), (7 * MAX_POSITION, 1), ((1 << 63) - 1, 1)))
    directions = directions_of(blocks, 12)
    found = estimate_gradient(blocks, directions, record)
    sixth = directions[6].combine(6, np.array([MAX_POSITION - 1]), record.coefficients[:1])
    seventh = directions[7].combine(6, np.array([0, MAX_POSITION - 1]), record.coefficients[1:])
    assert found.tobytes() == np.concatenate([np.zeros(24, np.float32), sixth, seventh]).tobytes()


def test_replicas_of_two_blocks_follow_each_other() -> None:
    server, device = (Replica(small_layout(), small_mask(), 11, 12, two_blocks(), OptimiserConfig()) for _ in range(2))
    start = device.digest
    for index in range(6):
        segments = ((3 * index, 3), (MAX_POSITION, 4))
        record = server.prepare(index, 2 * index, RATE, segments, seeded_coefficients(5, index, 7))
        message = decode(record.encode())
        assert isinstance(message, UpdateRecord)
        device.apply(message)
    assert state(device) == state(server)
    assert device.digest != start


N = small_mask().n_survivors


@pytest.mark.parametrize(
    "places",
    [
        (),
        ((0, 0, N - 1),),
        ((0, 0, N + 1),),
        ((0, 1, N - 1),),
        ((1, 0, N),),
        ((0, 0, 20), (1, 21, N - 21)),
        ((0, 0, 20), (1, 19, N - 19)),
        ((0, 0, 20), (1, 20, N - 21)),
        ((1, 20, N - 20), (0, 0, 20)),
        ((0, 0, 20), (0, 20, N - 20)),
        ((0, 0, 20), (2, 20, N - 20)),
    ],
)
def test_blocks_must_cover_the_survivors(places: tuple[tuple[int, int, int], ...]) -> None:
    blocks = [Block(number, first, size, "probe", "hadamard", 1) for number, first, size in places]
    with pytest.raises(ProtocolError, match=f"do not cover the {N} survivors"):
        Replica(small_layout(), small_mask(), 11, 12, blocks, OptimiserConfig())


class Logistic:
    """Binary logistic regression in float64 with its analytic gradient."""

    def __init__(self, size: int, samples: int) -> None:
        self.x = seeded_normals(1, 0, samples * size).reshape(samples, size).astype(np.float64) / np.sqrt(size)
        self.y = np.sign(seeded_normals(1, 1, samples)).astype(np.float64)

    def loss(self, w: NDArray[np.float64]) -> float:
        return float(np.mean(np.logaddexp(0.0, -self.y * (self.x @ w))))

    def gradient(self, w: NDArray[np.float64]) -> NDArray[np.float64]:
        margin = self.y * (self.x @ w)
        return np.asarray(-(self.x.T @ (self.y / (1.0 + np.exp(margin)))) / self.y.size)


def slopes(
    problem: Logistic, directions: Directions, round_: int, positions: list[int], w: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Two-sided differences along the directions."""
    sigma, buffer = 1e-4, np.empty(directions.size, dtype=np.float32)
    out = []
    for position in positions:
        step = sigma * directions.direction(round_, position, buffer).astype(np.float64)
        out.append((problem.loss(w + step) - problem.loss(w - step)) / (2 * sigma))
    return np.array(out)


@pytest.mark.parametrize("size", [64, 100, 200])
def test_a_dealt_round_over_the_whole_basis_is_the_gradient(size: int) -> None:
    problem = Logistic(size, 300)
    directions = Directions("hadamard", 3, size)
    w = seeded_normals(1, 2, size).astype(np.float64)
    # Three devices measure disjoint positions; the record holds all of them.
    share = directions.padded // 3
    segments = ((0, share), (share, share), (2 * share, directions.padded - 2 * share))
    scalars = np.concatenate([slopes(problem, directions, 5, list(range(a, a + n)), w) for a, n in segments])
    scalars /= directions.padded
    record = UpdateRecord(0, 5, RATE, segments, round_coefficients(scalars), bytes(16), bytes(16))
    exact = problem.gradient(w)
    found = estimate_gradient(whole_block("hadamard", size), [directions], record)
    assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_are_unbiased(family: Family) -> None:
    problem = Logistic(40, 200)
    directions = Directions(family, 3, 40)
    w = seeded_normals(1, 2, 40).astype(np.float64)
    total = np.zeros(40)
    rounds, positions = 300, list(range(8))
    for round_ in range(rounds):
        coefficients = round_coefficients(slopes(problem, directions, round_, positions, w) / 8)
        record = UpdateRecord(0, round_, RATE, ((0, 8),), coefficients, bytes(16), bytes(16))
        total += estimate_gradient(whole_block(family, 40), [directions], record)
    exact = problem.gradient(w)
    # The mean of 2,400 directions has a relative error near sqrt(40 / 2400) = 0.13.
    assert np.linalg.norm(total / rounds - exact) / np.linalg.norm(exact) < 0.25


def test_training_by_scalars_lowers_the_loss() -> None:
    layout = Layout((Parameter("w", (60,), True, Initialiser("constant", 0.0)),))
    problem = Logistic(60, 300)
    replica = Replica(layout, Mask.dense(layout), 1, 2, whole_block("hadamard", 60), OptimiserConfig("adam"))
    directions = Directions("hadamard", 2, 60)
    rate = float(np.float32(0.1))
    for index in range(40):
        first = 16 * index % 48
        w = replica.weights.astype(np.float64)
        scalars = slopes(problem, directions, index, list(range(first, first + 16)), w)
        replica.prepare(index, index, rate, ((first, 16),), round_coefficients(scalars / 16))
    assert problem.loss(np.zeros(60)) == pytest.approx(np.log(2))
    assert problem.loss(replica.weights.astype(np.float64)) < 0.6


@pytest.mark.parametrize("devices", [1, 3])
def test_a_sketch_of_all_coordinates_is_the_gradient(devices: int) -> None:
    """Scalars of a sketch are final: averaged over the devices, they give the mean of the gradients."""
    blocks = (Block(0, 0, 30, "probe", "hadamard", 32), Block(1, 30, 70, "sketch", "ranked", 128))
    front, ranking = directions_of(blocks, 3)
    assert isinstance(front, Directions)
    assert isinstance(ranking, CoordinateRanking)
    gradients = [seeded_normals(1, device, 100) for device in range(devices)]
    deals = deal(blocks, "shared", 0, devices)
    reports = []
    for rank, gradient in enumerate(gradients):
        slopes_ = front.project(6, deals[0].positions(0), gradient[:30]).astype(np.float32)
        rows = GradientSketch(70, 0.0).encode(gradient[30:], ranking.chosen(deals[1].k))
        reports.append((rank, Report(ReportKind.PROBE, bytes(4), 6, 1, 5, bytes(16), 0.0, 1, 1, 1, (slopes_, rows))))
    segments, coefficients = combine_probes(deals, reports)
    record = UpdateRecord(0, 6, RATE, segments, coefficients, bytes(16), bytes(16))
    exact = np.mean(gradients, axis=0)
    found = estimate_gradient(blocks, (front, ranking), record)
    assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < 1e-3
