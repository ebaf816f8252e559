"""Puts a head of its own behind a stage."""

from __future__ import annotations

import math

import numpy as np
from onnx import ModelProto, TensorProto, helper

from ..forward import BATCH
from ..local_heads import HeadPlan
from .editing import add_constant, input_names, new_node
from .infrastructure import GraphPass

__all__ = ["HEAD_PARAMETERS", "LocalHead"]

HEAD_PARAMETERS = ("fedzo.head.weight", "fedzo.head.bias")
"""Values that hold the head's dense tensors inside the graph."""


class LocalHead(GraphPass):
    """Adds ``logits float32[batch, n_classes]``, which a linear layer makes of a value's pooled entries.

    Its weight and bias are one input, ``head float32[n_classes * (n_inputs + 1)]``.

    Args:
        plan: Pooling and sizes.
        value: Name of the stage's output.
        pooled: Whether what enters the layer is an output too: ``pooled float32[batch, n_inputs]``.
    """

    def __init__(self, plan: HeadPlan, value: str, *, pooled: bool = False) -> None:
        self._plan, self._value, self._pooled = plan, value, pooled

    def requires(self, model: ModelProto) -> None:
        """The value is there and nothing is called ``logits``."""
        made = set(input_names(model.graph)) | {name for node in model.graph.node for name in node.output}
        self.check(self._value in made, f"the graph has no {self._value!r}")
        self.check("logits" not in made and "head" not in made, "the graph already has a head")

    def ensures(self, model: ModelProto) -> None:
        """``logits`` is an output."""
        self.check("logits" in [o.name for o in model.graph.output], "the graph has no output logits")

    def transform(self, model: ModelProto) -> bool:
        """Pool and add the layer."""
        graph, plan = model.graph, self._plan
        weight, bias = HEAD_PARAMETERS
        size = plan.n_classes * (plan.n_inputs + 1)
        graph.input.append(helper.make_tensor_value_info("head", TensorProto.FLOAT, [size]))
        parts = add_constant(graph, "fedzo.head.parts", np.array([size - plan.n_classes, plan.n_classes], np.int64))
        shape = add_constant(graph, "fedzo.head.shape", np.array([plan.n_classes, plan.n_inputs], np.int64))
        graph.node.append(new_node("Split", ["head", parts], ["fedzo.head.flat", bias], axis=0))
        graph.node.append(new_node("Reshape", ["fedzo.head.flat", shape], [weight]))
        value = self._value
        if plan.kernel:
            grid = add_constant(graph, "fedzo.head.grid", np.array([-1, *plan.grid], np.int64))
            graph.node.append(new_node("Reshape", [value, grid], ["fedzo.head.features"]))
            value = "fedzo.head.window"
            window = {"kernel_shape": list(plan.kernel), "strides": list(plan.kernel)}
            graph.node.append(new_node("AveragePool", ["fedzo.head.features"], [value], **window))
            self.check(math.prod(plan.grid) >= plan.n_inputs, "pooling cannot make more numbers")
        graph.node.append(new_node("Flatten", [value], ["pooled"], axis=1))
        graph.node.append(new_node("Gemm", ["pooled", weight, bias], ["logits"], transB=1))
        if self._pooled:
            graph.output.append(helper.make_tensor_value_info("pooled", TensorProto.FLOAT, [BATCH, plan.n_inputs]))
        graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, [BATCH, plan.n_classes]))
        return True
