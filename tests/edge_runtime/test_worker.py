"""The computing thread on a real LeNet-5: what it measures, and that whatever goes wrong becomes an answer."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from fedzo.edge_runtime import worker as worker_module
from fedzo.edge_runtime.datasets.data import batch_indices
from fedzo.edge_runtime.estimation.estimators import SteinEstimator
from fedzo.edge_runtime.estimation.saliency import UnitShiftScorer
from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.inference.ort import arena_limit_holds
from fedzo.edge_runtime.inference.variants import matching_variant, wanted_variants
from fedzo.edge_runtime.planning.memory import MemoryPlan, peak_rss_mib
from fedzo.edge_runtime.planning.run_plan import plan_with_variants
from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.edge_runtime.worker import Limits, Worker
from fedzo.protocol.artifact.graph_files import GraphFile, GraphVariant
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import GraphMemory, Manifest
from fedzo.protocol.device_side.device_events import (
    Compute,
    Computed,
    DeviceEvent,
    Failed,
    Outcome,
    Plan,
    Planned,
    Prepare,
    Prepared,
    Task,
)
from fedzo.protocol.errors import ArtifactError, DataError, FedzoError, MemoryBudgetError, SelfTestError
from fedzo.protocol.perturbation.directions import Directions
from fedzo.protocol.pruning.mask import Mask, threshold
from fedzo.protocol.pruning.saliency import gaussian_inputs
from fedzo.protocol.settings import SaliencySettings, TrainingSettings
from fedzo.protocol.wire.documents import RunDocument
from fedzo.protocol.wire.messages import Decline, Report, ReportKind
from tests.edge_runtime.federation import (
    INPUT_SHAPE,
    N_CLASSES,
    export_lenet,
    filled_store,
    loader,
    run_document,
    write_data,
)

SEED = 5
TRAINING = TrainingSettings(k=6, batch=8, rounds=4)
SALIENCY = SaliencySettings(samples=12, draws=1)
_T = TypeVar("_T")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_lenet(tmp_path_factory.mktemp("worker") / "lenet5")


@pytest.fixture(scope="module")
def manifest(artifact: Path) -> Manifest:
    return load_artifact(artifact).manifest


@pytest.fixture(scope="module")
def run(artifact: Path) -> RunDocument:
    return run_document(artifact, seed=SEED, training=TRAINING, saliency=SALIENCY)


@pytest.fixture(scope="module")
def mask(manifest: Manifest) -> Mask:
    scores = gaussian_inputs(manifest, 1, 0, 0, manifest.layout.size // 784 + 1).ravel()[: manifest.layout.size]
    return threshold(manifest.layout, scores, 0.8)


class Desk:
    """A worker and its answers."""

    def __init__(self, tmp_path: Path, artifact: Path, *, holdout: float = 0.2, **limits: Any) -> None:
        self.answers: queue.Queue[DeviceEvent] = queue.Queue()
        self.data = write_data(tmp_path / "data.npz")
        self.store = filled_store(tmp_path / "blobs", artifact)
        allowed = Limits(**{"ram_budget_mib": 4096.0, **limits})
        self.worker = Worker(loader(self.data, holdout), self.store, self.answers.put, allowed)
        self.worker.start()
        self.tasks = 0

    def ask(self, command: Plan | Prepare | Compute, kind: type[_T]) -> _T:
        self.worker.submit(command)
        answer = self.answers.get(timeout=60)
        assert isinstance(answer, kind), answer
        return answer

    def ready(self, run: RunDocument, manifest: Manifest, mask: Mask) -> None:
        self.ask(Plan(run, manifest), Planned)
        prepared = self.ask(Prepare(run, manifest, mask, "ab"), Prepared)
        assert (prepared.run, prepared.mask_sha256) == (run.run, "ab")

    def task(
        self, kind: ReportKind, weights: NDArray[np.float32], round_: int = 3, k: int = 6, ordinal: int = 2
    ) -> Task:
        self.tasks += 1
        positions = (np.arange(10, 10 + k, dtype=np.int64),) if kind is ReportKind.PROBE else ()
        return Task(self.tasks, kind, round_, ordinal, positions, weights)

    def compute(self, task: Task) -> Outcome | None:
        computed = self.ask(Compute(task), Computed)
        assert computed.number == task.number
        return computed.outcome


@pytest.fixture
def desk(tmp_path: Path, artifact: Path) -> Iterator[Desk]:
    made = Desk(tmp_path, artifact)
    yield made
    made.worker.close()
    assert not made.worker._thread.is_alive()


def weights_of(manifest: Manifest, mask: Mask) -> NDArray[np.float32]:
    return initial_weights(manifest.layout, manifest.seed)[mask.kept]


def as_report(outcome: Outcome, kind: ReportKind) -> Report:
    """Any outcome must make a report that the codec takes."""
    made = Report(
        kind, b"run1", 3, 1, outcome.samples, bytes(16), outcome.mean_loss, outcome.queries, outcome.elapsed_ms,
        outcome.peak_rss_kib, outcome.blocks, outcome.decline,
    )  # fmt: skip
    assert Report.decode(made.encode()).encode() == made.encode()
    return made


# --- what is measured ---------------------------------------------------------------------------------------------


def test_a_probe_is_the_estimators(
    desk: Desk, run: RunDocument, manifest: Manifest, mask: Mask, artifact: Path
) -> None:
    desk.ready(run, manifest, mask)
    weights = weights_of(manifest, mask)
    outcome = desk.compute(desk.task(ReportKind.PROBE, weights))
    assert outcome is not None
    train = loader(desk.data)(INPUT_SHAPE, N_CLASSES).train
    batch = train.batch(batch_indices(SEED, 3, 2, len(train), TRAINING.batch))
    estimator = SteinEstimator(Directions("hadamard", SEED, mask.n_survivors), TRAINING.sigma)
    with Engine(load_artifact(artifact), mask, micro_batch=8) as engine:
        expected = estimator.probe(engine, weights, batch, 3, np.arange(10, 16, dtype=np.int64))
    (block,) = outcome.blocks
    assert block.dtype == np.float32
    assert block.tobytes() == expected.values.tobytes()
    assert (outcome.samples, outcome.queries) == (8, 7)
    assert outcome.mean_loss == expected.mean_loss
    assert 0 < outcome.peak_rss_kib <= 1024 * (peak_rss_mib() + 2)  # the kernel keeps batched counters
    assert outcome.decline is Decline.NONE
    as_report(outcome, ReportKind.PROBE)


def test_batches_differ_by_round_and_device_and_come_again(
    desk: Desk, run: RunDocument, manifest: Manifest, mask: Mask
) -> None:
    desk.ready(run, manifest, mask)
    weights = weights_of(manifest, mask)

    def loss(round_: int, ordinal: int) -> float:
        outcome = desk.compute(desk.task(ReportKind.PROBE, weights, round_, 1, ordinal))
        assert outcome is not None
        return outcome.mean_loss

    losses = {(round_, ordinal): loss(round_, ordinal) for round_ in (1, 2) for ordinal in (0, 1)}
    assert len(set(losses.values())) == 4
    assert all(loss(*key) == value for key, value in losses.items())


@pytest.mark.parametrize("inputs", ["gaussian", "data"])
@pytest.mark.parametrize("draws", [0, 1])
def test_a_scoring_is_the_scorers(
    desk: Desk, run: RunDocument, manifest: Manifest, artifact: Path, inputs: Any, draws: int
) -> None:
    saliency = dataclasses.replace(SALIENCY, inputs=inputs, draws=draws)
    run = dataclasses.replace(run, settings=dataclasses.replace(run.settings, saliency=saliency))
    dense = Mask.dense(manifest.layout)
    desk.ready(run, manifest, dense)
    weights = weights_of(manifest, dense)
    outcome = desk.compute(desk.task(ReportKind.SALIENCY, weights))
    assert outcome is not None
    if inputs == "gaussian":
        x = gaussian_inputs(manifest, SEED, 3, 2, 12)
    else:
        train = loader(desk.data)(INPUT_SHAPE, N_CLASSES).train
        x = train.batch(batch_indices(SEED, 3, 2, len(train), 12)).x
    with Engine(load_artifact(artifact), dense, micro_batch=8) as engine:
        expected = UnitShiftScorer(manifest, draws=draws, seed=SEED).score(engine, weights, x, 3)
    assert [b.shape for b in outcome.blocks] == [b.shape for b in expected.blocks]
    assert len(outcome.blocks) == 2 + draws
    for block, wanted in zip(outcome.blocks, expected.blocks, strict=True):
        assert block.dtype == np.float32
        np.testing.assert_allclose(block, wanted, rtol=1e-5)
    assert (outcome.samples, outcome.queries) == (12, expected.passes)
    as_report(outcome, ReportKind.SALIENCY)


def test_an_evaluation_counts_the_held_out_samples(
    desk: Desk, run: RunDocument, manifest: Manifest, mask: Mask, artifact: Path
) -> None:
    desk.ready(run, manifest, mask)
    weights = weights_of(manifest, mask)
    outcome = desk.compute(desk.task(ReportKind.EVALUATE, weights))
    assert outcome is not None
    test = loader(desk.data)(INPUT_SHAPE, N_CLASSES).test
    whole = test.batch(np.arange(len(test), dtype=np.int64))
    with Engine(load_artifact(artifact), mask) as engine:
        loss_sum, correct, count = engine.evaluate(weights, whole.x, whole.y)
    (block,) = outcome.blocks
    assert block.dtype == np.float32
    np.testing.assert_allclose(block, [loss_sum, correct, count], rtol=1e-6)
    assert (outcome.samples, count) == (10, 10)
    assert outcome.mean_loss == pytest.approx(loss_sum / count)
    as_report(outcome, ReportKind.EVALUATE)


def test_the_next_mask_takes_over(desk: Desk, run: RunDocument, manifest: Manifest, mask: Mask) -> None:
    dense = Mask.dense(manifest.layout)
    desk.ready(run, manifest, dense)
    desk.ready(run, manifest, mask)
    assert desk.compute(desk.task(ReportKind.PROBE, weights_of(manifest, mask))) is not None
    wrong = desk.compute(desk.task(ReportKind.PROBE, weights_of(manifest, dense)))
    assert wrong is not None
    assert wrong.decline is Decline.FAILED


# --- planning and preparing -----------------------------------------------------------------------------------------


def test_the_plan_is_the_larger_of_both_phases(desk: Desk, run: RunDocument, manifest: Manifest) -> None:
    planned = desk.ask(Plan(run, manifest), Planned)
    assert len(desk.worker.plans) == 2
    assert planned.peak_mib == max(plan.planned_peak_mib for plan in desk.worker.plans)
    dense_run = dataclasses.replace(run, settings=dataclasses.replace(run.settings, sparsity=0.0))
    desk.ask(Plan(dense_run, manifest), Planned)
    assert len(desk.worker.plans) == 1


def test_a_run_over_budget_is_refused_with_numbers(
    tmp_path: Path, artifact: Path, run: RunDocument, manifest: Manifest
) -> None:
    desk = Desk(tmp_path, artifact, ram_budget_mib=40.0)
    failed = desk.ask(Plan(run, manifest), Failed)
    assert isinstance(failed.error, MemoryBudgetError)
    assert failed.run == run.run
    assert "the budget is 40 MiB" in failed.error.message
    desk.worker.close()


@pytest.fixture
def variant(manifest: Manifest) -> GraphVariant:
    found = matching_variant(manifest, "probe.onnx")
    if found is None:
        pytest.skip("onnxruntime has no blocked kernels on this machine")
    return found


@pytest.mark.parametrize("layout", ["blocked", "portable"])
def test_a_variant_is_asked_for_and_used_when_its_file_was_fetched(
    desk: Desk, run: RunDocument, manifest: Manifest, mask: Mask, variant: GraphVariant, layout: str, artifact: Path
) -> None:
    desk.store.path(variant.file.sha256).unlink()
    planned = desk.ask(Plan(run, manifest), Planned)
    assert planned.files == tuple(wanted.file for wanted in wanted_variants(manifest))
    assert planned.peak_mib == max(plan.planned_peak_mib for plan in desk.worker.plans)
    if layout == "blocked":  # It is fetched after the plan, as the plan asks for it.
        desk.store.put((artifact / variant.file.name).read_bytes(), expected=variant.file.sha256)
    desk.ask(Prepare(run, manifest, mask, "ab"), Prepared)
    assert desk.worker.layout == ""
    assert desk.worker._work is not None
    outcome = desk.compute(desk.task(ReportKind.PROBE, weights_of(manifest, mask)))
    assert outcome is not None
    assert outcome.decline is Decline.NONE
    assert desk.worker._work.engine.layout == desk.worker.layout == layout


@pytest.mark.parametrize(
    ("portable", "blocked", "chosen"),
    [(32, 32, 32), (32, 8, 8), (32, 4, 32), (4, 4, 4), (4, 2, 4), (32, None, 32), (1, 1, 1)],
)
@pytest.mark.parametrize("batched", [32, None])
def test_a_variant_must_not_make_micro_batches_small(
    manifest: Manifest,
    variant: GraphVariant,
    portable: int,
    blocked: int | None,
    chosen: int,
    batched: int | None,
) -> None:
    other = GraphFile("probe.plainq4.onnx", bytes(32), 1)
    both = dataclasses.replace(variant, file=other, machine="any", onnxruntime="any", block=0, queries=4)
    manifest = dataclasses.replace(
        manifest, variants=(variant, both), memory=(*manifest.memory, GraphMemory(other.name, ((1, 1),)))
    )

    def phase(graphs: tuple[str, ...]) -> MemoryPlan:
        size = blocked if variant.file.name in graphs else portable
        if size is None or (batched is None and other.name in graphs):
            raise MemoryBudgetError("too large")
        return MemoryPlan(1.0, 1.0, 1.0, 1.0, 1.0, size, 9.0)

    plan, files = plan_with_variants(manifest, phase)
    assert plan.micro_batch == chosen
    expected = (variant.file, other) if batched else (variant.file,)
    assert files == (expected if chosen == blocked else ())


def test_a_smaller_budget_asks_for_fewer_variants(
    tmp_path: Path, artifact: Path, run: RunDocument, manifest: Manifest, variant: GraphVariant
) -> None:
    dense_run = dataclasses.replace(run, settings=dataclasses.replace(run.settings, sparsity=0.0))
    files = tuple(wanted.file for wanted in wanted_variants(manifest))
    limits: dict[str, Any] = {}
    for expected in dict.fromkeys((files, (variant.file,), ())):
        desk = Desk(tmp_path, artifact, **limits)
        assert desk.ask(Plan(dense_run, manifest), Planned).files == expected
        (chosen,) = desk.worker.plans
        desk.worker.close()
        limits = {"ram_budget_mib": chosen.planned_peak_mib - 0.01, "micro_batch": chosen.micro_batch}


def test_data_of_another_shape_fail_the_plan(
    tmp_path: Path, artifact: Path, run: RunDocument, manifest: Manifest
) -> None:
    desk = Desk(tmp_path, artifact)
    np.savez(desk.data, x=np.zeros((4, 5, 5), np.uint8), y=np.zeros(4, np.int64))
    failed = desk.ask(Plan(run, manifest), Failed)
    assert isinstance(failed.error, DataError)
    desk.worker.close()


def test_an_absent_graph_fails_the_preparation(desk: Desk, run: RunDocument, manifest: Manifest, mask: Mask) -> None:
    desk.ask(Plan(run, manifest), Planned)
    desk.store.path(manifest.graph("probe.onnx").sha256).unlink()
    failed = desk.ask(Prepare(run, manifest, mask, ""), Failed)
    assert isinstance(failed.error, ArtifactError)


def test_the_known_answer_is_checked_once_an_artifact(
    desk: Desk, run: RunDocument, manifest: Manifest, mask: Mask, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def check(engine: Engine) -> float:
        calls.append(1)
        if len(calls) == 1:
            raise SelfTestError("the known answer is another one")
        return 0.0

    monkeypatch.setattr(Engine, "check_golden", check)
    desk.ask(Plan(run, manifest), Planned)
    failed = desk.ask(Prepare(run, manifest, mask, ""), Failed)
    assert isinstance(failed.error, SelfTestError)
    desk.ask(Prepare(run, manifest, mask, ""), Prepared)
    desk.ask(Prepare(run, manifest, Mask.dense(manifest.layout), ""), Prepared)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(MemoryError("huge"), MemoryBudgetError), (ZeroDivisionError("odd"), FedzoError), (DataError("bad"), DataError)],
)
def test_whatever_happens_in_a_plan_is_an_answer(
    desk: Desk, run: RunDocument, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: type
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(worker_module, "plan_run", fail)
    failed = desk.ask(Plan(run, manifest), Failed)
    assert isinstance(failed.error, expected)
    assert str(raised) in failed.error.message
    monkeypatch.undo()
    desk.ask(Plan(run, manifest), Planned)


# --- declines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(ReportKind))
@pytest.mark.parametrize("value", [np.inf, np.nan, 1e30])
def test_diverged_weights_are_declined(
    desk: Desk, run: RunDocument, manifest: Manifest, mask: Mask, kind: ReportKind, value: float
) -> None:
    desk.ready(run, manifest, mask)
    weights = np.full(mask.n_survivors, value, dtype=np.float32)
    outcome = desk.compute(desk.task(kind, weights))
    assert outcome is not None
    assert outcome.decline is Decline.NON_FINITE, outcome
    assert outcome.blocks == ()
    assert outcome.detail
    as_report(outcome, kind)
    healthy = desk.compute(desk.task(kind, weights_of(manifest, mask)))
    assert healthy is not None
    assert healthy.decline is Decline.NONE


def test_without_held_out_samples_an_evaluation_is_declined(
    tmp_path: Path, artifact: Path, run: RunDocument, manifest: Manifest, mask: Mask
) -> None:
    desk = Desk(tmp_path, artifact, holdout=0.0)
    desk.ready(run, manifest, mask)
    outcome = desk.compute(desk.task(ReportKind.EVALUATE, weights_of(manifest, mask)))
    assert outcome is not None
    assert outcome.decline is Decline.NO_DATA
    as_report(outcome, ReportKind.EVALUATE)
    desk.worker.close()


@pytest.mark.skipif(not arena_limit_holds(), reason="this onnxruntime does not enforce the arena's limit")
@pytest.mark.parametrize("kind", list(ReportKind))
def test_tensors_over_the_cap_are_declined(
    desk: Desk, run: RunDocument, manifest: Manifest, mask: Mask, kind: ReportKind
) -> None:
    desk.ready(run, manifest, mask)
    engine = desk.worker._work.engine  # type: ignore[union-attr]
    engine.close()
    full, engine._arena_bytes = engine._arena_bytes, 100_000
    outcome = desk.compute(desk.task(kind, weights_of(manifest, mask)))
    assert outcome is not None
    assert outcome.decline is Decline.OVER_BUDGET, outcome
    as_report(outcome, kind)
    engine.close()
    engine._arena_bytes = full
    healthy = desk.compute(desk.task(kind, weights_of(manifest, mask)))
    assert healthy is not None
    assert healthy.decline is Decline.NONE


@pytest.mark.parametrize(
    ("raised", "decline"),
    [
        (MemoryError(), Decline.OVER_BUDGET),
        (MemoryBudgetError("over"), Decline.OVER_BUDGET),
        (RuntimeError("native"), Decline.FAILED),
        (ArtifactError("odd graph"), Decline.FAILED),
        (KeyError("x"), Decline.FAILED),
    ],
)
def test_whatever_happens_in_a_task_is_an_outcome(
    desk: Desk,
    run: RunDocument,
    manifest: Manifest,
    mask: Mask,
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    decline: Decline,
) -> None:
    desk.ready(run, manifest, mask)

    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(Engine, "loss", fail)
    outcome = desk.compute(desk.task(ReportKind.PROBE, weights_of(manifest, mask)))
    assert outcome is not None
    assert outcome.decline is decline
    as_report(outcome, ReportKind.PROBE)
    monkeypatch.undo()
    healthy = desk.compute(desk.task(ReportKind.PROBE, weights_of(manifest, mask)))
    assert healthy is not None
    assert healthy.decline is Decline.NONE


def test_a_task_without_an_engine_is_declined(desk: Desk, manifest: Manifest, mask: Mask) -> None:
    outcome = desk.compute(desk.task(ReportKind.PROBE, weights_of(manifest, mask)))
    assert outcome is not None
    assert outcome.decline is Decline.FAILED


# --- cancelling -----------------------------------------------------------------------------------------------------


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], threading.Event]:
    """``gate(n)``: the n-th run of queries waits until the event is set; ``gate.losses`` counts."""

    def install(stop_at: int) -> threading.Event:
        reached, original, count = threading.Event(), Engine.losses, [0]
        goes_on = threading.Event()
        install.goes_on, install.count = goes_on, count  # type: ignore[attr-defined]

        def losses(engine: Engine, *args: Any) -> Any:
            count[0] += 1
            if count[0] == stop_at:
                reached.set()
                assert goes_on.wait(60)
            return original(engine, *args)

        monkeypatch.setattr(Engine, "losses", losses)
        return reached

    return install


def test_cancel_ends_a_task_between_two_queries(
    desk: Desk, run: RunDocument, manifest: Manifest, mask: Mask, gate: Any
) -> None:
    desk.ready(run, manifest, mask)
    reached = gate(3)
    task = desk.task(ReportKind.PROBE, weights_of(manifest, mask), k=500)
    desk.worker.submit(Compute(task))
    assert reached.wait(60)
    desk.worker.cancel()
    gate.goes_on.set()
    assert desk.answers.get(timeout=60) == Computed(task.number, None)
    assert gate.count[0] == 3
    assert desk.compute(desk.task(ReportKind.PROBE, weights_of(manifest, mask))) is not None


@pytest.mark.parametrize("kind", list(ReportKind))
def test_a_task_cancelled_while_it_waits_never_starts(
    desk: Desk, run: RunDocument, manifest: Manifest, mask: Mask, gate: Any, kind: ReportKind
) -> None:
    desk.ready(run, manifest, mask)
    reached = gate(1)
    first = desk.task(ReportKind.PROBE, weights_of(manifest, mask), k=8)
    second = desk.task(kind, weights_of(manifest, mask))
    desk.worker.submit(Compute(first))
    assert reached.wait(60)
    desk.worker.submit(Compute(second))
    desk.worker.cancel()
    third = desk.task(ReportKind.PROBE, weights_of(manifest, mask), k=1)
    desk.worker.submit(Compute(third))
    gate.goes_on.set()
    answers = [desk.answers.get(timeout=60) for _ in range(3)]
    assert answers[:2] == [Computed(first.number, None), Computed(second.number, None)]
    assert isinstance(answers[2], Computed)
    assert answers[2].outcome is not None


def test_close_cancels_what_runs(desk: Desk, run: RunDocument, manifest: Manifest, mask: Mask, gate: Any) -> None:
    desk.ready(run, manifest, mask)
    reached = gate(2)
    desk.worker.submit(Compute(desk.task(ReportKind.PROBE, weights_of(manifest, mask), k=5000)))
    assert reached.wait(60)
    desk.worker.submit(Compute(desk.task(ReportKind.PROBE, weights_of(manifest, mask), k=5000)))
    threading.Timer(0.1, gate.goes_on.set).start()
    started = time.monotonic()
    desk.worker.close()
    assert time.monotonic() - started < 5.0
    assert not desk.worker._thread.is_alive()
    assert gate.count[0] == 2
