"""ONNX text graphs and how tests run them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, parser

from fedzo.exporter.sessions import run_graph
from fedzo.protocol.artifact.layout import Initialiser, Layout, Parameter

HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'

LINEAR = """
linear (float[batch, 3] x, float[4, 3] fc_weight, float[4] fc_bias) => (float[batch, 4] logits) {
    logits = Gemm <transB = 1> (x, fc_weight, fc_bias)
}
"""

CONVOLUTION = """
convolution (float[batch, 2, 5, 4] x, float[3, 2, 3, 2] conv_weight, float[3] conv_bias, float[4, 3] fc_weight)
    => (float[batch, 4] logits) {
    conv = Conv <strides = [2, 1], pads = [1, 0, 1, 1]> (x, conv_weight, conv_bias)
    relu = Relu (conv)
    pool = GlobalAveragePool (relu)
    flat = Flatten (pool)
    transposed = Transpose <perm = [1, 0]> (fc_weight)
    logits = MatMul (flat, transposed)
}
"""


def parse(text: str) -> ModelProto:
    """A checked model of a text graph."""
    model = parser.parse_model(HEADER + text)
    onnx.checker.check_model(model)
    return model


def layout_of(model: ModelProto, *, maskable: bool = True) -> Layout:
    """All inputs but ``x`` as parameters, in the order of the graph; those with two axes or more are maskable."""
    parameters = []
    for value in model.graph.input:
        if value.name != "x":
            shape = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
            parameters.append(Parameter(value.name, shape, maskable and len(shape) > 1, Initialiser("normal", 0.5)))
    return Layout(tuple(parameters))


def numbers(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    """Different numbers between -1 and 1, the same each time: ``float32[shape]``."""
    count = math.prod(shape)
    return np.sin(np.arange(1, count + 1, dtype=np.float64) * (1.7 + seed)).astype(np.float32).reshape(shape)


def dense_by_name(layout: Layout, dense: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """The parameters as the forward graph takes them."""
    return {p.name: dense[layout.slice_of(k)].reshape(p.shape) for k, p in enumerate(layout.parameters)}


def output(model: ModelProto, feeds: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """The only output of a run."""
    (value,) = run_graph(model, feeds).values()
    return value


def signature(model: ModelProto) -> dict[str, list[int | str]]:
    """Shapes of inputs and outputs by name."""
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }


def operators(model: ModelProto) -> list[str]:
    """Operators in file order."""
    return [node.op_type for node in model.graph.node]
