"""A tiny artifact with short files, and what many machines of one process share of it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import ClassVar

from fedzo.protocol.artifact.layout import Layout
from fedzo.protocol.artifact.manifest import GraphFile, Manifest
from fedzo.protocol.device_side.parts import Parts
from fedzo.protocol.pruning.mask import Fill, Mask
from fedzo.protocol.settings import EstimatorName
from fedzo.protocol.wire.documents import RunDocument
from tests.protocol.simulation.fakes import manifest_for

__all__ = ["SharedParts", "artifact_of"]


@functools.cache
def artifact_of(estimator: EstimatorName) -> tuple[Manifest, dict[bytes, bytes]]:
    """The artifact of a run with that estimator, and its files by hash."""
    manifest = manifest_for(estimator)
    graphs, files = [], {}
    for graph in manifest.graphs:
        data = f"the bytes of {graph.name}".encode()
        sha256 = hashlib.sha256(data).digest()
        graphs.append(GraphFile(graph.name, sha256, len(data)))
        files[sha256] = data
    manifest = dataclasses.replace(manifest, graphs=tuple(graphs))
    data = manifest.encode()
    return manifest, files | {hashlib.sha256(data).digest(): data}


@functools.lru_cache(maxsize=64)
def _manifest(data: bytes) -> Manifest:
    return Manifest.decode(data)


class SharedParts(Parts):
    """Manifest and masks are the same objects for all devices; each has weights of its own."""

    _masks: ClassVar[dict[tuple[int, bytes, Fill], Mask]] = {}

    def manifest(self, data: bytes) -> Manifest:
        """See :class:`Parts`."""
        return _manifest(data)

    def mask(self, run: RunDocument, layout: Layout, data: bytes) -> Mask:
        """See :class:`Parts`."""
        key = (id(layout), data, run.settings.fill)  # Layouts live as long as their manifests: for ever.
        if key not in self._masks:
            self._masks[key] = Parts.mask(self, run, layout, data)
        return self._masks[key]
