"""The estimators that learn stage by stage keep the contract of all estimators."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fedzo.edge_runtime.datasets.data import Batch
from fedzo.edge_runtime.estimation.block_estimators import BlockEstimator, ProbeRequest, estimator_bytes, make_estimator
from fedzo.edge_runtime.estimation.estimators import Cancelled
from fedzo.edge_runtime.estimation.local_estimator import LocalBlocks
from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.inference.loss import NonFiniteLossError
from fedzo.edge_runtime.inference.ort import arena_limit_holds
from fedzo.edge_runtime.planning.memory import SCORING_GRAPHS, plan
from fedzo.edge_runtime.storage.artifact import Artifact, load_artifact
from fedzo.exporter.artifact import export_artifact
from fedzo.protocol.artifact.manifest import golden_batch
from fedzo.protocol.artifact.stages import local_stages
from fedzo.protocol.device_side.run_files import needed_graphs
from fedzo.protocol.errors import ConfigError, MemoryBudgetError, ProtocolError
from fedzo.protocol.perturbation.blocks import Block, Deal, blocks_of, deal, directions_of
from fedzo.protocol.perturbation.directions import MAX_BLOCKS
from fedzo.protocol.pruning.mask import Mask
from fedzo.protocol.replay.update import Replica, estimate_gradient
from fedzo.protocol.server_side.aggregation import combine_probes
from fedzo.protocol.settings import LOCAL_ESTIMATORS, EstimatorName, RunSettings, TrainingSettings
from fedzo.protocol.wire.messages import Report, ReportKind, UpdateRecord
from tests.edge_runtime.estimation.test_local_gradient import Case
from tests.edge_runtime.estimation.test_local_gradient import case as made_case

SEED = 7


@pytest.fixture(scope="module", params=["lenet5", "cnn1d"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A fifth of the weights."""
    folder = tmp_path_factory.mktemp("local") / request.param
    shape = {"lenet5": (3, 32, 32), "cnn1d": (9, 40)}[request.param]
    export_artifact(request.param, shape, 10, 0.5, 3, folder, local_heads=True)
    return made_case(request.param, {request.param: load_artifact(folder)}, 0.8)


def settings(name: EstimatorName, **changes: object) -> TrainingSettings:
    base = TrainingSettings(estimator=name, k=3, tail_k=60, repeats=3, feedback=0.9, sigma=2.0**-10)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def made(case: Case, training: TrainingSettings) -> tuple[BlockEstimator, tuple[Block, ...], tuple[Deal, ...]]:
    blocks = blocks_of(training, case.artifact.manifest, case.mask)
    return make_estimator(training, blocks, SEED), blocks, deal(blocks, "shared", 0, 3)


def request_of(case: Case, deals: tuple[Deal, ...], round_: int = 1) -> ProbeRequest:
    """With other coordinates of every block in every round."""
    draw = np.random.default_rng(round_)
    positions = tuple(np.sort(draw.choice(d.block.size, d.k, replace=False)) for d in deals)
    return ProbeRequest(case.weights, Batch(case.x, case.y), round_, 0, positions)


@pytest.mark.parametrize("name", LOCAL_ESTIMATORS)
def test_all_coordinates_give_the_gradient(case: Case, name: EstimatorName) -> None:
    training = settings(name, repeats=400)
    estimator, blocks, _ = made(case, training)
    deals = tuple(Deal(dataclasses.replace(b, k=b.size), b.size, 1, 0) for b in blocks)  # so the draw has them all
    with Engine(case.artifact, case.mask) as engine:
        found = estimator.probe(engine, request_of(case, deals))
        assert found.mean_loss == pytest.approx(engine.loss(case.weights, case.x, case.y), rel=1e-6)
    report = Report(ReportKind.PROBE, bytes(4), 1, 1, 12, bytes(16), 1.0, 1, 1, 1, found.blocks)
    segments, coefficients = combine_probes(deals, [(0, report)])
    record = UpdateRecord(0, 1, 0.5, segments, coefficients, bytes(16), bytes(16))
    estimate = estimate_gradient(blocks, directions_of(blocks, SEED), record)
    exact, _ = case.gradient()
    for block in blocks:
        a, b = (part[block.first : block.first + block.size] for part in (estimate, exact))
        cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        assert cosine > (0.9999 if name == "local" or block is blocks[-1] else 0.4), block


@pytest.mark.parametrize("name", LOCAL_ESTIMATORS)
def test_blocks_are_the_stages_and_their_heads(case: Case, name: EstimatorName) -> None:
    training = settings(name, tail_k=1000)
    blocks = blocks_of(training, case.artifact.manifest, case.mask)
    counts = case.mask.counts()
    stages = local_stages(case.artifact.manifest.stages)
    sizes = [int(counts[s.first_parameter : s.end_parameter].sum()) for s in stages]
    assert [block.size for block in blocks] == [*sizes, case.mask.n_survivors - case.n_model]
    assert {block.kind for block in blocks} == {"sketch"}
    assert abs(sum(block.k for block in blocks) - 1000) <= len(blocks)
    for block in blocks[1:]:
        ratio = (block.size / blocks[0].size) ** 0.5
        assert block.k / blocks[0].k == pytest.approx(ratio, rel=0.05)


@pytest.mark.parametrize("name", LOCAL_ESTIMATORS)
def test_scalars_are_deterministic_and_of_the_asked_number(case: Case, name: EstimatorName) -> None:
    results = []
    for _ in range(2):
        estimator, blocks, deals = made(case, settings(name))
        with Engine(case.artifact, case.mask) as engine:
            results.append([estimator.probe(engine, request_of(case, deals, r)).blocks for r in (1, 2)])
        assert [part.size for part in results[-1][0]] == [block.k for block in blocks]
    for one, other in zip(results[0], results[1], strict=True):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", LOCAL_ESTIMATORS)
@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_a_cancelled_probe_leaves_the_state(case: Case, name: EstimatorName, part: float) -> None:
    estimator, _, deals = made(case, settings(name))
    asked = 0

    def counted() -> bool:
        nonlocal asked
        asked += 1
        return False

    with Engine(case.artifact, case.mask) as engine:
        estimator.probe(engine, request_of(case, deals), counted)
        before, last = estimator.state(), int(part * asked)
        assert asked > 2
        answers = iter([False] * last + [True])
        with pytest.raises(Cancelled):
            estimator.probe(engine, request_of(case, deals, 2), lambda: next(answers))
        assert estimator.state() == before
        estimator.probe(engine, request_of(case, deals, 2))  # the engine is usable
        assert estimator.state() != before


@pytest.mark.parametrize("name", LOCAL_ESTIMATORS)
def test_local_steps_send_the_average_of_their_gradients(case: Case, name: EstimatorName) -> None:
    training = settings(name, local_steps=2, local_rate=0.1)
    estimator, blocks, deals = made(case, training)
    batches = [Batch(case.x, case.y), Batch(case.x[::-1].copy(), case.y[:1].repeat(len(case.y)))]
    request = dataclasses.replace(request_of(case, deals), later=lambda step: batches[step])
    single = LocalBlocks(training, blocks, SEED)
    with Engine(case.artifact, case.mask) as engine:
        found = estimator.probe(engine, request)
        one = np.concatenate(single.measure(engine, dataclasses.replace(request, draw=2)).blocks)
        moved = dataclasses.replace(request, weights=case.weights - np.float32(0.1) * one, batch=batches[1], draw=3)
        mean = (one + np.concatenate(single.measure(engine, moved).blocks)) / 2
    for block, positions, scalars in zip(blocks, request.positions, found.blocks, strict=True):
        np.testing.assert_allclose(scalars, mean[block.first + positions], rtol=1e-3, atol=1e-8)  # they have 11 bits


@pytest.mark.parametrize("name", LOCAL_ESTIMATORS)
def test_what_the_sketches_left_counts_in_the_next_round(case: Case, name: EstimatorName) -> None:
    """In every block; and it comes back from the disk."""
    training = settings(name)
    estimator, _, deals = made(case, training)
    other, _, _ = made(case, training)
    fresh, _, _ = made(case, training)
    with Engine(case.artifact, case.mask) as engine:
        estimator.probe(engine, request_of(case, deals, 1))
        other.restore(estimator.state())
        found = [e.probe(engine, request_of(case, deals, 2)).blocks for e in (estimator, other, fresh)]
    assert estimator.state() == other.state() != fresh.state()
    for own, restored, anew in zip(*found, strict=True):
        assert own.tobytes() == restored.tobytes()
        assert float(np.abs(own - anew).max()) > 0.05 * float(np.abs(own).max())


@pytest.mark.parametrize("name", LOCAL_ESTIMATORS)
def test_diverged_weights_are_told_and_leave_the_state(case: Case, name: EstimatorName) -> None:
    estimator, _, deals = made(case, settings(name))
    before = estimator.state()
    asked = dataclasses.replace(request_of(case, deals), weights=np.full_like(case.weights, np.float32(3e38)))
    with Engine(case.artifact, case.mask) as engine, pytest.raises(NonFiniteLossError):
        estimator.probe(engine, asked)
    assert estimator.state() == before


def test_a_head_that_has_diverged_leaves_all_blocks(case: Case) -> None:
    """The network's own loss is finite then, and the sketches of the stages come first."""
    estimator, _, deals = made(case, settings("local"))
    before = estimator.state()
    weights = case.weights.copy()
    weights[case.n_model :] = np.float32(3e38)
    asked = dataclasses.replace(request_of(case, deals), weights=weights)
    with Engine(case.artifact, case.mask) as engine, pytest.raises(NonFiniteLossError, match="round 1"):
        estimator.probe(engine, asked)
    assert estimator.state() == before


def test_states_of_others_are_refused(case: Case) -> None:
    estimator, _, _ = made(case, settings("local"))
    before = estimator.state()
    assert len(before) == 4 * case.mask.n_survivors
    bad: NDArray[np.float32] = np.zeros(case.mask.n_survivors, np.float32)
    bad[-1] = np.inf
    for state, message in (
        (b"abc", "residual of 3 bytes"),
        (before + bytes(4), "does not belong"),
        (bad.tobytes(), "finite"),
    ):
        with pytest.raises(ProtocolError, match=message):
            estimator.restore(state)
        assert estimator.state() == before


def test_the_memory_is_planned(case: Case) -> None:
    """More samples and noise need more; a stage's features and dense gradient are in it."""
    manifest, n = case.artifact.manifest, case.mask.n_survivors
    forms: tuple[tuple[EstimatorName, int], ...] = (("local", 16), ("local-node", 16), ("local", 32))
    local, noisy, larger = (estimator_bytes(settings(name, batch=batch), manifest, n) for name, batch in forms)
    assert 16 * n < local < min(noisy, larger)
    assert isinstance(
        make_estimator(settings("local"), blocks_of(settings("local"), manifest, case.mask), 1), LocalBlocks
    )


def test_stages_of_a_deep_network_share_sketches(tmp_path: Path) -> None:
    """Twelve layers, and no more blocks than a record can name."""
    export_artifact("tests.exporter.user_models:deep", (6,), 3, 0.0, 3, tmp_path / "deep", local_heads=True)
    artifact = load_artifact(tmp_path / "deep")
    mask = Mask.dense(artifact.manifest.layout)
    training = settings("local")
    blocks = blocks_of(training, artifact.manifest, mask)
    assert len(local_stages(artifact.manifest.stages)) > len(blocks) == MAX_BLOCKS
    replica = Replica(mask.layout, mask, artifact.manifest.seed, SEED, blocks, training.optimiser)
    estimator, deals = make_estimator(training, blocks, SEED), deal(blocks, "shared", 0, 1)
    positions = tuple(replica.coordinates(one.block.number, one.k) for one in deals)
    x = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    batch = Batch(x, np.arange(5) % 3)
    with Engine(artifact, mask) as engine:
        found = estimator.probe(engine, ProbeRequest(replica.weights, batch, 1, 0, positions))
    report = Report(ReportKind.PROBE, bytes(4), 1, 1, 5, bytes(16), 1.0, 1, 1, 1, found.blocks)
    segments, coefficients = combine_probes(deals, [(0, report)])
    before = replica.weights.copy()
    record = replica.prepare(0, 1, 0.5, segments, coefficients)
    assert UpdateRecord.decode(record.encode()).segments == segments
    assert (replica.weights != before).any()


def test_artifacts_without_heads_are_refused_and_heads_by_other_estimators(
    case: Case, tmp_path_factory: pytest.TempPathFactory
) -> None:
    others: tuple[EstimatorName, ...] = ("stein", "split", "node")
    for name in others:
        with pytest.raises(ConfigError, match=f"the estimator {name} does not train them") as caught:
            blocks_of(settings(name), case.artifact.manifest, case.mask)
        assert "--local-heads" in caught.value.hint
    for model, shape in (("lenet5", (1, 16, 16)), ("resnet8", (3, 16, 16))):
        folder = tmp_path_factory.mktemp("plain") / model
        export_artifact(model, shape, 10, 0.5, 3, folder)
        artifact: Artifact = load_artifact(folder)
        for name in LOCAL_ESTIMATORS:
            with pytest.raises(ConfigError, match=f"the estimator {name} needs local heads") as caught:
                blocks_of(settings(name), artifact.manifest, Mask.dense(artifact.manifest.layout))
            assert "--local-heads" in caught.value.hint
        if model == "resnet8":
            with pytest.raises(ConfigError, match="local heads need a network that is one chain"):
                export_artifact(model, shape, 10, 0.5, 3, folder.with_name("heads"), local_heads=True)


@pytest.mark.parametrize("name", LOCAL_ESTIMATORS)
@pytest.mark.parametrize("micro_batch", [1, 8, 32])
def test_planned_tensors_are_enough(case: Case, name: EstimatorName, micro_batch: int) -> None:
    """Under the limit of the arena that the plan says; half of it is not enough."""
    manifest, mask = case.artifact.manifest, case.mask
    run = RunSettings(training=settings(name, batch=32), sparsity=0.5)
    graphs = [graph.name for graph in needed_graphs(manifest, run) if graph.name not in SCORING_GRAPHS]
    limits = plan(manifest, mask.n_survivors, 1e6, graphs=graphs, batch=32, micro_batch=micro_batch)
    estimator, _, deals = made(case, run.training)
    asked = request_of(case, deals)
    x, y = golden_batch(manifest.input_shape, 10, 1, 32)
    asked = dataclasses.replace(asked, batch=Batch(x, y))
    with Engine(case.artifact, mask, micro_batch=micro_batch, arena_bytes=limits.arena_bytes) as engine:
        for _ in range(2):
            estimator.probe(engine, asked)
    if micro_batch == 32 and arena_limit_holds():
        before = estimator.state()
        tight = Engine(case.artifact, mask, micro_batch=micro_batch, arena_bytes=limits.arena_bytes // 2)
        with tight, pytest.raises(MemoryBudgetError):
            estimator.probe(tight, asked)
        assert estimator.state() == before


@pytest.mark.parametrize("name", LOCAL_ESTIMATORS)
@pytest.mark.parametrize("batch", [8, 64])
def test_planned_arrays_are_enough(case: Case, name: EstimatorName, batch: int) -> None:
    """What Python and numpy allocate for the estimator and one probe, against the plan."""
    manifest, mask = case.artifact.manifest, case.mask
    training = settings(name, batch=batch)
    x, y = golden_batch(manifest.input_shape, 10, 1, batch)
    with Engine(case.artifact, mask, micro_batch=8) as engine:
        warm, _, deals = made(case, training)
        asked = dataclasses.replace(request_of(case, deals), batch=Batch(x, y))
        warm.probe(engine, asked)
        del warm
        tracemalloc.start()
        try:
            estimator, _, _ = made(case, training)
            estimator.probe(engine, asked)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    planned = estimator_bytes(training, manifest, mask.n_survivors)
    slack = 160 << 10  # objects of the interpreter, and the bytes of the largest graph
    assert peak < planned + slack
    assert planned < 2 * peak + slack
