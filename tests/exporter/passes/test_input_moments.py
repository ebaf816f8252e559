"""input_moments: exact for every stride, padding, dilation and group, compared with torch's unfold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto

from fedzo.exporter.passes.infrastructure import PassError
from fedzo.exporter.passes.input_moments import InputMoments
from fedzo.exporter.units import find_units
from tests.exporter.text_graphs import CONVOLUTION, dense_by_name, layout_of, numbers, operators, output, parse


def moments_of(model: ModelProto, x: NDArray[np.float32]) -> NDArray[Any]:
    layout = layout_of(model)
    graph = InputMoments(find_units(model, layout))(model).model
    assert [value.name for value in graph.graph.output] == ["moments"]
    return output(graph, {**dense_by_name(layout, numbers(layout.size)), "x": x})


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "pads"),
    [
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((3, 3), (2, 2), (1, 1), (1, 1)),
        ((5, 2), (1, 3), (1, 1), (0, 0)),
        ((3, 2), (2, 3), (2, 1), (2, 1)),
        ((1, 1), (2, 2), (1, 1), (0, 0)),
        ((2, 3), (1, 1), (3, 2), (0, 1)),
    ],
)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_two_dimensional_windows(
    kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int], pads: tuple[int, int], groups: int
) -> None:
    text = f"""
    g (float[batch, 4, 9, 8] x, float[8, {4 // groups}, {kernel[0]}, {kernel[1]}] w1) => (float[batch, 8, h, v] y) {{
        y = Conv <group = {groups}, strides = [{stride[0]}, {stride[1]}], dilations = [{dilation[0]}, {dilation[1]}],
                  pads = [{pads[0]}, {pads[1]}, {pads[0]}, {pads[1]}]> (x, w1)
    }}
    """
    x = numbers(3, 4, 9, 8)
    columns = torch.nn.functional.unfold(torch.from_numpy(x).double(), kernel, dilation, pads, stride)
    expected = (columns**2).mean(dim=(0, 2)).numpy()  # (channels * kernel), groups side by side
    np.testing.assert_allclose(moments_of(parse(text), x), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("rule", "before", "after"), [("VALID", 0, 0), ("SAME_UPPER", 1, 2), ("SAME_LOWER", 2, 1), ("NOTSET", 0, 0)]
)
def test_one_dimension_and_padding_rules(rule: str, before: int, after: int) -> None:
    text = f"""
    g (float[batch, 2, 7] x, float[3, 2, 4] w1) => (float[batch, 3, t] y) {{
        y = Conv <auto_pad = "{rule}", strides = [2]> (x, w1)
    }}
    """
    x = numbers(2, 2, 7)
    padded = torch.nn.functional.pad(torch.from_numpy(x).double(), (before, after))
    columns = padded.unfold(2, 4, 2)  # (batch, channels, positions, kernel)
    expected = (columns**2).mean(dim=(0, 2)).flatten().numpy()
    np.testing.assert_allclose(moments_of(parse(text), x), expected, rtol=1e-5)


def test_linear_layers_and_sequences() -> None:
    text = """
    g (float[batch, 5, 3] x, float[4, 3] a, float[2, 20] b) => (float[batch, 2] y) {
        at = Transpose <perm = [1, 0]> (a)
        h = MatMul (x, at)
        r = Relu (h)
        flat = Flatten (r)
        y = Gemm <transB = 1> (flat, b)
    }
    """
    model, x = parse(text), numbers(6, 5, 3)
    layout = layout_of(model)
    a = dense_by_name(layout, numbers(layout.size))["a"]
    hidden = np.maximum(x.astype(np.float64) @ a.T.astype(np.float64), 0.0)
    expected = np.concatenate([(x.astype(np.float64) ** 2).mean((0, 1)), (hidden.reshape(6, -1) ** 2).mean(0)])
    np.testing.assert_allclose(moments_of(model, x), expected, rtol=1e-5)


def test_batches_average() -> None:
    x = numbers(8, 2, 5, 4)
    model = parse(CONVOLUTION)
    parts = [moments_of(model, x[:2]), moments_of(model, x[2:])]
    np.testing.assert_allclose(moments_of(model, x), (2 * parts[0] + 6 * parts[1]) / 8, rtol=1e-5)


def test_what_only_the_logits_need_is_gone() -> None:
    model = parse(CONVOLUTION)
    graph = InputMoments(find_units(model, layout_of(model)))(model).model
    assert operators(graph).count("MatMul") == 2  # the window of the convolution, not the last layer
    assert "Transpose" not in operators(graph)
    assert "logits" not in {name for node in graph.graph.node for name in node.output}


def test_needs_unit_layers() -> None:
    with pytest.raises(PassError, match="InputMoments: there is no unit layer"):
        InputMoments(())(parse(CONVOLUTION))
