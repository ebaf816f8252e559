"""The graphs of a network's stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..protocol.artifact.layout import Layout
from ..protocol.artifact.stages import Stage, local_stages, stage_graph
from .local_heads import head_plan
from .passes.infrastructure import GraphPass
from .passes.keep_stage import KeepStage
from .passes.local_gradient import LocalGradient
from .passes.local_head import LocalHead
from .passes.lone_features import LoneFeatures
from .passes.sample_losses import SampleLosses
from .passes.scatter_survivors import ScatterSurvivors
from .passes.stage_gradient import StageGradient
from .passes.weights_as_inputs import WeightsAsInputs
from .stages import StagePoint

__all__ = ["StageGraph", "stage_graphs"]


@dataclass(frozen=True)
class StageGraph:
    """One graph to be made.

    Attributes:
        name: File name.
        owner: Whose parameters it takes; None for those of a head alone.
        feature_shape: Of one sample of its input ``features``.
        output_shape: Of one sample of its input ``cotangent``, if it has that.
        head_size: Length of its input ``head``; 0 if it has none.
        passes: What makes it of the forward graph.
    """

    name: str
    owner: Stage | None
    feature_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    head_size: int
    passes: tuple[GraphPass, ...]


def stage_graphs(points: Sequence[StagePoint], layout: Layout, n_classes: int, *, local: bool) -> Iterator[StageGraph]:
    """The graphs of every stage.

    Args:
        points: The stages.
        layout: All parameters, those of heads included.
        n_classes: Number of logits.
        local: Whether stages learn from losses of their own.
    """
    for point in points:
        stage = point.stage
        keep = KeepStage(point.value, stage.feature_shape, point.output, stage.output_shape)
        gradient = StageGradient(stage.layout(layout), stage.output_shape)
        yield _of_stage(stage_graph(stage.number, "forward"), stage, layout, keep)
        yield _of_stage(stage_graph(stage.number, "gradient"), stage, layout, keep, gradient)
    if not local:
        return
    for stage in local_stages([point.stage for point in points]):
        point, size = points[stage.number], stage.head_size(layout)
        gradient_of = LocalGradient(stage.layout(layout))
        name = stage_graph(stage.number, "local")
        if stage.head is not None:
            keep = KeepStage(point.value, stage.feature_shape, point.output, stage.output_shape)
            plan = head_plan(point.grid, n_classes)
            steps = (keep, LocalHead(plan, "next_features"), SampleLosses(), gradient_of)
            yield _of_stage(name, stage, layout, *steps, head_size=size)
            lone = (LoneFeatures(stage.output_shape), LocalHead(plan, "features", pooled=True), SampleLosses())
            yield StageGraph(stage_graph(stage.number, "head"), None, stage.output_shape, (), size, lone)
            continue
        last = points[-1]
        keep = KeepStage(point.value, stage.feature_shape, last.output, stage.output_shape, "logits")
        yield _of_stage(name, stage, layout, keep, SampleLosses(), gradient_of)
        if len(points) == 1:
            continue  # its gradient needs no noise
        keep = KeepStage(last.value, last.stage.feature_shape, last.output, last.stage.output_shape, "logits")
        yield _of_stage(stage_graph(stage.number, "head"), last.stage, layout, keep, SampleLosses())


def _of_stage(name: str, stage: Stage, layout: Layout, *steps: GraphPass, head_size: int = 0) -> StageGraph:
    own = stage.layout(layout)
    passes = (*steps, WeightsAsInputs(own), ScatterSurvivors(own))
    return StageGraph(name, stage, stage.feature_shape, stage.output_shape, head_size, passes)
