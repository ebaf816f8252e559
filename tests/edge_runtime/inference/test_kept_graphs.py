"""Graphs stay loaded between rounds where the plan has room: the same bits, fewer loads, and what the plan says."""

from __future__ import annotations

import dataclasses
import json
import queue
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from fedzo.edge_runtime.agent import Agent, Connection
from fedzo.edge_runtime.inference import ort
from fedzo.edge_runtime.inference.kept_graphs import with_kept_graphs
from fedzo.edge_runtime.planning.memory import TRAINING_GRAPHS, MemoryPlan, plan
from fedzo.edge_runtime.planning.run_plan import plan_run
from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.edge_runtime.storage.state import DeviceState
from fedzo.edge_runtime.worker import Limits, Worker
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import Manifest
from fedzo.protocol.device_side.device_events import (
    Compute,
    Computed,
    DeviceEvent,
    Outcome,
    Plan,
    Planned,
    Prepare,
    Prepared,
    Task,
)
from fedzo.protocol.errors import MemoryBudgetError
from fedzo.protocol.perturbation.blocks import blocks_of
from fedzo.protocol.pruning.mask import Mask
from fedzo.protocol.settings import RunSettings, SaliencySettings, TrainingSettings
from fedzo.protocol.wire.documents import Hello, RunDocument
from fedzo.protocol.wire.messages import Decline, ReportKind
from tests.edge_runtime.federation import (
    INPUT_SHAPE,
    N_CLASSES,
    export_lenet,
    filled_store,
    loader,
    run_document,
    write_data,
)

LARGE_MIB = 4096.0
_T = TypeVar("_T")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_lenet(tmp_path_factory.mktemp("kept") / "lenet5")


@pytest.fixture(scope="module")
def manifest(artifact: Path) -> Manifest:
    return load_artifact(artifact).manifest


def training(estimator: Any = "node") -> TrainingSettings:
    return TrainingSettings(estimator=estimator, k=3, tail_k=12, batch=16, repeats=4, rounds=9)


def plans_of(artifact: Path, budget_mib: float, settings: RunSettings, data: Path) -> tuple[MemoryPlan, ...]:
    dataset = loader(data)(INPUT_SHAPE, N_CLASSES)
    return plan_run(load_artifact(artifact).manifest, settings, dataset, Limits(budget_mib), None)[0]


# --- the plan -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["stein", "split", "node", "coordinate"])
def test_all_graphs_of_training_are_planned_where_there_is_room(artifact: Path, tmp_path: Path, estimator: str) -> None:
    data = write_data(tmp_path / "data.npz")
    settings = RunSettings(sparsity=0.5, training=training(estimator), saliency=SaliencySettings(samples=16))
    roomy, *scoring = plans_of(artifact, LARGE_MIB, settings, data)
    assert not any(phase.keeps_graphs for phase in scoring)
    assert roomy.keeps_graphs is (estimator != "stein")  # which changes graphs at an evaluation only
    if not roomy.keeps_graphs:
        return
    exact = plans_of(artifact, roomy.planned_peak_mib, settings, data)[0]
    assert exact.kept_mib == roomy.kept_mib
    tight = plans_of(artifact, roomy.planned_peak_mib - 0.01, settings, data)[0]
    assert not tight.keeps_graphs
    assert tight.planned_peak_mib < roomy.planned_peak_mib - 2
    # Nothing else changes, so neither do the bits.
    assert (tight.micro_batch, tight.arena_bytes) == (roomy.micro_batch, roomy.arena_bytes)


def test_every_further_graph_counts_with_its_arena(manifest: Manifest) -> None:
    one = plan(manifest, 1000, LARGE_MIB, graphs=TRAINING_GRAPHS, batch=16)
    assert with_kept_graphs(one, manifest, ("probe.onnx",), 1000).kept_mib == 0.0
    names = ("probe.onnx", "predict.onnx", "stage0.onnx")
    found = [with_kept_graphs(one, manifest, names[:n], 1000).kept_mib for n in (1, 2, 3)]
    live = [manifest.live_bytes(name, one.micro_batch) / 2**20 for name in names]
    assert found[1] - found[0] > min(live[:2])
    assert found[2] - found[1] > live[2]
    anonymous = with_kept_graphs(one, manifest, names, 1000).anonymous_mib
    assert anonymous == one.anonymous_mib + found[2]


# --- the worker -----------------------------------------------------------------------------------------------------


class Desk:
    """A worker in a run of an estimator, with the graphs that it loads."""

    def __init__(self, folder: Path, artifact: Path, budget_mib: float, monkeypatch: pytest.MonkeyPatch) -> None:
        folder.mkdir()
        self.answers: queue.Queue[DeviceEvent] = queue.Queue()
        self.loads = 0
        exact = ort.runtime().InferenceSession

        def load(*arguments: Any, **keywords: Any) -> Any:
            self.loads += 1
            return exact(*arguments, **keywords)

        monkeypatch.setattr(ort.runtime(), "InferenceSession", load)
        store = filled_store(folder / "blobs", artifact)
        data = loader(write_data(folder / "data.npz"))
        self.worker = Worker(data, store, self.answers.put, Limits(budget_mib))
        self.worker.start()
        self.manifest = load_artifact(artifact).manifest
        self.mask = Mask.dense(self.manifest.layout)

    def ask(self, command: Plan | Prepare | Compute, kind: type[_T]) -> _T:
        self.worker.submit(command)
        answer = self.answers.get(timeout=60)
        assert isinstance(answer, kind), answer
        return answer

    def ready(self, run: RunDocument, micro_batch: int | None = None) -> None:
        self.ask(Plan(run, self.manifest, micro_batch), Planned)
        self.ask(Prepare(run, self.manifest, self.mask, ""), Prepared)

    def probe(self, run: RunDocument, round_: int) -> Outcome:
        blocks = blocks_of(run.training, self.manifest, self.mask)
        positions = tuple(np.arange(block.k, dtype=np.int64) for block in blocks)
        weights = initial_weights(self.manifest.layout, self.manifest.seed)
        task = Task(round_, ReportKind.PROBE, round_, 0, positions, weights)
        outcome = self.ask(Compute(task), Computed).outcome
        assert outcome is not None
        return outcome


@pytest.mark.parametrize("estimator", ["node", "split"])
def test_rounds_give_the_same_bits_and_load_nothing_again(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimator: str
) -> None:
    run = run_document(artifact, sparsity=0.0, training=training(estimator))
    scalars, loads = [], []
    budget_mib = LARGE_MIB
    for name, words in (("kept", "graphs stay loaded"), ("one", "one graph at a time")):
        with monkeypatch.context() as patch:
            desk = Desk(tmp_path / name, artifact, budget_mib, patch)
            desk.ready(run)
            assert desk.worker.loading == words
            budget_mib = desk.worker.plans[0].planned_peak_mib - 0.01
            found = [desk.probe(run, 1)]
            before = desk.loads
            found += [desk.probe(run, round_) for round_ in (2, 3)]
            assert ort.sessions_stay() is (name == "kept")
            loads.append(desk.loads - before)
            scalars.append([block.tobytes() for outcome in found for block in outcome.blocks])
            desk.worker.close()
            assert not ort.sessions_stay()
    assert loads[0] == 0
    assert loads[1] >= 4
    assert scalars[0] == scalars[1]


def test_graphs_that_stayed_are_given_up_when_memory_runs_out(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_document(artifact, sparsity=0.0, training=training())
    desk = Desk(tmp_path / "desk", artifact, LARGE_MIB, monkeypatch)
    desk.ready(run)
    desk.probe(run, 1)
    work = desk.worker._work
    assert work is not None
    assert ort.sessions_stay()

    def full(*_: object) -> Any:
        raise MemoryBudgetError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(work, "measure", full)
        assert desk.probe(run, 2).decline is Decline.OVER_BUDGET
    assert not ort.sessions_stay()
    assert not work.engine._kept
    # What the server orders then is planned with one graph at a time.
    desk.ready(run, micro_batch=4)
    assert desk.worker.loading == "one graph at a time"
    assert desk.probe(run, 2).blocks
    assert not ort.sessions_stay()
    desk.worker.close()


def test_scoring_loads_one_graph_at_a_time(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its graphs are of no use for training."""
    run = run_document(artifact, sparsity=0.5, training=training(), saliency=SaliencySettings(samples=16, draws=1))
    desk = Desk(tmp_path / "desk", artifact, LARGE_MIB, monkeypatch)
    desk.ready(run)
    assert desk.worker.plans[0].keeps_graphs
    assert not ort.sessions_stay()
    desk.ask(Prepare(run, desk.manifest, desk.mask, "ab"), Prepared)
    assert ort.sessions_stay()
    desk.worker.close()


def test_a_device_says_whether_its_graphs_stay(artifact: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    with DeviceState(tmp_path / "state", federation="default", device="dev-a") as state:
        hello = Hello(state.session, "test", LARGE_MIB, 40, 10, "", "x86_64")
        data = loader(write_data(tmp_path / "data.npz"))
        agent = Agent(state, hello, data, Connection("mqtt://127.0.0.1:1"), Limits(LARGE_MIB), say=lines.append)
        for estimator in ("node", "stein"):
            run = run_document(artifact, sparsity=0.0, training=training(estimator))
            agent._translate(agent._worker._plan(Plan(run, load_artifact(artifact).manifest)))
        agent._transport.close()
    assert [line.rpartition(", ")[2] for line in lines] == ["graphs stay loaded", "one graph at a time"]


# --- a real process -------------------------------------------------------------------------------------------------

_DEVICE = """
import json, queue, sys
from pathlib import Path
from fedzo.edge_runtime.connection.light_imports import hashlib_without_openssl
from fedzo.edge_runtime.planning.peaks import Watch
from fedzo.edge_runtime.planning.resident import keep_small, release_code, trim_heap
keep_small()
hashlib_without_openssl()
watch = Watch()
import numpy as np
from fedzo.edge_runtime import join  # the client and the state machine are in a device's memory as well
from fedzo.edge_runtime.storage.artifact import BlobStore
from fedzo.edge_runtime.datasets.data import load_dataset
from fedzo.edge_runtime.worker import Limits, Worker
from fedzo.protocol.perturbation.blocks import blocks_of
from fedzo.protocol.device_side.device_events import Compute, Plan, Prepare, Task
from fedzo.protocol.wire.documents import RunDocument, parse
from fedzo.protocol.artifact.manifest import Manifest
from fedzo.protocol.pruning.mask import Mask
from fedzo.protocol.wire.messages import ReportKind
from fedzo.protocol.device_side.parts import start_replica

folder, budget_mib = Path(sys.argv[1]), float(sys.argv[2])
run = parse(RunDocument, (folder / "run.json").read_bytes())
manifest = Manifest.decode((folder / "lenet5" / "manifest.json").read_bytes())
mask = Mask.dense(manifest.layout)
replica = start_replica(run, manifest, mask)
answers = queue.Queue()
load = lambda shape, classes: load_dataset(folder / "data.npz", shape, classes, holdout=0.2)
worker = Worker(load, BlobStore(folder / "blobs"), answers.put, Limits(budget_mib))
worker.start()

def ask(command):
    worker.submit(command)
    return answers.get(timeout=100)

planned = ask(Plan(run, manifest))
release_code()
trim_heap()
watch.restart()
ask(Prepare(run, manifest, mask, ""))
positions = tuple(np.arange(block.k, dtype=np.int64) for block in blocks_of(run.training, manifest, mask))
queries = 0
for round_ in range(1, 4):
    task = Task(round_, ReportKind.PROBE, round_, 0, positions, replica.weights.copy())
    queries += ask(Compute(task)).outcome.queries
    task = Task(100 + round_, ReportKind.EVALUATE, round_, 0, (), replica.weights.copy())
    queries += ask(Compute(task)).outcome.queries
peaks = watch.restart()
plan = worker.plans[0]
worker.close()
watch.__exit__(None, None, None)
print(json.dumps({"measured": peaks.anonymous_mib, "planned": plan.anonymous_mib, "kept": plan.kept_mib,
                  "peak": plan.planned_peak_mib, "queries": queries}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system has no /proc")
def test_the_plan_holds_in_a_real_process(artifact: Path, tmp_path: Path) -> None:
    """With all graphs loaded and with one at a time, of `node` and with evaluations."""
    write_data(tmp_path / "data.npz")
    filled_store(tmp_path / "blobs", artifact)
    (tmp_path / "lenet5").symlink_to(artifact)
    run = run_document(artifact, sparsity=0.0, training=dataclasses.replace(training(), batch=40))
    (tmp_path / "run.json").write_bytes(run.encode())

    def device(budget_mib: float) -> dict[str, float]:
        done = subprocess.run(
            [sys.executable, "-c", _DEVICE, str(tmp_path), str(budget_mib)],
            capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return answer

    kept = device(LARGE_MIB)
    one = device(kept["peak"] - 0.01)
    assert one["kept"] == 0 < kept["kept"]
    assert one["queries"] == kept["queries"] > 20
    for found in (kept, one):
        assert found["measured"] <= found["planned"] + 1.0
    assert 1.0 < kept["measured"] - one["measured"] <= kept["kept"]
