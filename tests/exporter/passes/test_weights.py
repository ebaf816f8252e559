"""weights_as_inputs, scatter_survivors and fold_weights: from parameter inputs to survivors and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedzo.exporter.passes.fold_weights import FoldWeights
from fedzo.exporter.passes.infrastructure import PassError, Sequential
from fedzo.exporter.passes.scatter_survivors import ScatterSurvivors
from fedzo.exporter.passes.weights_as_inputs import WeightsAsInputs
from fedzo.protocol.pruning.mask import Mask, threshold
from tests.exporter.text_graphs import (
    CONVOLUTION,
    LINEAR,
    dense_by_name,
    layout_of,
    numbers,
    operators,
    output,
    parse,
    signature,
)


@pytest.mark.parametrize("text", [LINEAR, CONVOLUTION])
def test_flat_weights_compute_what_the_parameters_compute(text: str) -> None:
    model = parse(text)
    layout = layout_of(model)
    before = model.SerializeToString()
    result = WeightsAsInputs(layout)(model)
    assert result.modified
    assert model.SerializeToString() == before, "the caller's model changed"
    dense, x = numbers(layout.size), numbers(3, *signature(model)["x"][1:], seed=1)  # type: ignore[arg-type]
    counts = Mask.dense(layout).counts()
    expected = output(model, {**dense_by_name(layout, dense), "x": x})
    assert np.array_equal(output(result.model, {"w": dense, "counts": counts, "x": x}), expected)
    assert list(signature(result.model)) == ["w", "counts", "x", "logits"]


def test_parts_are_reshaped_just_before_their_first_use() -> None:
    model = parse(CONVOLUTION)
    flat = WeightsAsInputs(layout_of(model))(model).model
    expected = ["Split", "Reshape", "Reshape", "Conv", "Relu", "GlobalAveragePool", "Flatten", "Reshape"]
    assert operators(flat) == [*expected, "Transpose", "MatMul"]
    made = {node.output[0] for node in flat.graph.node}
    assert {"conv_weight", "conv_bias", "fc_weight"} <= made


def test_a_parameter_that_is_no_input_is_refused() -> None:
    model = parse(LINEAR)
    layout = layout_of(parse(CONVOLUTION))
    with pytest.raises(PassError, match=r"WeightsAsInputs: parameter 'conv_weight' is no input"):
        WeightsAsInputs(layout)(model)


@pytest.mark.parametrize("text", [LINEAR, CONVOLUTION])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_survivors_compute_what_zeros_compute(text: str, sparsity: float) -> None:
    model = parse(text)
    layout = layout_of(model)
    scattered = Sequential([WeightsAsInputs(layout), ScatterSurvivors(layout)])(model).model
    dense, x = numbers(layout.size), numbers(3, *signature(model)["x"][1:], seed=1)  # type: ignore[arg-type]
    mask = threshold(layout, np.abs(dense), sparsity)
    assert (sparsity == 0.0) == bool(mask.kept.all())
    feeds: dict[str, NDArray[Any]] = {
        "w": dense[mask.survivors()],
        "index": mask.index(),
        "counts": mask.counts(),
        "x": x,
    }
    expected = output(model, {**dense_by_name(layout, np.where(mask.kept, dense, np.float32(0.0))), "x": x})
    assert np.array_equal(output(scattered, feeds), expected)
    assert signature(scattered)["index"] == signature(scattered)["w"] == ["survivors"]


def test_each_scatter_lies_just_before_the_use() -> None:
    model = parse(CONVOLUTION)
    layout = layout_of(model)
    scattered = Sequential([WeightsAsInputs(layout), ScatterSurvivors(layout)])(model).model
    scatter = ["ConstantOfShape", "ScatterElements", "Reshape"]
    expected = ["Split", "Split", *scatter, "Reshape", "Conv", "Relu", "GlobalAveragePool", "Flatten"]
    assert operators(scattered) == [*expected, *scatter, "Transpose", "MatMul"]


def test_without_maskable_parameters_nothing_is_scattered() -> None:
    model = parse(LINEAR)
    layout = layout_of(model, maskable=False)
    flat = WeightsAsInputs(layout)(model).model
    result = ScatterSurvivors(layout)(flat)
    assert not result.modified
    assert "index" not in signature(result.model)
    assert "ScatterElements" not in operators(result.model)


def test_a_failure_names_the_passes_before_it() -> None:
    model = parse(LINEAR)
    layout = layout_of(model)
    with pytest.raises(PassError, match=r"ScatterSurvivors: .*already has an input index.*after WeightsAsInputs, Scat"):
        Sequential([WeightsAsInputs(layout), ScatterSurvivors(layout), ScatterSurvivors(layout)])(model)
    with pytest.raises(PassError, match=r"no inputs w and counts \(after no other pass\)"):
        Sequential([ScatterSurvivors(layout)])(model)


@pytest.mark.parametrize("maskable", [True, False])
@pytest.mark.parametrize("text", [LINEAR, CONVOLUTION])
def test_folded_weights_leave_a_plain_model(text: str, maskable: bool) -> None:
    model = parse(text)
    layout = layout_of(model, maskable=maskable)
    dense, x = numbers(layout.size), numbers(3, *signature(model)["x"][1:], seed=1)  # type: ignore[arg-type]
    flat = Sequential([WeightsAsInputs(layout), ScatterSurvivors(layout)])(model).model
    folded = FoldWeights(layout, dense)(flat).model
    assert list(signature(folded)) == ["x", "logits"]
    assert operators(folded) == operators(model)
    assert {t.name for t in folded.graph.initializer} == {p.name for p in layout.parameters}
    assert np.array_equal(output(folded, {"x": x}), output(model, {**dense_by_name(layout, dense), "x": x}))


def test_weights_of_another_length_are_refused() -> None:
    model = parse(LINEAR)
    layout = layout_of(model)
    flat = WeightsAsInputs(layout)(model).model
    with pytest.raises(PassError, match=r"the weights have shape \(15,\), the layout has 16 entries"):
        FoldWeights(layout, numbers(15))(flat)
