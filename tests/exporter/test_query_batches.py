"""The graph for several queries: its losses are those of single queries, and it is made only where it can pay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

from fedzo.exporter.forward import ForwardGraph, GraphBuilder, Tensor
from fedzo.exporter.graphs import build_graphs
from fedzo.exporter.models.registry import build_forward
from fedzo.exporter.query_batches import batch_queries
from fedzo.exporter.sessions import dense_feeds, run_graph
from fedzo.protocol.artifact.query_layout import query_layout, query_name

SHAPE = (2, 12, 12)


def branches(graph: GraphBuilder) -> ForwardGraph:
    """The value behind the shared part is read twice."""
    h = graph.relu(graph.convolution("a", graph.x, 5, 3, padding=1))
    r = graph.convolution("b", h, 5, 3, padding=1)
    return graph.finish(graph.linear("fc", graph.global_average_pool(graph.add(h, r, "sum")), 4, output="logits"))


def normalised(graph: GraphBuilder) -> ForwardGraph:
    h = graph.group_normalisation("n", graph.convolution("a", graph.x, 8, 3, bias=False), 2)
    return graph.finish(graph.linear("fc", graph.flatten(graph.average_pool(graph.relu(h))), 4, output="logits"))


def read_twice(graph: GraphBuilder) -> ForwardGraph:
    a = graph.global_average_pool(graph.convolution("a", graph.x, 4, 3))
    b = graph.global_average_pool(graph.convolution("b", graph.x, 4, 3))
    return graph.finish(graph.linear("fc", graph.add(a, b, "sum"), 4, output="logits"))


def dense(graph: GraphBuilder) -> ForwardGraph:
    return graph.finish(graph.linear("fc", graph.flatten(graph.x), 4, output="logits"))


def logits_at_once(graph: GraphBuilder) -> ForwardGraph:
    h = graph.convolution("a", graph.x, 4, 12)
    return graph.finish(Tensor(graph.node("Flatten", [h.name], "logits", axis=1), (4,)))


def lenet5(_: GraphBuilder) -> ForwardGraph:
    return build_forward("lenet5", (1, 32, 32), 4, 0)


def cnn1d(_: GraphBuilder) -> ForwardGraph:
    return build_forward("cnn1d", (6, 64), 4, 0)


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("queries", [2, 4])
@pytest.mark.parametrize("build", [lenet5, cnn1d, branches, normalised, logits_at_once])
def test_losses(build: Callable[[GraphBuilder], ForwardGraph], queries: int, batch: int) -> None:
    forward = build(GraphBuilder("net", SHAPE))
    built = build_graphs(forward, 0.0)
    made = batch_queries(forward, built.layout, queries)
    assert made is not None
    model, tensors = made
    rng = np.random.default_rng(0)
    shape = [d.dim_value for d in forward.model.graph.input[0].type.tensor_type.shape.dim[1:]]
    x, y = rng.normal(size=(batch, *shape)).astype(np.float32), rng.integers(0, 4, batch)
    weights = rng.normal(0, 0.3, (queries, built.layout.size)).astype(np.float32)
    probe = built.graphs["probe.onnx"]
    expected = [float(run_graph(probe, {**dense_feeds(built.layout, w), "x": x, "y": y})["loss_sum"]) for w in weights]
    feeds: dict[str, Any] = {"x": x, "y": y}
    names = {tensor.name: tensor for tensor in tensors.parameters}
    for position, parameter in enumerate(built.layout.parameters):
        parts = [w[built.layout.slice_of(position)].reshape(parameter.shape) for w in weights]
        if parameter.name in names:
            feeds[parameter.name] = np.concatenate(parts)
        else:
            feeds |= {query_name(parameter.name, k): part for k, part in enumerate(parts)}
    assert {name: value.shape for name, value in feeds.items() if name in names} == {
        name: tensor.shape for name, tensor in names.items()
    }
    found = plain(model, feeds)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def plain(model: ModelProto, feeds: dict[str, Any]) -> NDArray[np.float64]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


@pytest.mark.parametrize("build", [read_twice, dense, lambda _: build_forward("resnet20", (3, 32, 32), 4, 0)])
def test_no_graph(build: Callable[[GraphBuilder], ForwardGraph]) -> None:
    """The samples are read by two layers or none, or the first is a small part."""
    forward = build(GraphBuilder("net", SHAPE))
    assert batch_queries(forward, build_graphs(forward, 0.0).layout) is None


def test_layout_of_one_query_is_the_layout() -> None:
    layout = build_forward("lenet5", (1, 32, 32), 10, 0).layout
    assert query_layout(layout, 1, {"conv1.weight"}) is layout
    four = query_layout(layout, 4, {"conv1.weight"})
    assert four.size == 4 * layout.size
    assert four.parameters[0].shape == (24, 1, 5, 5)
    assert [p.name for p in four.parameters[1:5]] == [f"conv1.bias.query{k}" for k in range(4)]
