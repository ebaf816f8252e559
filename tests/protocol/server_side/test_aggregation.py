"""What the coordinator makes of reports, and which reports it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedzo.protocol.device_side.tasks import make_task
from fedzo.protocol.errors import ProtocolError
from fedzo.protocol.perturbation.blocks import Block, BlockKind, Deal, deal, whole_block
from fedzo.protocol.perturbation.directions import MAX_POSITION, round_coefficients
from fedzo.protocol.pruning.mask import Mask
from fedzo.protocol.replay.optimisers import OptimiserConfig
from fedzo.protocol.replay.update import Replica
from fedzo.protocol.server_side.aggregation import (
    MAX_PARTICIPANTS,
    average_blocks,
    check_report,
    combine_probes,
    evaluate_reports,
)
from fedzo.protocol.server_side.open_round import OpenRound
from fedzo.protocol.server_side.roster import Roster
from fedzo.protocol.settings import Assignment, RunSettings, SaliencySettings, TrainingSettings
from fedzo.protocol.wire.documents import Announcement, Hello, RunDocument, pack_participants
from fedzo.protocol.wire.messages import Decline, Report, ReportKind, UpdateRecord
from tests.protocol.builders import one_parameter, small_manifest

DIGEST = bytes(range(16))
MANIFEST = small_manifest()
SETTINGS = RunSettings(
    saliency=SaliencySettings(samples=64), training=TrainingSettings(k=4, batch=16), scalar_limit=100.0
)
WITH_DRAWS = dataclasses.replace(SETTINGS, saliency=SaliencySettings(samples=64, draws=2))


def row(*values: float) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


def report(kind: ReportKind, *blocks: NDArray[np.float32], **changes: Any) -> Report:
    fields: dict[str, Any] = {"samples": 16, "weights_digest": DIGEST, "decline": Decline.NONE} | changes
    return Report(
        kind, bytes(4), 1, 1, fields["samples"], fields["weights_digest"], 0.0, 5, 6, 7, blocks, fields["decline"]
    )


SHARED = (Deal(Block(0, 0, 134, "probe", "gaussian", 4), 4, 1, 0),)
FRONT, TAIL = Block(0, 0, 100, "probe", "gaussian", 4), Block(1, 100, 34, "sketch", "ranked", 3)


def check(found: Report, settings: RunSettings = SETTINGS, kind: ReportKind | None = None) -> None:
    check_report(found, kind or found.kind, MANIFEST, settings, SHARED, DIGEST)


PROBE = report(ReportKind.PROBE, row(1, -100, 0, 2))
SCORES = (np.full(MANIFEST.n_units, 2, dtype=np.float32), np.full(MANIFEST.n_moments, 3, dtype=np.float32))
SALIENCY = report(ReportKind.SALIENCY, *SCORES)
EVALUATE = report(ReportKind.EVALUATE, row(1e30, 3, 4))


def test_good_reports_pass() -> None:
    check(PROBE)
    check(SALIENCY)
    check(EVALUATE)
    check(report(ReportKind.SALIENCY, *SCORES, row(1, 2)), WITH_DRAWS)
    check(report(ReportKind.SALIENCY, *SCORES, samples=64))
    check(report(ReportKind.PROBE, decline=Decline.NON_FINITE, samples=0, weights_digest=bytes(16)))


REFUSED: dict[str, tuple[Report, str]] = {
    "count": (report(ReportKind.PROBE, row(1, 2, 3)), "instead of"),
    "blocks": (report(ReportKind.PROBE, row(1, 2), row(3, 4)), "instead of"),
    "empty block": (report(ReportKind.PROBE, row()), "instead of"),
    "limit": (report(ReportKind.PROBE, row(1, 2, 3, 100.1)), "over the limit"),
    "negative limit": (report(ReportKind.PROBE, row(1, 2, 3, -100.1)), "over the limit"),
    "huge": (report(ReportKind.PROBE, row(1, 2, 3, 3e38)), "over the limit"),
    "digest": (report(ReportKind.PROBE, row(1, 2, 3, 4), weights_digest=bytes(16)), "other weights"),
    "no samples": (report(ReportKind.PROBE, row(1, 2, 3, 4), samples=0), "samples"),
    "weight": (report(ReportKind.PROBE, row(1, 2, 3, 4), samples=17), "allow 1 to 16"),
    "heavy weight": (report(ReportKind.PROBE, row(1, 2, 3, 4), samples=2**32 - 1), "allow 1 to 16"),
    "saliency weight": (report(ReportKind.SALIENCY, *SCORES, samples=65), "allow 1 to 64"),
    "saliency count": (report(ReportKind.SALIENCY, SCORES[0]), "instead of"),
    "saliency order": (report(ReportKind.SALIENCY, SCORES[1], SCORES[0]), "instead of"),
    "saliency draws": (report(ReportKind.SALIENCY, *SCORES, row(1, 2)), "instead of"),
    "negative saliency": (report(ReportKind.SALIENCY, SCORES[0], -SCORES[1]), "negative"),
    "evaluation count": (report(ReportKind.EVALUATE, row(1, 2)), "instead of"),
    "evaluation": (report(ReportKind.EVALUATE, row(1, 5, 4)), "5 correct answers of 4"),
    "evaluation of nothing": (report(ReportKind.EVALUATE, row(0, 0, 0)), "of 0 samples"),
    "evaluation of too much": (report(ReportKind.EVALUATE, row(0, 0, 1e30)), "1e\\+30 samples"),
    "negative evaluation": (report(ReportKind.EVALUATE, row(-1, 0, 4)), "negative"),
    "negative correct": (report(ReportKind.EVALUATE, row(1, -1, 4)), "negative"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_reports_are_refused(name: str) -> None:
    found, message = REFUSED[name]
    with pytest.raises(ProtocolError, match=message):
        check(found)


@pytest.mark.parametrize("found", [PROBE, SALIENCY, EVALUATE], ids=lambda found: found.kind.name.lower())
def test_reports_of_another_kind_are_refused(found: Report) -> None:
    for kind in ReportKind:
        if kind is not found.kind:
            with pytest.raises(ProtocolError, match="report in a"):
                check(found, kind=kind)
    declined = report(found.kind, decline=Decline.FAILED)
    with pytest.raises(ProtocolError, match="report in a"):
        check(declined, kind=ReportKind.PROBE if found.kind is not ReportKind.PROBE else ReportKind.EVALUATE)


def test_a_model_without_units_is_no_trap() -> None:
    """Nothing to shift: both blocks of a saliency report are empty."""
    bare = dataclasses.replace(MANIFEST, units=())
    found = report(ReportKind.SALIENCY, row(), row())
    check_report(found, ReportKind.SALIENCY, bare, SETTINGS, (), DIGEST)


def test_a_report_has_the_scalars_of_every_block() -> None:
    deals = deal((FRONT, TAIL), "dealt", 3, 2)
    good = report(ReportKind.PROBE, row(1, 2, 3, 4), row(5, 6, 7))
    check_report(good, ReportKind.PROBE, MANIFEST, SETTINGS, deals, DIGEST)
    for blocks in [
        (row(1, 2, 3, 4),),
        (row(5, 6, 7), row(1, 2, 3, 4)),
        (row(1, 2, 3, 4), row(5, 6)),
        (row(1, 2, 3, 4), row(5, 6, 7), row()),
    ]:
        with pytest.raises(ProtocolError, match="instead of"):
            check_report(report(ReportKind.PROBE, *blocks), ReportKind.PROBE, MANIFEST, SETTINGS, deals, DIGEST)
    wild = report(ReportKind.PROBE, row(1, 2, 3, 4), row(5, 6, 700))
    with pytest.raises(ProtocolError, match="over the limit"):
        check_report(wild, ReportKind.PROBE, MANIFEST, SETTINGS, deals, DIGEST)


def one(assignment: Assignment, k: int, n_devices: int, step: int = 0) -> tuple[Deal, ...]:
    """What a round of one probed block deals."""
    return deal(whole_block("gaussian", 134, k), assignment, step, n_devices)


def test_shared_scalars_are_averaged_by_samples() -> None:
    reports = [
        (0, report(ReportKind.PROBE, row(1, 2, 3), samples=1)),
        (1, report(ReportKind.PROBE, row(5, -2, 3), samples=3)),
    ]
    segments, coefficients = combine_probes(one("shared", 3, 2, step=10), reports)
    assert segments == ((30, 3),)
    np.testing.assert_allclose(coefficients, np.array([4.0, -1.0, 3.0]) / 3, rtol=2e-4)


def test_weights_by_samples_are_exact() -> None:
    """Products in float32 would lose what makes the difference here."""
    exact, reports = 65_521 * (1.0 + 2.0**-12), [(0, report(ReportKind.PROBE, row(1.0 + 2.0**-12), samples=65_521))]
    _, coefficients = combine_probes(one("shared", 1, 1), reports)
    assert coefficients.tolist() == round_coefficients(np.array([exact / 65_521])).tolist() == [1.0 + 2.0**-12]


@pytest.mark.parametrize(
    ("ranks", "segments"),
    [
        ((0,), ((40, 2),)),
        ((3,), ((46, 2),)),
        ((0, 1, 2, 3), ((40, 8),)),
        ((3, 1), ((42, 2), (46, 2))),
        ((2, 0, 1), ((40, 6),)),
        ((0, 3, 2), ((40, 2), (44, 4))),
    ],
)
@pytest.mark.parametrize("step", [5, 6])
def test_dealt_scalars_are_strung_up(ranks: tuple[int, ...], segments: tuple[tuple[int, int], ...], step: int) -> None:
    """Those of a slot, whichever device has it; their mean is over the positions that were answered."""
    turned = {rank: (rank + step) % 4 for rank in range(4)}
    slots = {slot: rank for rank, slot in turned.items()}
    reports = [(slots[slot], report(ReportKind.PROBE, row(slot, slot + 0.5))) for slot in ranks]
    found, coefficients = combine_probes(one("dealt", 2, 4, step), reports)
    assert found == tuple((first + 8 * (step - 5), count) for first, count in segments)
    values = [value / (2 * len(ranks)) for slot in sorted(ranks) for value in (slot, slot + 0.5)]
    np.testing.assert_allclose(coefficients, values, rtol=2e-4)


def test_dealt_scalars_count_alike_whatever_their_samples() -> None:
    reports = [(rank, report(ReportKind.PROBE, row(8.0), samples=1 + 9 * rank)) for rank in range(2)]
    _, coefficients = combine_probes(one("dealt", 1, 2), reports)
    assert coefficients.tolist() == [4.0, 4.0]


def test_a_probed_and_a_sketched_block() -> None:
    """Dealt scalars are divided by the positions answered; a sketch is the mean over devices, by samples."""
    deals = deal((FRONT, TAIL), "dealt", 2, 3)
    reports = [
        (0, report(ReportKind.PROBE, row(1, 2, 3, 4), row(1, 2, 3), samples=1)),
        (2, report(ReportKind.PROBE, row(-8, -16, 8, 16), row(5, -2, 3), samples=3)),
    ]
    segments, coefficients = combine_probes(deals, reports)
    # Step 2: rank 0 has slot 2 and rank 2 has slot 1; of a sketch positions are places in its ranking.
    assert segments == ((24 + 4, 8), (MAX_POSITION, 3))
    assert coefficients.tolist() == [-1, -2, 1, 2, 0.125, 0.25, 0.375, 0.5, 4, -1, 3]
    shared, values = combine_probes(deal((FRONT, TAIL), "shared", 2, 3), reports)
    assert shared == ((8, 4), (MAX_POSITION, 3))
    mean = np.array([(1 - 24) / 4, (2 - 48) / 4, (3 + 24) / 4, (4 + 48) / 4]) / 4
    np.testing.assert_allclose(values, [*mean, 4, -1, 3], rtol=2e-4)


@given(
    order=st.permutations(range(5)),
    assignment=st.sampled_from(["shared", "dealt"]),
    kind=st.sampled_from(["probe", "sketch"]),
)
def test_the_order_of_arrival_does_not_matter(order: list[int], assignment: Assignment, kind: BlockKind) -> None:
    blocks = (Block(0, 0, 64, "probe", "gaussian", 2), Block(1, 64, 70, kind, "hadamard", 1))
    rows = [(row(0.1 * i, 1 / (i + 1)), row(3.0 / (i + 2))) for i in range(5)]
    reports = [(i, report(ReportKind.PROBE, *rows[i], samples=i + 1)) for i in range(5)]
    deals = deal(blocks, assignment, 7, 5)
    expected = combine_probes(deals, reports)
    found = combine_probes(deals, [reports[i] for i in order])
    assert found[0] == expected[0]
    assert found[1].tobytes() == expected[1].tobytes()


def test_coefficients_are_rounded() -> None:
    _, coefficients = combine_probes(one("dealt", 2, 1), [(0, report(ReportKind.PROBE, row(1 / 3, 1e-35)))])
    assert coefficients.dtype == np.float32
    assert np.array_equal(coefficients, round_coefficients(row(1 / 3, 1e-35).astype(np.float64) / 2))
    assert coefficients[1] == 0.0


@pytest.mark.parametrize("step", [0, 1, 2, 3, 17])
@pytest.mark.parametrize("assignment", ["dealt", "shared"])
def test_the_update_holds_what_the_device_probed(step: int, assignment: Assignment) -> None:
    """Both sides derive the positions on their own."""
    roster = Roster()
    for name in "abcdef":
        roster.enrol(name, Hello(1, "", 0.0, 0, 0, "", ""))
    roster.number()
    roster.number()
    head = Announcement("r", 9, "train", pack_participants(np.array([0, 2, 3, 5])), log_length=step)
    blocks = (Block(0, 0, 100, "probe", "hadamard", 3), Block(1, 100, 34, "sketch", "ranked", 2))
    layout = one_parameter(134)
    replica = Replica(layout, Mask.dense(layout), 1, 2, blocks, OptimiserConfig())
    settings = RunSettings(training=TrainingSettings(assignment=assignment))
    run = RunDocument("r", bytes(32).hex(), 1, settings)
    current = OpenRound(head, roster, SETTINGS, deal(blocks, assignment, step, 4))
    assert current.participants == ("a", "c", "d", "f")
    for ordinal, name in zip((0, 2, 3, 5), current.participants, strict=True):
        task = make_task(run, head, ordinal, 1, replica)
        assert task is not None
        answer = report(ReportKind.PROBE, row(1, 2, 3), row(4, 5), weights_digest=replica.digest)
        current.check(name, answer, MANIFEST, replica.digest)
        segments, _ = combine_probes(deal(blocks, assignment, step, 4), [(current.rank(name), answer)])
        assert np.array_equal(task.positions[1], replica.coordinates(1, 2))
        probed = [*task.positions[0].tolist(), MAX_POSITION, MAX_POSITION + 1]
        assert [p for first, count in segments for p in range(first, first + count)] == probed
    assert make_task(run, head, 1, 1, replica) is None


def test_blocks_are_averaged_by_samples() -> None:
    reports = [
        report(ReportKind.SALIENCY, row(1, 3), row(2), samples=1),
        report(ReportKind.SALIENCY, row(5, 3), row(0), samples=3),
    ]
    first, second = average_blocks(reports)
    assert first.tolist() == [4.0, 3.0]
    assert second.tolist() == [0.5]
    assert first.dtype == np.float64


def test_evaluations_are_summed() -> None:
    found = evaluate_reports([EVALUATE, report(ReportKind.EVALUATE, row(2, 1, 6))])
    assert found is not None
    assert (found.samples, found.accuracy) == (10, 0.4)
    assert found.mean_loss == pytest.approx(1e29)
    assert evaluate_reports([]) is None


BLOCKS: dict[str, tuple[Block, ...]] = {
    "one": (Block(0, 0, 1 << 20, "probe", "gaussian", 60_000),),
    "probed": tuple(Block(i, i << 20, 1 << 20, "probe", "gaussian", 60_000) for i in range(2)),
    "sketched": (
        Block(0, 0, 1 << 20, "probe", "gaussian", 60_000),
        Block(1, 1 << 20, 1 << 20, "sketch", "ranked", 60_000),
    ),
    "small": (Block(0, 0, 9, "probe", "hadamard", 60_000), Block(1, 9, 5, "probe", "hadamard", 60_000)),
}


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("n_devices", [1, 2, 3, 8, 1_000, 9_999, 10_000, 12_000, 16_384, MAX_PARTICIPANTS])
@pytest.mark.parametrize("missing", ["nobody", "every second", "the second half", "one in three"])
def test_an_update_of_any_fleet_fits_one_message(kind: str, n_devices: int, missing: str) -> None:
    blocks = BLOCKS[kind]
    n_devices = min(n_devices, MAX_PARTICIPANTS // len(blocks))
    deals = deal(blocks, "dealt", 0, n_devices)
    assert all(one.k >= 1 for one in deals)
    step = {"every second": 2, "one in three": 3}.get(missing, 1)
    ranks = [rank for rank in range(n_devices) if step == 1 or rank % step != 1]
    if missing == "the second half":
        ranks = ranks[: max(1, n_devices // 2)]
    rows = [np.ones(one.k, dtype=np.float32) for one in deals]
    answer = report(ReportKind.PROBE, *rows)  # would refuse what does not fit
    segments, coefficients = combine_probes(deals, [(rank, answer) for rank in ranks])
    record = UpdateRecord(0, 1, 0.5, segments, coefficients, DIGEST, DIGEST)  # as well
    assert record.coefficients.size == sum(one.k * (len(ranks) if one.n_slots > 1 else 1) for one in deals)
