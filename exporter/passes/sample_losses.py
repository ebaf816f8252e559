"""Puts a loss of every sample behind the logits, computed in double precision."""

from __future__ import annotations

from onnx import ModelProto, TensorProto, helper

from ..forward import BATCH
from .editing import input_names, new_node
from .float64_loss import add_log_likelihoods
from .infrastructure import GraphPass

__all__ = ["SampleLosses"]


class SampleLosses(GraphPass):
    """Adds the output ``losses float64[batch]``, the cross-entropy of every sample with ``y int64[batch]``."""

    def requires(self, model: ModelProto) -> None:
        """The graph yields ``logits``."""
        self.check("logits" in [o.name for o in model.graph.output], "the graph has no output logits")
        self.check("y" not in input_names(model.graph), "the graph already has an input y")

    def ensures(self, model: ModelProto) -> None:
        """The losses are an output."""
        self.check("losses" in [o.name for o in model.graph.output], "the graph has no output losses")

    def transform(self, model: ModelProto) -> bool:
        """Add the tail behind the logits."""
        graph = model.graph
        likelihoods, axis = add_log_likelihoods(graph)
        graph.node.extend(
            [
                new_node("Neg", [likelihoods], ["fedzo.losses"]),
                new_node("Squeeze", ["fedzo.losses", axis], ["losses"]),
            ]
        )
        graph.output.append(helper.make_tensor_value_info("losses", TensorProto.DOUBLE, [BATCH]))
        return True
