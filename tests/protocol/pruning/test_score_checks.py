"""Scores that the server computes again: what a board with wrong numerics changes, and what it does not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fedzo.protocol.pruning.layer_densities import LayerDensities, uniform_densities
from fedzo.protocol.pruning.mask import Mask
from fedzo.protocol.pruning.score_checks import checked_ranks, largest_difference
from fedzo.protocol.server_side.coordinator_events import CheckScores, MakeMask, MaskMade, OfferBlob, ScoresChecked
from fedzo.protocol.settings import PruningMethod, RunSettings, SaliencySettings
from tests.protocol.simulation.desk import NAMES, SETTINGS, Desk, change
from tests.protocol.simulation.fakes import manifest_for

SPARSE = change(SETTINGS, sparsity=0.5, saliency=SaliencySettings(samples=8))
MANIFEST = manifest_for("stein")


def scoring(settings: RunSettings = SPARSE, differences: dict[str, float | None] | None = None) -> Desk:
    desk = Desk(settings).connect()
    desk.differences = differences or {}
    desk.join()
    assert phase(desk) == "saliency"
    return desk


def phase(desk: Desk) -> str:
    return desk.head.phase


def masks(desk: Desk) -> list[bytes]:
    return [payload for kind, _, _, payload in desk.journal if kind == "mask"]


def test_scores_that_are_off_do_not_count() -> None:
    bad = NAMES[1]
    rigged = scoring(differences={bad: 0.05})
    rigged.report(*NAMES)
    refusals = [(device, text) for kind, _, device, text in rigged.journal if kind == "refusal"]
    assert refusals == [
        (bad, b"its scores differ from the server's by 5.00e-02, the limit is 5e-03: they do not count")
    ]
    assert phase(rigged) == "train"
    without = scoring()
    without.report(*[name for name in NAMES if name != bad])
    without.decline(bad)
    assert masks(rigged) == masks(without)
    everyone = scoring()
    everyone.report(*NAMES)
    assert masks(rigged) != masks(everyone)
    assert bad in rigged.participants(), "it may still train"


def test_a_restart_remembers_the_verdict() -> None:
    desk = scoring(differences={NAMES[0]: 0.05})
    desk.report(*NAMES[:2])
    again = Desk(SPARSE, journal=desk.journal).connect().presence(*NAMES)
    assert [c.device for c in again.trace if isinstance(c, CheckScores)] == [NAMES[1]]
    again.report(*NAMES[2:])
    undisturbed = scoring(differences={NAMES[0]: 0.05})
    undisturbed.report(*NAMES)
    assert masks(again) == masks(undisturbed)


@pytest.mark.parametrize(("difference", "used"), [(0.0, 4), (9.0, 3)])
def test_a_check_is_waited_for_beyond_the_deadline(difference: float, used: int) -> None:
    """The deadline bounds the devices' answers; scores that were not checked would count as if they were good."""
    desk = scoring(differences={NAMES[2]: None})
    desk.report(*NAMES)
    for _ in range(3):
        assert phase(desk) == "saliency"
        desk.wait(SPARSE.deadline_s + 1)
    desk.on(ScoresChecked(1, NAMES[2], difference))
    assert phase(desk) == "train"
    assert desk.kinds().count("report") - desk.kinds().count("refusal") == used


def test_a_scoring_round_closes_without_the_devices_once_its_deadline_and_its_checks_are_over() -> None:
    desk = scoring(differences={NAMES[1]: None})
    desk.report(*NAMES[:3])
    desk.wait(SPARSE.deadline_s + 1)
    assert phase(desk) == "saliency"
    desk.on(ScoresChecked(1, NAMES[1], 0.0))
    assert phase(desk) == "train"


def test_without_a_quorum_of_good_boards_the_run_stops() -> None:
    desk = scoring(differences=dict.fromkeys(NAMES, 0.5))
    desk.report(*NAMES)
    assert desk.machine.finished
    assert "0 of 4 devices could answer" in str(desk.finish().error)


@pytest.mark.parametrize(
    ("checked", "inputs", "count"), [(8, "gaussian", 4), (2, "gaussian", 2), (0, "gaussian", 0), (8, "data", 0)]
)
def test_how_many_reports_are_checked(checked: int, inputs: str, count: int) -> None:
    saliency = dataclasses.replace(SPARSE.saliency, checked=checked, inputs=inputs)  # type: ignore[arg-type]
    desk = scoring(change(SPARSE, saliency=saliency))
    desk.report(*NAMES)
    assert len([c for c in desk.trace if isinstance(c, CheckScores)]) == count
    assert phase(desk) == "train"


def test_the_drawn_devices_change_with_the_round() -> None:
    settings = change(SPARSE, saliency=dataclasses.replace(SPARSE.saliency, checked=3))
    drawn = [checked_ranks(settings, round_, 100) for round_ in range(20)]
    assert {len(ranks) for ranks in drawn} == {3}
    assert len(set(drawn)) > 10
    assert checked_ranks(settings, 1, 2) == {0, 1}


def test_the_difference_is_that_of_the_worst_layer() -> None:
    rng = np.random.default_rng(1)
    expected = [rng.uniform(1, 2, n).astype(np.float32) for n in (MANIFEST.n_units, MANIFEST.n_moments)]
    assert largest_difference(MANIFEST, expected, expected) == 0.0
    rigged = [part * np.float32(1.05) for part in expected]
    assert largest_difference(MANIFEST, expected, rigged) == pytest.approx(0.05, rel=1e-5)
    one = [part.copy() for part in expected]
    first = MANIFEST.units[0]
    one[1][first.moment_offset : first.moment_offset + first.n_moments] *= np.float32(0.9)
    assert largest_difference(MANIFEST, expected, one) == pytest.approx(0.1, rel=1e-5)
    nothing = [np.zeros_like(part) for part in expected]
    assert largest_difference(MANIFEST, nothing, expected) == float("inf")


@pytest.mark.parametrize("method", ["magnitude", "erk", "random"])
def test_masks_without_devices(method: PruningMethod) -> None:
    desk = Desk(change(SPARSE, saliency=SaliencySettings(method=method))).connect().join()
    assert phase(desk) == "train"
    (encoded,) = masks(desk)
    assert desk.head.mask_size == len(encoded)
    assert [c.data for c in desk.trace if isinstance(c, OfferBlob)] == [encoded]
    if method != "magnitude":
        assert LayerDensities.decode(encoded, MANIFEST.layout).seed == SPARSE.seed
    desk.play()
    again = Desk(change(SPARSE, saliency=SaliencySettings(method=method)), journal=desk.journal)
    assert again.machine.finished
    assert again.machine.replica.digest == desk.machine.replica.digest


def test_a_mask_that_the_server_s_engine_makes() -> None:
    settings = change(SPARSE, saliency=SaliencySettings(method="synflow"))
    desk = Desk(settings).connect().join()
    assert phase(desk) == "enrol"
    assert [c for c in desk.trace if isinstance(c, MakeMask)]
    assert desk.machine.wakeup is None, "there is nothing to do until the mask is made"
    encoded = uniform_densities(MANIFEST.layout, 0.5, 1).encode()
    desk.on(MaskMade(encoded))
    assert phase(desk) == "train"
    assert masks(desk) == [encoded]
    desk.on(MaskMade(Mask.dense(MANIFEST.layout).encode()))
    assert masks(desk) == [encoded]
