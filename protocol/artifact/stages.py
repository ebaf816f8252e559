"""The layers of a network that is one chain, each with what follows it up to the next: its stages.

A stage is one convolution or fully connected layer and the activations, poolings and reshapes behind it. Its gradient
has a closed form in the operators of inference: given the gradient of a loss at the stage's output, the cotangent, a
graph yields that of its parameters. A stage may have a head of its own, one linear layer from its pooled output to the
classes, so that it can learn from a loss of its own (Nøkland and Eidnes, "Training neural networks with local error
signals", ICML 2019).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ArtifactError
from .layout import Layout

__all__ = [
    "MAX_STAGES",
    "Stage",
    "StageGraph",
    "StageHead",
    "check_stages",
    "is_stage_graph",
    "local_run_graphs",
    "local_stages",
    "model_layout",
    "stage_graph",
    "stage_graphs",
    "stages_from_json",
]

MAX_STAGES = 256
StageGraph = Literal["forward", "gradient", "local", "head"]
_GRAPH = re.compile(r"stage(0|[1-9][0-9]{0,2})(_gradient|_local|_head)?\.onnx")


def stage_graph(number: int, kind: StageGraph) -> str:
    """File name of a stage's graph.

    ``forward``: features to the features of the next stage. ``gradient``: features and cotangent to the gradient of
    the stage's parameters. ``local``: everything that learning from the stage's own loss needs. ``head``: output of the
    stage to its own loss.
    """
    return f"stage{number}{'' if kind == 'forward' else '_' + kind}.onnx"


def is_stage_graph(name: str) -> bool:
    """Whether a file may be the graph of a stage."""
    return _GRAPH.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class StageHead:
    """A linear layer from a stage's pooled output to the classes.

    Attributes:
        weight: Position of its weight in the layout, shape ``(n_classes, n_inputs)``.
        bias: Position of its bias, shape ``(n_classes,)``.
    """

    weight: int
    bias: int


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage.

    Attributes:
        number: From 0.
        first_parameter: Position of its first parameter in the layout.
        end_parameter: Position behind its last one.
        feature_shape: Shape of one sample of what enters it, without the batch axis.
        output_shape: Shape of one sample of what leaves it: the next stage's features, or the logits.
        multiply_accumulates: Of one sample, forward, without a head.
        head: Its own head; None if it has none.
    """

    number: int
    first_parameter: int
    end_parameter: int
    feature_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    multiply_accumulates: int
    head: StageHead | None = None

    def __post_init__(self) -> None:
        head = (self.head.weight, self.head.bias) if self.head else ()
        numbers = (self.number, self.first_parameter, self.end_parameter, self.multiply_accumulates, *head)
        if (
            any(type(n) is not int or not 0 <= n < 1 << 48 for n in (*numbers, *self.feature_shape, *self.output_shape))
            or self.first_parameter >= self.end_parameter
            or self.multiply_accumulates < 1
            or any(not 0 < math.prod(shape) <= 1 << 26 for shape in (self.feature_shape, self.output_shape))
        ):
            raise ArtifactError(f"the manifest has an impossible stage: {self}")

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        data = dataclasses.asdict(self)
        data |= {"feature_shape": list(self.feature_shape), "output_shape": list(self.output_shape)}
        if self.head is None:
            del data["head"]
        return data

    def layout(self, layout: Layout) -> Layout:
        """Its parameters, without those of the head."""
        return Layout(layout.parameters[self.first_parameter : self.end_parameter])

    def head_size(self, layout: Layout) -> int:
        """Entries of its head's weight and bias; 0 if it has none."""
        if self.head is None:
            return 0
        return sum(layout.parameters[p].size for p in (self.head.weight, self.head.bias))


def stages_from_json(raw: Any) -> tuple[Stage, ...]:
    """Inverse of :meth:`Stage.to_json` for a list; :func:`check_stages` compares them with a layout.

    Raises:
        ArtifactError: The data are no stages.
    """
    if not isinstance(raw, list) or len(raw) > MAX_STAGES:
        raise ArtifactError("the manifest's stages are no list, or too many")
    return tuple(_stage(entry) for entry in raw)


def _stage(raw: Any) -> Stage:
    try:
        if not isinstance(raw, Mapping):
            raise TypeError("no object")
        shapes = {name: tuple(raw[name]) for name in ("feature_shape", "output_shape")}
        head = StageHead(**raw["head"]) if "head" in raw else None
        return Stage(**{**raw, **shapes, "head": head})
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"the manifest has a malformed stage: {error!r}") from None


def check_stages(
    stages: Sequence[Stage], layout: Layout, input_shape: tuple[int, ...], n_classes: int, files: Collection[str]
) -> None:
    """Compare stages with the network that they are of.

    They follow each other without a gap, from the input to the logits. Heads belong to all stages but the last two, or
    to none; theirs are the last parameters of the layout, in order. Every stage has its graphs among ``files``.

    Raises:
        ArtifactError: They do not fit.
    """
    position, shape = 0, input_shape
    for number, stage in enumerate(stages):
        if (stage.number, stage.first_parameter, stage.feature_shape) != (number, position, shape):
            raise ArtifactError(f"stage {number} of the manifest does not follow the one before it")
        position, shape = stage.end_parameter, stage.output_shape
    if stages and shape != (n_classes,):
        raise ArtifactError("the manifest's last stage does not yield the logits")
    headed = [stage.head is not None for stage in stages]
    if any(headed) and headed != [True] * (len(stages) - 2) + [False] * 2:
        raise ArtifactError("the manifest's heads do not belong to all stages but the last two")
    for stage in stages:
        if stage.head is None:
            continue
        parameters = layout.parameters[position : position + 2]
        shapes = [p.shape for p in parameters]
        if (
            (stage.head.weight, stage.head.bias) != (position, position + 1)
            or len(shapes) != 2
            or len(shapes[0]) != 2
            or shapes[0][0] != n_classes
            or shapes[1] != (n_classes,)
            or any(p.maskable for p in parameters)
        ):
            raise ArtifactError(f"the head of stage {stage.number} does not match the manifest's layout")
        position += 2
    if stages and position != len(layout.parameters):
        raise ArtifactError("the manifest's stages do not hold every parameter")
    if not all(name in files for stage in stages for name in stage_graphs([stage], ("forward", "gradient"))):
        raise ArtifactError("the manifest has stages without their graphs")
    local = any(headed) or stage_graph(0, "local") in files
    if local and (not stages or any(headed) != (len(stages) > 2)):
        raise ArtifactError("the manifest has graphs of local losses and no stages with heads")
    if local and not all(name in files for noisy in (False, True) for name in local_run_graphs(stages, noisy=noisy)):
        raise ArtifactError("the manifest has local heads without their graphs")


def stage_graphs(stages: Sequence[Stage], kinds: Sequence[StageGraph]) -> tuple[str, ...]:
    """File names of the graphs of some kinds."""
    return tuple(stage_graph(stage.number, kind) for stage in stages for kind in kinds)


def local_run_graphs(stages: Sequence[Stage], *, noisy: bool) -> tuple[str, ...]:
    """File names of the graphs that learning from local losses needs: in closed form, or by node perturbation."""
    if not noisy:
        return stage_graphs(local_stages(stages), ("local",))
    hidden, last = stages[:-1], stages[-1:]
    return (*stage_graphs(hidden, ("forward", "head", "gradient")), *stage_graphs(last, ("forward", "gradient")))


def model_layout(layout: Layout, stages: Sequence[Stage]) -> Layout:
    """The parameters of the network alone, without those of heads."""
    if not any(stage.head for stage in stages):
        return layout
    return Layout(layout.parameters[: stages[-1].end_parameter])


def local_stages(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages that learn from a loss of their own: the last two as one, whose loss is the network's.

    The last layer serves the stage before it as a head, so that stage needs none of its own.
    """
    if len(stages) < 2:
        return tuple(stages)
    before, last = stages[-2:]
    merged = dataclasses.replace(
        before,
        end_parameter=last.end_parameter,
        output_shape=last.output_shape,
        multiply_accumulates=before.multiply_accumulates + last.multiply_accumulates,
    )
    return (*stages[:-2], merged)
