"""Coordinates one after another, and steps that a device makes alone, on a network without kinks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from fedzo.edge_runtime.datasets.data import Batch
from fedzo.edge_runtime.estimation.block_estimators import (
    BlockScalars,
    ProbeRequest,
    StepEstimator,
    estimator_bytes,
    make_estimator,
)
from fedzo.edge_runtime.estimation.estimators import Cancelled
from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.inference.loss import NonFiniteLossError
from fedzo.edge_runtime.storage.artifact import Artifact, load_artifact
from fedzo.exporter.artifact import export_artifact
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.device_side.run_files import needed_graphs
from fedzo.protocol.perturbation.blocks import Block, Deal, blocks_of, deal
from fedzo.protocol.perturbation.directions import Directions
from fedzo.protocol.perturbation.ranking import CoordinateRanking
from fedzo.protocol.pruning.mask import Mask, threshold
from fedzo.protocol.settings import EstimatorName, RunSettings, TrainingSettings
from tests.end_to_end import smooth_lenet

SEED = 7
RATE = 0.25
SHAPE = (1, 16, 16)


@dataclasses.dataclass(frozen=True)
class Case:
    artifact: Artifact
    mask: Mask
    weights: NDArray[np.float32]

    def batch(self, number: int, samples: int = 6) -> Batch:
        draw = np.random.default_rng(100 + number)
        return Batch(draw.normal(size=(samples, *SHAPE)).astype(np.float32), draw.integers(0, 4, samples))

    def gradient(self, weights: NDArray[np.float32], batch: Batch) -> NDArray[np.float64]:
        """By torch in double precision, of the survivors."""
        layout = self.artifact.manifest.layout
        dense = np.zeros(layout.size)
        dense[self.mask.kept] = weights
        network = smooth_lenet.build().double()
        parameters = dict(network.named_parameters())
        assert [parameter.name for parameter in layout.parameters] == list(parameters)
        for k, parameter in enumerate(parameters.values()):
            parameter.data = torch.from_numpy(dense[layout.slice_of(k)].reshape(parameter.shape))
        loss = functional.cross_entropy(network(torch.from_numpy(batch.x).double()), torch.from_numpy(batch.y))
        parts = torch.autograd.grad(loss, list(parameters.values()))
        return np.asarray(np.concatenate([part.numpy().ravel() for part in parts])[self.mask.kept])


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A quarter of the weights."""
    folder: Path = tmp_path_factory.mktemp("steps") / "smooth"
    export_artifact("tests.end_to_end.smooth_lenet:build", SHAPE, 4, 0.75, 3, folder)
    artifact = load_artifact(folder)
    dense = initial_weights(artifact.manifest.layout, 3)
    mask = threshold(artifact.manifest.layout, np.abs(dense), 0.75)
    return Case(artifact, mask, np.ascontiguousarray(dense[mask.survivors()]))


def settings(name: EstimatorName, steps: int = 1, **changes: object) -> TrainingSettings:
    usual: dict[str, Any] = {"k": 8, "tail_k": 12, "repeats": 3, "sigma": 2.0**-8, "two_sided": True, **changes}
    return TrainingSettings(estimator=name, local_steps=steps, local_rate=RATE, **usual)


def made(case: Case, training: TrainingSettings) -> tuple[Any, tuple[Block, ...], tuple[Deal, ...]]:
    blocks = blocks_of(training, case.artifact.manifest, case.mask)
    return make_estimator(training, blocks, SEED), blocks, deal(blocks, training.assignment, 3, 2)


def asked(case: Case, deals: tuple[Deal, ...], round_: int = 4, rank: int = 1) -> ProbeRequest:
    positions = tuple(
        CoordinateRanking(SEED, d.block.size, d.block.number).chosen(d.k)
        if d.block.kind == "sketch"
        else d.positions(d.slot(rank))
        for d in deals
    )
    return ProbeRequest(case.weights, case.batch(0), round_, rank, positions, later=case.batch)


# --- coordinates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("two_sided", [True, False])
def test_rounds_of_coordinates_make_up_the_gradient(case: Case, two_sided: bool) -> None:
    """The ranking hands out all of them after a while."""
    training = settings("coordinate", k=128, two_sided=two_sided, sigma=2.0**-8 if two_sided else 2.0**-11)
    estimator, blocks, deals = made(case, training)
    assert [(block.kind, block.family, block.size) for block in blocks] == [("sketch", "ranked", len(case.weights))]
    exact = case.gradient(case.weights, case.batch(0))
    ranking = CoordinateRanking(SEED, len(exact), 0)
    found = np.full(len(exact), np.nan)
    with Engine(case.artifact, case.mask) as engine:
        for round_ in range(1, 100):
            positions = ranking.chosen(128)
            request = dataclasses.replace(asked(case, deals, round_), positions=(positions,))
            (scalars,) = estimator.probe(engine, request).blocks
            found[positions] = scalars
            ranking.advance(scalars)
            if np.isfinite(found).all():
                break
    assert round_ > 1
    assert np.linalg.norm(found - exact) < 1e-3 * np.linalg.norm(exact)


def test_coordinates_behind_the_cut_cost_less(case: Case) -> None:
    training = settings("coordinate", k=len(case.weights), two_sided=False)
    estimator, _, _ = made(case, training)
    cut = case.artifact.manifest.cut
    assert cut is not None
    first = int(case.mask.counts()[: cut.first_parameter].sum())
    n, share = 6, cut.suffix_share
    table: list[tuple[list[int], float, int]] = [
        ([0, first - 1], 3 * n, 3),
        ([first, first + 1, len(case.weights) - 1], n * (1 - share) + 4 * n * share, 5),
        ([0, first], 2 * n + n * (1 - share) + 2 * n * share, 5),
    ]
    _, _, deals = made(case, training)
    with Engine(case.artifact, case.mask, queries=1) as engine:
        for places, passes, queries in table:
            before = engine.sample_passes
            request = dataclasses.replace(asked(case, deals), positions=(np.array(places, np.int64),))
            found = estimator.probe(engine, request)
            assert engine.sample_passes - before == pytest.approx(passes)
            assert (found.queries, found.blocks[0].size) == (queries, len(places))


def test_coordinates_need_no_cut(case: Case) -> None:
    """Without one every pass is whole, and no further graph is loaded."""
    manifest = case.artifact.manifest
    run = RunSettings(sparsity=0.0, training=settings("coordinate"))
    without = dataclasses.replace(manifest, cut=None)
    assert [g.name for g in needed_graphs(manifest, run)][2:] == ["prefix.onnx", "suffix.onnx"]
    assert len(needed_graphs(without, run)) == 2
    assert estimator_bytes(run.training, without, 100) == 0
    results = []
    for used in (manifest, without):
        artifact = dataclasses.replace(case.artifact, manifest=used)
        estimator, _, deals = made(case, run.training)
        with Engine(artifact, case.mask) as engine:
            results.append(estimator.probe(engine, asked(case, deals)).blocks[0])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-3, atol=1e-5)


# --- local steps ----------------------------------------------------------------------------------------------------

NAMES: tuple[EstimatorName, ...] = ("stein", "split", "node", "coordinate")


@pytest.mark.parametrize("name", NAMES)
def test_one_step_is_what_it_was(case: Case, name: EstimatorName) -> None:
    """The estimator itself measures, and its loop with one step gives the same bits."""
    from fedzo.edge_runtime.estimation.local_steps import LocalSteps

    training = settings(name)
    plain, blocks, deals = made(case, training)
    assert isinstance(plain, StepEstimator)
    inner, _, _ = made(case, training)
    assert isinstance(inner, StepEstimator)
    looped = LocalSteps(inner, blocks, 1, RATE)
    with Engine(case.artifact, case.mask) as engine:
        for round_ in (1, 2):
            request = asked(case, deals, round_)
            one, other = plain.probe(engine, request), looped.probe(engine, request)
            assert [b.tobytes() for b in one.blocks] == [b.tobytes() for b in other.blocks]
            assert (one.mean_loss, one.queries) == (other.mean_loss, other.queries)
            assert plain.state() == looped.state()


@pytest.mark.parametrize("assignment", ["dealt", "shared"])
@pytest.mark.parametrize("name", ["stein", "split", "coordinate"])
def test_two_steps_by_hand(case: Case, name: EstimatorName, assignment: str) -> None:
    """Slopes of the exact gradients along the directions, half of them after a step of plain descent."""
    training = settings(name, 2, assignment=assignment)
    estimator, blocks, deals = made(case, training)
    request = asked(case, deals)
    with Engine(case.artifact, case.mask) as engine:
        found = estimator.probe(engine, request)
    weights = case.weights.astype(np.float64)
    wanted: list[list[float]] = [[] for _ in blocks]
    for step in range(2):
        gradient = case.gradient(weights.astype(np.float32), case.batch(step))
        moved = np.zeros_like(weights)
        for block, positions, scalars in zip(blocks, request.positions, wanted, strict=True):
            part = slice(block.first, block.first + block.size)
            half = len(positions) // 2
            for position in positions[step * half : (step + 1) * half].tolist():
                direction = np.zeros(block.size, np.float32)
                if name == "coordinate":
                    direction[position] = 1.0
                else:
                    basis = Directions(training.directions, SEED, block.size, block.number)
                    basis.direction(request.round, position, direction)
                scalars.append(float(gradient[part] @ direction))
                moved[part] += scalars[-1] * direction / (1 if name == "coordinate" else half)
        weights -= RATE * moved
    assert [block.size for block in found.blocks] == [len(positions) for positions in request.positions]
    for scalars, values in zip(found.blocks, wanted, strict=True):
        np.testing.assert_allclose(scalars, values, rtol=0.01, atol=0.01 * float(np.abs(values).max()))
    assert np.array_equal(request.weights, case.weights)


def two_gradients(case: Case, training: TrainingSettings, request: ProbeRequest) -> tuple[BlockScalars, BlockScalars]:
    """Both steps of ``node``, each by an estimator of a single step."""
    single = dataclasses.replace(training, local_steps=1)
    estimator, blocks, _ = made(case, single)
    assert isinstance(estimator, StepEstimator)
    front, rows = request.positions
    half = len(front) // 2
    first = dataclasses.replace(request, positions=(front[:half], rows), draw=2 * request.round)
    with Engine(case.artifact, case.mask) as engine:
        one = estimator.measure(engine, first)
        weights, block = case.weights.copy(), blocks[0]
        basis = Directions(training.directions, SEED, block.size, block.number)
        slopes = (one.blocks[0] / np.float32(half)).astype(np.float32)
        weights[: block.size] -= np.float32(RATE) * basis.combine(request.round, front[:half], slopes)
        weights[block.size :] -= np.float32(RATE) * one.blocks[1]
        second = dataclasses.replace(
            first, weights=weights, batch=case.batch(1), positions=(front[half:], rows), draw=2 * request.round + 1
        )
        return one, estimator.measure(engine, second)


def test_a_sketch_carries_the_average_over_the_steps(case: Case) -> None:
    training = settings("node", 2, feedback=0.5)
    estimator, _, deals = made(case, training)
    request = asked(case, deals)
    with Engine(case.artifact, case.mask) as engine:
        found = estimator.probe(engine, request)
        assert found.mean_loss == pytest.approx(float(engine.loss(case.weights, *dataclasses.astuple(case.batch(0)))))
    one, two = two_gradients(case, training, request)
    gradient = (one.blocks[1] + two.blocks[1]) / 2
    front = np.concatenate([one.blocks[0], two.blocks[0]])
    np.testing.assert_allclose(found.blocks[0], front, rtol=1e-3, atol=1e-3 * float(np.abs(front).max()))
    tolerance = 1e-3 * float(np.abs(gradient).max())
    np.testing.assert_allclose(found.blocks[1], gradient[request.positions[1]], rtol=1e-3, atol=tolerance)
    residual = np.frombuffer(estimator.state(), "<f4")
    gradient[request.positions[1]] = 0.0
    np.testing.assert_allclose(residual, gradient, rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_deterministic_and_each_has_its_batch_and_noise(case: Case, name: EstimatorName) -> None:
    drawn: list[int] = []

    def later(step: int) -> Batch:
        drawn.append(step)
        return case.batch(step)

    def again(step: int) -> Batch:
        return case.batch(0)

    results = []
    training = settings(name, 4, k=8, tail_k=8)
    for batches in (later, later, again):
        estimator, _, deals = made(case, training)
        with Engine(case.artifact, case.mask) as engine:
            found = estimator.probe(engine, dataclasses.replace(asked(case, deals), later=batches))
        results.append(b"".join(block.tobytes() for block in found.blocks) + estimator.state())
    assert drawn == [1, 2, 3, 1, 2, 3]
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", [0.0, 0.6, 0.99])
def test_a_cancelled_round_leaves_state_and_weights(case: Case, name: EstimatorName, part: float) -> None:
    training = settings(name, 2)
    estimator, _, deals = made(case, training)
    n_asked = 0

    def counted() -> bool:
        nonlocal n_asked
        n_asked += 1
        return False

    before = case.weights.copy()
    with Engine(case.artifact, case.mask, queries=1) as engine:
        estimator.probe(engine, asked(case, deals), counted)
        state, last = estimator.state(), int(part * n_asked)
        answers = iter([False] * last + [True])
        with pytest.raises(Cancelled):
            estimator.probe(engine, asked(case, deals, 5), lambda: next(answers))
    assert estimator.state() == state
    assert np.array_equal(case.weights, before)


@pytest.mark.parametrize("name", NAMES)
def test_steps_that_diverge_are_told_and_leave_the_state(case: Case, name: EstimatorName) -> None:
    """The first step is fine, and its rate is not."""
    estimator, _, deals = made(case, settings(name, 2))
    estimator._rate = np.float32(np.inf)  # a network of tanh survives all that the settings allow
    state = estimator.state()
    with Engine(case.artifact, case.mask) as engine, pytest.raises(NonFiniteLossError):
        estimator.probe(engine, asked(case, deals))
    assert estimator.state() == state


@pytest.mark.parametrize(("n_positions", "sizes"), [(7, [3, 2, 2]), (2, [1, 1]), (1, [1])])
def test_a_round_with_other_numbers_of_directions_is_shared_nearly_equally(
    case: Case, n_positions: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server may announce another number, and a small block holds fewer positions."""
    training = settings("stein", 3, k=9)
    estimator, _, deals = made(case, training)
    inner: StepEstimator = estimator._estimator
    measured: list[int] = []
    measure: Callable[..., BlockScalars] = inner.measure

    def counted(engine: Engine, request: ProbeRequest, *arguments: Any) -> BlockScalars:
        measured.append(request.positions[0].size)
        return measure(engine, request, *arguments)

    monkeypatch.setattr(inner, "measure", counted)
    request = dataclasses.replace(asked(case, deals), positions=(np.arange(5, 5 + n_positions, dtype=np.int64),))
    with Engine(case.artifact, case.mask) as engine:
        found = estimator.probe(engine, request)
    assert (measured, found.blocks[0].size) == (sizes, n_positions)


def test_the_memory_of_steps_is_planned(case: Case) -> None:
    manifest, n = case.artifact.manifest, case.mask.n_survivors
    for name in NAMES:
        vectors = 2 if name == "node" else 1
        one, two = (settings(name, steps, batch=16) for steps in (1, 2))
        further = estimator_bytes(two, manifest, n) - estimator_bytes(one, manifest, n)
        assert further == 4 * vectors * n + 4 * 16 * 256
