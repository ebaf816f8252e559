"""Turns the graph of a stage into one that yields the gradient of its parameters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from ...protocol.artifact.layout import Layout
from ..forward import BATCH
from .chain_rules import Tape
from .editing import add_constant, input_names, keep_live_nodes, new_node, value_shapes
from .infrastructure import GraphPass

__all__ = ["StageGradient", "append_gradients", "chain_between"]


def chain_between(nodes: Sequence[NodeProto], first: str, last: str) -> list[NodeProto]:
    """The nodes from value ``first`` to value ``last``; those beside the chain, such as transposes, are left out."""
    producers = {node.output[0]: node for node in nodes}
    chain: list[NodeProto] = []
    value = last
    while value != first:
        node = producers[value]
        chain.append(node)
        # Of several inputs the one that the chain comes from is no parameter and no constant: it is computed.
        value = next(name for name in node.input if name == first or name in producers)
    return chain[::-1]


def append_gradients(model: ModelProto, chain: Sequence[NodeProto], cotangent: str, names: Sequence[str]) -> list[str]:
    """Add the way back through a chain.

    Args:
        model: Edited in place.
        chain: Nodes of the model, front to back; all of ``names`` are used in it.
        cotangent: Gradient of the summed loss at the chain's end, a row a sample.
        names: Parameters.

    Returns:
        Values with the gradients of ``names``, summed over the batch and flat.
    """
    tape = Tape(model.graph, value_shapes(model), set(names))
    first = next(k for k, node in enumerate(chain) if node.op_type in ("Conv", "Gemm", "MatMul"))
    for place in range(len(chain) - 1, first - 1, -1):
        cotangent = tape.back(chain[place], cotangent, to_input=place > first)
    flat = add_constant(model.graph, "fedzo.back.flat", np.array([-1], np.int64))
    return [tape.add("Reshape", [tape.gradients[name], flat], f"flat.{name}") for name in names]


class StageGradient(GraphPass):
    """``next_features`` -> ``gradient float32[stage parameters]`` for an input ``cotangent float32[batch, *output]``.

    The cotangent is the gradient of the summed loss with respect to the stage's output; the gradient is that with
    respect to the stage's dense parameters, one after another in layout order, summed over the batch.

    Args:
        layout: The stage's parameters.
        output_shape: Shape of one sample of the stage's output.
    """

    def __init__(self, layout: Layout, output_shape: Sequence[int]) -> None:
        self._layout = layout
        self._shape = tuple(output_shape)

    def requires(self, model: ModelProto) -> None:
        """The graph goes from ``features`` to ``next_features``."""
        self.check("features" in input_names(model.graph), "the graph has no input features")
        self.check([o.name for o in model.graph.output] == ["next_features"], "the output is not next_features")

    def ensures(self, model: ModelProto) -> None:
        """The only output is ``gradient``."""
        self.check([o.name for o in model.graph.output] == ["gradient"], "the graph's output is not gradient")

    def transform(self, model: ModelProto) -> bool:
        """Add the way back and drop what it does not need."""
        graph = model.graph
        cotangent = helper.make_tensor_value_info("cotangent", TensorProto.FLOAT, [BATCH, *self._shape])
        graph.input.append(cotangent)
        chain = chain_between(graph.node, "features", "next_features")
        parts = append_gradients(model, chain, "cotangent", [p.name for p in self._layout.parameters])
        graph.node.append(new_node("Concat", parts, ["gradient"], axis=0))
        del graph.output[:]
        graph.output.append(helper.make_tensor_value_info("gradient", TensorProto.FLOAT, [self._layout.size]))
        keep_live_nodes(graph)
        return True
