"""Removes whole channels and units from a model before it is exported: structured pruning.

Parameters of the smaller network are drawn anew, with its own fan-in, so that they still follow from the seed alone.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast, get_args

import numpy as np
from numpy.typing import NDArray

from ..protocol.artifact.layout import Initialiser, Layout, Parameter
from ..protocol.artifact.manifest import GRAPHS, Manifest
from ..protocol.artifact.structure import ChannelScores, NarrowedLayer, Structure
from ..protocol.errors import ConfigError
from .channel_families import ChannelFamily, choose_channels, find_families
from .channel_labels import ChannelLabels, trace_channels
from .channel_scores import channel_scores
from .cuts import multiply_accumulates
from .fan_in import fan_in_axes
from .forward import ForwardGraph
from .passes.keep_channels import KeepChannels
from .sessions import run_graph
from .units import find_units

__all__ = ["ChannelSelection", "narrow"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChannelSelection:
    """How many channels stay, and which.

    Attributes:
        keep: Fraction of the channels to keep, ``0 < keep <= 1``; at 1 nothing is removed.
        scores: How channels are ranked; ``uniform`` keeps the same fraction of every layer.
    """

    keep: float = 1.0
    scores: ChannelScores = "uniform"

    def __post_init__(self) -> None:
        if not 0.0 < self.keep <= 1.0:
            raise ConfigError(
                f"the fraction of channels to keep is {self.keep}, it must be above 0 and at most 1",
                hint="0.5 keeps half of them",
            )
        if self.scores not in get_args(ChannelScores):
            raise ConfigError(
                f"channels cannot be ranked by {self.scores!r}", hint=f"one of {', '.join(get_args(ChannelScores))}"
            )

    @classmethod
    def of(cls, keep: float, scores: str) -> ChannelSelection:
        """From what a user wrote; both are checked.

        Raises:
            ConfigError: The fraction is out of range, or there are no such scores.
        """
        return cls(keep, cast(ChannelScores, scores))


def narrow(
    forward: ForwardGraph, whole: Manifest, files: Mapping[str, bytes], selection: ChannelSelection
) -> tuple[ForwardGraph, Structure]:
    """The smaller network, and the record of what was removed.

    Args:
        forward: The whole network; not changed.
        whole: Its manifest.
        files: Its graphs by file name.
        selection: What to keep.

    Raises:
        ConfigError: No channel can be removed, or one layer would lose all.
    """
    units, traced = find_units(forward.model, forward.layout), trace_channels(forward.model)
    families, fixed = find_families(traced, units)
    for name, reason in fixed.items():
        logger.warning("%s keeps all its channels: %s", name, reason)
    if not families:
        raise ConfigError(
            "no channel of the model can be removed"
            + "".join(f"; {name}: {reason}" for name, reason in list(fixed.items())[:3]),
            hint="export it without --keep-channels, or write it with convolutions and linear layers in between",
        )
    scores = channel_scores(selection.scores, whole, files)
    kept = choose_channels(families, selection.keep, None if scores is None else _by_root(families, traced, scores))
    removed = {root for family in families for root in family.roots} - kept
    if not removed:
        fewer = max(1.0 - 0.75 * f.multiple / len(f.roots) for f in families)
        raise ConfigError(
            f"keeping the fraction {selection.keep:g} removes no channel", hint=f"try {fewer:.3g} or less"
        )
    rewrite = KeepChannels(traced, removed)
    model = rewrite(forward.model).model
    layout = _layout(forward, traced, rewrite)
    _check(ForwardGraph(model, layout), whole)
    layers = tuple(
        NarrowedLayer(
            unit.parameter, unit.n_units, unit.groups, tuple(np.flatnonzero(_rows(traced, rewrite, unit.parameter)))
        )
        for unit in whole.units
    )
    structure = Structure(
        selection.scores,
        selection.keep,
        tuple(replace(layer, kept=tuple(map(int, layer.kept))) for layer in layers),
        tuple(parameter.shape for parameter in whole.layout.parameters),
        tuple(memory for memory in whole.memory if memory.name in GRAPHS),
        {graph.name: graph.size for graph in whole.graphs if graph.name in GRAPHS},
        sum(multiply_accumulates(unit, forward.layout) for unit in units),
    )
    return ForwardGraph(model, layout), structure


def _rows(traced: ChannelLabels, rewrite: KeepChannels, parameter: str) -> NDArray[np.bool_]:
    kept = rewrite.kept(traced.axes[parameter][0])
    assert kept is not None
    return kept


def _by_root(
    families: tuple[ChannelFamily, ...], traced: ChannelLabels, scores: Mapping[str, NDArray[np.float64]]
) -> dict[int, float]:
    """Scores of channels: the sum over all units that are tied to one."""
    out: dict[int, float] = defaultdict(float)
    for name in dict.fromkeys(name for family in families for name in family.layers):
        labels = traced.axes[name][0]
        assert labels is not None
        for root, score in zip(traced.labels.roots(labels).tolist(), scores[name].tolist(), strict=True):
            out[root] += score
    return out


def _layout(forward: ForwardGraph, traced: ChannelLabels, rewrite: KeepChannels) -> Layout:
    """Parameters with the sizes that stay; weights scale with the root of the fan-in."""
    parameters: list[Parameter] = []
    summed = fan_in_axes(forward.model, forward.layout)
    for parameter in forward.layout.parameters:
        stays = (rewrite.kept(axis) for axis in traced.axes[parameter.name])
        shape = tuple(int(axis.sum()) for axis in stays if axis is not None)
        initialiser, axes = parameter.initialiser, summed.get(parameter.name, ())
        if axes and initialiser.kind != "constant":
            growth = math.sqrt(math.prod(parameter.shape[k] for k in axes) / math.prod(shape[k] for k in axes))
            initialiser = Initialiser(initialiser.kind, float(np.float32(initialiser.scale * growth)))
        parameters.append(replace(parameter, shape=shape, initialiser=initialiser))
    return Layout(tuple(parameters))


def _check(forward: ForwardGraph, whole: Manifest) -> None:
    """Run the smaller graph: what states a size that is no longer true fails here and not on a board.

    Raises:
        ConfigError: It cannot be run, or yields something else than logits.
    """
    feeds: dict[str, NDArray[np.generic]] = {
        p.name: np.full(p.shape, 0.1, np.float32) for p in forward.layout.parameters
    }
    for batch in (1, 3):
        feeds["x"] = np.zeros((batch, *whole.input_shape), np.float32)
        logits = run_graph(forward.model, feeds)["logits"]
        if logits.shape != (batch, whole.n_classes):
            raise ConfigError(
                f"with fewer channels the model yields {logits.shape[1:]}, not {whole.n_classes} logits",
                hint="some operator depends on the number of channels in a way that cannot be followed",
            )
