"""One contract for all estimators: what the server makes of their scalars is the gradient."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from fedzo.edge_runtime.datasets.data import Batch
from fedzo.edge_runtime.estimation.block_estimators import BlockEstimator, ProbeRequest, estimator_bytes, make_estimator
from fedzo.edge_runtime.estimation.estimators import Cancelled
from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.inference.loss import NonFiniteLossError
from fedzo.edge_runtime.storage.artifact import Artifact, load_artifact
from fedzo.exporter.artifact import export_artifact
from fedzo.exporter.reference import network
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import golden_batch
from fedzo.protocol.errors import ProtocolError
from fedzo.protocol.perturbation.blocks import Block, Deal, blocks_of, deal, directions_of
from fedzo.protocol.pruning.mask import Mask, threshold
from fedzo.protocol.replay.optimisers import OptimiserConfig
from fedzo.protocol.replay.update import estimate_gradient
from fedzo.protocol.server_side.aggregation import combine_probes
from fedzo.protocol.settings import EstimatorName, TrainingSettings
from fedzo.protocol.wire.messages import Report, ReportKind, UpdateRecord

SEED = 7
NAMES: tuple[EstimatorName, ...] = ("stein", "split", "node", "coordinate")


@dataclasses.dataclass(frozen=True)
class Case:
    artifact: Artifact
    mask: Mask
    weights: NDArray[np.float32]
    batch: Batch

    def gradient(self) -> NDArray[np.float32]:
        """By torch, of the survivors."""
        layout = self.artifact.manifest.layout
        dense = np.zeros(layout.size, np.float32)
        dense[self.mask.kept] = self.weights
        parameters = {
            p.name: torch.tensor(dense[layout.slice_of(k)].reshape(p.shape), requires_grad=True)
            for k, p in enumerate(layout.parameters)
        }
        logits = network("lenet5")(parameters, torch.from_numpy(self.batch.x))
        loss = functional.cross_entropy(logits, torch.from_numpy(self.batch.y))
        parts = torch.autograd.grad(loss, list(parameters.values()))
        return np.concatenate([part.numpy().ravel() for part in parts])[self.mask.kept]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """LeNet-5 with 2 % of its weights, so that whole bases are small."""
    folder: Path = tmp_path_factory.mktemp("blocks") / "lenet5"
    export_artifact("lenet5", (1, 32, 32), 10, 0.98, 3, folder)
    artifact = load_artifact(folder)
    dense = initial_weights(artifact.manifest.layout, 3)
    mask = threshold(artifact.manifest.layout, np.abs(dense), 0.98)
    # Biases of zero would put units without inputs on the kink of their activation.
    moved = dense[mask.survivors()] + np.float32(0.05) * np.random.default_rng(0).standard_normal(mask.n_survivors)
    return Case(artifact, mask, moved.astype(np.float32), Batch(*golden_batch((1, 32, 32), 10, 1, 12)))


def settings(name: EstimatorName, **changes: object) -> TrainingSettings:
    base = TrainingSettings(estimator=name, k=60_000, tail_k=60_000, repeats=600, sigma=2.0**-12, two_sided=True)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def made(case: Case, training: TrainingSettings) -> tuple[BlockEstimator, tuple[Block, ...], tuple[Deal, ...]]:
    blocks = blocks_of(training, case.artifact.manifest, case.mask)
    return make_estimator(training, blocks, SEED), blocks, deal(blocks, training.assignment, 0, 1)


def request(case: Case, deals: tuple[Deal, ...], round_: int = 1) -> ProbeRequest:
    return ProbeRequest(case.weights, case.batch, round_, 0, tuple(d.positions(d.slot(0)) for d in deals))


def decoded(
    blocks: tuple[Block, ...], deals: tuple[Deal, ...], scalars: tuple[NDArray[np.float32], ...], round_: int = 1
) -> NDArray[np.float32]:
    """The server's half: report, update record, gradient."""
    report = Report(ReportKind.PROBE, bytes(4), round_, 1, 12, bytes(16), 1.0, 1, 1, 1, scalars)
    segments, coefficients = combine_probes(deals, [(0, report)])
    record = UpdateRecord(0, round_, 0.5, segments, coefficients, bytes(16), bytes(16))
    return estimate_gradient(blocks, directions_of(blocks, SEED), record)


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_basis_gives_the_gradient(case: Case, name: EstimatorName) -> None:
    """Exact but for kinks of the units; node perturbation has noise in the hidden dense layers."""
    training = settings(name)
    estimator, blocks, deals = made(case, training)
    with Engine(case.artifact, case.mask) as engine:
        found = estimator.probe(engine, request(case, deals))
    estimate, exact = decoded(blocks, deals, found.blocks), case.gradient()
    first = blocks[-1].first if len(blocks) > 1 else len(exact)
    cosine = [
        float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        for a, b in ((estimate[:first], exact[:first]), (estimate[first:], exact[first:]))
        if a.size
    ]
    assert cosine[0] > 0.99
    if name == "split":
        assert cosine[1] > 0.99
    if name == "node":
        assert cosine[1] > 0.8
    assert np.isfinite(found.mean_loss)


@pytest.mark.parametrize("name", NAMES)
def test_scalars_are_deterministic_and_of_the_asked_number(case: Case, name: EstimatorName) -> None:
    training = settings(name, k=5, tail_k=7, repeats=3, two_sided=False)
    results = []
    for _ in range(2):
        estimator, _, deals = made(case, training)
        with Engine(case.artifact, case.mask) as engine:
            results.append([estimator.probe(engine, request(case, deals, r)).blocks for r in (1, 2)])
    assert [[b.size for b in blocks] for blocks in results[0]] == [
        [5] if name in ("stein", "coordinate") else [5, 7]
    ] * 2
    for one, other in zip(results[0], results[1], strict=True):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_a_cancelled_probe_leaves_the_state(case: Case, name: EstimatorName, part: float) -> None:
    training = settings(name, k=40, tail_k=16, repeats=8, two_sided=False)
    estimator, _, deals = made(case, training)
    asked = 0

    def counted() -> bool:
        nonlocal asked
        asked += 1
        return False

    with Engine(case.artifact, case.mask) as engine:
        estimator.probe(engine, request(case, deals), counted)
        before, last = estimator.state(), int(part * asked)
        assert asked > 4
        answers = iter([False] * last + [True])
        with pytest.raises(Cancelled):
            estimator.probe(engine, request(case, deals, 2), lambda: next(answers))
        assert estimator.state() == before
        estimator.probe(engine, request(case, deals, 2))  # the engine is usable
        assert (estimator.state() == before) == (name != "node")


def test_what_a_sketch_left_counts_in_the_next_round(case: Case) -> None:
    training = settings("node", k=2, tail_k=32, repeats=4, feedback=0.9)
    estimator, _, deals = made(case, training)
    other, _, _ = made(case, training)
    with Engine(case.artifact, case.mask) as engine:
        estimator.probe(engine, request(case, deals, 1))
        other.restore(estimator.state())
        fresh, _, _ = made(case, training)
        asked = request(case, deals, 2)
        asked = dataclasses.replace(asked, positions=(asked.positions[0], asked.positions[1] + 32))
        scalars = [e.probe(engine, asked).blocks[1] for e in (estimator, other, fresh)]
    assert scalars[0].tobytes() == scalars[1].tobytes()
    assert float(np.abs(scalars[0] - scalars[2]).max()) > 0.05 * float(np.abs(scalars[0]).max())


@pytest.mark.parametrize("name", NAMES)
def test_diverged_weights_are_told_and_leave_the_state(case: Case, name: EstimatorName) -> None:
    estimator, _, deals = made(case, settings(name, k=4, tail_k=16, repeats=2))
    before = estimator.state()
    asked = dataclasses.replace(request(case, deals), weights=np.full_like(case.weights, np.float32(3e38)))
    with Engine(case.artifact, case.mask) as engine, pytest.raises(NonFiniteLossError):
        estimator.probe(engine, asked)
    assert estimator.state() == before


@pytest.mark.parametrize("name", ["split", "node"])
def test_directions_of_the_front_have_few_samples_each(case: Case, name: EstimatorName) -> None:
    """Of five directions three have the first three samples, and two the next three."""
    estimator, _, deals = made(case, settings(name, k=5, tail_k=8, repeats=2, probe_batch=3))
    asked = dataclasses.replace(request(case, deals), batch=Batch(case.batch.x[:8], case.batch.y[:8]))
    positions = asked.positions[0]
    with Engine(case.artifact, case.mask, queries=1) as engine:
        found = estimator.probe(engine, asked).blocks[0]
        for rows, part in ((slice(0, 3), slice(0, 3)), (slice(3, 6), slice(3, 5))):
            alone, _, _ = made(case, settings(name, k=5, tail_k=8, repeats=2))
            batch = Batch(case.batch.x[rows], case.batch.y[rows])
            own = dataclasses.replace(asked, batch=batch, positions=(positions[part], asked.positions[1]))
            assert alone.probe(engine, own).blocks[0].tobytes() == found[part].tobytes()


def test_states_of_others_are_refused(case: Case) -> None:
    node, _, _ = made(case, settings("node"))
    with pytest.raises(ProtocolError, match="residual of 3 bytes"):
        node.restore(b"abc")
    for name in ("stein", "split", "coordinate"):
        other, _, _ = made(case, settings(name))
        other.restore(other.state())
        with pytest.raises(ProtocolError, match="another estimator"):
            other.restore(node.state())


def test_the_memory_of_an_estimator_is_planned(case: Case) -> None:
    manifest, n = case.artifact.manifest, case.mask.n_survivors
    assert estimator_bytes(settings("stein"), manifest, n) == 0
    assert estimator_bytes(settings("split", batch=16), manifest, n) == 4 * 16 * 400
    assert estimator_bytes(settings("coordinate", batch=16), manifest, n) == 4 * 16 * 400
    assert estimator_bytes(settings("node", batch=16), manifest, n) > 4 * 120 * 400
    for name in NAMES:
        bare, averaged = settings(name, batch=16), settings(name, batch=16, optimiser=OptimiserConfig(ema=0.9))
        assert estimator_bytes(averaged, manifest, n) == estimator_bytes(bare, manifest, n) + 4 * n


@pytest.mark.parametrize("name", ["stein", "split", "coordinate"])
def test_an_announced_sigma_counts_instead_of_the_settings_own(case: Case, name: EstimatorName) -> None:
    training = settings(name, k=5, tail_k=5)
    estimator, _, deals = made(case, training)
    other, _, _ = made(case, dataclasses.replace(training, sigma=2.0**-6))
    with Engine(case.artifact, case.mask) as engine:
        asked = estimator.probe(engine, dataclasses.replace(request(case, deals), sigma=2.0**-6))
        own = other.probe(engine, request(case, deals))
        before = estimator.probe(engine, request(case, deals))
    for found, wanted, plain in zip(asked.blocks, own.blocks, before.blocks, strict=True):
        assert found.tobytes() == wanted.tobytes()
        assert found.tobytes() != plain.tobytes()


def test_every_section_is_probed_as_by_whole_passes(tmp_path: Path) -> None:
    """Differences from stored features are those of whole passes along the same directions, section by section."""
    export_artifact("lenet5", (1, 32, 32), 10, 0.9, 3, tmp_path / "lenet5", sections=8)
    artifact = load_artifact(tmp_path / "lenet5")
    dense = initial_weights(artifact.manifest.layout, 3)
    mask = threshold(artifact.manifest.layout, np.abs(dense), 0.9)
    case = Case(artifact, mask, dense[mask.survivors()], Batch(*golden_batch((1, 32, 32), 10, 1, 12)))
    training = settings("split", k=2, tail_k=12, sigma=2.0**-8)  # runs of four queries are full
    estimator, blocks, deals = made(case, training)
    assert len(blocks) == 5
    asked = request(case, deals)
    with Engine(artifact, mask, micro_batch=5, layout="portable") as engine:
        estimator.probe(engine, asked)  # measures how many queries a run takes
        before = engine.sample_passes
        found = estimator.probe(engine, asked)
        spent = engine.sample_passes - before
        for block, directions, positions, scalars in zip(
            blocks, directions_of(blocks, SEED), asked.positions, found.blocks, strict=True
        ):
            for position, scalar in zip(positions.tolist(), scalars.tolist(), strict=True):
                step = np.zeros(block.size, np.float32)
                directions.scaled(1, position, np.float32(training.sigma), step)  # type: ignore[union-attr]
                losses = []
                for sign in (1, -1):
                    moved = case.weights.copy()
                    moved[block.first : block.first + block.size] += sign * step
                    losses.append(engine.loss(moved, case.batch.x, case.batch.y))
                assert scalar == pytest.approx((losses[0] - losses[1]) / (2 * training.sigma), rel=1e-6, abs=1e-7)
    sections = artifact.manifest.sections
    assert sections is not None
    passes = sum(2 * d.k * sections.cost(number) for number, d in enumerate(deals))
    assert spent == pytest.approx(len(case.batch) * (passes + 1 - sections.cost(len(sections) - 1)), rel=1e-6)
    assert found.queries == sum(2 * d.k for d in deals) + 4
