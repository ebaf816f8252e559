"""From one forward graph to the graphs of an artifact."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from ..protocol.errors import ConfigError
from ..protocol.layout import Layout
from .forward import ForwardGraph
from .passes.float64_loss import Float64Loss
from .passes.infrastructure import GraphPass, Sequential
from .passes.input_moments import InputMoments
from .passes.scatter_survivors import ScatterSurvivors
from .passes.unit_shifts import UnitShifts
from .passes.weights_as_inputs import WeightsAsInputs
from .sessions import dense_feeds
from .units import UnitNode, find_units

__all__ = ["ArtifactGraphs", "build_graphs", "zero_feeds"]


@dataclass(frozen=True)
class ArtifactGraphs:
    """The graphs of an artifact before they are written.

    Attributes:
        layout: The parameters, marked maskable as the sparsity asks.
        units: The unit layers.
        graphs: Models by file name; ``saliency.onnx`` and ``moments.onnx`` are absent when there is no unit layer.
    """

    layout: Layout
    units: tuple[UnitNode, ...]
    graphs: dict[str, ModelProto]


def build_graphs(forward: ForwardGraph, sparsity: float) -> ArtifactGraphs:
    """Run the passes.

    A parameter is maskable when it is the weight of a unit layer and ``sparsity`` is above 0: at 0 no graph has a
    scatter or an input ``index``.

    Raises:
        ConfigError: The sparsity is above 0 and no layer can be pruned.
        PassError: A pass's condition does not hold; a defect of the exporter.
    """
    units = find_units(forward.model, forward.layout)
    prunable = {unit.layer.parameter for unit in units} if sparsity > 0.0 else set()
    if sparsity > 0.0 and not prunable:
        raise ConfigError(
            f"sparsity is {sparsity}, but no layer of the model can be pruned",
            hint="pruning needs Conv or Linear layers whose weight is used once; export with sparsity 0",
        )
    layout = Layout(tuple(replace(p, maskable=p.name in prunable) for p in forward.layout.parameters))
    tails: list[GraphPass] = [WeightsAsInputs(layout), ScatterSurvivors(layout)]
    heads: dict[str, list[GraphPass]] = {"probe.onnx": [Float64Loss()], "predict.onnx": []}
    if units:
        heads |= {"saliency.onnx": [UnitShifts(units)], "moments.onnx": [InputMoments(units)]}
    graphs = {}
    for name, head in heads.items():
        graphs[name] = Sequential([*head, *tails])(forward.model).model
        graphs[name].graph.name = name.removesuffix(".onnx")
    return ArtifactGraphs(layout, units, graphs)


def zero_feeds(
    layout: Layout, units: tuple[UnitNode, ...], input_shape: tuple[int, ...], batch: int
) -> dict[str, NDArray[np.generic]]:
    """A value for every input that one of the graphs may have: zeros, and no mask."""
    feeds = dense_feeds(layout, np.zeros(layout.size, np.float32))
    feeds["x"] = np.zeros((batch, *input_shape), np.float32)
    feeds["y"] = np.zeros(batch, np.int64)
    feeds["shift"] = np.zeros(sum(unit.layer.n_units for unit in units), np.float32)
    return feeds
