"""Memory that runs out while a device prepares or computes: it says so, plans smaller when told, and computes again."""

from __future__ import annotations

import errno
import functools
import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from fedzo.edge_runtime import round_work
from fedzo.edge_runtime import worker as worker_module
from fedzo.edge_runtime.estimation.estimators import SteinEstimator
from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.inference.ort import arena_limit_holds, mapped_error
from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.edge_runtime.worker import Limits, Worker
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import Manifest
from fedzo.protocol.device_side.device_events import (
    Compute,
    Computed,
    DeviceEvent,
    Failed,
    Outcome,
    OverBudget,
    Plan,
    Planned,
    Prepare,
    Prepared,
    Task,
)
from fedzo.protocol.errors import MemoryBudgetError
from fedzo.protocol.pruning.mask import Mask
from fedzo.protocol.settings import TrainingSettings
from fedzo.protocol.wire.documents import Presence, RunDocument
from fedzo.protocol.wire.messages import Decline, Report, ReportKind
from fedzo.protocol.wire.topics import Channel
from tests.arena_need import arena_need
from tests.edge_runtime.federation import (
    FakeServer,
    export_lenet,
    filled_store,
    loader,
    run_document,
    start_agent,
    write_data,
)
from tests.end_to_end.rigged import capped_engine

BATCH = 8
_T = TypeVar("_T")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_lenet(tmp_path_factory.mktemp("over") / "lenet5")


@pytest.fixture(scope="module")
def manifest(artifact: Path) -> Manifest:
    return load_artifact(artifact).manifest


@pytest.fixture(scope="module")
def run(artifact: Path) -> RunDocument:
    return run_document(artifact, sparsity=0.0, training=TrainingSettings(k=4, batch=BATCH, rounds=4))


@pytest.fixture(scope="module")
def needs(artifact: Path) -> dict[int, int]:
    """Smallest arena by micro-batch."""
    return {micro_batch: arena_need(artifact, micro_batch, BATCH, scoring=False) for micro_batch in (2, 4)}


class Desk:
    """A worker and its answers."""

    def __init__(self, folder: Path, artifact: Path) -> None:
        self.answers: queue.Queue[DeviceEvent] = queue.Queue()
        data = write_data(folder / "data.npz")
        store = filled_store(folder / "blobs", artifact)
        self.worker = Worker(loader(data), store, self.answers.put, Limits(4096.0))
        self.worker.start()

    def ask(self, command: Plan | Prepare | Compute, kind: type[_T]) -> _T:
        self.worker.submit(command)
        answer = self.answers.get(timeout=30)
        assert isinstance(answer, kind), answer
        return answer

    def probe(self, manifest: Manifest, number: int = 1) -> Outcome:
        weights = initial_weights(manifest.layout, manifest.seed)
        task = Task(number, ReportKind.PROBE, 1, 0, (np.arange(4, dtype=np.int64),), weights)
        outcome = self.ask(Compute(task), Computed).outcome
        assert outcome is not None
        return outcome


@pytest.fixture
def desk(tmp_path: Path, artifact: Path) -> Iterator[Desk]:
    made = Desk(tmp_path, artifact)
    yield made
    made.worker.close()


# --- planning under a limit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "micro_batch"), [(None, 8), (64, 8), (8, 8), (4, 4), (3, 3), (1, 1)])
def test_a_plan_keeps_to_the_servers_limit(
    desk: Desk, run: RunDocument, manifest: Manifest, limit: int | None, micro_batch: int
) -> None:
    free = desk.ask(Plan(run, manifest), Planned)
    arena_bytes = desk.worker._arena_bytes
    planned = desk.ask(Plan(run, manifest, limit), Planned)
    assert planned.micro_batch == micro_batch
    assert planned.peak_mib == free.peak_mib  # the budget allows as much as before, and what did not fit may take it
    assert desk.worker._arena_bytes == arena_bytes
    assert planned.files == (free.files if micro_batch == 8 else ())
    desk.ask(Prepare(run, manifest, Mask.dense(manifest.layout), ""), Prepared)
    assert desk.worker._work is not None
    assert desk.worker._work.engine.micro_batch == micro_batch
    outcome = desk.probe(manifest)
    assert (outcome.decline, outcome.samples) == (Decline.NONE, BATCH)
    assert desk.worker.layout == ("portable" if micro_batch < 8 or not free.files else "blocked")


# --- real limits ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not arena_limit_holds(), reason="this onnxruntime does not enforce the arena's limit")
def test_an_arena_that_is_too_small_fits_a_smaller_micro_batch(
    desk: Desk, run: RunDocument, manifest: Manifest, needs: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cap = (needs[2] + needs[4]) // 2
    monkeypatch.setattr(worker_module, "Engine", functools.partial(capped_engine, Engine, cap))
    dense = Mask.dense(manifest.layout)
    for limit in (None, 4):
        desk.ask(Plan(run, manifest, limit), Planned)
        over = desk.ask(Prepare(run, manifest, dense, ""), OverBudget)
        assert over.run == run.run
        assert "Available memory" in over.detail
    desk.ask(Plan(run, manifest, 2), Planned)
    desk.ask(Prepare(run, manifest, dense, ""), Prepared)
    assert desk.probe(manifest).decline is Decline.NONE


@pytest.mark.skipif(not arena_limit_holds(), reason="this onnxruntime does not enforce the arena's limit")
def test_a_query_over_the_cap_ends_with_a_clean_error(
    desk: Desk, run: RunDocument, manifest: Manifest, needs: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The known answer was found before, under another mask perhaps: only the query shows that it does not fit."""
    monkeypatch.setattr(worker_module, "Engine", functools.partial(capped_engine, Engine, needs[2]))
    monkeypatch.setattr(Engine, "check_golden", lambda _: 0.0)
    monkeypatch.setattr(Engine, "fits", lambda *_: False)  # a graph for this processor would need less
    dense = Mask.dense(manifest.layout)
    desk.ask(Plan(run, manifest), Planned)
    desk.ask(Prepare(run, manifest, dense, ""), Prepared)
    for number in (1, 2):
        outcome = desk.probe(manifest, number)
        assert (outcome.decline, outcome.blocks, outcome.samples) == (Decline.OVER_BUDGET, (), 0)
        assert "Available memory" in outcome.detail
    desk.ask(Plan(run, manifest, 2), Planned)
    desk.ask(Prepare(run, manifest, dense, ""), Prepared)
    assert desk.probe(manifest, 3).decline is Decline.NONE


@pytest.mark.skipif(not arena_limit_holds(), reason="this onnxruntime does not enforce the arena's limit")
def test_an_agent_declines_and_comes_back_with_a_smaller_micro_batch(
    mosquitto: Any,
    tmp_path: Path,
    artifact: Path,
    run: RunDocument,
    manifest: Manifest,
    needs: dict[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cap = (needs[2] + needs[4]) // 2
    monkeypatch.setattr(worker_module, "Engine", functools.partial(capped_engine, Engine, cap))
    server = FakeServer(mosquitto.url, artifact, run)
    agent = start_agent(mosquitto.url, tmp_path / "state", write_data(tmp_path / "data.npz"))
    try:
        assert server.expect(Presence, status="ready").micro_batch == 8
        server.announce(1, "train")
        declined = server.expect(Report)
        assert (declined.decline, declined.micro_batch, declined.run_tag) == (Decline.OVER_BUDGET, 8, run.tag)
        said = server.expect(Presence, micro_batch=8)  # again and again, as long as there is no order
        assert "Available memory" in said.detail
        server.expect(Presence, micro_batch=8)
        server.limit = 2
        server.send(Channel.COMMAND, server.order("dev-a", agent.state.session), "dev-a")
        server.expect(Presence, micro_batch=2, status="ready", detail="")
        server.announce(2, "train")
        report = server.expect(Report, round=2)
        assert (report.decline, report.micro_batch, report.blocks[0].size) == (Decline.NONE, 2, 4)
    finally:
        agent.stop()
        server.close()


def too_large_an_array() -> MemoryError:
    """What numpy raises."""
    with pytest.raises(MemoryError) as caught:
        np.zeros(1 << 58, np.uint8)
    return caught.value


# --- memory that runs out elsewhere ---------------------------------------------------------------------------------

NO_MEMORY: dict[str, Callable[[], Exception]] = {
    "python": MemoryError,
    "numpy": too_large_an_array,
    "system": lambda: OSError(errno.ENOMEM, "Cannot allocate memory"),
    "plan": lambda: MemoryBudgetError("over the cap"),
    "onnxruntime": lambda: mapped_error(RuntimeError("Non-zero status code: std::bad_alloc"), "probe.onnx failed"),
}


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("name", NO_MEMORY)
@pytest.mark.parametrize("place", ["make_estimator", "UnitShiftScorer", "Engine"])
def test_memory_that_runs_out_while_preparing_is_over_budget(
    desk: Desk, run: RunDocument, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    dense = Mask.dense(manifest.layout)
    desk.ask(Plan(run, manifest), Planned)
    monkeypatch.setattr(worker_module if place == "Engine" else round_work, place, failing(NO_MEMORY[name]()))
    assert desk.ask(Prepare(run, manifest, dense, ""), OverBudget).detail
    monkeypatch.undo()
    desk.ask(Plan(run, manifest, 4), Planned)
    desk.ask(Prepare(run, manifest, dense, ""), Prepared)
    assert desk.probe(manifest).decline is Decline.NONE


@pytest.mark.parametrize("name", NO_MEMORY)
def test_memory_that_runs_out_while_computing_is_over_budget(
    desk: Desk, run: RunDocument, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    desk.ask(Plan(run, manifest), Planned)
    desk.ask(Prepare(run, manifest, Mask.dense(manifest.layout), ""), Prepared)
    monkeypatch.setattr(SteinEstimator, "measure", failing(NO_MEMORY[name]()))
    outcome = desk.probe(manifest)
    assert (outcome.decline, outcome.blocks) == (Decline.OVER_BUDGET, ())
    assert outcome.detail


@pytest.mark.parametrize("name", NO_MEMORY)
def test_memory_that_runs_out_while_planning_refuses_the_run(
    desk: Desk, run: RunDocument, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """No micro-batch is planned yet, so there is none to lower: the data themselves do not fit."""
    monkeypatch.setattr(worker_module, "plan_run", failing(NO_MEMORY[name]()))
    assert isinstance(desk.ask(Plan(run, manifest), Failed).error, MemoryBudgetError)
