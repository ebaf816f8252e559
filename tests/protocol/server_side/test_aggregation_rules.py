"""Every aggregation rule against one contract: plain formulas, order, no NaN, and what hostile rows cannot do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedzo.protocol.errors import ConfigError, QuorumError
from fedzo.protocol.perturbation.blocks import Block, Deal, deal
from fedzo.protocol.perturbation.directions import MAX_POSITION
from fedzo.protocol.server_side.aggregation import combine_probes, combine_scores
from fedzo.protocol.server_side.aggregation_rules import RULES, AggregationSettings, RuleName, aggregate, clip_rows
from fedzo.protocol.settings import RunSettings, TrainingSettings
from fedzo.protocol.wire.documents import RunDocument, parse
from fedzo.protocol.wire.messages import Report, ReportKind

Rows = NDArray[np.float64]
HOSTILE = 2
COUNT = 9
ROBUST = [name for name, rule in RULES.items() if rule.compares]
"""All but the mean."""
COORDINATEWISE = ("median", "trimmed-mean", "sign-vote")


def rule(name: RuleName, hostile: int = HOSTILE, **changes: Any) -> AggregationSettings:
    return AggregationSettings(name, 0 if name == "mean" else hostile, **changes)


def rows(seed: int, count: int = COUNT, size: int = 7) -> Rows:
    return np.random.default_rng(seed).normal(0.5, 1.0, (count, size))


def ones(found: Rows) -> Rows:
    return np.ones(len(found))


def reference_krum_order(found: Rows, hostile: int) -> list[int]:
    scores = []
    for i in range(len(found)):
        distances = sorted(float(np.sum((found[i] - found[j]) ** 2)) for j in range(len(found)) if j != i)
        scores.append(sum(distances[: len(found) - hostile - 2]))
    return sorted(range(len(found)), key=lambda i: scores[i])


def reference_centred_clip(found: Rows) -> Rows:
    centre = np.median(found, axis=0)
    radius = np.median(np.linalg.norm(found - centre, axis=1))
    for _ in range(3):
        steps = [(row - centre) * min(1.0, radius / np.linalg.norm(row - centre)) for row in found]
        centre = centre + np.mean(steps, axis=0)
    return centre


REFERENCES: dict[RuleName, Callable[[Rows, Rows], Rows]] = {
    "mean": lambda found, weights: np.average(found, axis=0, weights=weights),
    "median": lambda found, _: np.sort(found, axis=0)[len(found) // 2],
    "trimmed-mean": lambda found, _: np.mean(np.sort(found, axis=0)[HOSTILE:-HOSTILE], axis=0),
    "krum": lambda found, _: found[reference_krum_order(found, HOSTILE)[0]],
    "multi-krum": lambda found, _: np.mean(found[reference_krum_order(found, HOSTILE)[: COUNT - HOSTILE - 2]], axis=0),
    "sign-vote": lambda found, _: np.where((found > 0).sum(0) > (found < 0).sum(0), 1, -1) * np.median(abs(found), 0),
    "centred-clip": lambda found, _: reference_centred_clip(found),
}


def test_every_rule_has_a_reference() -> None:
    assert set(REFERENCES) == set(RULES)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", range(5))
def test_rules_agree_with_plain_formulas(name: RuleName, seed: int) -> None:
    found, weights = rows(seed), np.random.default_rng(seed).integers(1, 17, COUNT).astype(float)
    before = found.copy()
    np.testing.assert_allclose(aggregate(rule(name), found, weights), REFERENCES[name](found, weights), rtol=1e-12)
    assert found.tobytes() == before.tobytes(), "rows are not changed"


@pytest.mark.parametrize("name", RULES)
@given(order=st.permutations(range(COUNT)), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_devices_have_no_order(name: RuleName, order: list[int], seed: int) -> None:
    found, weights = rows(seed), np.random.default_rng(seed).integers(1, 17, COUNT).astype(float)
    one = aggregate(rule(name), found, weights)
    other = aggregate(rule(name), found[order], weights[order])
    if name in ("median", "trimmed-mean", "krum", "sign-vote"):
        assert one.tobytes() == other.tobytes()
    else:
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", RULES)
def test_nothing_overflows_and_nothing_is_nan(name: RuleName) -> None:
    cases = {
        "zeros": np.zeros((COUNT, 3)),
        "alike": np.full((COUNT, 3), 0.1),
        "huge": np.full((COUNT, 3), 1e20) * np.where(np.arange(COUNT) % 2, 1, -1)[:, None],
        "tiny": rows(3) * 1e-38,
        "mixed": rows(4) * np.logspace(-30, 20, COUNT)[:, None],
        "empty": np.zeros((COUNT, 0)),
    }
    for clip in ("none", "norm", "value"):
        for case, found in cases.items():
            made = aggregate(rule(name, clip=clip), found, ones(found))
            assert made.shape == found.shape[1:], case
            assert np.isfinite(made).all(), case
            if case == "zeros":
                assert not made.any()
            elif case == "alike":
                np.testing.assert_allclose(made, 0.1, rtol=1e-14)


HOSTILE_ROWS = st.lists(
    st.lists(st.floats(-1e20, 1e20) | st.sampled_from([0.0, 1e20, -1e20]), min_size=4, max_size=4),
    min_size=HOSTILE,
    max_size=HOSTILE,
)


def attacked(seed: int, hostile: list[list[float]]) -> tuple[Rows, Rows]:
    """Honest rows, and these with hostile ones among them."""
    honest = rows(seed, COUNT - HOSTILE, 4)
    return honest, np.insert(honest, [1, 4], np.array(hostile), axis=0)


@pytest.mark.parametrize("name", COORDINATEWISE)
@given(hostile=HOSTILE_ROWS, seed=st.integers(0, 99))
def test_scalars_stay_among_the_honest(name: RuleName, hostile: list[list[float]], seed: int) -> None:
    honest, found = attacked(seed, hostile)
    made = aggregate(rule(name), found, ones(found))
    if name == "sign-vote":
        assert (np.abs(made) <= np.abs(honest).max(axis=0)).all()
        votes = np.sign(honest).sum(axis=0)
        assert (np.sign(made) == np.sign(votes))[np.abs(votes) > HOSTILE].all()
    else:
        assert (made >= honest.min(axis=0)).all()
        assert (made <= honest.max(axis=0)).all()


@pytest.mark.parametrize("name", ["krum", "multi-krum"])
@given(hostile=HOSTILE_ROWS, near=st.booleans(), seed=st.integers(0, 99))
def test_krum_stays_near_the_honest(name: RuleName, hostile: list[list[float]], near: bool, seed: int) -> None:
    """Every chosen row has honest ones among its neighbours, and no larger score than an honest row can have."""
    if near:  # where they can be chosen
        hostile = [[float(np.sin(value)) for value in row] for row in hostile]
    honest, found = attacked(seed, hostile)
    made = aggregate(rule(name), found, ones(found))
    widest = max(float(np.linalg.norm(a - b)) for a in honest for b in honest)
    bound = widest * (1.0 + ((COUNT - HOSTILE - 2) / (COUNT - 2 * HOSTILE - 1)) ** 0.5)
    assert float(np.linalg.norm(made - honest.mean(axis=0))) <= bound


@given(hostile=HOSTILE_ROWS, seed=st.integers(0, 99))
def test_centred_clipping_stays_near_the_honest(hostile: list[list[float]], seed: int) -> None:
    honest, found = attacked(seed, hostile)
    made = aggregate(rule("centred-clip"), found, ones(found))
    across = float(np.linalg.norm(honest.max(axis=0) - honest.min(axis=0)))
    assert float(np.linalg.norm(made - np.median(found, axis=0))) <= 3.0 * across * (1 + 1e-9)


@pytest.mark.parametrize("clip", ["norm", "value"])
@given(hostile=HOSTILE_ROWS, seed=st.integers(0, 99))
def test_clipped_rows_are_no_larger_than_the_honest(clip: Any, hostile: list[list[float]], seed: int) -> None:
    honest, found = attacked(seed, hostile)
    clipped = clip_rows(rule("mean", clip=clip, clip_factor=2.0), found)
    largest = 2.0 * float(np.sqrt(np.mean(honest**2, axis=1)).max()) * (1 + 1e-9)
    assert (np.sqrt(np.mean(clipped**2, axis=1)) <= largest).all()
    assert (clipped * np.sign(found) >= 0).all()
    small = np.sqrt(np.mean(found**2, axis=1)) <= 2.0 * np.median(np.sqrt(np.mean(found**2, axis=1)))
    if clip == "norm":
        assert np.array_equal(clipped[small], found[small]), "what is under the limit is not touched"


@pytest.mark.parametrize("name", ROBUST)
def test_a_majority_breaks_every_rule_and_one_breaks_the_mean(name: RuleName) -> None:
    honest = rows(5)
    wild = honest.copy()
    wild[: COUNT - HOSTILE - 1] = 1e6
    assert float(aggregate(rule(name), wild, ones(wild)).max()) > 1e5
    lone = honest.copy()
    lone[0] = 1e6
    assert float(np.abs(aggregate(rule(name), lone, ones(lone))).max()) < 10.0
    assert float(aggregate(rule("mean"), lone, ones(lone)).min()) > 1e5


@pytest.mark.parametrize("name", RULES)
def test_too_few_rows_are_refused(name: RuleName) -> None:
    wanted = rule(name)
    least = wanted.least_reports
    assert least == {"mean": 1, "krum": 7, "multi-krum": 7}.get(name, 5)
    aggregate(wanted, rows(0, least), np.ones(least))
    if least > 1:
        with pytest.raises(QuorumError, match=f"{least - 1} reports, the rule {name} needs {least}"):
            aggregate(wanted, rows(0, least - 1), np.ones(least - 1))


# --- reports ----------------------------------------------------------------------------------------------------------

FRONT, TAIL = Block(0, 0, 100, "probe", "gaussian", 4), Block(1, 100, 34, "sketch", "ranked", 3)
SHARED: tuple[Deal, ...] = deal((FRONT, TAIL), "shared", 3, COUNT)


def report(kind: ReportKind, *blocks: Any, samples: int = 16) -> Report:
    values = tuple(np.asarray(block, dtype=np.float32) for block in blocks)
    return Report(kind, bytes(4), 1, 1, samples, bytes(16), 0.0, 5, 6, 7, values)


def reports(seed: int, count: int = COUNT) -> list[tuple[int, Report]]:
    found = rows(seed, count)
    return [(rank, report(ReportKind.PROBE, row[:4], row[4:], samples=rank + 1)) for rank, row in enumerate(found)]


@pytest.mark.parametrize("name", RULES)
def test_the_order_of_arrival_does_not_matter(name: RuleName) -> None:
    answers = reports(1)
    segments, coefficients = combine_probes(SHARED, answers, rule(name))
    assert segments == ((12, 4), (MAX_POSITION, 3))
    again = combine_probes(SHARED, answers[::-1], rule(name))
    assert again[0] == segments
    assert again[1].tobytes() == coefficients.tobytes()


@pytest.mark.parametrize("name", COORDINATEWISE)
def test_units_of_blocks_change_no_bit(name: RuleName) -> None:
    """Rules of single scalars give for both blocks what they give for each alone."""
    answers = reports(2)
    _, both = combine_probes(SHARED, answers, rule(name))
    for number, part in ((0, both[:4]), (1, both[4:])):
        block = dataclasses.replace((FRONT, TAIL)[number], number=0, first=0)
        alone = [(rank, report(ReportKind.PROBE, one.blocks[number])) for rank, one in answers]
        _, found = combine_probes(deal((block,), "shared", 3, COUNT), alone, rule(name))
        assert found.tobytes() == part.tobytes()


def test_krum_takes_one_device_for_all_blocks() -> None:
    answers = reports(3)
    _, coefficients = combine_probes(SHARED, answers, rule("krum"))
    chosen = [
        rank
        for rank, one in answers
        if np.allclose(coefficients[:4], one.blocks[0] / 4, rtol=1e-3)
        and np.allclose(coefficients[4:], one.blocks[1], rtol=1e-3)
    ]
    assert len(chosen) == 1


def test_a_device_has_one_vote_whatever_its_samples() -> None:
    answers = reports(4)
    for name in ROBUST:
        one = combine_probes(SHARED, answers, rule(name))[1]
        alike = [(rank, dataclasses.replace(answer, samples=16)) for rank, answer in answers]
        assert combine_probes(SHARED, alike, rule(name))[1].tobytes() == one.tobytes()


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_dealt_directions_can_be_clipped(clip: Any) -> None:
    deals = deal((FRONT,), "dealt", 0, 3)
    answers = [(rank, report(ReportKind.PROBE, [s, -s, s, -s])) for rank, s in enumerate((1.0, 2.0, 1000.0))]
    segments, coefficients = combine_probes(deals, answers, AggregationSettings(clip=clip))
    assert segments == ((0, 12),)
    np.testing.assert_allclose(np.abs(coefficients * 12), [*[1.0] * 4, *[2.0] * 8], rtol=2e-4)
    _, plain = combine_probes(deals, answers)
    np.testing.assert_allclose(np.abs(plain * 12), [*[1.0] * 4, *[2.0] * 4, *[1000.0] * 4], rtol=2e-4)


@pytest.mark.parametrize("name", RULES)
def test_scores_follow_the_rule(name: RuleName) -> None:
    """Blocks of very different sizes weigh alike; a hostile device does not decide."""
    honest = np.abs(rows(6, COUNT, 5)) + np.array([1.0, 2.0, 3.0, 1e4, 2e4])
    found = [report(ReportKind.SALIENCY, row[:3], row[3:]) for row in honest]
    small, large = combine_scores(found, rule(name))
    assert (small >= honest[:, :3].min(axis=0).astype(np.float32)).all()
    assert (large <= honest[:, 3:].max(axis=0).astype(np.float32)).all()
    found[2] = report(ReportKind.SALIENCY, [1e6, 0, 0], [0, 1e9])
    small, large = combine_scores(found, rule(name))
    assert (float(small[0]) > 1e4) == (name == "mean")


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_travel() -> None:
    run = RunDocument(
        "r", bytes(32).hex(), 1,
        RunSettings(
            training=TrainingSettings(assignment="shared"), quorum=7,
            aggregation=AggregationSettings("multi-krum", 2, "norm", 1.5),
        ),
    )  # fmt: skip
    assert parse(RunDocument, run.encode()) == run


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "name": ({"rule": "average"}, "'average'", "median"),
    "clip": ({"clip": "hard"}, "'hard'", "norm"),
    "negative": ({"rule": "median", "hostile": -1}, "-1", ""),
    "factor": ({"clip": "norm", "clip_factor": 0.0}, "clip factor", ""),
    "nan": ({"clip": "norm", "clip_factor": float("nan")}, "clip factor", ""),
    "mean": ({"hostile": 1}, "counts everybody", "trimmed-mean"),
    "untold": ({"rule": "krum"}, "must know", "--hostile"),
}


@pytest.mark.parametrize("name", BAD)
def test_impossible_rules_are_refused(name: str) -> None:
    values, message, hint = BAD[name]
    with pytest.raises(ConfigError, match=message) as caught:
        AggregationSettings(**values)
    assert hint in caught.value.hint


@pytest.mark.parametrize("estimator", ["stein", "split", "node"])
@pytest.mark.parametrize("name", ROBUST)
def test_dealt_directions_cannot_be_compared(estimator: Any, name: RuleName) -> None:
    wanted = rule(name, hostile=1)
    with pytest.raises(ConfigError, match="compares devices") as caught:
        RunSettings(training=TrainingSettings(estimator=estimator), quorum=8, aggregation=wanted)
    assert "--assign shared" in caught.value.hint
    shared = TrainingSettings(estimator=estimator, assignment="shared")
    RunSettings(training=shared, quorum=8, aggregation=wanted)


@pytest.mark.parametrize("estimator", ["coordinate", "local", "local-node"])
def test_sketches_can_always_be_compared(estimator: Any) -> None:
    RunSettings(training=TrainingSettings(estimator=estimator), aggregation=rule("median", hostile=0))


def test_the_quorum_must_outvote_the_hostile() -> None:
    shared = TrainingSettings(assignment="shared")
    name: Any
    for name, quorum in (("median", 5), ("trimmed-mean", 5), ("krum", 7), ("multi-krum", 7)):
        RunSettings(training=shared, quorum=quorum, aggregation=AggregationSettings(name, 2))
        with pytest.raises(ConfigError, match=f"needs {quorum} reports against 2") as caught:
            RunSettings(training=shared, quorum=quorum - 1, aggregation=AggregationSettings(name, 2))
        assert f"--quorum {quorum}" in caught.value.hint
