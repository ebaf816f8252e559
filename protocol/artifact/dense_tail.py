"""The fully connected layers at the end of a network, as node perturbation sees them.

Behind the tail's cut there is nothing trainable but the weights and biases of these layers. Noise on their
pre-activations and their inputs are all that an estimate of their gradient needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ArtifactError
from .cut import Cut
from .layout import Layout

__all__ = ["DenseLayer", "DenseTail"]


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """One fully connected layer, ``input @ weight.T + bias``.

    Attributes:
        weight: Position of its weight in the layout, shape ``(n_units, n_inputs)``.
        bias: Position of its bias, shape ``(n_units,)``; None if it has none.
    """

    weight: int
    bias: int | None


@dataclass(frozen=True, slots=True)
class DenseTail:
    """The layers, first to last; the last one yields the logits.

    Attributes:
        cut: Where the tail begins; its features are a row of numbers a sample.
        layers: At least one.
    """

    cut: Cut
    layers: tuple[DenseLayer, ...]

    def __post_init__(self) -> None:
        if not self.layers or len(self.cut.feature_shape) != 1:
            raise ArtifactError("the manifest has an impossible dense tail")

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"cut": self.cut.to_json(), "layers": [[layer.weight, layer.bias] for layer in self.layers]}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> DenseTail:
        """Inverse of :meth:`to_json`; positions are checked by :meth:`shapes`.

        Raises:
            ArtifactError: The data are no dense tail.
        """
        try:
            layers = tuple(DenseLayer(weight, bias) for weight, bias in raw["layers"])
            return cls(Cut.from_json(raw["cut"]), layers)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"the manifest has a malformed dense tail: {error!r}") from None

    def shapes(self, layout: Layout) -> tuple[tuple[int, int], ...]:
        """``(n_units, n_inputs)`` of every layer.

        Raises:
            ArtifactError: The tail does not belong to ``layout``.
        """
        shapes = []
        positions: list[int] = []
        try:
            for layer in self.layers:
                if any(type(p) is not int or p < 0 for p in (layer.weight, layer.bias or 0)):
                    raise ValueError("a position is no number")
                units, inputs = layout.parameters[layer.weight].shape
                positions.append(layer.weight)
                if layer.bias is not None:
                    positions.append(layer.bias)
                    if layout.parameters[layer.bias].shape != (units,):
                        raise ValueError("a bias has another length than its layer")
                shapes.append((units, inputs))
        except (ValueError, IndexError) as error:
            raise ArtifactError(f"the manifest's dense tail does not match its layout: {error}") from None
        if sorted(positions) != list(range(self.cut.first_parameter, len(layout.parameters))):
            raise ArtifactError("the manifest's dense tail does not hold every parameter behind its cut")
        return tuple(shapes)
