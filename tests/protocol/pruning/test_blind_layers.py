"""Layers whose unit shifts do not show: real networks against automatic differentiation, and what their scores are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedzo.broker_server.server_passes import ServerPasses
from fedzo.edge_runtime.estimation.saliency import SaliencyResult, UnitShiftScorer
from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.storage.artifact import Artifact, load_artifact
from fedzo.exporter.artifact import export_artifact
from fedzo.protocol.artifact.layout import Initialiser, Layout, initial_weights
from fedzo.protocol.artifact.manifest import Manifest
from fedzo.protocol.pruning.blind_layers import visibility
from fedzo.protocol.pruning.mask import Mask, threshold
from fedzo.protocol.pruning.mask_choice import federated_mask
from fedzo.protocol.pruning.saliency import diagonal_scores, gaussian_inputs, kernel_scores
from fedzo.protocol.server_side.coordinator_events import CheckScores, ScoresChecked
from fedzo.protocol.settings import RunSettings, SaliencySettings
from fedzo.protocol.wire.documents import RunDocument
from tests.protocol.builders import seeded_normals, small_manifest
from tests.protocol.pruning import blind_networks

SAMPLES, ROUND, ORDINAL = 8, 1, 0
SHAPES = {"instance": (3, 12, 12), "groups": (3, 12, 12), "attention": (9, 12)}
CLASSES = {"instance": 10, "groups": 10, "attention": 6}
BLIND = {"instance": "2.weight", "groups": "0.weight", "attention": "keys.weight"}
ZEROS = {"zero_head": 3, "zero_branch": 2}


def exported(name: str, shape: tuple[int, ...], n_classes: int, folder: Path) -> Artifact:
    export_artifact(f"{blind_networks.__name__}:{name}", shape, n_classes, 0.8, 3, folder / name)
    return load_artifact(folder / name)


def measured(artifact: Artifact, mask: Mask, *, micro_batch: int, draws: int = 0) -> SaliencyResult:
    manifest = artifact.manifest
    weights = initial_weights(manifest.layout, manifest.seed)[mask.kept]
    x = gaussian_inputs(manifest, 1, ROUND, ORDINAL, SAMPLES)
    with Engine(artifact, mask, micro_batch=micro_batch, threads=1) as engine:
        return UnitShiftScorer(manifest, draws=draws, seed=1).score(engine, weights, x, ROUND)


def exact(manifest: Manifest, network: Callable[[], torch.nn.Module]) -> NDArray[np.float32]:
    """The diagonal score by automatic differentiation."""
    layout, weights = manifest.layout, initial_weights(manifest.layout, manifest.seed)
    torch.manual_seed(manifest.seed)
    module = network().eval()
    named = dict(module.named_parameters())
    leaves = [named[p.name] for p in layout.parameters]
    with torch.no_grad():
        for number, leaf in enumerate(leaves):
            leaf.copy_(torch.from_numpy(weights[layout.slice_of(number)].reshape(leaf.shape)))
    squares = [torch.zeros_like(leaf) for leaf in leaves]
    for sample in torch.from_numpy(gaussian_inputs(manifest, 1, ROUND, ORDINAL, SAMPLES)):
        for output in module(sample[None])[0]:
            for square, slope in zip(squares, torch.autograd.grad(output, leaves, retain_graph=True), strict=True):
                square += slope**2
    parts = [(leaf**2 * square / SAMPLES).detach().ravel() for leaf, square in zip(leaves, squares, strict=True)]
    return torch.cat(parts).numpy()


def survivors(manifest: Manifest, scores: NDArray[np.float32], sparsity: float) -> dict[str, int]:
    layout = manifest.layout
    counts = threshold(layout, scores, sparsity).counts()
    return {unit.parameter: int(counts[layout.position_of(unit.parameter)]) for unit in manifest.units}


@dataclass(frozen=True)
class Case:
    name: str
    artifact: Artifact
    found: SaliencyResult
    alone: SaliencyResult
    exact: NDArray[np.float32]

    @property
    def manifest(self) -> Manifest:
        return self.artifact.manifest

    @property
    def weights(self) -> NDArray[np.float32]:
        return initial_weights(self.manifest.layout, self.manifest.seed)

    def scores(
        self, totals: NDArray[np.float32] | None = None, shift: float | None = 1e-2, alone: bool = False
    ) -> NDArray[np.float32]:
        found = self.alone if alone else self.found
        return diagonal_scores(self.manifest, self.weights, found.sensitivities, found.moments, totals, shift=shift)


@pytest.fixture(scope="module", params=list(SHAPES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name = request.param
    artifact = exported(name, SHAPES[name], CLASSES[name], tmp_path_factory.mktemp("blind"))
    mask = Mask.dense(artifact.manifest.layout)
    found, alone = (measured(artifact, mask, micro_batch=size, draws=4) for size in (SAMPLES, 1))
    return Case(name, artifact, found, alone, exact(artifact.manifest, getattr(blind_networks, name)))


def test_a_blind_layer_is_pruned_like_the_others(case: Case) -> None:
    wanted, kept = (survivors(case.manifest, scores, 0.8) for scores in (case.exact, case.scores()))
    assert all(3 * kept[name] >= wanted[name] for name in wanted), (kept, wanted)
    scores = case.exact, case.scores(), case.scores(shift=None)
    wanted_, kept_, measured_ = (survivors(case.manifest, each, 0.5)[BLIND[case.name]] for each in scores)
    assert 3 * kept_ >= 2 * wanted_ > 3 * measured_


def test_layers_that_show_keep_their_scores(case: Case) -> None:
    layout, raw, scores = case.manifest.layout, case.scores(shift=None), case.scores()
    differing = [p.name for k, p in enumerate(layout.parameters) if (raw != scores)[layout.slice_of(k)].any()]
    assert differing == [BLIND[case.name]]


def test_a_mask_does_not_follow_the_rounding(case: Case) -> None:
    one, other = (threshold(case.manifest.layout, case.scores(alone=alone), 0.8).kept for alone in (False, True))
    assert np.count_nonzero(one != other) <= 2
    layout = case.manifest.layout
    part = layout.slice_of(layout.position_of(BLIND[case.name]))
    raw, again = (case.scores(shift=None, alone=alone)[part] for alone in (False, True))
    assert not np.allclose(raw, again, rtol=0.05, atol=0.0), "as measured, the layer's scores are noise"


def test_layer_draws_give_a_blind_layer_its_measured_total(case: Case) -> None:
    layout, totals = case.manifest.layout, case.found.layer_totals
    assert totals is not None
    part = layout.slice_of(layout.position_of(BLIND[case.name]))
    number = [unit.parameter for unit in case.manifest.units].index(BLIND[case.name])
    total = float(case.scores(totals)[part].sum(dtype=np.float64))
    assert total == pytest.approx(float(totals[number]), rel=1e-5)
    assert total == pytest.approx(float(case.exact[part].sum(dtype=np.float64)), rel=0.5)


@pytest.mark.parametrize("draws", [0, 4])
def test_a_right_board_passes_the_check_and_a_wrong_one_does_not(case: Case, draws: int) -> None:
    saliency, manifest = SaliencySettings(samples=SAMPLES, draws=draws), case.manifest
    settings = RunSettings(seed=1, sparsity=0.8, saliency=saliency)
    passes = ServerPasses(case.artifact, RunDocument("run-1", case.artifact.digest.hex(), 1, settings))

    def difference(*blocks: NDArray[np.float32]) -> float:
        mask = Mask.dense(manifest.layout)
        checked = passes.answer(CheckScores(ROUND, "b", ORDINAL, mask, case.weights, blocks))
        assert isinstance(checked, ScoresChecked)
        return checked.difference

    right = case.alone.blocks if draws else case.alone.blocks[:2]
    assert difference(*right) < saliency.check_limit / 10
    seeing = next(u for u in manifest.units if u.parameter != BLIND[case.name])
    wrong = [block.copy() for block in right]
    wrong[0][seeing.shift_offset : seeing.shift_offset + seeing.n_units] *= np.float32(1.01)
    assert difference(*wrong) > saliency.check_limit


def test_the_server_names_the_layer(case: Case) -> None:
    settings = RunSettings(sparsity=0.8)
    mask = Mask.dense(case.manifest.layout)
    chosen = federated_mask(case.manifest, settings, mask, case.weights, case.found.blocks[:2], 1)
    assert chosen.unscored == (BLIND[case.name],)
    assert Mask.decode(chosen.encoded, case.manifest.layout) == threshold(case.manifest.layout, case.scores(), 0.8)
    settings = RunSettings(sparsity=0.8, saliency=SaliencySettings(method="ntk-sap"))
    chosen = federated_mask(case.manifest, settings, mask, case.weights, case.found.blocks[:2], 1)
    assert chosen.unscored == (BLIND[case.name],)


def test_ntk_sap_shares_a_blind_layer_s_part_by_weights_and_inputs(case: Case) -> None:
    layout, manifest = case.manifest.layout, case.manifest
    unit = next(u for u in manifest.units if u.parameter == BLIND[case.name])
    part = layout.slice_of(layout.position_of(unit.parameter))
    scores = kernel_scores(
        manifest, case.weights, case.found.sensitivities, case.found.moments, np.ones(layout.size, bool)
    )[part].reshape(unit.n_units, -1)
    moments = case.found.moments[unit.moment_offset : unit.moment_offset + unit.n_moments].astype(np.float64)
    wanted = case.weights[part].reshape(unit.n_units, -1).astype(np.float64) ** 2 * moments
    np.testing.assert_allclose(scores / scores.sum(), wanted / wanted.sum(), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", list(ZEROS))
def test_zeros_at_the_start_cost_no_layer_its_weights(name: str, steps: int, tmp_path: Path) -> None:
    artifact = exported(name, (3, 8, 8), 10, tmp_path)
    manifest, layout = artifact.manifest, artifact.manifest.layout
    settings = RunSettings(sparsity=0.8, saliency=SaliencySettings(steps=0 if steps == 1 else steps))
    mask = Mask.dense(layout)
    for step in range(1, steps + 1):
        blocks = measured(artifact, mask, micro_batch=SAMPLES).blocks
        weights = initial_weights(layout, manifest.seed)[mask.kept]
        chosen = federated_mask(manifest, settings, mask, weights, blocks, step)
        assert len(chosen.unscored) == ZEROS[name]
        mask = Mask.decode(chosen.encoded, layout)
    assert mask.sparsity == pytest.approx(0.8, abs=1e-3)
    for unit in manifest.units:
        part = layout.slice_of(layout.position_of(unit.parameter))
        assert mask.kept[part].mean() > 0.05, unit.parameter


# --- without a network ------------------------------------------------------------------------------------------------

SMALL = small_manifest()
WEIGHTS = initial_weights(SMALL.layout, SMALL.seed)
SENSITIVITIES = np.abs(seeded_normals(4, 0, SMALL.n_units))
MOMENTS = np.abs(seeded_normals(4, 1, SMALL.n_moments))


def noisy(level: float, *units: int) -> NDArray[np.float32]:
    out = SENSITIVITIES.copy()
    out[list(units)] = level
    return out


def test_a_dead_unit_beside_others_stays_dead() -> None:
    scores = diagonal_scores(SMALL, WEIGHTS, noisy(0.0, 1), MOMENTS)
    assert not scores[18:36].any()
    assert scores[:18].all()


@pytest.mark.parametrize("level", [0.0, 1e-10])
def test_a_blind_layer_without_a_total_takes_that_of_the_others(level: float) -> None:
    scores = diagonal_scores(SMALL, WEIGHTS, noisy(level, 0, 1, 2, 3), MOMENTS).astype(np.float64)
    assert scores[:72].sum() == pytest.approx(scores[80:].sum(), rel=1e-5)
    alike = diagonal_scores(SMALL, WEIGHTS, noisy(1.0, 0, 1, 2, 3), MOMENTS).astype(np.float64)
    np.testing.assert_allclose(scores[:72] / scores[:72].sum(), alike[:72] / alike[:72].sum(), rtol=1e-5)


@pytest.mark.parametrize(("total", "used"), [(0.25, True), (1e-10, False)])
def test_a_measured_total_that_is_noise_does_not_count(total: float, used: bool) -> None:
    totals = np.array([total, 2.0], dtype=np.float32)
    scores = diagonal_scores(SMALL, WEIGHTS, noisy(1e-10, 0, 1, 2, 3), MOMENTS, totals).astype(np.float64)
    assert scores[:72].sum() == pytest.approx(total if used else 2.0, rel=1e-5)


def test_the_noise_grows_as_the_shift_falls() -> None:
    seen = [visibility(SMALL, WEIGHTS, noisy(1e-5, 0, 1, 2, 3), MOMENTS, shift).blind for shift in (1e-2, 1e-4)]
    assert seen == [frozenset(), frozenset({0})]


def test_where_nothing_is_known_all_layers_are_alike() -> None:
    weights = WEIGHTS.copy()
    weights[80:] = 0.0
    scores = diagonal_scores(SMALL, weights, noisy(0.0, 0, 1, 2, 3), MOMENTS).astype(np.float64)
    assert scores[:72].sum() == pytest.approx(1.0, rel=1e-5)
    assert scores[80:].sum() == pytest.approx(1.0, rel=1e-5)
    nothing = np.zeros_like(MOMENTS)
    assert diagonal_scores(SMALL, weights, SENSITIVITIES, nothing)[80:].min() > 0.0


@pytest.mark.parametrize("starts_at_zero", [False, True])
def test_what_earlier_masks_cut_off_stays_dead(starts_at_zero: bool) -> None:
    manifest = SMALL
    if starts_at_zero:
        first, norm, *others = SMALL.layout.parameters
        norm = dataclasses.replace(norm, initialiser=Initialiser("constant", 0.0))
        manifest = dataclasses.replace(SMALL, layout=Layout((first, norm, *others)))
    kept = np.ones(SMALL.layout.size, dtype=np.bool_)
    kept[:30] = False
    weights = np.where(kept, WEIGHTS, np.float32(0.0))
    scores = diagonal_scores(manifest, weights, noisy(0.0, 0, 1, 2, 3), MOMENTS, kept=kept)
    assert scores[:72].any() == starts_at_zero
    assert scores[80:].all()
