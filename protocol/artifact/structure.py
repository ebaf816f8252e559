"""What structured pruning removed from a model before it was exported, as the manifest records it.

The smaller network is an ordinary artifact: layout, graphs and initial weights are its own, drawn from the seed with
its own fan-in. This record is for people and for `fedzo plan`; no arithmetic depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import ArtifactError
from .graph_files import GraphMemory
from .layout import Layout, Parameter

__all__ = ["ChannelScores", "NarrowedLayer", "Structure"]

ChannelScores = Literal["uniform", "diagonal", "magnitude", "random"]
_MAX_NUMBER = 1 << 48


@dataclass(frozen=True, slots=True)
class NarrowedLayer:
    """One unit layer before and after.

    Attributes:
        parameter: Its weight.
        n_units: Its units or channels in the whole network.
        groups: Groups of a convolution in the whole network.
        kept: Which of its units stayed, ascending.
    """

    parameter: str
    n_units: int
    groups: int
    kept: tuple[int, ...]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip((-1, *self.kept), (*self.kept, self.n_units), strict=True))
        if not self.kept or not ascending or not 0 < self.groups <= self.n_units < _MAX_NUMBER:
            raise ArtifactError(f"the manifest keeps impossible units of {self.parameter!r}")


@dataclass(frozen=True, slots=True)
class Structure:
    """The whole network that the artifact's is a part of.

    Attributes:
        scores: How channels were ranked; ``uniform`` keeps the same fraction of every layer.
        keep: Fraction of the channels to keep that was asked for, ``0 < keep < 1``.
        layers: Every unit layer, in the order of the manifest's ``units``.
        shapes: Shapes of the whole network's parameters, in the order of the layout.
        memory: Live sets of its graphs for training and scoring.
        graph_bytes: Their sizes as files, by name.
        multiply_accumulates: Of its unit layers, for one sample.
    """

    scores: ChannelScores
    keep: float
    layers: tuple[NarrowedLayer, ...]
    shapes: tuple[tuple[int, ...], ...]
    memory: tuple[GraphMemory, ...]
    graph_bytes: Mapping[str, int]
    multiply_accumulates: int

    def __post_init__(self) -> None:
        if self.scores not in get_args(ChannelScores):
            raise ArtifactError(f"the manifest ranks channels by {self.scores!r}")
        if not 0.0 < self.keep < 1.0:
            raise ArtifactError(f"the manifest keeps the fraction {self.keep} of the channels")
        planned = {memory.name for memory in self.memory}
        if planned != set(self.graph_bytes) or not planned.issuperset(("probe.onnx", "predict.onnx")):
            raise ArtifactError("the manifest's whole network lacks a graph or the memory plan of one")

    def check(self, layout: Layout, units: Mapping[str, int]) -> None:
        """Compare with the artifact's own network.

        Args:
            layout: The artifact's.
            units: Units of each of its layers, by parameter, in order.

        Raises:
            ArtifactError: The record is not one of this network.
        """
        own = {layer.parameter: len(layer.kept) for layer in self.layers}
        shapes = {p.name: s for p, s in zip(layout.parameters, self.shapes, strict=False)}
        if (
            list(own.items()) != list(units.items())
            or len(self.shapes) != len(layout.parameters)
            or any(
                len(p.shape) != len(whole) or any(n > m for n, m in zip(p.shape, whole, strict=False))
                for p, whole in zip(layout.parameters, self.shapes, strict=False)
            )
            or any(shapes[layer.parameter][0] != layer.n_units for layer in self.layers)
        ):
            raise ArtifactError("the manifest's record of removed channels does not match its layout")

    def whole_layout(self, layout: Layout) -> Layout:
        """The whole network's parameters; ``layout`` is the artifact's."""
        pairs = zip(layout.parameters, self.shapes, strict=True)
        return Layout(tuple(Parameter(p.name, shape, p.maskable, p.initialiser) for p, shape in pairs))

    @property
    def parameters(self) -> int:
        """Trainable entries of the whole network."""
        return sum(math.prod(shape) for shape in self.shapes)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "scores": self.scores,
            "keep": self.keep,
            "layers": [
                {"parameter": x.parameter, "n_units": x.n_units, "groups": x.groups, "kept": list(x.kept)}
                for x in self.layers
            ],
            "shapes": [list(shape) for shape in self.shapes],
            "memory": {m.name: m.to_json() for m in self.memory},
            "graph_bytes": dict(self.graph_bytes),
            "multiply_accumulates": self.multiply_accumulates,
        }

    @classmethod
    def from_json(cls, raw: object) -> Structure:
        """Inverse of :meth:`to_json`; checks every field.

        Raises:
            ArtifactError: A field is missing or impossible.
        """
        try:
            return _structure(raw)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ArtifactError(f"the manifest has a malformed record of removed channels: {error!r}") from None


def _structure(raw: Any) -> Structure:
    keep = raw["keep"]
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise TypeError(f"{keep!r} is not a number")
    return Structure(
        _text(raw["scores"]),  # type: ignore[arg-type]  # checked by the class
        float(keep),
        tuple(
            NarrowedLayer(
                _text(x["parameter"]), _count(x["n_units"]), _count(x["groups"]), tuple(map(_count, x["kept"]))
            )
            for x in raw["layers"]
        ),
        tuple(tuple(max(1, _count(n)) for n in shape) for shape in raw["shapes"]),
        tuple(GraphMemory.from_json(_text(name), plan) for name, plan in raw["memory"].items() if plan),
        {_text(name): _count(size) for name, size in raw["graph_bytes"].items()},
        _count(raw["multiply_accumulates"]),
    )


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MAX_NUMBER:
        raise ValueError(f"{value!r} is no count")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > 256:
        raise TypeError("a text is missing or too long")
    return value
