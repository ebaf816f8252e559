"""What the coordinator makes of reports, and which reports it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedzo.protocol.aggregation import (
    MAX_PARTICIPANTS,
    average_blocks,
    check_report,
    combine_probes,
    directions_per_device,
    evaluate_reports,
)
from fedzo.protocol.directions import round_coefficients
from fedzo.protocol.documents import Announcement, Hello, pack_participants
from fedzo.protocol.errors import ProtocolError
from fedzo.protocol.messages import Decline, Report, ReportKind, UpdateRecord
from fedzo.protocol.open_round import OpenRound
from fedzo.protocol.roster import Roster
from fedzo.protocol.settings import Assignment, RunSettings, SaliencySettings, TrainingSettings, positions_of
from tests.protocol.builders import small_manifest

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


def check(found: Report, settings: RunSettings = SETTINGS, kind: ReportKind | None = None) -> None:
    check_report(found, kind or found.kind, MANIFEST, settings, 4, DIGEST)


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
    check_report(found, ReportKind.SALIENCY, bare, SETTINGS, 0, DIGEST)


def test_shared_scalars_are_averaged_by_samples() -> None:
    reports = [
        (0, report(ReportKind.PROBE, row(1, 2, 3), samples=1)),
        (1, report(ReportKind.PROBE, row(5, -2, 3), samples=3)),
    ]
    segments, coefficients = combine_probes("shared", 40, 3, reports)
    assert segments == ((40, 3),)
    assert coefficients.tolist() == [4.0, -1.0, 3.0]


@pytest.mark.parametrize(
    ("slots", "segments"),
    [
        ((0,), ((40, 2),)),
        ((3,), ((46, 2),)),
        ((0, 1, 2, 3), ((40, 8),)),
        ((3, 1), ((42, 2), (46, 2))),
        ((2, 0, 1), ((40, 6),)),
        ((0, 3, 2), ((40, 2), (44, 4))),
    ],
)
def test_dealt_scalars_are_strung_up(slots: tuple[int, ...], segments: tuple[tuple[int, int], ...]) -> None:
    reports = [(slot, report(ReportKind.PROBE, row(slot, slot + 0.5))) for slot in slots]
    found, coefficients = combine_probes("dealt", 40, 2, reports)
    assert found == segments
    assert coefficients.tolist() == [value for slot in sorted(slots) for value in (slot, slot + 0.5)]


@given(order=st.permutations(range(5)), assignment=st.sampled_from(["shared", "dealt"]))
def test_the_order_of_arrival_does_not_matter(order: list[int], assignment: Assignment) -> None:
    reports = [(i, report(ReportKind.PROBE, row(0.1 * i, 1 / (i + 1)), samples=i + 1)) for i in range(5)]
    expected = combine_probes(assignment, 7, 2, reports)
    found = combine_probes(assignment, 7, 2, [reports[i] for i in order])
    assert found[0] == expected[0]
    assert found[1].tobytes() == expected[1].tobytes()


def test_coefficients_are_rounded() -> None:
    _, coefficients = combine_probes("dealt", 0, 2, [(0, report(ReportKind.PROBE, row(1 / 3, 1e-35)))])
    assert coefficients.dtype == np.float32
    assert np.array_equal(coefficients, round_coefficients(row(1 / 3, 1e-35).astype(np.float64)))
    assert coefficients[1] == 0.0


@pytest.mark.parametrize("round_", [1, 2, 3, 17])
def test_the_coordinators_slot_is_where_the_device_probes(round_: int) -> None:
    """Both sides derive the positions on their own."""
    roster = Roster()
    for name in "abcdef":
        roster.enrol(name, Hello(1, "", 0.0, 0, 0, "", ""))
    roster.number()
    roster.number()
    head = Announcement("r", round_, "train", pack_participants(np.array([0, 2, 3, 5])), k=3, cursor=12)
    current = OpenRound(head, roster)
    assert current.participants == ("a", "c", "d", "f")
    for rank, name in enumerate(current.participants):
        positions = positions_of("dealt", round_, 12, 3, rank, 4)
        ((first, count),), _ = combine_probes("dealt", 12, 3, [(current.slot(name), PROBE)])
        assert positions[0] == first
        assert count == 3


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


@pytest.mark.parametrize("n_slots", [1, 2, 3, 8, 1_000, 9_999, 10_000, 16_384, MAX_PARTICIPANTS])
@pytest.mark.parametrize("missing", ["nobody", "every second", "the second half", "one in three"])
def test_an_update_of_any_fleet_fits_one_message(n_slots: int, missing: str) -> None:
    k = directions_per_device(60_000, n_slots, 1 << 62)
    assert k >= 1
    step = {"every second": 2, "one in three": 3}.get(missing, 1)
    slots = [slot for slot in range(n_slots) if step == 1 or slot % step != 1]
    if missing == "the second half":
        slots = slots[: max(1, n_slots // 2)]
    block = np.ones(k, dtype=np.float32)
    segments, coefficients = combine_probes("dealt", 5, k, [(slot, report(ReportKind.PROBE, block)) for slot in slots])
    record = UpdateRecord(0, 1, 0.5, segments, coefficients, DIGEST, DIGEST)  # would refuse what does not fit
    assert record.coefficients.size == k * len(slots)


@pytest.mark.parametrize(
    ("k", "n_slots", "n_positions", "expected"),
    [(64, 8, 65_536, 64), (64, 2_000, 65_536, 30), (64, 8, 64, 8), (64, 100, 64, 1), (60_000, 1, 1 << 62, 60_000)],
)
def test_directions_per_device(k: int, n_slots: int, n_positions: int, expected: int) -> None:
    assert directions_per_device(k, n_slots, n_positions) == expected
