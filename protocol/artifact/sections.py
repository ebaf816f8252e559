"""A network that is cut in several places, front to back, for probes that start from stored activations.

A direction that moves the weights of one section alone changes nothing in front of it: all its probes start from the
features that enter the section and go through it and what lies behind. The later the section, the cheaper the probe; so
few directions move the costly first layers and many the cheap last ones. The feature reuse of DeepZero (Chen et al.,
arXiv 2310.02025, section 4), generalised from coordinates to directions and from one layer to sections of any size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..errors import ArtifactError
from ..perturbation.directions import MAX_BLOCKS
from .cut import Cut
from .layout import Layout
from .stages import Stage

__all__ = ["MAX_SECTIONS", "Sections", "is_section_graph", "section_graph", "section_graphs", "suffix_graph"]

MAX_SECTIONS = MAX_BLOCKS
_GRAPH = re.compile(r"section([0-6])\.onnx|suffix([1-7])\.onnx")


def section_graph(number: int) -> str:
    """File name of the graph from what enters a section to what enters the next one."""
    return f"section{number}.onnx"


def suffix_graph(number: int) -> str:
    """File name of the graph from what enters a section to the loss; the first section's is ``probe.onnx``."""
    return f"suffix{number}.onnx"


def section_graphs(n_sections: int) -> tuple[str, ...]:
    """File names of all graphs of a network of so many sections."""
    forward = [section_graph(number) for number in range(n_sections - 1)]
    return (*forward, *(suffix_graph(number) for number in range(1, n_sections)))


def is_section_graph(name: str) -> bool:
    """Whether a file may be the graph of a section."""
    return _GRAPH.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Sections:
    """Where a network is cut.

    Attributes:
        cuts: Front to back, two or more; section ``i`` lies between cut ``i - 1`` and cut ``i``.
        gains: One number a section: the squared gradient of a logit with respect to its parameters, summed over
            parameters and logits, mean over Gaussian inputs, at the initial weights. Only their ratios matter.
    """

    cuts: tuple[Cut, ...]
    gains: tuple[float, ...]

    def __post_init__(self) -> None:
        costs = [cut.prefix_multiply_accumulates for cut in self.cuts]
        if (
            not 2 <= len(self.cuts) < MAX_SECTIONS
            or len({cut.prefix_multiply_accumulates + cut.suffix_multiply_accumulates for cut in self.cuts}) != 1
            or any(a >= b for a, b in pairwise(costs))
            or any(a.first_parameter >= b.first_parameter for a, b in pairwise(self.cuts))
        ):
            raise ArtifactError("the manifest's sections do not follow each other")
        if len(self.gains) != len(self) or not all(0.0 <= gain < 1e300 for gain in self.gains) or not any(self.gains):
            raise ArtifactError(f"the manifest's sections have the impossible gains {self.gains}")

    def __len__(self) -> int:
        return len(self.cuts) + 1

    def check(self, layout: Layout, files: Collection[str]) -> None:
        """Compare them with the artifact that they are of.

        Raises:
            ArtifactError: They do not fit, or a graph is missing.
        """
        self.cuts[-1].split(layout)
        if lacking := set(section_graphs(len(self))).difference(files):
            raise ArtifactError(f"the manifest has sections without {min(lacking)}")

    def stage(self, number: int, input_shape: tuple[int, ...]) -> Stage:
        """A section that has one behind it, in the terms of a stage: its parameters, and what enters and leaves it.

        Args:
            number: Below the last section's.
            input_shape: Of the network.
        """
        before, after = self.cuts[number - 1] if number else None, self.cuts[number]
        return Stage(
            number,
            before.first_parameter if before else 0,
            after.first_parameter,
            before.feature_shape if before else input_shape,
            after.feature_shape,
            after.prefix_multiply_accumulates - (before.prefix_multiply_accumulates if before else 0),
        )

    def sizes(self, counts: Sequence[int]) -> tuple[int, ...]:
        """Survivors of every section, from those of every parameter."""
        edges = [0, *(cut.first_parameter for cut in self.cuts), len(counts)]
        return tuple(int(sum(counts[a:b])) for a, b in pairwise(edges))

    def cost(self, number: int) -> float:
        """A probe of a section over a probe of the whole network, by multiply-accumulates."""
        return self.cuts[number - 1].suffix_share if number else 1.0

    def dealt(self, total: int, sizes: Sequence[int], multiple: int = 1) -> tuple[int, ...]:
        """Directions of the sections behind the first one.

        With ``k`` directions the estimate of a gradient of ``n`` weights and square ``g`` is off by ``g n / k`` in the
        square (concepts.md). The sum over the sections is smallest, for the passes that it costs, when ``k`` goes as
        the root of ``g n`` over the cost of a probe. The gain stands for ``g``, by the share of weights that survive.

        Args:
            total: Of them all, about.
            sizes: Survivors of all sections.
            multiple: Each gets a multiple of this number, once at least.

        Returns:
            One number for each section but the first.
        """
        behind = range(1, len(self))
        roots = [math.sqrt(self.gains[i] * sizes[i] / max(self.cost(i), 1e-12)) for i in behind]
        whole = math.fsum(roots) or 1.0  # as the sum of Python 3.12 differs from older ones in the last bit
        return tuple(max(1, round(total * root / whole / multiple)) * multiple for root in roots)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"cuts": [cut.to_json() for cut in self.cuts], "gains": list(self.gains)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Sections:
        """Inverse of :meth:`to_json`.

        Raises:
            ArtifactError: The data are no sections.
        """
        try:
            cuts, gains = list(raw["cuts"]), list(raw["gains"])
            if len(cuts) >= MAX_SECTIONS or any(type(gain) not in (int, float) for gain in gains):
                raise TypeError("too many cuts, or a gain that is no number")
            return cls(tuple(Cut.from_json(cut) for cut in cuts), tuple(float(gain) for gain in gains))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"the manifest has malformed sections: {error!r}") from None
