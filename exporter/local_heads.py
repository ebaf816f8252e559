"""Small linear heads that let the stages of a network learn from losses of their own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..protocol.artifact.layout import Initialiser, Layout, Parameter
from ..protocol.artifact.stages import StageHead
from ..protocol.errors import ConfigError
from .forward import he_normal
from .stages import StagePoint

__all__ = ["HEAD_INPUTS", "HeadPlan", "add_heads", "head_plan"]

HEAD_INPUTS = 512
"""A head reads at most so many numbers a sample, if pooling can do that."""


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """What lies between a stage's output and its head.

    Attributes:
        grid: Shape of one sample of the stage's output before it is made flat.
        kernel: Windows of the average pooling in front of the head; nothing for no pooling.
        n_inputs: Numbers that the head reads.
        n_classes: Numbers that it yields.
    """

    grid: tuple[int, ...]
    kernel: tuple[int, ...]
    n_inputs: int
    n_classes: int


def head_plan(grid: tuple[int, ...], n_classes: int) -> HeadPlan:
    """The smallest windows that leave at most :data:`HEAD_INPUTS` numbers; a remainder at the edge is dropped."""
    channels, *sizes = grid
    side = 0
    n_inputs, kernel = channels * math.prod(sizes), tuple(1 for _ in sizes)
    while n_inputs > HEAD_INPUTS and side < max(sizes, default=0):
        side += 1
        kernel = tuple(min(side, size) for size in sizes)
        n_inputs = channels * math.prod(size // k for size, k in zip(sizes, kernel, strict=True))
    return HeadPlan(grid, kernel if max(kernel, default=1) > 1 else (), n_inputs, n_classes)


def add_heads(layout: Layout, points: Sequence[StagePoint], n_classes: int) -> tuple[Layout, tuple[StagePoint, ...]]:
    """Heads for all stages but the last two, whose loss is the network's.

    Args:
        layout: The network's parameters.
        points: Its stages.
        n_classes: Number of logits.

    Returns:
        The layout with the heads' weights and biases at its end, which no mask removes, and the stages with heads.

    Raises:
        ConfigError: The network has no stages.
    """
    if not points:
        raise ConfigError(
            "local heads need a network that is one chain of convolutions and fully connected layers",
            hint="networks with shortcuts or normalisation have no stages; export without --local-heads",
        )
    parameters = list(layout.parameters)
    headed = []
    for point in points[:-2]:
        plan = head_plan(point.grid, n_classes)
        position, name = len(parameters), f"fedzo.head{point.stage.number}"
        parameters += [
            Parameter(f"{name}.weight", (n_classes, plan.n_inputs), False, he_normal(plan.n_inputs)),
            Parameter(f"{name}.bias", (n_classes,), False, Initialiser("constant", 0.0)),
        ]
        stage = dataclasses.replace(point.stage, head=StageHead(position, position + 1))
        headed.append(dataclasses.replace(point, stage=stage))
    return Layout(tuple(parameters)), (*headed, *points[-2:])
