"""Puts a loss behind the logits, computed in double precision."""

from __future__ import annotations

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, helper

from ..forward import BATCH
from .editing import add_constant, input_names, new_node
from .infrastructure import GraphPass

__all__ = ["Float64Loss", "add_log_likelihoods"]


def add_log_likelihoods(graph: GraphProto) -> tuple[str, str]:
    """Add the input ``y int64[batch]`` and the log-likelihood of every sample, in double precision.

    Returns:
        Names of ``float64[batch, 1]`` and of the constant ``int64[1]`` that holds its last axis.
    """
    graph.input.append(helper.make_tensor_value_info("y", TensorProto.INT64, [BATCH]))
    axis = add_constant(graph, "fedzo.axis1", np.array([1], np.int64))
    graph.node.extend(
        [
            new_node("Cast", ["logits"], ["fedzo.logits64"], to=TensorProto.DOUBLE),
            new_node("LogSoftmax", ["fedzo.logits64"], ["fedzo.log_softmax"], axis=1),
            new_node("Unsqueeze", ["y", axis], ["fedzo.label"]),
            new_node("GatherElements", ["fedzo.log_softmax", "fedzo.label"], ["fedzo.log_likelihood"], axis=1),
        ]
    )
    return "fedzo.log_likelihood", axis


class Float64Loss(GraphPass):
    """``logits`` -> ``loss_sum float64[]``, the sum over the batch of the cross-entropy with ``y int64[batch]``.

    A loss in float32 has steps of 2.4e-7, which a difference over a step of 1e-4 turns into an error of 1e-3. The
    tail is free: it touches one row of logits a sample. The sum, not the mean, makes micro-batches add up.
    """

    def requires(self, model: ModelProto) -> None:
        """The only output is ``logits``."""
        self.check([o.name for o in model.graph.output] == ["logits"], "the graph's output is not logits")
        self.check("y" not in input_names(model.graph), "the graph already has an input y")

    def ensures(self, model: ModelProto) -> None:
        """The only output is ``loss_sum``."""
        self.check([o.name for o in model.graph.output] == ["loss_sum"], "the graph's output is not loss_sum")

    def transform(self, model: ModelProto) -> bool:
        """Add the tail behind the logits."""
        graph = model.graph
        likelihoods, _ = add_log_likelihoods(graph)
        graph.node.extend(
            [
                new_node("ReduceSum", [likelihoods], ["fedzo.log_likelihood_sum"], keepdims=0),
                new_node("Neg", ["fedzo.log_likelihood_sum"], ["loss_sum"]),
            ]
        )
        del graph.output[:]
        graph.output.append(helper.make_tensor_value_info("loss_sum", TensorProto.DOUBLE, []))
        return True
