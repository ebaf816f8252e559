"""Where a network is cut in two, so that probes of the later layers start from stored activations.

Everything after the cut depends on the input only through one tensor, the features. A direction that moves parameters
behind the cut alone changes no feature: one pass through the layers before it serves many such probes, as in the
feature reuse of DeepZero (Chen et al., arXiv 2310.02025, section 4).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ArtifactError
from .layout import Layout

__all__ = ["Cut"]


@dataclass(frozen=True, slots=True)
class Cut:
    """One cut through the graph and through the flat vector.

    Attributes:
        first_parameter: Parameters from this position of the layout on act behind the cut only, those before it in
            front of the cut only; so the survivors behind the cut are the end of the weight vector.
        feature_shape: Shape of one sample's features, without the batch axis.
        prefix_multiply_accumulates: Of one sample, in front of the cut.
        suffix_multiply_accumulates: Of one sample, behind it.
    """

    first_parameter: int
    feature_shape: tuple[int, ...]
    prefix_multiply_accumulates: int
    suffix_multiply_accumulates: int

    def __post_init__(self) -> None:
        numbers = (*self.feature_shape, *dataclasses.astuple(self)[:1], *dataclasses.astuple(self)[2:])
        if (
            any(type(n) is not int or n >= 1 << 48 for n in numbers)
            or self.first_parameter < 1
            or any(n < 1 for n in self.feature_shape)
            or not 0 < math.prod(self.feature_shape) <= 1 << 26
            or self.prefix_multiply_accumulates < 1
            or self.suffix_multiply_accumulates < 0
        ):
            raise ArtifactError(f"the manifest has an impossible cut: {self}")

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**dataclasses.asdict(self), "feature_shape": list(self.feature_shape)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Cut:
        """Inverse of :meth:`to_json`.

        Raises:
            ArtifactError: A number is missing or impossible.
        """
        try:
            return cls(**{**raw, "feature_shape": tuple(raw["feature_shape"])})
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"the manifest has a malformed cut: {error!r}") from None

    @property
    def suffix_share(self) -> float:
        """Cost of a probe from stored features over the cost of a whole one, by multiply-accumulates."""
        return self.suffix_multiply_accumulates / (self.prefix_multiply_accumulates + self.suffix_multiply_accumulates)

    def split(self, layout: Layout) -> tuple[Layout, Layout]:
        """The parameters in front of the cut and those behind it.

        Raises:
            ArtifactError: The cut is not inside ``layout``.
        """
        if self.first_parameter >= len(layout.parameters):
            raise ArtifactError(
                f"the manifest cuts {len(layout.parameters)} parameters before number {self.first_parameter}"
            )
        return (
            Layout(layout.parameters[: self.first_parameter]),
            Layout(layout.parameters[self.first_parameter :]),
        )
