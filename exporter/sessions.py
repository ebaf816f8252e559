"""Runs graphs on the exporting machine, the way a board runs them: one thread, no rewriting at load time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, ValueInfoProto

from ..protocol.artifact.layout import Layout
from ..protocol.errors import ConfigError

__all__ = ["dense_feeds", "open_graph", "run_every_value", "run_graph"]

Feeds = Mapping[str, NDArray[np.generic]]


def dense_feeds(layout: Layout, weights: NDArray[np.float32]) -> dict[str, NDArray[np.generic]]:
    """Feeds ``w``, ``index`` and ``counts`` of a network without a mask.

    Args:
        layout: The parameters.
        weights: ``float32[layout.size]``; not copied.
    """
    sizes = [p.size for p in layout.parameters]
    index = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])
    return {"w": weights, "index": index, "counts": np.array(sizes, np.int64)}


def open_graph(model: ModelProto | bytes, *, optimised: bool = False) -> Callable[[Feeds], dict[str, NDArray[Any]]]:
    """Load a graph on the CPU; what is returned runs it and yields its outputs by name, owned by the caller.

    Args:
        model: The graph, or its bytes.
        optimised: Let onnxruntime rewrite the graph as it does by default.

    Raises:
        ConfigError: onnxruntime cannot load the graph, or later cannot run it.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read once, when the library is loaded
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimised else level.ORT_DISABLE_ALL
    data = model if isinstance(model, bytes) else model.SerializeToString()
    state = onnxruntime.capi.onnxruntime_pybind11_state
    own = (state.Fail, state.InvalidArgument, state.InvalidGraph, state.NotImplemented, state.RuntimeException)
    failures = (RuntimeError, ValueError, *own)

    def refused(error: Exception) -> ConfigError:
        text = str(error).splitlines()[0]
        return ConfigError(
            f"onnxruntime {onnxruntime.__version__} cannot run the graph: {text}",
            hint="map any number to an index, such as x.long().clamp(0, n - 1): inputs may be normal numbers"
            if "out of data bounds" in text
            else "the model uses an operator or a shape that the board runtime lacks",
        )

    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except failures as error:
        raise refused(error) from error
    names = [output.name for output in session.get_outputs()]
    inputs = [value.name for value in session.get_inputs()]

    def run(feeds: Feeds) -> dict[str, NDArray[Any]]:
        try:
            return dict(zip(names, session.run(names, {name: feeds[name] for name in inputs}), strict=True))
        except failures as error:
            raise refused(error) from error

    return run


def run_graph(model: ModelProto | bytes, feeds: Feeds, *, optimised: bool = False) -> dict[str, NDArray[Any]]:
    """Run a graph once on the CPU.

    Args:
        model: The graph, or its bytes.
        feeds: A value for every input; further entries are left out.
        optimised: Let onnxruntime rewrite the graph as it does by default.

    Returns:
        The outputs by name, owned by the caller.

    Raises:
        ConfigError: onnxruntime cannot load or run the graph.
    """
    return open_graph(model, optimised=optimised)(feeds)


def run_every_value(model: ModelProto, feeds: Feeds) -> dict[str, NDArray[Any]]:
    """Run a graph once and return every value that it computes, by name."""
    copy = ModelProto()
    copy.CopyFrom(model)
    outputs = {value.name for value in copy.graph.output}
    for node in copy.graph.node:
        copy.graph.output.extend(ValueInfoProto(name=name) for name in node.output if name and name not in outputs)
    return run_graph(copy, feeds)
