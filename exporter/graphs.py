"""From one forward graph to the graphs of an artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from ..protocol.artifact.cut import Cut
from ..protocol.artifact.dense_tail import DenseTail
from ..protocol.artifact.layout import Layout
from ..protocol.artifact.manifest import CUT_GRAPHS, TAIL_GRAPHS
from ..protocol.artifact.sections import Sections, section_graphs
from ..protocol.artifact.stages import Stage, model_layout
from ..protocol.errors import ConfigError
from .cuts import CutPoint, find_cut
from .dense_tails import TailPoint, find_dense_tail
from .forward import ForwardGraph
from .local_heads import add_heads
from .passes.float64_loss import Float64Loss
from .passes.infrastructure import GraphPass, Sequential
from .passes.input_moments import InputMoments
from .passes.keep_prefix import KeepPrefix
from .passes.keep_suffix import KeepSuffix
from .passes.layer_inputs import LayerInputs
from .passes.node_noise import NodeNoise
from .passes.sample_losses import SampleLosses
from .passes.scatter_survivors import ScatterSurvivors
from .passes.unit_shifts import UnitShifts
from .passes.weights_as_inputs import WeightsAsInputs
from .sections import section_layouts, section_passes
from .sessions import dense_feeds
from .stage_graphs import StageGraph, stage_graphs
from .stages import find_stages
from .units import UnitNode, find_units

__all__ = ["ArtifactGraphs", "build_graphs", "with_sections"]


@dataclass(frozen=True)
class ArtifactGraphs:
    """The graphs of an artifact before they are written.

    Attributes:
        layout: The parameters, marked maskable as the sparsity asks, and those of heads.
        units: The unit layers.
        graphs: Models by file name; ``saliency.onnx`` and ``moments.onnx`` are absent when there is no unit layer,
            ``prefix.onnx`` and ``suffix.onnx`` when there is no cut, ``tail.onnx`` when there is no dense tail, and
            ``body.onnx`` too when the tail begins at the cut.
        cut: Where prefix and suffix meet.
        tail: The fully connected layers at the end.
        stages: The layers of a network that is one chain; each has a graph ``stage{i}.onnx`` and one
            ``stage{i}_gradient.onnx``, and with heads one ``stage{i}_local.onnx`` and one ``stage{i}_head.onnx``.
        stage_inputs: What the stages' graphs take, by file name.
        sections: Where it is cut in several places.
        section_layouts: The parameters that the graphs of sections take, by file name.
    """

    layout: Layout
    units: tuple[UnitNode, ...]
    graphs: dict[str, ModelProto]
    cut: Cut | None
    tail: DenseTail | None
    stages: tuple[Stage, ...]
    stage_inputs: dict[str, StageGraph]
    sections: Sections | None = None
    section_layouts: Mapping[str, Layout] = field(default_factory=dict)

    @property
    def model_layout(self) -> Layout:
        """The parameters of the network alone."""
        return model_layout(self.layout, self.stages)

    def layout_of(self, name: str) -> Layout:
        """The parameters that graph ``name`` takes."""
        tail_cut = self.tail.cut if self.tail else None
        for cut, names in ((self.cut, CUT_GRAPHS), (tail_cut, TAIL_GRAPHS)):
            if cut is not None and name in names:
                return cut.split(self.layout)[names.index(name)]
        if name in self.section_layouts:
            return self.section_layouts[name]
        stage = self.stage_inputs.get(name)
        if stage is not None and stage.owner is not None:
            return stage.owner.layout(self.layout)
        return self.model_layout

    def zero_feeds(self, name: str, input_shape: tuple[int, ...], batch: int) -> dict[str, NDArray[np.generic]]:
        """A value for every input that graph ``name`` may have: zeros, and no mask."""
        layout = self.layout_of(name)
        feeds = dense_feeds(layout, np.zeros(layout.size, np.float32))
        feeds["x"] = np.zeros((batch, *input_shape), np.float32)
        feeds["y"] = np.zeros(batch, np.int64)
        feeds["shift"] = np.zeros(sum(unit.layer.n_units for unit in self.units), np.float32)
        if self.cut is not None:
            feeds["features"] = np.zeros((batch, *self.cut.feature_shape), np.float32)
        if self.tail is not None and name in TAIL_GRAPHS:
            feeds["features"] = np.zeros((batch, *self.tail.cut.feature_shape), np.float32)
            hidden = self.tail.shapes(self.layout)[:-1]
            feeds["noise"] = np.zeros((batch, sum(n_units for n_units, _ in hidden)), np.float32)
        if self.sections is not None and name in self.section_layouts:
            number = section_graphs(len(self.sections)).index(name) % len(self.sections.cuts)
            entering = self.sections.stage(number, input_shape)
            shape = entering.feature_shape if name.startswith("section") else entering.output_shape
            feeds["features"] = np.zeros((batch, *shape), np.float32)
        if (stage := self.stage_inputs.get(name)) is not None:
            feeds["features"] = np.zeros((batch, *stage.feature_shape), np.float32)
            feeds["cotangent"] = np.zeros((batch, *stage.output_shape), np.float32)
            feeds["head"] = np.zeros(stage.head_size, np.float32)
        return feeds


def build_graphs(forward: ForwardGraph, sparsity: float, *, local_heads: bool = False) -> ArtifactGraphs:
    """Run the passes.

    A parameter is maskable when it is the weight of a unit layer and ``sparsity`` is above 0: at 0 no graph has a
    scatter or an input ``index``.

    With heads there is neither cut nor dense tail: only estimators that work stage by stage train heads.

    Args:
        forward: The network.
        sparsity: Fraction of the prunable weights to remove.
        local_heads: Give the stages heads of their own.

    Raises:
        ConfigError: The sparsity is above 0 and no layer can be pruned, or a network without stages cannot have heads.
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
    whole = _weight_passes(layout)
    heads: dict[str, list[GraphPass]] = {"probe.onnx": [Float64Loss()], "predict.onnx": []}
    if units:
        heads |= {"saliency.onnx": [UnitShifts(units)], "moments.onnx": [InputMoments(units)]}
    passes = {name: [*head, *whole] for name, head in heads.items()}
    point, tail = find_cut(forward.model, layout, units), find_dense_tail(forward.model, layout, units)
    stages, n_classes = find_stages(forward.model, layout, units), _n_classes(forward)
    if local_heads:
        layout, stages = add_heads(layout, stages, n_classes)
        point = tail = None
    if point is not None:
        passes |= _cut_passes(point, layout)
    if tail is not None:
        passes |= _tail_passes(tail, layout)
        if point is not None and tail.tail.cut == point.cut:
            del passes["body.onnx"]
    of_stages = {graph.name: graph for graph in stage_graphs(stages, layout, n_classes, local=local_heads)}
    passes |= {name: list(graph.passes) for name, graph in of_stages.items()}
    graphs = {}
    for name, steps in passes.items():
        graphs[name] = Sequential(steps)(forward.model).model
        graphs[name].graph.name = name.removesuffix(".onnx")
    return ArtifactGraphs(
        layout,
        units,
        graphs,
        point.cut if point else None,
        tail.tail if tail else None,
        tuple(stage.stage for stage in stages),
        of_stages,
    )


def with_sections(
    built: ArtifactGraphs,
    forward: ForwardGraph,
    sections: Sections,
    points: Sequence[CutPoint],
    input_shape: tuple[int, ...],
) -> ArtifactGraphs:
    """The graphs of an artifact and those of its sections.

    Args:
        built: Without them.
        forward: The network.
        sections: Of the network.
        points: Where they meet.
        input_shape: Shape of one sample.
    """
    graphs = dict(built.graphs)
    for name, steps in section_passes(sections, points, built.layout, input_shape).items():
        graphs[name] = Sequential(steps)(forward.model).model
        graphs[name].graph.name = name.removesuffix(".onnx")
    layouts = section_layouts(sections, built.layout, input_shape)
    return replace(built, graphs=graphs, sections=sections, section_layouts=layouts)


def _n_classes(forward: ForwardGraph) -> int:
    return int(forward.model.graph.output[0].type.tensor_type.shape.dim[-1].dim_value)


def _weight_passes(layout: Layout) -> list[GraphPass]:
    return [WeightsAsInputs(layout), ScatterSurvivors(layout)]


def _cut_passes(point: CutPoint, layout: Layout) -> dict[str, list[GraphPass]]:
    """Each half takes its own part of the weights only."""
    front, behind = point.cut.split(layout)
    edge = (point.value, point.cut.feature_shape)
    return {
        "prefix.onnx": [KeepPrefix(*edge), *_weight_passes(front)],
        "suffix.onnx": [KeepSuffix(*edge), Float64Loss(), *_weight_passes(behind)],
    }


def _tail_passes(point: TailPoint, layout: Layout) -> dict[str, list[GraphPass]]:
    """The tail with noise on all layers but the last, whose gradient the logits give."""
    front, behind = point.tail.cut.split(layout)
    edge = (point.value, point.tail.cut.feature_shape)
    noisy: list[GraphPass] = []
    if len(point.units) > 1:
        sizes = [n_inputs for _, n_inputs in point.tail.shapes(layout)[1:]]
        noisy = [NodeNoise(point.units[:-1]), LayerInputs(point.units[1:], sizes)]
    return {
        "body.onnx": [KeepPrefix(*edge), *_weight_passes(front)],
        "tail.onnx": [KeepSuffix(*edge), *noisy, SampleLosses(), *_weight_passes(behind)],
    }
