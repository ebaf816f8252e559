"""Directions and sigma of the next round: what the rules make of reports with known signal, noise and curvature."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedzo.protocol.artifact.layout import Initialiser, Layout, Parameter
from fedzo.protocol.perturbation.blocks import Block, Deal, deal, directions_of, whole_block
from fedzo.protocol.perturbation.ranking import CoordinateRanking
from fedzo.protocol.pruning.mask import Mask
from fedzo.protocol.replay.optimisers import OptimiserConfig
from fedzo.protocol.replay.update import Replica
from fedzo.protocol.server_side.adaptation import TARGET, Adaptation, _medians_of_the_others, next_sigma
from fedzo.protocol.server_side.aggregation import combine_probes
from fedzo.protocol.server_side.aggregation_rules import AggregationSettings
from fedzo.protocol.settings import Assignment, TrainingSettings
from fedzo.protocol.wire.documents import Announcement
from fedzo.protocol.wire.messages import Report, ReportKind

Lie = Callable[[NDArray[np.float64], np.random.Generator], NDArray[np.float64]]
PLAIN = AggregationSettings()
SIZE, SEED, K, K_MAX = 200, 3, 8, 40


def report(*blocks: Any, loss: float = 2.0) -> Report:
    arrays = tuple(np.asarray(block, dtype=np.float32) for block in blocks)
    return Report(ReportKind.PROBE, bytes(4), 1, 1, 16, bytes(16), loss, 1, 0, 0, arrays)


def rounds(
    assignment: Assignment,
    noise: float,
    *,
    devices: int = 16,
    updates: int = 30,
    blocks: tuple[Block, ...] = (),
    liars: Sequence[int] = (),
    lie: Lie = lambda row, _: row,
    rule: AggregationSettings = PLAIN,
) -> list[int]:
    """What is announced after each round, for a constant gradient and batches that add noise of a relative size."""
    rng = np.random.default_rng(5)
    layout = Layout((Parameter("w", (SIZE,), True, Initialiser("normal", 0.125)),))
    blocks = blocks or whole_block("hadamard", SIZE, K)
    training = TrainingSettings(assignment=assignment, k=K, k_max=K_MAX)
    replica = Replica(layout, Mask.dense(layout), 1, SEED, blocks, OptimiserConfig("sgd"))
    directions, adaptation, found = directions_of(blocks, SEED), Adaptation(training, is_robust=not rule.is_plain), []
    gradient = rng.standard_normal(SIZE) / np.sqrt(SIZE)
    for index in range(updates):
        head = Announcement("run", index + 1, "train", log_length=index, k=adaptation.k)
        deals = deal(blocks, assignment, index, devices, k=head.k, k_max=K_MAX)
        reports = []
        for rank in range(devices):
            own = gradient + noise * rng.standard_normal(SIZE) / np.sqrt(SIZE)
            parts: list[NDArray[np.float64]] = []
            for one, basis in zip(deals, directions, strict=True):
                part = own[one.block.first : one.block.first + one.block.size].astype(np.float32)
                if isinstance(basis, CoordinateRanking):
                    parts.append(part[replica.coordinates(one.block.number, one.k)].astype(np.float64))
                else:
                    parts.append(basis.project(head.round, one.positions(one.slot(rank)), part))
            reports.append((rank, report(*(lie(part, rng) for part in parts) if rank in liars else parts)))
        segments, coefficients = combine_probes(deals, reports, rule)
        record = replica.prepare(index, head.round, 2.0**-10, segments, coefficients)
        adaptation.learn(head, deals, reports, record, replica)
        found.append(adaptation.k)
    return found


@pytest.mark.parametrize(
    ("assignment", "noise", "low", "high"),
    [
        ("shared", 0.0, K, K),
        ("shared", 2.0, 9, 12),  # 4 parts of noise, averaged over 16 devices: q = 0.8
        ("shared", 8.0, 30, K_MAX),  # q = 0.2
        ("dealt", 0.0, K, 9),
        ("dealt", 1.0, 13, 19),  # q = 0.5
        ("dealt", 8.0, K_MAX, K_MAX),
    ],
)
def test_directions_make_up_for_noise(assignment: Assignment, noise: float, low: int, high: int) -> None:
    found = rounds(assignment, noise)
    assert all(K <= k <= K_MAX for k in found if k)
    assert low <= np.median(found[10:]) <= high, found


LIES: dict[str, Lie] = {
    "large noise": lambda row, rng: 30.0 * rng.standard_normal(row.size),
    "large and alike": lambda row, _: np.full(row.size, 1e3),
    "sign flip": lambda row, _: -4.0 * row,
}


@pytest.mark.parametrize("liars", [(0, 2, 4), (3, 7, 11)])  # all in one half, and in both
@pytest.mark.parametrize("name", LIES)
@pytest.mark.parametrize(
    ("noise", "low", "high"),
    [
        (0.5, K, 11),  # q = 0.98: nothing to ask for
        (8.0, 15, K_MAX),  # q = 0.2; liars on one side move medians by a quarter of the honest spread
    ],
)
def test_a_minority_of_liars_does_not_choose_the_directions(
    name: str, liars: tuple[int, ...], noise: float, low: int, high: int
) -> None:
    for rule in (AggregationSettings("trimmed-mean", hostile=3), AggregationSettings("mean", clip="norm")):
        found = rounds("shared", noise, liars=liars, lie=LIES[name], rule=rule)
        assert low <= np.median(found[10:]) <= high, found


def test_robust_directions_are_those_of_honest_devices() -> None:
    rule = AggregationSettings("median")
    for noise in (0.0, 2.0, 8.0):
        plain, robust = (np.median(rounds("shared", noise, rule=r)[10:]) for r in (PLAIN, rule))
        assert robust == pytest.approx(plain, rel=0.25), noise
    assert np.median(rounds("shared", 0.0, devices=2, rule=rule)[10:]) == K


def test_clipping_bounds_what_liars_do_to_dealt_directions() -> None:
    liars, lie = (0, 2, 4), LIES["large noise"]
    assert np.median(rounds("dealt", 0.0, liars=liars, lie=lie)[10:]) == K_MAX
    found = rounds("dealt", 0.0, liars=liars, lie=lie, rule=AggregationSettings("mean", clip="norm"))
    assert K <= np.median(found[10:]) <= 2 * K, found


@pytest.mark.parametrize("devices", [2, 3, 4, 7])
def test_medians_of_the_others(devices: int) -> None:
    rows = np.random.default_rng(2).integers(0, 4, (devices, 50)).astype(np.float64)  # with ties
    wanted = [np.median(np.delete(rows, i, axis=0), axis=0) for i in range(devices)]
    assert np.array_equal(_medians_of_the_others(rows), wanted)


def test_one_device_learns_from_its_own_rounds() -> None:
    found = rounds("shared", 0.0, devices=1, updates=40)
    assert found[0] == 0
    assert all(K <= k <= K_MAX for k in found[1:])
    # Without noise eight of 256 rows say little about a share in one round; over many the share is near 1.
    assert np.median(found[20:]) <= 2 * K


def test_sketches_do_not_count() -> None:
    blocks = (Block(0, 0, 100, "probe", "hadamard", K), Block(1, 100, SIZE - 100, "sketch", "ranked", 9))
    assert 13 <= np.median(rounds("dealt", 1.0, blocks=blocks)[10:]) <= 20
    only = (Block(0, 0, SIZE, "sketch", "ranked", K),)
    assert set(rounds("dealt", 1.0, blocks=only)) == {0}


def test_nothing_is_announced_unless_asked_for() -> None:
    training = TrainingSettings(k=K)
    adaptation, deals = Adaptation(training), deal(whole_block("hadamard", SIZE, K), "shared", 0, 2)
    reports = [(rank, report(np.ones(K))) for rank in range(2)]
    layout = Layout((Parameter("w", (SIZE,), True, Initialiser("normal", 0.125)),))
    replica = Replica(layout, Mask.dense(layout), 1, SEED, whole_block("hadamard", SIZE, K), OptimiserConfig())
    segments, coefficients = combine_probes(deals, reports)
    record = replica.prepare(0, 1, 0.125, segments, coefficients)
    adaptation.learn(Announcement("run", 1, "train"), deals, reports, record, replica)
    assert (adaptation.k, adaptation.sigma) == (0, 0.0)
    sigma = Adaptation(dataclasses.replace(training, adapt_sigma=True))
    sigma.learn(Announcement("run", 1, "train"), deals, reports, record, replica)
    assert sigma.sigma > 0
    assert sigma.k == 0


DEALS = (Deal(Block(0, 0, SIZE, "probe", "hadamard", 16), 16, 4, 0),)


def answers(change: float, *, lean: float = 0.0, sigma: float = 1e-3, devices: int = 4, k: int = 16) -> list[Report]:
    """Scalars whose loss differences have a root mean square of ``change`` times the loss; ``lean`` in common."""
    rng = np.random.default_rng(1)
    signs = rng.choice([-1.0, 1.0], (devices, k)) + lean
    return [report(row * change * 2.0 / sigma / np.sqrt(1 + lean**2), loss=2.0) for row in signs]


@pytest.mark.parametrize(
    ("change", "factor"),
    [
        (TARGET, 1.0),
        (TARGET * 2.9, 1.0),
        (TARGET / 2.9, 1.0),
        (TARGET * 5, 0.2),
        (TARGET / 5, 5.0),
        (TARGET * 1e4, 0.1),
        (TARGET / 1e4, 10.0),
        (0.0, 10.0),
    ],
)
def test_sigma_keeps_differences_between_rounding_and_curvature(change: float, factor: float) -> None:
    found = next_sigma(1e-3, DEALS, answers(change), two_sided=False)
    assert found == pytest.approx(1e-3 * factor, rel=1e-4)
    assert found == float(np.float32(found)) or found == 1e-3


@pytest.mark.parametrize(("two_sided", "k", "factor"), [(False, 16, 1 / 3), (True, 16, 1.0), (False, 2, 1.0)])
def test_scalars_that_lean_to_one_side_lower_sigma(two_sided: bool, k: int, factor: float) -> None:
    """Only one-sided ones tell, and only if there are enough of them."""
    deals = (dataclasses.replace(DEALS[0], k=k),)
    found = next_sigma(1e-3, deals, answers(TARGET, lean=3.0, k=k), two_sided=two_sided)
    assert found == pytest.approx(1e-3 * factor, rel=1e-4)


def test_the_rounding_of_the_clean_loss_is_no_curvature() -> None:
    found = next_sigma(1e-3, DEALS, answers(1e-6, lean=3.0), two_sided=False)
    assert found == pytest.approx(1e-2, rel=1e-4)


def test_a_few_strange_devices_do_not_decide() -> None:
    good = answers(TARGET, devices=5)
    strange = [report(np.full(16, 1e6), loss=1e-9), report(np.zeros(16), loss=1e9)]
    assert next_sigma(1e-3, DEALS, good + strange, two_sided=False) == 1e-3


@pytest.mark.parametrize(("sigma", "change", "expected"), [(1e-7, 0.0, 1e-7 * 10), (1.0, 0.0, 1.0), (1e-7, 1.0, 1e-7)])
def test_sigma_stays_in_its_range(sigma: float, change: float, expected: float) -> None:
    found = next_sigma(sigma, DEALS, answers(change, sigma=sigma), two_sided=True)
    assert found == pytest.approx(expected, rel=1e-4)


def test_losses_that_say_nothing_change_nothing() -> None:
    assert next_sigma(1e-3, DEALS, [report(np.ones(16), loss=0.0)], two_sided=False) == 1e-3
