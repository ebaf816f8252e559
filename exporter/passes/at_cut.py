"""What the passes that keep one half of a cut network have in common."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import ModelProto

from .infrastructure import GraphPass

__all__ = ["AtCut"]


class AtCut(GraphPass):
    """A pass that is about the value that crosses a cut.

    Args:
        value: Name of that value in the forward graph.
        feature_shape: Its shape without the batch axis.
    """

    def __init__(self, value: str, feature_shape: Sequence[int]) -> None:
        self._value = value
        self._shape = tuple(feature_shape)

    def requires(self, model: ModelProto) -> None:
        """The graph computes the value."""
        made = {name for node in model.graph.node for name in node.output}
        self.check(self._value in made, f"the graph does not compute {self._value!r}")
