"""The manifest of the network that an artifact's was cut out of, for comparing what both need."""

from __future__ import annotations

import dataclasses
import math

from .graph_files import GraphFile
from .manifest import Manifest, UnitLayer

__all__ = ["whole_network"]


def whole_network(manifest: Manifest) -> Manifest:
    """The network before channels were removed, as far as planning its memory needs it; itself if none were.

    The hashes of its graphs are zeros: these files do not exist.
    """
    structure = manifest.structure
    if structure is None:
        return manifest
    units: tuple[UnitLayer, ...] = ()
    shift = moment = 0
    layout = structure.whole_layout(manifest.layout)
    for unit, layer in zip(manifest.units, structure.layers, strict=True):
        row = layout.parameters[layout.position_of(unit.parameter)].shape[1:]
        n_moments = layer.groups * math.prod(row)
        units += (UnitLayer(unit.parameter, layer.n_units, layer.groups, shift, moment, n_moments, unit.is_output),)
        shift, moment = shift + layer.n_units, moment + n_moments
    return dataclasses.replace(
        manifest,
        layout=layout,
        units=units,
        graphs=tuple(GraphFile(name, bytes(32), size) for name, size in structure.graph_bytes.items()),
        memory=structure.memory,
        variants=(),
        cut=None,
        tail=None,
        work=None,
        stages=(),
        structure=None,
    )
