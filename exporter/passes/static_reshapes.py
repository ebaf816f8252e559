"""Replaces computed reshape targets by constants, so that only the batch axis stays open."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import ModelProto

from .editing import add_constant, keep_live_nodes
from .infrastructure import GraphPass

__all__ = ["StaticReshapes"]


class StaticReshapes(GraphPass):
    """``Reshape(x, computed)`` -> ``Reshape(x, constant)``, and no more arithmetic on shapes at run time.

    Args:
        two: Shapes of all values for a batch of 2.
        three: The same for a batch of 3. The one axis that differs becomes -1; with more such axes, or none when the
            target is not constant, the node stays.
    """

    def __init__(self, two: Mapping[str, tuple[int, ...]], three: Mapping[str, tuple[int, ...]]) -> None:
        self._two = two
        self._three = three

    def transform(self, model: ModelProto) -> bool:
        """Replace the targets and remove what computed them."""
        graph = model.graph
        constants = {tensor.name for tensor in graph.initializer}
        changed = False
        for node in graph.node:
            if node.op_type != "Reshape" or node.input[1] in constants:
                continue
            two, three = self._two[node.output[0]], self._three[node.output[0]]
            if len(two) != len(three) or sum(a != b for a, b in zip(two, three, strict=True)) > 1 or 0 in two:
                continue
            target = [a if a == b else -1 for a, b in zip(two, three, strict=True)]
            node.input[1] = add_constant(graph, f"fedzo.target.{node.output[0]}", np.array(target, np.int64))
            changed = True
        return keep_live_nodes(graph) or changed
