"""The memory plan: choice of the micro-batch, refusals, and the plan against a real process."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.inference.ort import arena_limit_holds, runtime_version
from fedzo.edge_runtime.planning import memory
from fedzo.edge_runtime.planning.child import answer_of
from fedzo.edge_runtime.planning.memory import SCORING_GRAPHS, TRAINING_GRAPHS, plan
from fedzo.edge_runtime.storage.artifact import Artifact, load_artifact
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import GraphMemory, Manifest, golden_batch
from fedzo.protocol.errors import ConfigError, MemoryBudgetError
from fedzo.protocol.pruning.mask import Mask, threshold

NEWEST = tuple(int(part) for part in runtime_version().split(".")[:2]) >= (1, 32)
needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system has no /proc")


@pytest.fixture
def big(tiny: Any) -> Manifest:
    """The small network's manifest with tensors of 1 MiB a sample."""
    names = (*TRAINING_GRAPHS, *SCORING_GRAPHS)
    envelopes = tuple(GraphMemory(name, ((4 << 20, 0), (0, 1 << 20))) for name in names)
    manifest: Manifest = dataclasses.replace(tiny.artifact.manifest, memory=envelopes)
    return manifest


def _plan(manifest: Manifest, budget_mib: float, batch: int, **more: Any) -> memory.MemoryPlan:
    return plan(manifest, 20, budget_mib, graphs=TRAINING_GRAPHS, batch=batch, **more)


@pytest.mark.parametrize(
    ("batch", "samples_that_fit", "chosen"),
    [(64, 100, 32), (32, 100, 32), (20, 100, 20), (20, 19, 16), (64, 20, 16), (64, 9, 8), (64, 4, 4), (5, 100, 5)],
)
def test_largest_micro_batch_that_fits_is_chosen(big: Manifest, batch: int, samples_that_fit: int, chosen: int) -> None:
    budget = _plan(big, 1e6, batch, micro_batch=samples_that_fit).planned_peak_mib + 0.01
    chosen_plan = _plan(big, budget, batch)
    assert chosen_plan.micro_batch == chosen
    assert chosen_plan.fits
    assert chosen_plan.planned_peak_mib <= budget


def test_parts_add_up_and_grow(big: Manifest) -> None:
    base = _plan(big, 500, 32, micro_batch=8)
    assert base.live_mib == pytest.approx(8 + 8 * 20 / 2**20)
    parts = base.process_mib + base.session_mib + base.feeds_mib + base.live_mib + base.margin_mib
    assert base.anonymous_mib == parts
    assert base.planned_peak_mib == parts + base.code_mib
    assert base.arena_bytes == pytest.approx((base.live_mib + base.margin_mib) * 2**20, abs=1)
    for bigger in (
        _plan(big, 500, 32, micro_batch=16),
        _plan(big, 500, 256, micro_batch=8),
        _plan(big, 500, 32, micro_batch=8, threads=4),
        _plan(big, 500, 32, micro_batch=8, dataset_bytes=1 << 20),
        plan(big, 4000, 500, graphs=TRAINING_GRAPHS, batch=32, micro_batch=8),
    ):
        assert bigger.planned_peak_mib > base.planned_peak_mib
    scoring = plan(big, 20, 500, graphs=SCORING_GRAPHS, batch=32, micro_batch=8)
    assert scoring.feeds_mib < base.feeds_mib


def test_refusal_names_numbers_and_next_action(big: Manifest) -> None:
    with pytest.raises(MemoryBudgetError, match=r"needs \d+\.\d MiB .* micro-batch 1, the budget is 50 MiB") as caught:
        _plan(big, 50, 32, dataset_bytes=5 << 20)
    assert "use a board with" in caught.value.hint
    assert "uncompressed" in caught.value.hint
    assert caught.value.exit_code == 4
    budget = _plan(big, 1e6, 32, micro_batch=4).planned_peak_mib + 0.01
    with pytest.raises(MemoryBudgetError, match="micro-batch 8") as caught:
        _plan(big, budget, 32, micro_batch=8)
    assert caught.value.hint == "--micro-batch 4 fits"


@pytest.mark.parametrize(
    "arguments", [{"batch": 0}, {"threads": 0}, {"micro_batch": 0}, {"budget_mib": 0.0}, {"budget_mib": float("nan")}]
)
def test_numbers_out_of_range_are_refused(big: Manifest, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        plan(big, 20, **{"budget_mib": 500.0, "batch": 8, "graphs": TRAINING_GRAPHS, **arguments})


def test_planned_arena_is_enough_for_every_graph(tiny: Any) -> None:
    limits = plan(tiny.artifact.manifest, 50, 500, graphs=(*TRAINING_GRAPHS, *SCORING_GRAPHS), batch=23)
    shift = np.zeros(tiny.artifact.manifest.n_units, np.float32)
    with Engine(tiny.artifact, tiny.dense, micro_batch=limits.micro_batch, arena_bytes=limits.arena_bytes) as engine:
        engine.loss(tiny.weights, tiny.x, tiny.y)
        engine.logits(tiny.weights, tiny.x)
        engine.shifted_logits(tiny.weights, tiny.x, shift)
        engine.moments(tiny.weights, tiny.x)


@needs_proc
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_plan_holds_in_a_real_process(tiny: Any, sparsity: float) -> None:
    arguments = [str(tiny.folder), "--budget-mib", "500", "--batch", "32", "--samples", "32"]
    found = answer_of("fedzo.edge_runtime.planning.measure", [*arguments, "--sparsity", str(sparsity)])
    assert [phase["phase"] for phase in found["phases"]] == (["scoring"] if sparsity else []) + ["training"]
    for phase in found["phases"]:
        # Without code, whose resident part the page cache decides. Older releases of onnxruntime need less.
        over = phase["planned_anonymous_mib"] - phase["anonymous_mib"]
        assert -1.0 < over < (0.05 * phase["anonymous_mib"] + 1.0 if NEWEST else 15.0)
        # The kernel's count is that and code; the watch may miss the last bit of either.
        assert phase["measured_mib"] - phase["anonymous_mib"] < phase["code_mib"] + 4.0


@needs_proc
@pytest.mark.skipif(not NEWEST, reason="older releases of onnxruntime need less")
@pytest.mark.parametrize(
    ("model", "shape", "sparsity"),
    [
        ("tests.exporter.growing_models:perceptron", (1, 28, 28), 0.0),
        ("tests.exporter.growing_models:perceptron", (1, 28, 28), 0.5),
        ("tests.exporter.growing_models:frozen", (1, 28, 28), 0.5),
        ("resnet20", (3, 32, 32), 0.8),
    ],
)
def test_plan_holds_for_many_weights_for_constants_and_for_a_variant(
    model: str, shape: tuple[int, ...], sparsity: float, tmp_path: Path
) -> None:
    exporter = pytest.importorskip("fedzo.exporter.artifact", reason="fedzo[server] is not installed")
    exporter.export_artifact(model, shape, 10, 0.8, 1, tmp_path / "a")
    arguments = [str(tmp_path / "a"), "--budget-mib", "900", "--variant", "--sparsity", str(sparsity)]
    found = answer_of("fedzo.edge_runtime.planning.measure", arguments)
    worst = max(found["phases"], key=lambda phase: phase["anonymous_mib"])
    for phase in found["phases"]:
        assert phase["anonymous_mib"] < phase["planned_anonymous_mib"] + 1.0
    assert worst["planned_anonymous_mib"] < 1.15 * worst["anonymous_mib"] + 1.0


def test_the_known_answer_is_planned(big: Manifest) -> None:
    """It takes dense weights, so a high sparsity does not make a process small without end."""
    dense = 12 * big.layout.size / 2**20
    few, more = _plan(big, 500, 1, micro_batch=1), plan(big, 21, 500, graphs=TRAINING_GRAPHS, batch=1, micro_batch=1)
    assert few.feeds_mib > dense
    assert more.planned_peak_mib > few.planned_peak_mib


@needs_proc
def test_peak_follows_allocations_and_resets() -> None:
    assert memory.reset_peak()
    before = memory.peak_rss_mib()
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    grown = memory.peak_rss_mib()
    assert grown - before > 60
    del block
    assert memory.peak_rss_mib() == pytest.approx(grown, abs=2)  # the kernel keeps batched counters
    assert memory.reset_peak()
    assert memory.peak_rss_mib() < grown - 50
    assert 0 < memory.available_mib() <= memory.total_mib() * 64


def test_a_system_without_proc_reports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(Path, "open", missing)
    monkeypatch.setattr(os, "open", missing)
    monkeypatch.setattr(Path, "read_text", missing)
    assert memory.peak_rss_mib() == memory.total_mib() == memory.available_mib() == 0.0
    assert memory.reset_peak() is False


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    exporter = pytest.importorskip("fedzo.exporter.artifact", reason="fedzo[server] is not installed")
    artifacts = {}
    for model in ("lenet5", "resnet8"):
        folder = tmp_path_factory.mktemp("exported") / model
        exporter.export_artifact(model, (3, 32, 32), 10, 0.8, 1, folder)
        artifacts[model] = load_artifact(folder)
    return artifacts


@pytest.mark.parametrize("micro_batch", [1, 2, 8, 32])
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("model", ["lenet5", "resnet8"])
def test_planned_arena_is_enough_and_tight_for_real_models(
    exported: dict[str, Artifact], model: str, dense: bool, micro_batch: int
) -> None:
    artifact = exported[model]
    manifest = artifact.manifest
    weights = initial_weights(manifest.layout, 1)
    mask = Mask.dense(manifest.layout) if dense else threshold(manifest.layout, np.abs(weights), 0.8)
    x, y = golden_batch(manifest.input_shape, 10, 1, micro_batch)
    shift = np.zeros(manifest.n_units, np.float32)
    calls: dict[str, Callable[[Engine], object]] = {
        "probe.onnx": lambda engine: engine.loss(weights[mask.kept], x, y),
        "predict.onnx": lambda engine: engine.logits(weights[mask.kept], x),
        "saliency.onnx": lambda engine: engine.shifted_logits(weights[mask.kept], x, shift),
        "moments.onnx": lambda engine: engine.moments(weights[mask.kept], x),
    }
    for graph, call in calls.items():
        limits = plan(manifest, mask.n_survivors, 1e6, graphs=[graph], batch=micro_batch, micro_batch=micro_batch)
        with Engine(artifact, mask, micro_batch=micro_batch, arena_bytes=limits.arena_bytes) as engine:
            for _ in range(3):
                call(engine)
        if micro_batch == 32 and arena_limit_holds():
            tight = Engine(artifact, mask, micro_batch=micro_batch, arena_bytes=int(0.6 * limits.arena_bytes))
            with tight, pytest.raises(MemoryBudgetError):
                call(tight)


def test_known_answer_of_real_models(exported: dict[str, Artifact]) -> None:
    for artifact in exported.values():
        with Engine(artifact, Mask.dense(artifact.manifest.layout), micro_batch=8) as engine:
            assert engine.check_golden() < 1e-6
