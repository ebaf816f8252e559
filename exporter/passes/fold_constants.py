"""Computes once what does not depend on the inputs."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from .editing import keep_live_nodes, replace_nodes
from .infrastructure import GraphPass

__all__ = ["FoldConstants"]

_RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")
_SMALL_BYTES = 4096


class FoldConstants(GraphPass):
    """Replaces nodes that see only constants by their value, then removes what is no longer used.

    A node whose value is much larger than its inputs (an expanded zero tensor) stays: it is cheaper to compute than
    to store.
    """

    def transform(self, model: ModelProto) -> bool:
        """Evaluate and replace."""
        graph = model.graph
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        outputs = {value.name for value in graph.output}
        nodes: list[NodeProto] = []
        for node in graph.node:
            names = [name for name in node.input if name]
            foldable = node.op_type not in _RANDOM and len(node.output) == 1 and node.output[0] not in outputs
            if not foldable or any(name not in constants for name in names):
                nodes.append(node)
                continue
            value = self._value(model, node, {name: constants[name] for name in names})
            if value.nbytes > max(_SMALL_BYTES, 2 * sum(constants[name].nbytes for name in names)):
                nodes.append(node)
                continue
            constants[node.output[0]] = value
            graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
        changed = len(nodes) < len(graph.node)
        replace_nodes(graph, nodes)
        return keep_live_nodes(graph) or changed

    def _value(
        self, model: ModelProto, node: NodeProto, inputs: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
        values = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in inputs.items()
        ]
        graph = helper.make_graph([node], "fold", values, [helper.make_empty_tensor_value_info(node.output[0])])
        single = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
        (value,) = ReferenceEvaluator(single).run(None, dict(inputs))
        return np.ascontiguousarray(value).reshape(np.shape(value))
