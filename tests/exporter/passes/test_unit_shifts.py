"""unit_shifts: one constant a unit or channel, before normalisation."""

from __future__ import annotations

import numpy as np
import pytest

from fedzo.exporter.passes.infrastructure import PassError
from fedzo.exporter.passes.unit_shifts import UnitShifts
from fedzo.exporter.units import find_units
from tests.exporter.text_graphs import CONVOLUTION, LINEAR, dense_by_name, layout_of, numbers, output, parse, signature

TOKENS = """
tokens (float[batch, 5, 3] x, float[4, 3] a_weight, float[4] a_bias, float[2, 4] b_weight) => (float[batch, 2] logits) {
    a_transposed = Transpose <perm = [1, 0]> (a_weight)
    product = MatMul (x, a_transposed)
    sum = Add (product, a_bias)
    tanh = Tanh (sum)
    mean = ReduceMean <axes = [1], keepdims = 0> (tanh)
    logits = Gemm <transB = 1> (mean, b_weight)
}
"""


@pytest.mark.parametrize("text", [LINEAR, CONVOLUTION, TOKENS])
def test_no_shift_changes_nothing(text: str) -> None:
    model = parse(text)
    layout = layout_of(model)
    units = find_units(model, layout)
    shifted = UnitShifts(units)(model).model
    feeds = {**dense_by_name(layout, numbers(layout.size)), "x": numbers(3, *signature(model)["x"][1:], seed=1)}  # type: ignore[arg-type]
    (length,) = signature(shifted)["shift"]
    assert length == sum(unit.layer.n_units for unit in units)
    zeros = np.zeros(int(length), np.float32)
    assert np.array_equal(output(shifted, {**feeds, "shift": zeros}), output(model, feeds))


def test_a_shift_is_a_change_of_the_bias() -> None:
    model = parse(CONVOLUTION)
    layout = layout_of(model)
    shifted = UnitShifts(find_units(model, layout))(model).model
    feeds = {**dense_by_name(layout, numbers(layout.size)), "x": numbers(3, 2, 5, 4, seed=1)}
    shift = numbers(7, seed=2)
    moved = output(shifted, {**feeds, "shift": shift})
    biased = {**feeds, "conv_bias": feeds["conv_bias"] + shift[:3]}
    np.testing.assert_allclose(moved, output(model, biased) + shift[3:], rtol=1e-5, atol=1e-6)
    assert np.abs(moved - output(model, feeds)).max() > 0.1


def test_a_shift_reaches_every_position_of_a_sequence() -> None:
    model = parse(TOKENS)
    layout = layout_of(model)
    shifted = UnitShifts(find_units(model, layout))(model).model
    feeds = {**dense_by_name(layout, numbers(layout.size)), "x": numbers(2, 5, 3, seed=1)}
    shift = np.concatenate([numbers(4, seed=2), np.zeros(2, np.float32)])
    biased = {**feeds, "a_bias": feeds["a_bias"] + shift[:4]}
    moved = output(shifted, {**feeds, "shift": shift})
    np.testing.assert_allclose(moved, output(model, biased), rtol=1e-5, atol=1e-6)


def test_the_shift_lies_before_a_normalisation() -> None:
    model = parse("""
    normal (float[batch, 2, 6] x, float[4, 2, 3] conv_weight, float[4] gain, float[4] offset)
        => (float[batch, 4, 4] y) {
        conv = Conv (x, conv_weight)
        y = InstanceNormalization (conv, gain, offset)
    }
    """)
    layout = layout_of(model)
    shifted = UnitShifts(find_units(model, layout))(model).model
    assert [n.op_type for n in shifted.graph.node] == ["Split", "Conv", "Reshape", "Add", "InstanceNormalization"]
    feeds = {**dense_by_name(layout, numbers(layout.size)), "x": numbers(2, 2, 6)}
    moved = output(shifted, {**feeds, "shift": np.ones(4, np.float32)})
    np.testing.assert_allclose(moved, output(model, feeds), atol=1e-4)  # a mean of its own takes the shift away


def test_needs_unit_layers() -> None:
    with pytest.raises(PassError, match="UnitShifts: there is no unit layer"):
        UnitShifts(())(parse(LINEAR))
    units = find_units(parse(CONVOLUTION), layout_of(parse(CONVOLUTION)))
    with pytest.raises(PassError, match="the graph does not compute 'conv'"):
        UnitShifts(units)(parse(LINEAR))
