"""Which channels can be removed at all, sorted by the layers that make them, and how many of them stay."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..protocol.errors import ConfigError
from .axis_labels import Labels
from .channel_labels import ChannelLabels
from .units import UnitNode

__all__ = ["ChannelFamily", "choose_channels", "find_families"]


@dataclass(frozen=True, slots=True)
class ChannelFamily:
    """Channels of layers that are tied one to one, such as the two operands of a sum.

    Attributes:
        layers: The parameters whose units they are.
        roots: Label of every channel.
        multiple: How many stay must be a multiple of this: the groups of a normalisation.
    """

    layers: tuple[str, ...]
    roots: tuple[int, ...]
    multiple: int


def find_families(traced: ChannelLabels, units: Sequence[UnitNode]) -> tuple[tuple[ChannelFamily, ...], dict[str, str]]:
    """The families of removable channels, and the unit layers that keep all of theirs, with the reason.

    Args:
        traced: Labels of the graph.
        units: Its unit layers; channels that none of them makes stay.
    """
    families = _families(traced, units)
    multiples: dict[tuple[int, ...], int] = {}
    for norm in traced.grouped_norms:
        roots = set(traced.labels.roots(norm.labels[norm.labels > 0]).tolist()) - set(traced.labels.pinned())
        for family in families:
            if not roots & set(family.roots):
                continue
            multiple = math.lcm(multiples.get(family.roots, 1), norm.groups)
            multiples[family.roots] = multiple
            if set(family.roots) != roots or len(norm.labels) != len(roots):
                reason = f"the normalisation {norm.name!r} has groups over several layers"
                traced.labels.pin(norm.labels, reason)
            elif len(family.roots) % multiple or len(family.roots) == multiple:
                traced.labels.pin(
                    norm.labels, f"the normalisation {norm.name!r} needs all for its {norm.groups} groups"
                )
    families = _families(traced, units)
    free = {name for family in families for name in family.layers}
    pinned = traced.labels.pinned()
    fixed = {}
    for unit in units:
        name = unit.layer.parameter
        if name not in free and not unit.layer.is_output:
            rows = traced.labels.roots(_units(traced, name)).tolist()
            fixed[name] = next((pinned[row] for row in rows if row in pinned), "")
    return tuple(ChannelFamily(f.layers, f.roots, multiples.get(f.roots, 1)) for f in families), fixed


def _units(traced: ChannelLabels, parameter: str) -> Labels:
    labels = traced.axes[parameter][0]
    assert labels is not None
    return labels


def _families(traced: ChannelLabels, units: Sequence[UnitNode]) -> list[ChannelFamily]:
    pinned = traced.labels.pinned()
    makers: dict[int, list[str]] = defaultdict(list)
    for unit in units:
        name = unit.layer.parameter
        for root in dict.fromkeys(traced.labels.roots(_units(traced, name)).tolist()):
            if root not in pinned:
                makers[root].append(name)
    found: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for root, names in makers.items():
        found[tuple(names)].append(root)
    return [ChannelFamily(names, tuple(roots), 1) for names, roots in found.items()]


def choose_channels(
    families: Sequence[ChannelFamily], keep: float, scores: Mapping[int, float] | None
) -> frozenset[int]:
    """Roots of the channels that stay.

    Without scores every family keeps the same fraction. With scores all channels are ranked together, each by its
    score over the mean of its family, in steps of a family's multiple; at least one step of each family stays.

    Args:
        families: What can be removed.
        keep: Fraction of the channels to keep, in (0, 1].
        scores: Of every root; None for the same fraction everywhere.

    Raises:
        ConfigError: A family would round to no channel.
    """
    for family in families:
        size = len(family.roots)
        if keep * size < 0.5:
            raise ConfigError(
                f"of the {size} channels of {family.layers[0]} none would stay: the fraction to keep is {keep:g}",
                hint=f"keep at least {math.ceil(500 / size) / 1000:g}",
            )
    if scores is None:
        kept = (family.roots[: _nearest(keep * len(family.roots), family)] for family in families)
        return frozenset(root for roots in kept for root in roots)
    steps: list[tuple[float, int, tuple[int, ...]]] = []
    chosen: list[int] = []
    for number, family in enumerate(families):
        values = np.array([scores[root] for root in family.roots], np.float64)
        values /= max(float(values.mean()), float(np.finfo(np.float64).tiny))
        order = np.argsort(-values, kind="stable")
        for start in range(0, len(order), family.multiple):
            part = order[start : start + family.multiple]
            roots = tuple(family.roots[k] for k in part)
            if start == 0:
                chosen += roots
            else:
                steps.append((-float(values[part].mean()), number, roots))
    wanted = round(keep * sum(len(family.roots) for family in families))
    for _, _, roots in sorted(steps, key=lambda step: step[:2]):
        if len(chosen) + len(roots) <= wanted:
            chosen += roots
    return frozenset(chosen)


def _nearest(wanted: float, family: ChannelFamily) -> int:
    """The multiple of the family that is nearest to ``wanted``, the larger of two, at least one."""
    return max(1, math.floor(wanted / family.multiple + 0.5)) * family.multiple
