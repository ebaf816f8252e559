"""Cuts a network into several sections, so that the probes of each start from what enters it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..protocol.artifact.cut import Cut
from ..protocol.artifact.layout import Layout
from ..protocol.artifact.sections import MAX_SECTIONS, Sections, section_graph, suffix_graph
from ..protocol.errors import ConfigError
from .cuts import CutPoint, cut_points
from .forward import ForwardGraph
from .passes.float64_loss import Float64Loss
from .passes.infrastructure import GraphPass
from .passes.keep_stage import KeepStage
from .passes.keep_suffix import KeepSuffix
from .passes.scatter_survivors import ScatterSurvivors
from .passes.weights_as_inputs import WeightsAsInputs
from .units import UnitNode

__all__ = ["choose_sections", "find_sections", "section_layouts", "section_passes"]


def find_sections(
    forward: ForwardGraph, units: Sequence[UnitNode], gains: NDArray[np.float64], most: int
) -> tuple[Sections, tuple[CutPoint, ...]]:
    """The sections of a network, and the values that cross its cuts.

    Args:
        forward: The network.
        units: Its unit layers.
        gains: ``float64[n_parameters]``, see :class:`~fedzo.protocol.artifact.sections.Sections`.
        most: Sections at most; where the network has more places to be cut, the best are taken.

    Raises:
        ConfigError: There are not two places where the network can be cut.
    """
    if not 3 <= most <= MAX_SECTIONS:
        raise ConfigError(f"the number of sections is {most}, it must be 2 to {MAX_SECTIONS}")
    places = _places(forward, units)
    if len(places) < 2:
        raise ConfigError(
            f"the network can be cut in {len(places)} place{'s' if len(places) != 1 else ''}, sections need two",
            hint="export it without --sections; layers that run side by side cannot be separated",
        )
    sizes = [p.size for p in forward.layout.parameters]
    chosen = choose_sections([place.cut for place in places], sizes, gains.tolist(), most)
    points = tuple(places[k] for k in chosen)
    edges = [0, *(point.cut.first_parameter for point in points), len(sizes)]
    sums = tuple(float(gains[a:b].sum()) for a, b in pairwise(edges))
    return Sections(tuple(point.cut for point in points), sums), points


def choose_sections(cuts: Sequence[Cut], sizes: Sequence[int], gains: Sequence[float], most: int) -> tuple[int, ...]:
    """Which cuts make the best sections: the smallest sum of the roots of weights times gain times cost of a probe.

    That sum, squared, is the error of the estimated gradient for one pass, with directions dealt as
    :meth:`~fedzo.protocol.artifact.sections.Sections.dealt` does. Cutting once more never makes it larger.

    Args:
        cuts: Front to back.
        sizes: Entries of every parameter.
        gains: Of every parameter.
        most: Sections at most.

    Returns:
        Positions in ``cuts``, ascending, ``most - 1`` of them if there are as many.
    """
    edges = [0, *(cut.first_parameter for cut in cuts), len(sizes)]
    costs = [1.0, *(cut.suffix_share for cut in cuts)]

    def term(begin: int, end: int) -> float:
        """Of the section from one edge to another."""
        inside = slice(edges[begin], edges[end])
        return math.sqrt(sum(sizes[inside]) * sum(gains[inside]) * costs[begin])

    # best[e] = (sum, edges inside) of the best sections from the first edge to edge e.
    last = len(edges) - 1
    best: dict[int, tuple[float, tuple[int, ...]]] = {e: (term(0, e), ()) for e in range(1, last + 1)}
    for _ in range(min(most, last) - 1):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for end in range(2, last + 1):
            tried = [
                (best[middle][0] + term(middle, end), (*best[middle][1], middle))
                for middle in range(1, end)
                if middle in best
            ]
            if tried:
                longer[end] = min(tried)
        best = longer
    return tuple(edge - 1 for edge in best[last][1])


def section_passes(
    sections: Sections, points: Sequence[CutPoint], layout: Layout, input_shape: tuple[int, ...]
) -> dict[str, list[GraphPass]]:
    """The passes that make each section's graphs; every graph takes its own part of the weights only."""
    passes: dict[str, list[GraphPass]] = {}
    for number, point in enumerate(points):
        stage = sections.stage(number, input_shape)
        value = points[number - 1].value if number else "x"
        ends = (value, stage.feature_shape, point.value, stage.output_shape)
        passes[section_graph(number)] = [KeepStage(*ends), *_weight_passes(stage.layout(layout))]
        behind = point.cut.split(layout)[1]
        name = suffix_graph(number + 1)
        passes[name] = [KeepSuffix(point.value, point.cut.feature_shape), Float64Loss(), *_weight_passes(behind)]
    return passes


def section_layouts(sections: Sections, layout: Layout, input_shape: tuple[int, ...]) -> Mapping[str, Layout]:
    """The parameters that each section's graphs take, by file name."""
    found: dict[str, Layout] = {}
    for number, cut in enumerate(sections.cuts):
        found[section_graph(number)] = sections.stage(number, input_shape).layout(layout)
        found[suffix_graph(number + 1)] = cut.split(layout)[1]
    return found


def _places(forward: ForwardGraph, units: Sequence[UnitNode]) -> list[CutPoint]:
    """Where the network can be cut: of the values between two parameters the smallest, of these the last one."""
    found: dict[int, CutPoint] = {}
    for point in cut_points(forward.model, forward.layout, units):
        known = found.get(point.cut.first_parameter)
        if known is None or math.prod(point.cut.feature_shape) <= math.prod(known.cut.feature_shape):
            found[point.cut.first_parameter] = point
    places: list[CutPoint] = []
    for _, point in sorted(found.items()):
        if not places or point.cut.prefix_multiply_accumulates > places[-1].cut.prefix_multiply_accumulates:
            places.append(point)
    return places


def _weight_passes(layout: Layout) -> list[GraphPass]:
    return [WeightsAsInputs(layout), ScatterSurvivors(layout)]
