"""Adds noise of its own to the pre-activations of every sample, for node perturbation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from ..forward import BATCH
from ..units import UnitNode
from .editing import add_constant, input_names, new_node, replace_nodes
from .infrastructure import GraphPass

__all__ = ["NodeNoise"]


class NodeNoise(GraphPass):
    """Adds ``noise float32[batch, n_units]``, one number a sample and unit of a fully connected layer.

    Jabri and Flower, "Weight perturbation", IEEE Trans. Neural Networks 3 (1992), and Werfel, Xie and Seung,
    "Learning curves for stochastic gradient descent in linear feedforward networks", NIPS 2003.

    Args:
        units: Fully connected layers, in the order of ``noise``.
    """

    def __init__(self, units: Sequence[UnitNode]) -> None:
        self._units = tuple(units)

    def requires(self, model: ModelProto) -> None:
        """Every layer's result is a row of numbers a sample."""
        made = {name for node in model.graph.node for name in node.output}
        self.check(bool(self._units), "there is no layer")
        for unit in self._units:
            self.check(unit.output in made, f"the graph does not compute {unit.output!r}")
            self.check(unit.rank == 2 and unit.positions == 1, f"{unit.output!r} is no row of numbers a sample")
        self.check("noise" not in input_names(model.graph), "the graph already has an input noise")

    def ensures(self, model: ModelProto) -> None:
        """Every layer's result is a sum."""
        adds = {node.output[0] for node in model.graph.node if node.op_type == "Add"}
        for unit in self._units:
            self.check(unit.output in adds, f"{unit.output!r} has no noise")

    def transform(self, model: ModelProto) -> bool:
        """Add the noise."""
        graph = model.graph
        sizes = np.array([unit.layer.n_units for unit in self._units], np.int64)
        graph.input.append(helper.make_tensor_value_info("noise", TensorProto.FLOAT, [BATCH, int(sizes.sum())]))
        parts = [f"fedzo.noise.{unit.layer.parameter}" for unit in self._units]
        by_output = {unit.output: (unit, part) for unit, part in zip(self._units, parts, strict=True)}
        name = add_constant(graph, "fedzo.noise_sizes", sizes)
        nodes: list[NodeProto] = [new_node("Split", ["noise", name], parts, axis=1)]
        for node in graph.node:
            nodes.append(node)
            unit, part = by_output.get(node.output[0], (None, ""))
            if unit is not None:
                # The node's result gets a new name and the sum the old, so that no consumer has to change.
                node.output[0] = node.name = f"fedzo.quiet.{unit.layer.parameter}"
                nodes.append(new_node("Add", [node.output[0], part], [unit.output]))
        replace_nodes(graph, nodes)
        return True
