"""Structured pruning: which channels go together, that the smaller network is right, and what is refused."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedzo.edge_runtime.datasets.data import Batch
from fedzo.edge_runtime.estimation.saliency import UnitShiftScorer
from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.inference.golden_check import check_predictions
from fedzo.edge_runtime.planning.board_plan import RunSizes, plan_board
from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.exporter.artifact import export_artifact, verify_artifact
from fedzo.exporter.channel_families import choose_channels, find_families
from fedzo.exporter.channel_labels import trace_channels
from fedzo.exporter.channel_scores import SCORING_SAMPLES, channel_scores
from fedzo.exporter.deploy import deploy
from fedzo.exporter.fan_in import fan_in_axes
from fedzo.exporter.forward import ForwardGraph, GraphBuilder
from fedzo.exporter.models.registry import build_forward
from fedzo.exporter.narrow import ChannelSelection
from fedzo.exporter.passes.keep_channels import KeepChannels
from fedzo.exporter.reference import forward as torch_forward
from fedzo.exporter.sessions import run_graph
from fedzo.exporter.units import find_units
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import golden_batch
from fedzo.protocol.artifact.structure import ChannelScores
from fedzo.protocol.artifact.whole_network import whole_network
from fedzo.protocol.errors import ConfigError
from fedzo.protocol.pruning.mask import Mask, threshold
from fedzo.protocol.pruning.saliency import diagonal_scores, gaussian_inputs
from tests.exporter.text_graphs import layout_of, numbers, parse

CONCAT = """
joined (float[batch, 2, 6, 6] x, float[4, 2, 3, 3] a, float[4] a_bias, float[6, 2, 3, 3] b, float[8, 10, 1, 1] c,
        float[5, 8] last) => (float[batch, 5] logits) {
    left = Conv <pads = [1, 1, 1, 1]> (x, a, a_bias)
    right = Conv <pads = [1, 1, 1, 1]> (x, b)
    both = Concat <axis = 1> (left, right)
    active = Relu (both)
    mixed = Conv (active, c)
    third = Sigmoid (mixed)
    pooled = ReduceMean <axes = [2, 3], keepdims = 0> (third)
    logits = Gemm <transB = 1> (pooled, last)
}
"""

DEPTHWISE = """
separable (float[batch, 1, 6, 6] x, float[4, 1, 3, 3] a, float[8, 1, 3, 3] depth, float[8] depth_bias,
           float[6, 8, 1, 1] point, float[3, 96] last) => (float[batch, 3] logits) {
    first = Conv (x, a)
    active = Relu (first)
    second = Conv <group = 4, pads = [1, 1, 1, 1]> (active, depth, depth_bias)
    again = Relu (second)
    third = Conv (again, point)
    flat = Flatten (third)
    logits = Gemm <transB = 1> (flat, last)
}
"""

TRANSPOSED = """
tokens (float[batch, 3, 4] x, float[8, 4] a, float[8] a_bias, float[8] gain, float[8] shift, float[6, 8] b,
        float[2, 18] last) => (float[batch, 2] logits)
<int64[2] target = {-1, 18}> {
    at = Transpose <perm = [1, 0]> (a)
    h = MatMul (x, at)
    moved = Add (h, a_bias)
    active = Relu (moved)
    bt = Transpose <perm = [1, 0]> (b)
    k = MatMul (active, bt)
    turned = Transpose <perm = [0, 2, 1]> (k)
    flat = Reshape (turned, target)
    logits = Gemm <transB = 1> (flat, last)
}
"""


def instances() -> ForwardGraph:
    """A normalisation with as many groups as channels."""
    graph = GraphBuilder("instances", (2, 6, 6))
    h = graph.relu(graph.group_normalisation("norm", graph.convolution("first", graph.x, 8, 3), 8))
    h = graph.relu(graph.convolution("second", h, 6, 3))
    return graph.finish(graph.linear("last", graph.flatten(h), 4, output="logits"))


GRAPHS = {"concat": CONCAT, "depthwise": DEPTHWISE, "transposed": TRANSPOSED}


def traced_half(graph: ForwardGraph, seed: int) -> tuple[KeepChannels, dict[str, tuple[NDArray[np.bool_], ...]]]:
    """Half of the channels of a graph, by random scores, and what stays of each axis of each parameter."""
    traced = trace_channels(graph.model)
    families, _ = find_families(traced, find_units(graph.model, graph.layout))
    roots = [root for family in families for root in family.roots]
    scores = dict(zip(roots, (1.5 + numbers(len(roots), seed=seed)).tolist(), strict=True))
    rewrite = KeepChannels(traced, set(roots) - choose_channels(families, 0.5, scores))
    kept = {
        p.name: tuple(k for a in traced.axes[p.name] if (k := rewrite.kept(a)) is not None)
        for p in graph.layout.parameters
    }
    return rewrite, kept


def parameters(graph: ForwardGraph) -> dict[str, NDArray[np.float32]]:
    return {p.name: numbers(*p.shape, seed=k) for k, p in enumerate(graph.layout.parameters)}


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", [*GRAPHS, "instances", "lenet5", "cnn1d"])
def test_the_smaller_network_is_the_whole_one_with_zeros(name: str, seed: int) -> None:
    if name in GRAPHS:
        model = parse(GRAPHS[name])
        graph = ForwardGraph(model, layout_of(model))
    elif name == "instances":
        graph = instances()
    else:
        graph = build_forward(name, {"lenet5": (1, 20, 20), "cnn1d": (2, 40)}[name], 4, 0)
    rewrite, kept = traced_half(graph, seed)
    small = rewrite(graph.model).model
    whole = parameters(graph)
    cut = {key: value[np.ix_(*kept[key])] for key, value in whole.items()}
    assert sum(value.size for value in cut.values()) < 0.7 * sum(value.size for value in whole.values())
    zeros = {key: np.zeros_like(value) for key, value in whole.items()}
    for key, value in whole.items():
        zeros[key][np.ix_(*kept[key])] = value[np.ix_(*kept[key])]
    shape = [d.dim_value for d in graph.model.graph.input[0].type.tensor_type.shape.dim][1:]
    for batch in (1, 3):
        x = numbers(batch, *shape, seed=9)
        expected = run_graph(graph.model, {**zeros, "x": x})["logits"]
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(run_graph(small, {**cut, "x": x})["logits"], expected, rtol=1e-4, atol=1e-5)


def widths(
    model: str, shape: tuple[int, ...], scores: ChannelScores, folder: Path, keep: float = 0.5
) -> dict[str, int]:
    manifest = export_artifact(model, shape, 10, 0.0, 3, folder, channels=ChannelSelection(keep, scores))
    assert manifest.structure is not None
    return {layer.parameter: len(layer.kept) for layer in manifest.structure.layers}


def test_sums_keep_one_width_and_normalisations_their_groups(tmp_path: Path) -> None:
    graph = build_forward("resnet20", (3, 8, 8), 10, 0)
    families, fixed = find_families(trace_channels(graph.model), find_units(graph.model, graph.layout))
    assert fixed == {}
    assert [(len(f.roots), f.multiple) for f in families if len(f.layers) == 1] == [(16, 8)] * 3 + [(32, 8)] * 3 + [
        (64, 8)
    ] * 3
    streams = {f.layers: len(f.roots) for f in families if len(f.layers) > 1}
    assert streams == {
        ("conv1.weight", *(f"layer1.{k}.conv2.weight" for k in range(3))): 16,
        (
            "layer2.0.conv2.weight",
            "layer2.0.shortcut.conv.weight",
            "layer2.1.conv2.weight",
            "layer2.2.conv2.weight",
        ): 32,
        (
            "layer3.0.conv2.weight",
            "layer3.0.shortcut.conv.weight",
            "layer3.1.conv2.weight",
            "layer3.2.conv2.weight",
        ): 64,
    }
    half = widths("resnet20", (3, 8, 8), "magnitude", tmp_path / "a", 0.7)
    for layers in streams:
        assert len({half[name] for name in layers}) == 1
    assert {width % 8 for name, width in half.items() if name != "fc.weight"} == {0}
    assert half["fc.weight"] == 10


SUMMED = """
summed (float[batch, 2, 4, 4] x, float[4, 2, 3, 3] conv, float[4] bias, float[4, 6, 2, 2] up, float[54, 5] plain,
        float[7, 5] turned, float[7, 7] tied, float[7] factor) => (float[batch, 7] logits) {
    a = Conv (x, conv, bias)
    b = ConvTranspose (a, up)
    c = Flatten (b)
    d = Gemm (c, plain)
    other = Transpose <perm = [1, 0]> (turned)
    e = MatMul (d, other)
    f = MatMul (e, tied)
    back = Transpose <perm = [1, 0]> (tied)
    g = MatMul (f, back)
    logits = Mul (g, factor)
}
"""


def test_the_axes_that_are_summed_over() -> None:
    """A weight with two uses that sum over different axes has no fan-in; offsets and factors have none either."""
    model = parse(SUMMED)
    found = fan_in_axes(model, layout_of(model))
    assert found == {"conv": (1, 2, 3), "up": (0,), "plain": (0,), "turned": (1,)}


def test_weights_that_are_no_units_keep_the_size_of_what_they_yield(tmp_path: Path) -> None:
    model = "tests.exporter.user_models:tied"
    whole = export_artifact(model, (8,), 3, 0.0, 1, tmp_path / "whole")
    own = export_artifact(model, (8,), 3, 0.0, 1, tmp_path / "own", channels=ChannelSelection(0.5))
    growth = {
        before.name.split(".")[0]: after.initialiser.scale / before.initialiser.scale
        for before, after in zip(whole.layout.parameters, own.layout.parameters, strict=True)
        if len(before.shape) == 2
    }
    assert own.layout.parameters[own.layout.position_of("twice.weight")].shape == (6, 6)
    half = pytest.approx(2.0**0.5, rel=1e-6)
    assert {name: growth[name] for name in ("first", "twice", "plain")} == {"first": 1.0, "twice": half, "plain": half}


@pytest.mark.parametrize(
    ("model", "shape"), [("lenet5", (1, 32, 32)), ("cnn1d", (9, 64)), ("resnet8", (3, 16, 16)), ("resnet20", (3, 8, 8))]
)
def test_the_artifact_computes_what_torch_computes_with_its_parameters(
    model: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    manifest = export_artifact(model, shape, 10, 0.5, 3, tmp_path / "a", channels=ChannelSelection(0.5))
    assert verify_artifact(tmp_path / "a") == manifest
    assert manifest.structure is not None
    assert manifest.layout.size < 0.4 * manifest.structure.parameters
    weights = initial_weights(manifest.layout, manifest.seed)
    for position, parameter in enumerate(manifest.layout.parameters):
        if parameter.initialiser.kind == "normal":
            values = weights[manifest.layout.slice_of(position)]
            fan_in = values.size / parameter.shape[0]
            assert parameter.initialiser.scale == pytest.approx((2.0 / fan_in) ** 0.5, rel=1e-6)
    x, _ = golden_batch(shape, 10, 5, 4)
    dense = Mask.dense(manifest.layout)
    feeds: dict[str, NDArray[Any]] = {"w": weights, "index": dense.index(), "counts": dense.counts(), "x": x}
    logits = run_graph((tmp_path / "a" / "predict.onnx").read_bytes(), feeds)["logits"]
    expected = torch_forward(model, manifest.layout, weights, x)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    artifact = load_artifact(tmp_path / "a")
    with Engine(artifact, dense, micro_batch=4) as engine:
        assert engine.check_golden() <= 1e-6
        difference = check_predictions(engine)
    assert difference is not None
    assert difference <= 1e-6
    mask = threshold(manifest.layout, np.abs(weights), 0.5)
    report = deploy(tmp_path / "a", manifest, mask, weights[mask.survivors()], tmp_path / "model.onnx")
    assert report.largest_difference <= report.tolerance


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="onnxruntime has blocked kernels on x86 only")
@pytest.mark.parametrize("model", ["lenet5", "resnet8"])
def test_variants_of_the_smaller_network_have_the_portable_losses(model: str, tmp_path: Path) -> None:
    shape = (1, 32, 32) if model == "lenet5" else (3, 16, 16)
    manifest = export_artifact(model, shape, 10, 0.5, 3, tmp_path / "a", channels=ChannelSelection(0.5))
    assert any(variant.block for variant in manifest.variants)
    artifact, dense = load_artifact(tmp_path / "a"), Mask.dense(manifest.layout)
    weights = initial_weights(manifest.layout, 3)
    batch = Batch(*golden_batch(shape, 10, 2, 8))
    losses = []
    for layout in ("portable", "auto"):
        with Engine(artifact, dense, micro_batch=8, layout=layout, queries=1) as engine:
            losses.append(engine.loss(weights, batch.x, batch.y))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_diagonal_scores_are_those_of_a_device(tmp_path: Path) -> None:
    manifest = export_artifact("lenet5", (1, 20, 20), 10, 0.5, 3, tmp_path / "a")
    files = {graph.name: (tmp_path / "a" / graph.name).read_bytes() for graph in manifest.graphs}
    found = channel_scores("diagonal", manifest, files)
    assert found is not None
    weights = initial_weights(manifest.layout, 3)
    with Engine(load_artifact(tmp_path / "a"), Mask.dense(manifest.layout), micro_batch=SCORING_SAMPLES) as engine:
        x = gaussian_inputs(manifest, 3, 0, 0, SCORING_SAMPLES)
        measured = UnitShiftScorer(manifest).score(engine, weights, x, 0)
    scores = diagonal_scores(manifest, weights, measured.sensitivities, measured.moments)
    for unit in manifest.units:
        part = scores[manifest.layout.slice_of(manifest.layout.position_of(unit.parameter))]
        np.testing.assert_allclose(found[unit.parameter], part.reshape(unit.n_units, -1).sum(1), rtol=1e-3)


@pytest.mark.parametrize("scores", ["uniform", "diagonal", "magnitude", "random"])
def test_ranked_channels_keep_the_total_and_every_layer(scores: ChannelScores, tmp_path: Path) -> None:
    found = widths("lenet5", (1, 20, 20), scores, tmp_path / "a")
    assert found.pop("fc3.weight") == 10
    assert sum(found.values()) == 113
    assert min(found.values()) >= 1
    if scores == "uniform":
        assert found == {"conv1.weight": 3, "conv2.weight": 8, "fc1.weight": 60, "fc2.weight": 42}


def test_two_exports_are_equal_and_the_whole_plan_is_that_of_the_dense_artifact(tmp_path: Path) -> None:
    channels = ChannelSelection(0.5, "random")
    own = export_artifact("lenet5", (1, 32, 32), 10, 0.8, 3, tmp_path / "a", channels=channels)
    assert export_artifact("lenet5", (1, 32, 32), 10, 0.8, 3, tmp_path / "b", channels=channels) == own
    dense = export_artifact("lenet5", (1, 32, 32), 10, 0.8, 3, tmp_path / "c", channels=ChannelSelection())
    assert dense.structure is None
    assert whole_network(dense) is dense
    whole = whole_network(own)
    assert [p.shape for p in whole.layout.parameters] == [p.shape for p in dense.layout.parameters]
    assert whole.units == dense.units
    assert plan_board(whole, 300.0, RunSizes()) == plan_board(dense, 300.0, RunSizes())
    assert (
        plan_board(own, 300.0, RunSizes()).peak.memory.planned_peak_mib
        < plan_board(dense, 300.0, RunSizes()).peak.memory.planned_peak_mib
    )


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.5, float("nan"), float("inf")])
def test_fractions_out_of_range(keep: float) -> None:
    with pytest.raises(ConfigError, match="it must be above 0 and at most 1"):
        ChannelSelection(keep)


def test_unknown_scores() -> None:
    with pytest.raises(ConfigError, match="channels cannot be ranked by 'best'"):
        ChannelSelection.of(0.5, "best")


@pytest.mark.parametrize(
    ("model", "shape", "classes", "keep", "message"),
    [
        ("lenet5", (1, 32, 32), 10, 0.05, "of the 6 channels of conv1.weight none would stay"),
        ("lenet5", (1, 32, 32), 10, 0.999, "keeping the fraction 0.999 removes no channel"),
        ("resnet8", (3, 16, 16), 10, 0.95, "keeping the fraction 0.95 removes no channel"),
        ("tests.exporter.user_models:linear", (4,), 2, 0.5, "no channel of the model can be removed"),
        ("tests.exporter.user_models:bare", (2,), 2, 0.5, "no channel of the model can be removed"),
        (
            "tests.exporter.user_models:mixed",
            (3, 32, 32),
            10,
            0.5,
            "second.weight: the convolution '/second/Conv_output_0' has 2 groups",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(
    model: str, shape: tuple[int, ...], classes: int, keep: float, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        export_artifact(model, shape, classes, 0.0, 1, tmp_path / "a", channels=ChannelSelection(keep))
    assert list(tmp_path.iterdir()) == []


def test_a_users_depthwise_model_is_narrowed(tmp_path: Path) -> None:
    found = widths("tests.exporter.user_models:mobile", (3, 32, 32), "uniform", tmp_path / "a")
    assert found == {"0.weight": 4, "2.weight": 4, "5.weight": 8, "10.weight": 10}
    artifact = load_artifact(tmp_path / "a")
    with Engine(artifact, Mask.dense(artifact.manifest.layout)) as engine:
        assert engine.check_golden() <= 1e-6


def test_layers_that_keep_their_channels_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = "tests.exporter.user_models:attention"
    manifest = export_artifact(model, (9, 20), 6, 0.0, 1, tmp_path / "a", channels=ChannelSelection(0.5))
    assert manifest.structure is not None
    found = {layer.parameter: (len(layer.kept), layer.n_units) for layer in manifest.structure.layers}
    assert found["encode.linear1.weight"] == (16, 32)
    assert found["encode.self_attn.in_proj_weight"] == (48, 48)
    assert "encode.self_attn.in_proj_weight keeps all its channels: Reshape" in caplog.text
