"""stages: which networks are chains, where they are cut, and what the manifest says of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from fedzo.exporter.artifact import export_artifact
from fedzo.exporter.local_heads import HeadPlan, head_plan
from fedzo.exporter.stages import find_stages
from fedzo.exporter.units import find_units
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import GRAPHS, Manifest
from fedzo.protocol.artifact.stages import Stage, StageHead, local_stages, stage_graph, stage_graphs, stages_from_json
from fedzo.protocol.device_side.run_files import needed_graphs
from fedzo.protocol.errors import ArtifactError
from fedzo.protocol.settings import LOCAL_ESTIMATORS, RunSettings, TrainingSettings
from tests.exporter.test_dense_tails import BRANCHES, SCALED, TOWER
from tests.exporter.text_graphs import CONVOLUTION, layout_of, parse


def read(folder: Path) -> Manifest:
    return Manifest.decode((folder / "manifest.json").read_bytes())


@pytest.fixture(scope="module")
def cnn1d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages") / "cnn1d"
    export_artifact("cnn1d", (3, 40), 5, 0.5, 7, folder)
    return folder


def test_stages_of_lenet(lenet5: Path) -> None:
    manifest = read(lenet5)
    assert manifest.stages == (
        Stage(0, 0, 2, (1, 32, 32), (6, 14, 14), 117_600),
        Stage(1, 2, 4, (6, 14, 14), (400,), 240_000),
        Stage(2, 4, 6, (400,), (120,), 48_000),
        Stage(3, 6, 8, (120,), (84,), 10_080),
        Stage(4, 8, 10, (84,), (10,), 840),
    )
    for stage in manifest.stages:
        for kind in ("forward", "gradient"):
            name = stage_graph(stage.number, kind)
            assert (lenet5 / name).exists()
            assert manifest.live_bytes(name, 4) > 0
    last = local_stages(manifest.stages)[-1]
    assert last == Stage(3, 6, 10, (120,), (10,), 10_920)


def test_stages_of_a_network_over_time(cnn1d: Path) -> None:
    shapes = [(s.feature_shape, s.output_shape) for s in read(cnn1d).stages]
    assert shapes == [((3, 40), (32, 17)), ((32, 17), (32, 6)), ((32, 6), (64,)), ((64,), (5,))]


def test_residual_networks_have_none(resnet8: Path) -> None:
    assert read(resnet8).stages == ()
    assert not list(resnet8.glob("stage*"))


GROUPED = """
net (float[batch, 4, 5] x, float[4, 2, 2] w1, float[3, 16] w2) => (float[batch, 3] logits) {
    c = Conv <group = 2> (x, w1)
    f = Flatten (c)
    logits = Gemm <transB = 1> (f, w2)
}
"""
DENSE = """
net (float[batch, 4] x, float[4, 4] w1, float[3, 4] w2) => (float[batch, 3] logits) {
    c = Gemm <transB = 1> (x, w1)
    h = Relu (c)
    logits = Gemm <transB = 1> (h, w2)
}
"""
BIASED = DENSE.replace("w1,", "w1, float[4] b1,").replace("(x, w1)", "(x, w1, b1)")


@pytest.mark.parametrize(
    ("text", "n_stages"),
    [
        (TOWER, 4),
        (CONVOLUTION, 2),
        (BRANCHES, 0),
        (SCALED, 0),
        (GROUPED, 0),
        (DENSE, 2),
        (DENSE.replace("Relu", "Erf"), 0),
        (DENSE.replace("h = Relu (c)", "h = Add (c, c)"), 0),
        (DENSE.replace("h = Relu (c)", "h = Softmax (c)"), 0),
        (DENSE.replace("transB = 1> (h, w2)", "transB = 1, alpha = 2.0> (h, w2)"), 0),
        (BIASED, 2),
        (BIASED.replace("<transB = 1> (x,", "<transB = 1, beta = 1.0> (x,"), 2),
        (BIASED.replace("<transB = 1> (x,", "<transB = 1, beta = 0.5> (x,"), 0),
    ],
)
def test_which_networks_are_chains(text: str, n_stages: int) -> None:
    model = parse(text)
    layout = layout_of(model)
    assert len(find_stages(model, layout, find_units(model, layout))) == n_stages


def altered(manifest: Manifest, number: int, changes: dict[str, Any]) -> None:
    stages = list(manifest.stages)
    stages[number] = dataclasses.replace(stages[number], **changes)
    dataclasses.replace(manifest, stages=tuple(stages))


@pytest.mark.parametrize(
    ("number", "changes", "message"),
    [
        (1, {"number": 2}, "stage 1 of the manifest does not follow"),
        (1, {"first_parameter": 3}, "stage 1 of the manifest does not follow"),
        (0, {"feature_shape": (1, 32, 31)}, "stage 0 of the manifest does not follow"),
        (3, {"output_shape": (83,)}, "stage 4 of the manifest does not follow"),
        (4, {"output_shape": (11,)}, "does not yield the logits"),
        (4, {"end_parameter": 9}, "do not hold every parameter"),
        (4, {"end_parameter": 11}, "do not hold every parameter"),
        (2, {"end_parameter": 4}, "impossible stage"),
        (2, {"multiply_accumulates": 0}, "impossible stage"),
        (2, {"output_shape": (1 << 20, 1 << 20)}, "impossible stage"),
    ],
)
def test_stages_that_do_not_match_are_refused(lenet5: Path, number: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        altered(read(lenet5), number, changes)


def test_stages_without_graphs_are_refused(lenet5: Path) -> None:
    manifest = read(lenet5)
    graphs = tuple(graph for graph in manifest.graphs if graph.name != "stage3_gradient.onnx")
    with pytest.raises(ArtifactError, match="stages without their graphs"):
        dataclasses.replace(manifest, graphs=graphs)


def test_heads_lie_behind_the_network(lenet5: Path, lenet5_with_heads: Path) -> None:
    """Small enough, never pruned, in no ordinary graph; the rest of the artifact is as without them."""
    manifest, plain = read(lenet5_with_heads), read(lenet5)
    heads = [stage.head for stage in manifest.stages]
    assert heads == [StageHead(10, 11), StageHead(12, 13), StageHead(14, 15), None, None]
    assert manifest.model_layout == plain.layout
    shapes = [p.shape for p in manifest.layout.parameters[10:]]
    assert shapes == [(10, 294), (10,), (10, 400), (10,), (10, 120), (10,)]
    assert not any(p.maskable for p in manifest.layout.parameters[10:])
    assert (manifest.learns_locally, plain.learns_locally) == (True, False)
    assert (manifest.cut, manifest.tail, manifest.variants) == (None, None, ())
    for name in (*GRAPHS, *stage_graphs(plain.stages, ("forward", "gradient"))):
        model, other = onnx.load(lenet5_with_heads / name), onnx.load(lenet5 / name)
        assert model.graph == other.graph
    assert manifest.golden == plain.golden
    first, whole = initial_weights(plain.layout, 7), initial_weights(manifest.layout, 7)
    assert first.tobytes() == whole[: first.size].tobytes()
    assert all(len(np.unique(whole[manifest.layout.slice_of(k)])) > 1 for k in (10, 12, 14))


@pytest.mark.parametrize(
    ("grid", "kernel", "n_inputs"),
    [
        ((6, 14, 14), (2, 2), 294),
        ((16, 5, 5), (), 400),
        ((120,), (), 120),
        ((1000,), (), 1000),
        ((64, 8, 8), (3, 3), 256),
        ((32, 61), (4,), 480),
        ((600, 4, 2), (4, 2), 600),
        ((8, 1, 90), (1, 2), 360),
    ],
)
def test_heads_read_few_numbers(grid: tuple[int, ...], kernel: tuple[int, ...], n_inputs: int) -> None:
    assert head_plan(grid, 10) == HeadPlan(grid, kernel, n_inputs, 10)


@pytest.mark.parametrize(
    ("number", "head", "message"),
    [
        (0, None, "all stages but the last two"),
        (3, StageHead(16, 17), "all stages but the last two"),
        (0, StageHead(11, 10), "head of stage 0"),
        (1, StageHead(10, 11), "head of stage 1"),
    ],
)
def test_heads_that_do_not_match_are_refused(
    lenet5_with_heads: Path, number: int, head: StageHead | None, message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        altered(read(lenet5_with_heads), number, {"head": head})


def test_heads_without_graphs_are_refused(lenet5_with_heads: Path) -> None:
    manifest = read(lenet5_with_heads)
    for name in ("stage0_local.onnx", "stage3_head.onnx"):
        graphs = tuple(graph for graph in manifest.graphs if graph.name != name)
        with pytest.raises(ArtifactError, match="local heads without their graphs"):
            dataclasses.replace(manifest, graphs=graphs)
    with pytest.raises(ArtifactError, match="no stages with heads"):
        dataclasses.replace(manifest, stages=())


def test_a_device_fetches_what_its_estimator_needs(lenet5_with_heads: Path) -> None:
    manifest = read(lenet5_with_heads)
    names = {}
    for estimator in LOCAL_ESTIMATORS:
        settings = RunSettings(sparsity=0.0, training=TrainingSettings(estimator=estimator))
        names[estimator] = [graph.name for graph in needed_graphs(manifest, settings)]
    usual = ["probe.onnx", "predict.onnx"]
    assert names["local"] == [*usual, *(f"stage{k}_local.onnx" for k in range(4))]
    hidden = [f"stage{k}{kind}.onnx" for k in range(4) for kind in ("", "_head", "_gradient")]
    assert names["local-node"] == [*usual, *hidden, "stage4.onnx", "stage4_gradient.onnx"]


GOOD = {
    "number": 0, "first_parameter": 0, "end_parameter": 1, "feature_shape": [2], "output_shape": [3],
    "multiply_accumulates": 6,
}  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "no list"),
        ([GOOD] * 300, "too many"),
        ([3], "malformed"),
        ([{**GOOD, "head": 3}], "malformed"),
        ([{**GOOD, "head": {"weight": 1}}], "malformed"),
        ([{**GOOD, "more": 1}], "malformed"),
        ([{**GOOD, "feature_shape": 4}], "malformed"),
        ([{**GOOD, "feature_shape": ["4"]}], "impossible"),
        ([{**GOOD, "head": {"weight": True, "bias": 2}}], "impossible"),
        ([{**GOOD, "number": -1}], "impossible"),
    ],
)
def test_malformed_stages_are_refused(raw: Any, message: str) -> None:
    assert stages_from_json([GOOD])[0].to_json() == GOOD
    with pytest.raises(ArtifactError, match=message):
        stages_from_json(raw)
