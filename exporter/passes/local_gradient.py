"""Lets the graph of a stage yield the gradient of its own loss, in closed form."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto, helper

from ...protocol.artifact.layout import Layout
from .editing import add_constant, keep_live_nodes, new_node
from .infrastructure import GraphPass
from .local_head import HEAD_PARAMETERS
from .stage_gradient import append_gradients, chain_between

__all__ = ["LocalGradient"]


class LocalGradient(GraphPass):
    """Adds ``gradient float32[stage parameters]`` and, if there is a head, ``head_gradient float32[head]``.

    Both are those of the cross-entropy summed over the batch. At the logits that is softmax minus label; from there
    the chain rule goes back through the stage. ``logits`` are no output any more.

    Args:
        layout: The stage's parameters.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def requires(self, model: ModelProto) -> None:
        """There is a loss of every sample."""
        self.check("losses" in [o.name for o in model.graph.output], "the graph has no output losses")
        made = {name for node in model.graph.node for name in node.output}
        self.check("fedzo.log_softmax" in made, "the loss is no cross-entropy")

    def ensures(self, model: ModelProto) -> None:
        """The gradient is an output."""
        self.check("gradient" in [o.name for o in model.graph.output], "the graph has no output gradient")

    def transform(self, model: ModelProto) -> bool:
        """Add softmax minus label and the way back."""
        graph = model.graph
        logits = next(o for o in graph.output if o.name == "logits")
        n_classes = logits.type.tensor_type.shape.dim[1].dim_value
        classes = add_constant(graph, "fedzo.classes", np.arange(n_classes, dtype=np.int64))
        chain = chain_between(graph.node, "features", "logits")
        graph.node.extend(
            [
                new_node("Exp", ["fedzo.log_softmax"], ["fedzo.softmax64"]),
                new_node("Cast", ["fedzo.softmax64"], ["fedzo.softmax"], to=TensorProto.FLOAT),
                new_node("Equal", ["fedzo.label", classes], ["fedzo.is_label"]),
                new_node("Cast", ["fedzo.is_label"], ["fedzo.one_hot"], to=TensorProto.FLOAT),
                new_node("Sub", ["fedzo.softmax", "fedzo.one_hot"], ["fedzo.excess"]),
            ]
        )
        kept = [o for o in graph.output if o.name != "logits"]
        del graph.output[:]
        graph.output.extend(kept)
        own = [p.name for p in self._layout.parameters]
        sizes = [v.type.tensor_type.shape.dim[0].dim_value for v in graph.input if v.name == "head"]
        parts = append_gradients(model, chain, "fedzo.excess", [*own, *(HEAD_PARAMETERS if sizes else ())])
        outputs = [("gradient", parts[: len(own)], self._layout.size)]
        outputs += [("head_gradient", parts[len(own) :], size) for size in sizes]
        for name, pieces, size in outputs:
            graph.node.append(new_node("Concat", pieces, [name], axis=0))
            graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [size]))
        keep_live_nodes(graph)
        return True
