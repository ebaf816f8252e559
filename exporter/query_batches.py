"""A probe graph that evaluates several queries in one run: the same samples under several sets of weights.

The first convolution reads the samples, which all queries share: it runs once with the filters of all queries, and so
do the rectifier and the pooling behind it. Then the channels are dealt out, and the rest of the network stands there
once a query. A small network gains because few filters leave most of a kernel's lanes idle; a large one would only
need more memory. Whether a device gains it finds out itself.

Grouped convolutions and batched products for the rest were tried for LeNet-5 on x86: slower than copies, since ONNX
Runtime has no blocked kernel for small groups.
"""

from __future__ import annotations

import logging
from typing import Final

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from ..protocol.artifact.layout import Layout
from ..protocol.artifact.query_layout import query_layout, query_name
from .cuts import multiply_accumulates
from .forward import BATCH, ForwardGraph, float_value, new_model
from .passes.editing import add_constant, attribute, new_node
from .units import find_units

__all__ = ["QUERIES", "batch_queries"]

QUERIES: Final = 4
"""Measured for LeNet-5 with batches of 8 and 32: 2, 4 and 8 gain alike, 16 less; memory grows with it."""

LEAST_SHARE: Final = 0.1
"""Least share of the first convolution in the multiplications of the network."""

_BY_CHANNEL: Final = frozenset({"Relu", "LeakyRelu", "Elu", "Selu", "Sigmoid", "Tanh", "Softplus", "Softsign"})
_POOLS: Final = frozenset({"AveragePool", "MaxPool"})

logger = logging.getLogger(__name__)


def batch_queries(forward: ForwardGraph, layout: Layout, queries: int = QUERIES) -> tuple[ModelProto, Layout] | None:
    """Make the graph.

    Args:
        forward: The network.
        layout: Its parameters.
        queries: Networks in one run.

    Returns:
        A graph with one input a tensor of the layout beside it, ``x`` and ``y``, whose ``loss_sum float64[queries]``
        are the sums that the probe graph gives for each query. None if the network does not begin with a convolution
        of at least a tenth of its work.
    """
    trunk = _trunk(forward)
    if trunk is None or not _pays(forward, trunk[0]):
        logger.info("no graph for several queries: the first convolution is no large part of the network")
        return None
    graph = forward.model.graph
    joint = [name for name in trunk[0].input[1:] if name]
    tensors = query_layout(layout, queries, joint)
    private = {p.name for p in layout.parameters if p.name not in joint}
    private |= {name for node in graph.node if not _is_in(node, trunk) for name in node.output}
    nodes = [_copy(node) for node in trunk]
    end = trunk[-1].output[0]
    parts = [query_name(end, k) for k in range(queries)]
    nodes.append(new_node("Split", [end], parts, axis=1))
    for query in range(queries):
        for node in graph.node:
            if _is_in(node, trunk):
                continue
            copy = _copy(node)
            for names in (copy.input, copy.output):
                for position, name in enumerate(names):
                    names[position] = query_name(name, query) if name in private or name == end else name
            copy.name = copy.output[0]
            nodes.append(copy)
    inputs = [value for value in graph.input if value.name == "x"]
    inputs += [float_value(p.name, p.shape) for p in tensors.parameters]
    inputs.append(helper.make_tensor_value_info("y", TensorProto.INT64, [BATCH]))
    outputs = [helper.make_tensor_value_info("loss_sum", TensorProto.DOUBLE, [queries])]
    made = helper.make_graph(nodes, "probe", inputs, outputs, list(graph.initializer))
    _add_losses(made, queries)
    return new_model(made), tensors


def _trunk(forward: ForwardGraph) -> list[NodeProto] | None:
    """What all queries share: the convolution that reads ``x``, and what handles each channel by itself after it."""
    graph = forward.model.graph
    outputs = {value.name for value in graph.output}
    parameters = {p.name for p in forward.layout.parameters}

    def only_reader(name: str) -> NodeProto | None:
        readers = [node for node in graph.node if name in node.input]
        return readers[0] if len(readers) == 1 and name not in outputs else None

    node = only_reader("x")
    if node is None or node.op_type != "Conv" or node.input[0] != "x" or attribute(node, "group", 1) != 1:
        return None
    if any(name not in parameters or only_reader(name) is None for name in node.input[1:] if name):
        return None  # a frozen or tied tensor
    trunk = [node]
    while True:
        following = only_reader(trunk[-1].output[0])
        if following is None or following.op_type not in _BY_CHANNEL | _POOLS or len(following.output) > 1:
            break
        trunk.append(following)
    return trunk if trunk[-1].output[0] not in outputs else None


def _pays(forward: ForwardGraph, convolution: NodeProto) -> bool:
    work = {
        unit.output: multiply_accumulates(unit, forward.layout) for unit in find_units(forward.model, forward.layout)
    }
    return work.get(convolution.output[0], 0) >= LEAST_SHARE * sum(work.values())


def _add_losses(graph: GraphProto, queries: int) -> None:
    """:class:`~.passes.float64_loss.Float64Loss` for the logits of all queries, one below the other."""
    rows = add_constant(graph, "fedzo.query_rows", np.array([queries, -1], np.int64))
    tiles = add_constant(graph, "fedzo.query_tiles", np.array([queries, 1], np.int64))
    column = add_constant(graph, "fedzo.label_column", np.array([-1, 1], np.int64))
    line = add_constant(graph, "fedzo.label_line", np.array([1, -1], np.int64))
    axis = add_constant(graph, "fedzo.axis1", np.array([1], np.int64))
    graph.node.extend(
        [
            new_node("Concat", [query_name("logits", k) for k in range(queries)], ["fedzo.all_logits"], axis=0),
            new_node("Cast", ["fedzo.all_logits"], ["fedzo.logits64"], to=TensorProto.DOUBLE),
            new_node("LogSoftmax", ["fedzo.logits64"], ["fedzo.log_softmax"], axis=1),
            new_node("Reshape", ["y", line], ["fedzo.label_row"]),
            new_node("Tile", ["fedzo.label_row", tiles], ["fedzo.label_rows"]),
            new_node("Reshape", ["fedzo.label_rows", column], ["fedzo.label"]),
            new_node("GatherElements", ["fedzo.log_softmax", "fedzo.label"], ["fedzo.log_likelihood"], axis=1),
            new_node("Reshape", ["fedzo.log_likelihood", rows], ["fedzo.log_likelihood_rows"]),
            new_node("ReduceSum", ["fedzo.log_likelihood_rows", axis], ["fedzo.log_likelihood_sum"], keepdims=0),
            new_node("Neg", ["fedzo.log_likelihood_sum"], ["loss_sum"]),
        ]
    )


def _copy(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy


def _is_in(node: NodeProto, nodes: list[NodeProto]) -> bool:
    return any(node.output[0] == other.output[0] for other in nodes)
