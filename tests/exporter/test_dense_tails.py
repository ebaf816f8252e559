"""dense_tails: which layers end a network, and what their graph yields for node perturbation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedzo.exporter.dense_tails import find_dense_tail
from fedzo.exporter.passes.infrastructure import PassError, Sequential
from fedzo.exporter.passes.keep_suffix import KeepSuffix
from fedzo.exporter.passes.layer_inputs import LayerInputs
from fedzo.exporter.passes.node_noise import NodeNoise
from fedzo.exporter.passes.sample_losses import SampleLosses
from fedzo.exporter.sessions import run_graph
from fedzo.exporter.units import find_units
from fedzo.protocol.artifact.cut import Cut
from fedzo.protocol.artifact.dense_tail import DenseLayer, DenseTail
from fedzo.protocol.artifact.manifest import TAIL_GRAPHS, Manifest
from fedzo.protocol.errors import ArtifactError
from tests.exporter.text_graphs import CONVOLUTION, LINEAR, dense_by_name, layout_of, numbers, parse, signature

TOWER = """
tower (float[batch, 2, 5, 4] x, float[3, 2, 3, 2] conv_weight, float[6, 3] a_weight, float[6] a_bias,
       float[5, 6] b_weight, float[5] b_bias, float[4, 5] c_weight) => (float[batch, 4] logits) {
    conv = Conv (x, conv_weight)
    pool = GlobalAveragePool (conv)
    flat = Flatten (pool)
    a = Gemm <transB = 1> (flat, a_weight, a_bias)
    a_tanh = Tanh (a)
    b_transposed = Transpose <perm = [1, 0]> (b_weight)
    b_product = MatMul (a_tanh, b_transposed)
    b = Add (b_product, b_bias)
    b_tanh = Tanh (b)
    logits = Gemm <transB = 1> (b_tanh, c_weight)
}
"""
SCALED = TOWER.replace("float[4, 5] c_weight", "float[4, 5] c_weight, float[4] d_scale").replace(
    "logits = Gemm <transB = 1> (b_tanh, c_weight)",
    "c = Gemm <transB = 1> (b_tanh, c_weight)\n    logits = Mul (c, d_scale)",
)


def test_the_tail_begins_behind_the_last_convolution() -> None:
    model = parse(TOWER)
    layout = layout_of(model)
    point = find_dense_tail(model, layout, find_units(model, layout))
    assert point is not None
    assert (point.value, [unit.output for unit in point.units]) == ("flat", ["a", "b_product", "logits"])
    assert point.tail.layers == (DenseLayer(1, 2), DenseLayer(3, 4), DenseLayer(5, None))
    assert point.tail.shapes(layout) == ((6, 3), (5, 6), (4, 5))


def test_a_layer_that_scales_its_product_or_bias_is_in_no_tail() -> None:
    """Node perturbation takes the bias for one number a unit."""
    for scaled in ("alpha = 0.5", "beta = 0.5"):
        model = parse(TOWER.replace("a = Gemm <transB = 1>", f"a = Gemm <transB = 1, {scaled}>"))
        layout = layout_of(model)
        point = find_dense_tail(model, layout, find_units(model, layout))
        assert point is not None
        assert point.tail.layers == (DenseLayer(3, 4), DenseLayer(5, None))


BRANCHES = """
branches (float[batch, 2, 5, 4] x, float[3, 2, 3, 2] conv_weight, float[6, 3] a_weight, float[6, 3] b_weight,
          float[4, 6] c_weight) => (float[batch, 4] logits) {
    conv = Conv (x, conv_weight)
    pool = GlobalAveragePool (conv)
    flat = Flatten (pool)
    a = Gemm <transB = 1> (flat, a_weight)
    b = Gemm <transB = 1> (flat, b_weight)
    sum = Add (a, b)
    logits = Gemm <transB = 1> (sum, c_weight)
}
"""


def test_a_number_that_is_added_is_no_bias() -> None:
    text = TOWER.replace("float[5] b_bias", "float[1] b_bias")
    model = parse(text)
    layout = layout_of(model)
    point = find_dense_tail(model, layout, find_units(model, layout))
    assert point is not None
    assert point.tail.layers == (DenseLayer(5, None),)


def test_layers_that_share_a_bias_are_no_tail() -> None:
    text = TOWER.replace("float[5] b_bias, float[4, 5]", "float[6] unused, float[4, 6]").replace("b_bias)", "a_bias)")
    model = parse(text.replace("float[5, 6] b_weight", "float[6, 6] b_weight").replace(", float[6] unused", ""))
    layout = layout_of(model)
    point = find_dense_tail(model, layout, find_units(model, layout))
    assert point is not None
    assert point.tail.layers == (DenseLayer(4, None),)


@pytest.mark.parametrize("text", [LINEAR, SCALED])
def test_other_networks_have_none(text: str) -> None:
    """A network that begins with its tail has nothing in front; a trained scale behind the layers is no bias."""
    model = parse(text)
    layout = layout_of(model)
    assert find_dense_tail(model, layout, find_units(model, layout)) is None


def test_a_tail_that_branches_begins_behind_the_branches() -> None:
    model = parse(BRANCHES)
    layout = layout_of(model)
    point = find_dense_tail(model, layout, find_units(model, layout))
    assert point is not None
    assert (point.value, len(point.units)) == ("sum", 1)


def test_noise_inputs_and_losses() -> None:
    model = parse(TOWER)
    layout = layout_of(model)
    point = find_dense_tail(model, layout, find_units(model, layout))
    assert point is not None
    passes = [
        KeepSuffix(point.value, point.tail.cut.feature_shape),
        NodeNoise(point.units[:-1]),
        LayerInputs(point.units[1:], [6, 5]),
        SampleLosses(),
    ]
    tail = Sequential(passes)(model).model
    assert signature(tail)["noise"] == ["batch", 11]
    weights = {key: value.astype(np.float64) for key, value in dense_by_name(layout, numbers(layout.size)).items()}
    features, noise, y = numbers(7, 3, seed=1), numbers(7, 11, seed=2), np.arange(7, dtype=np.int64) % 4
    feeds: dict[str, NDArray[Any]] = {**dense_by_name(layout, numbers(layout.size))}
    feeds |= {"features": features, "noise": noise, "y": y}
    found = run_graph(tail, feeds)
    a = np.tanh(features @ weights["a_weight"].T + weights["a_bias"] + noise[:, :6])
    b = np.tanh(a @ weights["b_weight"].T + weights["b_bias"] + noise[:, 6:])
    logits = b @ weights["c_weight"].T
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(7), y]
    assert list(found) == ["logits", "inputs", "losses"]
    np.testing.assert_allclose(found["logits"], logits, atol=1e-5)
    np.testing.assert_allclose(found["inputs"], np.concatenate([a, b], axis=1), atol=1e-6)
    np.testing.assert_allclose(found["losses"], losses, atol=1e-5)
    assert found["losses"].dtype == np.float64


def test_noise_on_a_convolution_is_refused() -> None:
    model = parse(CONVOLUTION)
    with pytest.raises(PassError, match="NodeNoise: 'conv' is no row of numbers a sample"):
        NodeNoise(find_units(model, layout_of(model))[:1])(model)


def test_artifacts_hold_the_tail(lenet5: Path, resnet8: Path) -> None:
    for folder, shapes, graphs in (
        (lenet5, ((120, 400), (84, 120), (10, 84)), ("prefix.onnx", "tail.onnx")),
        (resnet8, ((10, 64),), TAIL_GRAPHS),
    ):
        manifest = Manifest.decode((folder / "manifest.json").read_bytes())
        assert manifest.tail is not None
        assert manifest.tail.shapes(manifest.layout) == shapes
        assert manifest.tail_graphs == graphs
        assert all((folder / name).exists() for name in graphs)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (((4, 5), (6, 7)), "every parameter"),
        (((4, 5), (6, 7), (8, None)), "every parameter"),
        (((4, 7), (6, 5), (8, 9)), "another length"),
        (((4, 5), (6, 7), (8, 10)), "does not match"),
        (((5, 4), (6, 7), (8, 9)), "does not match"),
        (((-6, 5), (6, 7), (8, 9)), "no number"),
    ],
)
def test_a_tail_that_does_not_match_the_layout_is_refused(
    lenet5: Path, layers: tuple[tuple[int, int | None], ...], message: str
) -> None:
    manifest = Manifest.decode((lenet5 / "manifest.json").read_bytes())
    assert manifest.tail is not None
    tail = DenseTail(manifest.tail.cut, tuple(DenseLayer(*layer) for layer in layers))
    with pytest.raises(ArtifactError, match=message):
        tail.shapes(manifest.layout)


@pytest.mark.parametrize("tail", [{}, {"cut": {}, "layers": [[1, 2]]}, {"cut": 3, "layers": [[1]]}, {"layers": 7}])
def test_malformed_tails_are_refused(tail: dict[str, object]) -> None:
    with pytest.raises(ArtifactError, match="malformed"):
        DenseTail.from_json(tail)


def test_a_tail_without_layers_is_refused() -> None:
    with pytest.raises(ArtifactError, match="impossible"):
        DenseTail(Cut(1, (3,), 1, 1), ())
    with pytest.raises(ArtifactError, match="impossible"):
        DenseTail(Cut(1, (3, 4), 1, 1), (DenseLayer(1, None),))
