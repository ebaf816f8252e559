"""The engine against the float64 reference, and its failures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from fedzo.edge_runtime.inference.engine import Engine, NonFiniteLossError
from fedzo.edge_runtime.inference.ort import LAYOUT_KEY, arena_limit_holds
from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.protocol.artifact.layout import Layout
from fedzo.protocol.errors import ArtifactError, ConfigError, DataError, MemoryBudgetError, SelfTestError
from fedzo.protocol.pruning.mask import Mask


@pytest.mark.parametrize("micro_batch", [1, 4, 23, 64])
@pytest.mark.parametrize("which", ["dense", "half"])
def test_loss_matches_reference_for_every_micro_batch(tiny: Any, which: str, micro_batch: int) -> None:
    mask = getattr(tiny, which)
    weights = tiny.survivors(mask)
    with Engine(tiny.artifact, mask, micro_batch=micro_batch) as engine:
        loss = engine.loss(weights, tiny.x, tiny.y)
    assert loss == pytest.approx(tiny.reference.loss(tiny.expand(mask, weights), tiny.x, tiny.y), abs=3e-7)


def test_new_weights_are_seen_without_a_new_session(tiny: Any) -> None:
    weights = tiny.survivors(tiny.half)
    with Engine(tiny.artifact, tiny.half, micro_batch=8) as engine:
        first = engine.loss(weights, tiny.x, tiny.y)
        np.multiply(weights, np.float32(2.0), out=engine.weights_feed)
        doubled = engine.loss(engine.weights_feed, tiny.x, tiny.y)
        assert engine.loss(weights * np.float32(2.0), tiny.x, tiny.y) == doubled
        assert engine.loss(weights, tiny.x, tiny.y) == first != doubled


def test_samples_of_a_new_batch_in_the_same_memory_are_seen(tiny: Any) -> None:
    x = tiny.x.copy()
    with Engine(tiny.artifact, tiny.dense, micro_batch=32) as engine:
        first = engine.loss(tiny.weights, x, tiny.y)
        x *= np.float32(0.5)
        second = engine.loss(tiny.weights, x, tiny.y)
        assert second == engine.loss(tiny.weights, tiny.x * np.float32(0.5), tiny.y) != first


@pytest.mark.parametrize("micro_batch", [3, 32])
def test_rows_and_moments_match_reference(tiny: Any, micro_batch: int) -> None:
    weights = tiny.survivors(tiny.half)
    dense = tiny.expand(tiny.half, weights)
    shift = np.zeros(9, dtype=np.float32)
    shift[[2, 7]] = 0.125, -1.0
    with Engine(tiny.artifact, tiny.half, micro_batch=micro_batch) as engine:
        np.testing.assert_allclose(engine.logits(weights, tiny.x), tiny.reference.logits(dense, tiny.x), atol=1e-6)
        shifted = engine.shifted_logits(weights, tiny.x, shift)
        np.testing.assert_allclose(shifted, tiny.reference.logits(dense, tiny.x, shift), atol=1e-6)
        np.testing.assert_allclose(engine.moments(weights, tiny.x), tiny.reference.moments(dense, tiny.x), rtol=1e-5)
        assert engine.sample_passes == 3 * len(tiny.x)


def test_evaluate_counts_and_sums(tiny: Any) -> None:
    logits = tiny.reference.logits(tiny.weights, tiny.x)
    with Engine(tiny.artifact, tiny.dense, micro_batch=8) as engine:
        loss_sum, correct, n = engine.evaluate(tiny.weights, tiny.x, tiny.y, 5)
    assert (correct, n) == (int((logits.argmax(axis=1) == tiny.y).sum()), len(tiny.x))
    assert loss_sum / n == pytest.approx(tiny.reference.loss(tiny.weights, tiny.x, tiny.y), abs=1e-6)


def test_evaluate_of_diverged_weights_is_not_finite_but_returns(tiny: Any) -> None:
    weights = np.full_like(tiny.weights, np.inf)
    with Engine(tiny.artifact, tiny.dense) as engine:
        loss_sum, _, n = engine.evaluate(weights, tiny.x, tiny.y)
    assert n == len(tiny.x)
    assert not np.isfinite(loss_sum)


def test_diverged_weights_are_refused_with_the_next_action(tiny: Any) -> None:
    weights = np.full_like(tiny.weights, np.nan)
    with Engine(tiny.artifact, tiny.dense) as engine, pytest.raises(NonFiniteLossError, match="diverged") as caught:
        engine.loss(weights, tiny.x, tiny.y)
    assert "learning_rate" in caught.value.hint


def test_golden_passes_here_and_leaves_the_engine_usable(tiny: Any) -> None:
    with Engine(tiny.artifact, tiny.half, micro_batch=4) as engine:
        before = engine.loss(tiny.survivors(tiny.half), tiny.x, tiny.y)
        assert engine.check_golden() <= tiny.artifact.manifest.golden.tolerance
        assert engine.loss(tiny.survivors(tiny.half), tiny.x, tiny.y) == before


def test_golden_refuses_a_machine_that_computes_something_else(tiny: Any, tmp_path: Path) -> None:
    for path in tiny.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    manifest = (tmp_path / "manifest.json").read_text()
    value = tiny.artifact.manifest.golden.mean_loss
    (tmp_path / "manifest.json").write_text(manifest.replace(repr(value), repr(value + 1e-3)))
    with Engine(load_artifact(tmp_path), tiny.half) as engine, pytest.raises(SelfTestError, match=r"1\.00e-03"):
        engine.check_golden()


def _wide_probe(layout_digest: str) -> bytes:
    """A probe graph that needs 6 MiB a sample."""
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Expand", ["x", "shape"], ["wide"]),
        helper.make_node("ReduceSum", ["wide"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["loss_sum"], to=TensorProto.DOUBLE),
    ]
    shape = helper.make_tensor("shape", TensorProto.INT64, [4], [1 << 18, 1, 2, 3])
    inputs = [value("x", TensorProto.FLOAT, ["batch", 2, 3]), value("y", TensorProto.INT64, ["batch"])]
    graph = helper.make_graph(nodes, "wide", inputs, [value("loss_sum", TensorProto.DOUBLE, [])], [shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {LAYOUT_KEY: layout_digest})
    return bytes(model.SerializeToString())


@pytest.mark.skipif(not arena_limit_holds(), reason="onnxruntime before 1.23 has one arena a process")
def test_arena_limit_becomes_a_budget_error_and_engines_have_limits_of_their_own(
    tiny: Any, tmp_path: Path, write_tiny_artifact: Any
) -> None:
    digest = tiny.artifact.manifest.layout.digest.hex()
    write_tiny_artifact(tmp_path, lambda graphs: graphs.update({"probe.onnx": _wide_probe(digest)}))
    artifact = load_artifact(tmp_path)
    with Engine(artifact, tiny.dense, micro_batch=2, arena_bytes=10 << 20) as small:
        small.loss(tiny.weights, tiny.x[:1], tiny.y[:1])
        with pytest.raises(MemoryBudgetError, match=r"probe.onnx failed on 2 samples.*Available memory") as caught:
            small.loss(tiny.weights, tiny.x, tiny.y)
        assert "micro-batch" in caught.value.hint
        small.loss(tiny.weights, tiny.x[:1], tiny.y[:1])
        with Engine(artifact, tiny.dense, micro_batch=2) as unlimited:
            unlimited.loss(tiny.weights, tiny.x, tiny.y)
        with pytest.raises(MemoryBudgetError):
            small.loss(tiny.weights, tiny.x, tiny.y)


def test_graph_of_another_layout_is_refused(tiny: Any, tmp_path: Path, write_tiny_artifact: Any) -> None:
    def change(graphs: dict[str, bytes]) -> None:
        digest = tiny.artifact.manifest.layout.digest.hex().encode()
        graphs["predict.onnx"] = graphs["predict.onnx"].replace(digest, b"0" * 64)

    write_tiny_artifact(tmp_path, change)
    with Engine(load_artifact(tmp_path), tiny.dense) as engine:
        engine.loss(tiny.weights, tiny.x, tiny.y)
        with pytest.raises(ArtifactError, match=r"predict\.onnx says layout 0000"):
            engine.logits(tiny.weights, tiny.x)


@pytest.mark.parametrize(
    ("replacement", "message"),
    [(b"not a model at all", "cannot be loaded"), (b"", "malformed"), ("moments.onnx", "inputs")],
)
def test_graph_that_is_no_probe_is_refused(
    tiny: Any, tmp_path: Path, write_tiny_artifact: Any, replacement: bytes | str, message: str
) -> None:
    def change(graphs: dict[str, bytes]) -> None:
        graphs["probe.onnx"] = graphs[replacement] if isinstance(replacement, str) else replacement

    write_tiny_artifact(tmp_path, change)
    with pytest.raises(ArtifactError, match=message):
        Engine(load_artifact(tmp_path), tiny.dense).loss(tiny.weights, tiny.x, tiny.y)


@pytest.mark.parametrize(
    ("x_shape", "y_shape"),
    [((4, 3, 2), (4,)), ((4, 6), (4,)), ((0, 2, 3), (0,)), ((4, 2, 3), (3,)), ((4, 2, 3), (4, 1))],
)
def test_wrong_batches_are_refused(tiny: Any, x_shape: tuple[int, ...], y_shape: tuple[int, ...]) -> None:
    with Engine(tiny.artifact, tiny.dense) as engine, pytest.raises(DataError, match="shape"):
        engine.loss(tiny.weights, np.zeros(x_shape, np.float32), np.zeros(y_shape, np.int64))


def test_label_out_of_range_is_an_error_not_a_wild_read(tiny: Any) -> None:
    with Engine(tiny.artifact, tiny.dense) as engine, pytest.raises(ArtifactError, match=r"probe\.onnx failed"):
        engine.loss(tiny.weights, tiny.x, np.full_like(tiny.y, 1 << 40))


def test_wrong_weights_and_masks_are_refused(tiny: Any) -> None:
    with Engine(tiny.artifact, tiny.half) as engine:
        with pytest.raises(ArtifactError, match="this mask needs float32"):
            engine.loss(tiny.weights, tiny.x, tiny.y)
        with pytest.raises(ArtifactError, match="float64"):
            engine.loss(tiny.survivors(tiny.half).astype(np.float64), tiny.x, tiny.y)
    other = Layout(tiny.artifact.manifest.layout.parameters[:2])
    with pytest.raises(ArtifactError, match="another layout"):
        Engine(tiny.artifact, Mask.dense(other))


@pytest.mark.parametrize("keyword", ["threads", "micro_batch", "arena_bytes"])
def test_numbers_below_one_are_refused(tiny: Any, keyword: str) -> None:
    arguments: dict[str, Any] = {keyword: 0}
    with pytest.raises(ConfigError, match="at least 1"):
        Engine(tiny.artifact, tiny.dense, **arguments)


def test_absent_providers_fall_back_or_are_refused(tiny: Any) -> None:
    wanted = ("NoSuchExecutionProvider", "CPUExecutionProvider")
    with Engine(tiny.artifact, tiny.dense, providers=wanted) as engine:
        assert np.isfinite(engine.loss(tiny.weights, tiny.x, tiny.y))
    strict = Engine(tiny.artifact, tiny.dense, providers=wanted, strict_providers=True)
    with pytest.raises(ConfigError, match="NoSuchExecutionProvider") as caught:
        strict.loss(tiny.weights, tiny.x, tiny.y)
    assert "CPUExecutionProvider" in caught.value.hint
    with Engine(tiny.artifact, tiny.dense, providers=wanted[:1]) as engine, pytest.raises(ConfigError):
        engine.loss(tiny.weights, tiny.x, tiny.y)


def test_runtime_import_is_lazy_and_without_telemetry() -> None:
    code = (
        "import sys, os\n"
        "import fedzo.edge_runtime.inference.engine\n"
        "from fedzo.edge_runtime.estimation import estimators, saliency\n"
        "assert 'onnxruntime' not in sys.modules and 'torch' not in sys.modules and 'onnx' not in sys.modules\n"
        "from fedzo.edge_runtime.inference.ort import runtime\n"
        "runtime()\n"
        "assert os.environ['ORT_DISABLE_TELEMETRY'] == '1' and 'torch' not in sys.modules\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
