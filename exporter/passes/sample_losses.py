"""Puts a loss of every sample behind the logits, computed in double precision."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto, helper

from ..forward import BATCH
from .editing import add_constant, input_names, new_node
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
        graph.input.append(helper.make_tensor_value_info("y", TensorProto.INT64, [BATCH]))
        axis = add_constant(graph, "fedzo.axis1", np.array([1], np.int64))
        graph.node.extend(
            [
                new_node("Cast", ["logits"], ["fedzo.logits64"], to=TensorProto.DOUBLE),
                new_node("LogSoftmax", ["fedzo.logits64"], ["fedzo.log_softmax"], axis=1),
                new_node("Unsqueeze", ["y", axis], ["fedzo.label"]),
                new_node("GatherElements", ["fedzo.log_softmax", "fedzo.label"], ["fedzo.log_likelihoods"], axis=1),
                new_node("Neg", ["fedzo.log_likelihoods"], ["fedzo.losses"]),
                new_node("Squeeze", ["fedzo.losses", axis], ["losses"]),
            ]
        )
        graph.output.append(helper.make_tensor_value_info("losses", TensorProto.DOUBLE, [BATCH]))
        return True
