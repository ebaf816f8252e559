"""What a device's machine builds from bytes: the manifest, the masks and the weights."""

from __future__ import annotations

from ..artifact.layout import Layout
from ..artifact.manifest import Manifest
from ..perturbation.blocks import blocks_of
from ..pruning.layer_densities import read_mask
from ..pruning.mask import Mask
from ..replay.update import Replica
from ..wire.documents import RunDocument

__all__ = ["Parts", "start_replica"]


def start_replica(run: RunDocument, manifest: Manifest, mask: Mask) -> Replica:
    """The weights at the start of a run's log."""
    settings, blocks = run.settings, blocks_of(run.training, manifest, mask)
    optimiser = run.training.optimiser
    return Replica(manifest.layout, mask, manifest.seed, settings.seed, blocks, optimiser, settings.staleness)


class Parts:
    """Builds everything anew, as one device in a process needs it.

    Many machines in one process may share what is equal: a subclass that returns the same objects again saves their
    memory and their time.
    """

    def manifest(self, data: bytes) -> Manifest:
        """The artifact's description.

        Raises:
            ArtifactError: The bytes are none.
        """
        return Manifest.decode(data)

    def mask(self, run: RunDocument, layout: Layout, data: bytes) -> Mask:
        """The mask of a run; without bytes the one that keeps everything.

        Raises:
            ProtocolError: The bytes are no mask of this layout.
        """
        return read_mask(data, layout, run.settings.fill) if data else Mask.dense(layout)

    def replica(self, run: RunDocument, manifest: Manifest, mask: Mask) -> Replica:
        """The weights at the start of a run's log."""
        return start_replica(run, manifest, mask)
