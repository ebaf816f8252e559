"""Lets a graph run on the surviving weights alone: each layer's dense tensor exists only while the layer needs it."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from ...protocol.artifact.layout import Layout
from .editing import add_constant, input_names, new_node, replace_nodes
from .infrastructure import GraphPass

__all__ = ["ScatterSurvivors"]


class ScatterSurvivors(GraphPass):
    """Adds ``index int32[survivors]`` and scatters the maskable parameters into zeros just before their first use.

    ``index`` holds, for all parameters in layout order, each survivor's index inside its own parameter. A layout
    without maskable parameters leaves the graph as it is.

    Args:
        layout: The parameters, in the order in which ``w`` holds them.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def requires(self, model: ModelProto) -> None:
        """The graph takes ``w`` and ``counts``."""
        inputs = input_names(model.graph)
        self.check("w" in inputs and "counts" in inputs, "the graph has no inputs w and counts")
        self.check("index" not in inputs, "the graph already has an input index")

    def ensures(self, model: ModelProto) -> None:
        """Every maskable parameter in use is scattered."""
        scattered = {node.output[0] for node in model.graph.node if node.op_type == "ScatterElements"}
        for parameter in self._layout.parameters:
            if parameter.maskable and any(parameter.name in node.output for node in model.graph.node):
                self.check(f"fedzo.flat.{parameter.name}" in scattered, f"{parameter.name!r} is not scattered")

    def transform(self, model: ModelProto) -> bool:
        """Split ``index`` and scatter."""
        graph, parameters = model.graph, self._layout.parameters
        maskable = {p.name: p for p in parameters if p.maskable}
        if not maskable:
            return False
        others = list(graph.input)
        del graph.input[:]
        graph.input.append(others[0])
        graph.input.append(helper.make_tensor_value_info("index", TensorProto.INT32, ["survivors"]))
        graph.input.extend(others[1:])
        nodes: list[NodeProto] = []
        for node in graph.node:
            parameter = maskable.get(node.output[0]) if node.op_type == "Reshape" else None
            if parameter is not None:
                name = parameter.name
                size = add_constant(graph, f"fedzo.size.{name}", np.array([parameter.size], np.int64))
                zeros = new_node("ConstantOfShape", [size], [f"fedzo.zeros.{name}"])
                scatter = new_node(
                    "ScatterElements",
                    [f"fedzo.zeros.{name}", f"fedzo.index.{name}", f"fedzo.w.{name}"],
                    [f"fedzo.flat.{name}"],
                    axis=0,
                )
                node.input[0] = f"fedzo.flat.{name}"
                nodes += [zeros, scatter]
            nodes.append(node)
            if node.op_type == "Split" and node.input[0] == "w":
                outputs = [f"fedzo.index.{p.name}" for p in parameters]
                nodes.append(new_node("Split", ["index", "counts"], outputs, axis=0))
        replace_nodes(graph, nodes)
        return True
