"""cuts: where a network is cut, and that its halves compute what the whole does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from fedzo.exporter.artifact import export_artifact
from fedzo.exporter.cuts import find_cut
from fedzo.exporter.passes.infrastructure import PassError
from fedzo.exporter.passes.keep_prefix import KeepPrefix
from fedzo.exporter.passes.keep_suffix import KeepSuffix
from fedzo.exporter.sessions import dense_feeds, run_graph
from fedzo.exporter.units import find_units
from fedzo.protocol.artifact.cut import Cut
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import CUT_GRAPHS, Manifest, golden_batch
from fedzo.protocol.errors import ArtifactError
from tests.exporter.text_graphs import CONVOLUTION, LINEAR, dense_by_name, layout_of, numbers, output, parse, signature

SKIP = """
skip (float[batch, 3] x, float[3, 3] a_weight, float[4, 3] b_weight) => (float[batch, 4] logits) {
    a = Gemm <transB = 1> (x, a_weight)
    around = Add (a, x)
    relu = Relu (around)
    logits = Gemm <transB = 1> (relu, b_weight)
}
"""

TIED = """
tied (float[batch, 3] x, float[3, 3] a_weight, float[4, 3] b_weight) => (float[batch, 4] logits) {
    a = Gemm <transB = 1> (x, a_weight)
    relu = Relu (a)
    again = Gemm <transB = 1> (relu, a_weight)
    logits = Gemm <transB = 1> (again, b_weight)
}
"""

AROUND = """
around (float[batch, 3] x, float[3, 3] a_weight, float[4, 3] b_weight) => (float[batch, 4] logits) {
    a = Gemm <transB = 1> (x, a_weight)
    sum = Add (a, x)
    squares = Mul (x, x)
    both = Add (sum, squares)
    b = Gemm <transB = 1> (both, b_weight)
    total = ReduceSum <keepdims = 1> (x)
    logits = Add (b, total)
}
"""


@pytest.mark.parametrize(
    ("text", "value", "first", "prefix", "suffix"),
    [
        (CONVOLUTION, "flat", 2, 3 * 2 * 3 * 2 * 3 * 4, 4 * 3),
        (SKIP, "relu", 1, 9, 12),
    ],
)
def test_the_cut_is_where_it_saves_most(text: str, value: str, first: int, prefix: int, suffix: int) -> None:
    model = parse(text)
    layout = layout_of(model)
    point = find_cut(model, layout, find_units(model, layout))
    assert point is not None
    assert point.value == value
    assert point.cut.first_parameter == first
    assert (point.cut.prefix_multiply_accumulates, point.cut.suffix_multiply_accumulates) == (prefix, suffix)


SHARED = """
shared (float[batch, 3] x, float[3, 3] a_weight, float[3] slope, float[4, 3] b_weight, float[2, 4] c_weight)
    => (float[batch, 2] logits) {
    a = Gemm <transB = 1> (x, a_weight)
    a_act = PRelu (a, slope)
    b = Gemm <transB = 1> (a_act, b_weight)
    b_sum = ReduceMean <axes = [1], keepdims = 1> (b)
    b_act = PRelu (b_sum, slope)
    b_all = Add (b, b_act)
    logits = Gemm <transB = 1> (b_all, c_weight)
}
"""


def test_a_parameter_is_not_cut_in_two() -> None:
    model = parse(SHARED.replace("float[3] slope", "float[1] slope"))
    layout = layout_of(model)
    point = find_cut(model, layout, find_units(model, layout))
    assert point is not None
    front, behind = point.cut.split(layout)
    passes = (KeepPrefix(point.value, point.cut.feature_shape), KeepSuffix(point.value, point.cut.feature_shape))
    inputs = [set(signature(step(model).model)) for step in passes]
    assert {p.name for p in front.parameters} <= inputs[0]
    assert {p.name for p in behind.parameters} == inputs[1] - {"features", "logits"}


@pytest.mark.parametrize("text", [LINEAR, AROUND, TIED])
def test_layers_that_cannot_be_separated_have_no_cut(text: str) -> None:
    model = parse(text)
    layout = layout_of(model)
    assert find_cut(model, layout, find_units(model, layout)) is None


def test_the_halves_compute_the_whole() -> None:
    model = parse(CONVOLUTION)
    layout = layout_of(model)
    point = find_cut(model, layout, find_units(model, layout))
    assert point is not None
    edge = (point.value, point.cut.feature_shape)
    prefix, suffix = KeepPrefix(*edge)(model).model, KeepSuffix(*edge)(model).model
    assert set(signature(prefix)) == {"x", "conv_weight", "conv_bias", "features"}
    assert set(signature(suffix)) == {"features", "fc_weight", "logits"}
    feeds = {**dense_by_name(layout, numbers(layout.size)), "x": numbers(3, 2, 5, 4, seed=1)}
    features = output(prefix, feeds)
    assert np.array_equal(output(suffix, {**feeds, "features": features}), output(model, feeds))


@pytest.mark.parametrize("half", [KeepPrefix, KeepSuffix])
def test_a_value_that_is_not_there_is_no_cut(half: type[KeepPrefix | KeepSuffix]) -> None:
    with pytest.raises(PassError, match=f"{half.__name__}: the graph does not compute 'nothing'"):
        half("nothing", (3,))(parse(LINEAR))


def test_a_value_beside_which_the_input_passes_is_no_cut() -> None:
    with pytest.raises(PassError, match="KeepSuffix: what lies behind 'a' needs the input too"):
        KeepSuffix("a", (3,))(parse(SKIP))


@pytest.mark.parametrize(("model", "share", "coordinates"), [("lenet5", 0.142, 0.958), ("resnet8", 0.294, 0.748)])
def test_the_reference_models_are_cut(
    request: pytest.FixtureRequest, model: str, share: float, coordinates: float
) -> None:
    folder: Path = request.getfixturevalue(model)
    manifest = Manifest.decode((folder / "manifest.json").read_bytes())
    assert manifest.cut is not None
    front, behind = manifest.cut.split(manifest.layout)
    assert manifest.cut.suffix_share == pytest.approx(share, abs=1e-3)
    assert behind.size / manifest.layout.size == pytest.approx(coordinates, abs=1e-3)
    weights = initial_weights(manifest.layout, 7)
    x, y = golden_batch(manifest.input_shape, manifest.n_classes, 3, 5)
    graphs = {graph.name: (folder / graph.name).read_bytes() for graph in manifest.graphs}
    features = run_graph(graphs["prefix.onnx"], {**dense_feeds(front, weights[: front.size]), "x": x})["features"]
    assert features.shape == (5, *manifest.cut.feature_shape)
    feeds = {**dense_feeds(behind, weights[front.size :]), "features": features, "y": y}
    whole = run_graph(graphs["probe.onnx"], {**dense_feeds(manifest.layout, weights), "x": x, "y": y})["loss_sum"]
    assert run_graph(graphs["suffix.onnx"], feeds)["loss_sum"] == whole
    with pytest.raises(ArtifactError, match="cuts"):
        Cut(len(manifest.layout.parameters), (3,), 1, 1).split(manifest.layout)


def test_a_model_of_one_layer_has_no_cut(tmp_path: Path) -> None:
    manifest = export_artifact("tests.exporter.user_models:linear", (4,), 2, 0.0, 1, tmp_path / "linear")
    assert manifest.cut is None
    assert not {graph.name for graph in manifest.graphs} & set(CUT_GRAPHS)
    assert Manifest.decode(manifest.encode()) == manifest
    assert not list((tmp_path / "linear").glob("*fix.onnx"))


@pytest.mark.parametrize(
    "values", [(0, (3,), 1, 1), (1, (0,), 1, 1), (1, (1 << 27,), 1, 1), (1, (3,), 0, 1), (1, (3,), 1, -1)]
)
def test_an_impossible_cut_is_refused(values: tuple[int, tuple[int, ...], int, int]) -> None:
    with pytest.raises(ArtifactError, match="impossible cut"):
        Cut(*values)


def test_the_graphs_are_small_enough_to_send(lenet5: Path) -> None:
    for name in CUT_GRAPHS:
        assert (lenet5 / name).stat().st_size < 8_000
        assert all(len(tensor.raw_data) < 1024 for tensor in onnx.load(lenet5 / name).graph.initializer)
