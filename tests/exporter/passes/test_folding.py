"""fold_constants and static_reshapes."""

from __future__ import annotations

import numpy as np

from fedzo.exporter.passes.fold_constants import FoldConstants
from fedzo.exporter.passes.static_reshapes import StaticReshapes
from fedzo.exporter.sessions import run_every_value
from tests.exporter.text_graphs import numbers, operators, output, parse


def test_constant_expressions_become_constants() -> None:
    model = parse("""
    g (float[batch, 2] x) => (float[batch, 3] y) <float[3, 2] w1 = {1, 2, 3, 4, 5, 6}> {
        two = Constant <value = float {2}> ()
        doubled = Mul (w1, two)
        transposed = Transpose <perm = [1, 0]> (doubled)
        y = MatMul (x, transposed)
    }
    """)
    result = FoldConstants()(model)
    assert result.modified
    assert operators(result.model) == ["MatMul"]
    assert [t.name for t in result.model.graph.initializer] == ["transposed"]
    x = numbers(2, 2)
    assert np.array_equal(output(result.model, {"x": x}), output(model, {"x": x}))
    assert not FoldConstants()(result.model).modified


def test_large_expansions_random_values_and_outputs_stay() -> None:
    model = parse("""
    g (float[batch, 2] x) => (float[batch, 2] y, float[2] fixed) <int64[1] big = {4000}, float[2] k = {1, 2}> {
        zeros = ConstantOfShape (big)
        sum = ReduceSum <keepdims = 0> (zeros)
        noise = RandomNormal <shape = [1]> ()
        a = Add (x, sum)
        y = Add (a, noise)
        fixed = Neg (k)
    }
    """)
    result = FoldConstants()(model)
    assert not result.modified
    assert operators(result.model) == ["ConstantOfShape", "ReduceSum", "RandomNormal", "Add", "Add", "Neg"]


def test_computed_reshape_targets_become_constants() -> None:
    model = parse("""
    g (float[batch, 6] x) => (float[batch, 3, 2] y) <int64[1] zero = {0}, int64[2] rest = {3, 2}> {
        shape = Shape (x)
        size = Gather (shape, zero)
        target = Concat <axis = 0> (size, rest)
        y = Reshape (x, target)
    }
    """)
    x = numbers(3, 6)
    two, three = (
        {name: value.shape for name, value in run_every_value(model, {"x": x[:batch]}).items()} for batch in (2, 3)
    )
    result = StaticReshapes(two, three)(model)
    assert operators(result.model) == ["Reshape"]
    for batch in (1, 3):
        assert np.array_equal(output(result.model, {"x": x[:batch]}), x[:batch].reshape(batch, 3, 2))
    assert not StaticReshapes(two, three)(result.model).modified
