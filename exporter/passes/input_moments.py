"""Turns a forward graph into one that yields the mean squared input of every weight of a unit layer's row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from ..units import ConvolutionWindow, UnitNode
from .editing import add_constant, keep_live_nodes, new_node, replace_nodes
from .infrastructure import GraphPass

__all__ = ["InputMoments", "window_matrix"]


def window_matrix(window: ConvolutionWindow, axis: int) -> NDArray[np.float32]:
    """Which input positions a kernel offset sees, divided by the number of output positions.

    Returns:
        ``float32[kernel, input_size]``: entry ``(k, i)`` is ``1 / output_size`` when some output position ``o`` has
        ``o * stride + k * dilation - pad == i``. Its product with squared inputs is their mean over the output
        positions, zeros of the padding included; exact for every stride, padding and dilation.
    """
    size, outputs = window.input_sizes[axis], window.output_sizes[axis]
    matrix = np.zeros((window.kernel[axis], size), np.float32)
    for k in range(window.kernel[axis]):
        seen = np.arange(outputs) * window.strides[axis] + k * window.dilations[axis] - window.pads_begin[axis]
        matrix[k, seen[(seen >= 0) & (seen < size)]] = 1.0 / outputs
    return matrix


class InputMoments(GraphPass):
    """Replaces the outputs by ``moments float32[n_moments]`` and removes what only the old outputs needed.

    Per layer: the mean over the batch (and over output positions) of the squared input that meets each weight of a
    row, shape ``(groups * weight.shape[1], *weight.shape[2:])``; layers one after another. Squares are summed over
    the batch first, in one node that needs no second copy of the activations.

    Args:
        units: The unit layers, in the order of the moments.
    """

    def __init__(self, units: Sequence[UnitNode]) -> None:
        self._units = tuple(units)

    def requires(self, model: ModelProto) -> None:
        """The graph computes the input of every unit layer."""
        made = {"x", *(name for node in model.graph.node for name in node.output)}
        self.check(bool(self._units), "there is no unit layer")
        for unit in self._units:
            self.check(unit.input in made, f"the graph does not compute {unit.input!r}")

    def ensures(self, model: ModelProto) -> None:
        """The only output is ``moments``."""
        self.check([o.name for o in model.graph.output] == ["moments"], "the graph's output is not moments")

    def transform(self, model: ModelProto) -> bool:
        """Add the sums, drop the rest."""
        graph = model.graph
        consumers: dict[str, list[NodeProto]] = {}
        parts = []
        for unit in self._units:
            part = f"fedzo.moments.{unit.layer.parameter}"
            consumers.setdefault(unit.input, []).extend(self._layer(model, unit, part))
            parts.append(part)
        # Each layer's sums come right after its input exists, so that no activation is kept for them.
        nodes = consumers.pop("x", [])
        for node in graph.node:
            nodes.append(node)
            for name in node.output:
                nodes.extend(consumers.pop(name, []))
        nodes += [
            new_node("Concat", parts, ["fedzo.moment_sums"], axis=0),
            new_node("Shape", ["x"], ["fedzo.batch_shape"], start=0, end=1),
            new_node("Cast", ["fedzo.batch_shape"], ["fedzo.batch"], to=TensorProto.FLOAT),
            new_node("Div", ["fedzo.moment_sums", "fedzo.batch"], ["moments"]),
        ]
        replace_nodes(graph, nodes)
        del graph.output[:]
        n_moments = sum(unit.layer.n_moments for unit in self._units)
        graph.output.append(helper.make_tensor_value_info("moments", TensorProto.FLOAT, [n_moments]))
        keep_live_nodes(graph)
        return True

    def _layer(self, model: ModelProto, unit: UnitNode, part: str) -> list[NodeProto]:
        graph, window = model.graph, unit.window
        flat = add_constant(graph, "fedzo.flat", np.array([-1], np.int64))
        sums = f"{part}.squares"
        if window is None:
            axes = list(range(unit.rank - 1))
            nodes = [new_node("ReduceSumSquare", [unit.input], [sums], axes=axes, keepdims=0)]
            if unit.positions == 1:
                nodes[0].output[0] = nodes[0].name = part
            else:
                count = add_constant(graph, f"fedzo.positions{unit.positions}", np.array([unit.positions], np.float32))
                nodes.append(new_node("Div", [sums, count], [part]))
            return nodes
        nodes = [new_node("ReduceSumSquare", [unit.input], [sums], axes=[0], keepdims=0)]
        columns = add_constant(graph, f"{part}.columns", window_matrix(window, -1).T)
        nodes.append(new_node("MatMul", [sums, columns], [f"{part}.last"]))
        value = f"{part}.last"
        if len(window.kernel) == 2:
            rows = add_constant(graph, f"{part}.rows", window_matrix(window, 0))
            nodes.append(new_node("MatMul", [rows, value], [f"{part}.window"]))
            value = f"{part}.window"
        nodes.append(new_node("Reshape", [value, flat], [part]))
        return nodes
