"""The probe graph for the exporting machine: every weight is found again, and its losses are those of constants."""

from __future__ import annotations

import logging
import platform
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, numpy_helper

from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.inference.variants import block_size, machine_family
from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.exporter import blocked_layout
from fedzo.exporter.artifact import export_artifact
from fedzo.exporter.blocked_layout import BLOCKED_DOMAIN, block_probe
from fedzo.exporter.blocked_rewrites import stay_blocked
from fedzo.exporter.graphs import build_graphs
from fedzo.exporter.models.registry import build_forward
from fedzo.exporter.passes.fold_weights import FoldWeights
from fedzo.protocol.artifact.layout import Initialiser, Layout, Parameter, initial_weights
from fedzo.protocol.artifact.manifest import golden_batch
from fedzo.protocol.pruning.mask import Mask, threshold

needs_blocks = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="onnxruntime has blocked kernels on x86 only"
)


def constant_loss(
    probe: bytes, layout: Layout, dense: NDArray[np.float32], feeds: dict[str, Any], rewritten: bool
) -> float:
    """Loss of the graph with constant weights under all of onnxruntime's rewriting, but for prepacked constants."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_prepacking", "1")
    twin = FoldWeights(layout, dense)(onnx.load_from_string(probe)).model
    if rewritten:
        twin = blocked_layout.optimised_by_runtime(twin)[0]
        stay_blocked(twin, block_size())
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(twin.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return float(session.run(None, feeds)[0])


@needs_blocks
@pytest.mark.parametrize("batch", [1, 5, 32])
@pytest.mark.parametrize("sparsity", [0.0, 0.8])
@pytest.mark.parametrize("model", ["lenet5", "resnet8"])
def test_losses_are_those_of_constant_weights(
    model: str, sparsity: float, batch: int, request: pytest.FixtureRequest
) -> None:
    artifact = load_artifact(request.getfixturevalue(model))
    manifest = artifact.manifest
    weights = initial_weights(manifest.layout, 3)
    mask = threshold(manifest.layout, np.abs(weights), sparsity) if sparsity else Mask.dense(manifest.layout)
    dense = np.where(mask.kept, weights, np.float32(0.0))
    x, y = golden_batch(manifest.input_shape, manifest.n_classes, 4, batch)
    with Engine(artifact, mask, layout="blocked") as engine:
        for scale in (np.float32(1.0), np.float32(-0.5)):  # the tensors are written again, not made again
            loss = engine.loss(weights[mask.survivors()] * scale, x, y)
            probe, feeds = artifact.read_graph("probe.onnx"), {"x": x, "y": y}
            expected, plain = (
                constant_loss(probe, manifest.layout, dense * scale, feeds, r) / batch for r in (True, False)
            )
            assert loss == expected
            assert loss == pytest.approx(plain, rel=1e-6)  # the rewriting of blocked_rewrites only rounds otherwise


@needs_blocks
@pytest.mark.parametrize(("model", "forms"), [("lenet5", [1, 4]), ("resnet8", [1])])
def test_the_variants_are_of_this_machine(model: str, forms: list[int], request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(model)
    manifest = load_artifact(folder).manifest
    variants = [variant for variant in manifest.variants if variant.machine != "any"]
    assert [variant.queries for variant in variants] == forms
    for variant in variants:
        assert (variant.graph, variant.machine, variant.onnxruntime, variant.block) == (
            "probe.onnx",
            machine_family(),
            onnxruntime.__version__,
            block_size(),
        )
        graph = onnx.load(str(folder / variant.file.name)).graph
        assert BLOCKED_DOMAIN in {node.domain for node in graph.node}
        inputs = {value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in graph.input}
        names = {name.partition(".query")[0] for name in inputs}
        assert names == {p.name for p in manifest.layout.parameters} | {"x", "y"}
        weights = [value for name, value in inputs.items() if name not in ("x", "y")]
        assert variant.weight_bytes == 4 * sum(int(np.prod(dims)) for dims in weights)
        assert all(tensor.name not in inputs for tensor in graph.initializer)


def test_a_model_without_blocked_kernels_has_no_variant(tmp_path: Path) -> None:
    manifest = export_artifact("cnn1d", (1, 64), 3, 0.5, 0, tmp_path / "a")
    assert manifest.variants == ()
    assert b"variants" not in (tmp_path / "a" / "manifest.json").read_bytes()


@needs_blocks
@pytest.mark.parametrize("reason", ["machine", "size", "merged", "scaled", "lost", "shuffled", "refused"])
def test_what_cannot_be_traced_is_left_out(
    reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    built = build_graphs(build_forward("lenet5", (1, 32, 32), 10, 0), 0.5)
    probe = built.graphs["probe.onnx"]
    assert block_probe(probe, built.layout) is not None
    original = blocked_layout.optimised_by_runtime

    def changed(model: ModelProto) -> tuple[ModelProto, str]:
        if reason == "refused":
            model = ModelProto()
        optimised, version = original(model)
        for tensor in optimised.graph.initializer:
            if tensor.name == "fc2.weight":
                values = numpy_helper.to_array(tensor).copy()
                if reason == "merged":
                    values[0, 0] = values[0, 1]
                elif reason == "scaled":
                    values *= np.float32(0.25)
                elif reason == "shuffled":
                    values = np.random.default_rng(0).permutation(values.ravel()).reshape(values.shape)
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
                if reason == "lost":
                    optimised.graph.initializer.remove(tensor)
                    break
        return optimised, version

    if reason == "machine":
        monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    elif reason == "size":
        monkeypatch.setattr(blocked_layout, "_FIRST", 1000)
    else:
        monkeypatch.setattr(blocked_layout, "optimised_by_runtime", changed)
    with caplog.at_level(logging.INFO, logger=blocked_layout.__name__):
        assert block_probe(probe, built.layout) is None
    assert "no blocked graph" in caplog.text


@pytest.mark.parametrize("rearranged", ["plain", "padded", "blocked", "transposed"])
def test_rules_are_found(rearranged: str) -> None:
    shape = (20, 3, 2, 2)
    parameter = Parameter("p", shape, True, Initialiser("constant", 0.0))
    ids = np.arange(240, dtype=np.float32).reshape(shape) + np.float32(blocked_layout._FIRST)
    if rearranged == "padded":
        ids = np.pad(ids, [(0, 4), (0, 0), (0, 0), (0, 0)])
    elif rearranged == "blocked":  # (O / 8, I, H, W, 8)
        ids = np.pad(ids, [(0, 4), (0, 0), (0, 0), (0, 0)]).reshape(3, 8, 3, 2, 2).transpose(0, 2, 3, 4, 1)
    elif rearranged == "transposed":
        ids = ids.transpose(2, 3, 1, 0)
    tensor: TensorProto = numpy_helper.from_array(np.ascontiguousarray(ids), "t")
    placement = blocked_layout._placement(parameter, tensor)
    if rearranged == "plain":
        assert placement is None
        return
    assert placement is not None
    index = np.random.default_rng(0).permutation(240)[:50].astype(np.int32)
    found = ids.ravel()[placement.positions(shape, index)] - np.float32(blocked_layout._FIRST)
    np.testing.assert_array_equal(found, index)
    assert placement.size == ids.size
