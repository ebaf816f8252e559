"""What stays in blocks, what does not, and that it changes no more than rounding."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto

from fedzo.edge_runtime.inference.variants import block_size
from fedzo.exporter.blocked_layout import BLOCKED_DOMAIN, optimised_by_runtime
from fedzo.exporter.blocked_rewrites import stay_blocked
from fedzo.exporter.forward import ForwardGraph, GraphBuilder, Tensor
from fedzo.exporter.graphs import build_graphs
from fedzo.exporter.passes.fold_weights import FoldWeights
from fedzo.protocol.artifact.layout import initial_weights

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="onnxruntime has blocked kernels on x86 only"
)


def head(graph: GraphBuilder, x: Tensor) -> ForwardGraph:
    return graph.finish(graph.linear("fc", graph.global_average_pool(x), 4, output="logits"))


def pooled(graph: GraphBuilder) -> ForwardGraph:
    h = graph.average_pool(graph.relu(graph.convolution("a", graph.x, 6, 3)))
    return head(graph, graph.relu(graph.convolution("b", h, 16, 3)))


def pooled_twice_read(graph: GraphBuilder) -> ForwardGraph:
    h = graph.relu(graph.convolution("a", graph.x, 6, 3))
    low = graph.average_pool(h)
    return graph.finish(
        Tensor(
            graph.node(
                "Add",
                [
                    graph.linear("fc", graph.flatten(h), 4).name,
                    graph.linear("fc2", graph.flatten(low), 4).name,
                ],
                "logits",
            ),
            (4,),
        )
    )


def residual(graph: GraphBuilder, channels: int = 16) -> ForwardGraph:
    def layer(name: str, x: Tensor) -> Tensor:
        return graph.group_normalisation(f"{name}.norm", graph.convolution(name, x, channels, 3, padding=1), 2)

    h = graph.relu(layer("a", graph.x))
    r = layer("c", graph.relu(layer("b", h)))
    h = graph.relu(graph.add(r, h, "sum"))
    return head(graph, graph.relu(layer("d", h)))


def odd_channels(graph: GraphBuilder) -> ForwardGraph:
    return residual(graph, 12)


def two_sums(graph: GraphBuilder) -> ForwardGraph:
    """One convolution can add one value; the second sum is a node of its own."""
    h = graph.relu(graph.group_normalisation("n", graph.convolution("a", graph.x, 32, 3, padding=1), 4))
    r = graph.group_normalisation("m", graph.convolution("b", h, 32, 3, padding=1), 4)
    r = graph.add(graph.add(r, h, "once"), h, "twice")
    return head(graph, graph.add(r, r, "doubled"))


def read_between(graph: GraphBuilder) -> ForwardGraph:
    """The sum is read before the rectifier too, so that the rectifier is a node of its own."""
    h = graph.group_normalisation("n", graph.convolution("a", graph.x, 16, 3, padding=1), 4)
    return head(graph, graph.add(graph.relu(h), h, "both"))


def loss(model: ModelProto, batch: int) -> float:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {"x": rng.normal(size=(batch, 2, 16, 16)).astype(np.float32), "y": rng.integers(0, 4, batch)}
    return float(session.run(None, feeds)[0])


@pytest.mark.parametrize(
    ("build", "counts"),
    [
        (pooled, {"AveragePool": 1, "ReorderOutput": 2}),
        (pooled_twice_read, {"ReorderOutput": 2}),
        # One convolution a layer and one a normalisation; nothing else touches whole images but the normalisation.
        (residual, {"Conv": 8, "Mul": 0, "Add": 0, "Relu": 0, "ReorderInput": 4, "ReorderOutput": 5}),
        (odd_channels, {"Conv": 4, "Mul": 4, "Add": 5, "Relu": 4}),
        (two_sums, {"Conv": 4, "Mul": 0, "Add": 2}),
        (read_between, {"Conv": 2, "Mul": 0, "Add": 1, "Relu": 1}),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_rewriting(build: Callable[[GraphBuilder], ForwardGraph], counts: dict[str, int], batch: int) -> None:
    built = build_graphs(build(GraphBuilder("net", (2, 16, 16))), 0.0)
    weights = initial_weights(built.layout, 0) + np.random.default_rng(1).normal(0, 0.1, built.layout.size)
    twin = FoldWeights(built.layout, weights.astype(np.float32))(built.graphs["probe.onnx"]).model
    optimised, _ = optimised_by_runtime(twin)
    rewritten = ModelProto()
    rewritten.CopyFrom(optimised)
    stay_blocked(rewritten, block_size())
    found = Counter(node.op_type for node in rewritten.graph.node)
    assert {op: found[op] for op in counts} == counts
    assert loss(rewritten, batch) == pytest.approx(loss(optimised, batch), rel=2e-6)
    assert loss(optimised, batch) == pytest.approx(loss(twin, batch), rel=2e-6)
    assert BLOCKED_DOMAIN in {node.domain for node in rewritten.graph.node}
