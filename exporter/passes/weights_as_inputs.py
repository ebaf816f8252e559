"""Replaces the parameter tensors of a graph by one flat input ``w`` that is split on the way in."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto, helper

from ...protocol.artifact.layout import Layout
from .editing import add_constant, drop_inputs, input_names, new_node, replace_nodes
from .infrastructure import GraphPass

__all__ = ["WeightsAsInputs"]


class WeightsAsInputs(GraphPass):
    """Parameter inputs -> ``w float32[survivors]`` and ``counts int64[n_parameters]``.

    ``Split(w, counts)`` yields one part a parameter; just before its first use each part is reshaped to a value that
    bears the parameter's name. Maskable parameters keep all their entries until
    :class:`~fedzo.exporter.passes.scatter_survivors.ScatterSurvivors` runs.

    Args:
        layout: The parameters, in the order in which ``w`` holds them.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def requires(self, model: ModelProto) -> None:
        """Every parameter is an input."""
        inputs = input_names(model.graph)
        for parameter in self._layout.parameters:
            self.check(parameter.name in inputs, f"parameter {parameter.name!r} is no input of the graph")
        self.check(not {"w", "counts"} & set(inputs), "the graph already has an input w or counts")

    def ensures(self, model: ModelProto) -> None:
        """No parameter is an input."""
        extra = set(input_names(model.graph)) & {p.name for p in self._layout.parameters}
        self.check(not extra, f"parameters {sorted(extra)} are still inputs")

    def transform(self, model: ModelProto) -> bool:
        """Split ``w`` and reshape the parts."""
        graph, parameters = model.graph, self._layout.parameters
        drop_inputs(graph, {p.name for p in parameters})
        others = list(graph.input)
        del graph.input[:]
        graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, ["survivors"]))
        graph.input.append(helper.make_tensor_value_info("counts", TensorProto.INT64, [len(parameters)]))
        graph.input.extend(others)
        nodes = [new_node("Split", ["w", "counts"], [f"fedzo.w.{p.name}" for p in parameters], axis=0)]
        waiting = {p.name: p for p in parameters}
        for node in graph.node:
            for name in node.input:
                parameter = waiting.pop(name, None)
                if parameter is not None:
                    shape = add_constant(graph, f"fedzo.shape.{name}", np.array(parameter.shape, np.int64))
                    nodes.append(new_node("Reshape", [f"fedzo.w.{name}", shape], [name]))
            nodes.append(node)
        replace_nodes(graph, nodes)
        return True
