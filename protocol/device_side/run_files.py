"""The files of a run on a device: the manifest, the graphs that it names, and the mask of the day."""

from __future__ import annotations

from collections.abc import Sequence

from ..artifact.graph_files import GraphFile
from ..artifact.layout import Layout
from ..artifact.manifest import CUT_GRAPHS, Manifest
from ..artifact.node_stages import node_graphs
from ..artifact.sections import section_graphs
from ..artifact.stages import local_run_graphs
from ..errors import ProtocolError
from ..pruning.mask import Mask
from ..settings import LOCAL_ESTIMATORS, RunSettings
from ..wire.blobs import BlobFetcher
from ..wire.documents import Announcement, RunDocument
from ..wire.transfers import BlobBlock
from .device_events import BlobFound, DeviceCommand
from .parts import Parts

__all__ = ["RunFiles", "needed_graphs"]


def needed_graphs(manifest: Manifest, settings: RunSettings) -> tuple[GraphFile, ...]:
    """The graphs of an artifact that a device loads in a run with these settings.

    Raises:
        ArtifactError: The artifact lacks one.
    """
    names = ["probe.onnx", "predict.onnx"]
    if settings.sparsity > 0 and settings.saliency.is_federated:
        names += [graph.name for graph in manifest.graphs if graph.name in ("saliency.onnx", "moments.onnx")]
    estimator = settings.training.estimator
    if estimator == "split" and manifest.sections is not None:
        names += section_graphs(len(manifest.sections))
    elif estimator == "split" or (estimator == "coordinate" and manifest.cut is not None):
        names += CUT_GRAPHS
    elif estimator == "node":
        names += node_graphs(manifest)
    elif estimator in LOCAL_ESTIMATORS:
        names += local_run_graphs(manifest.stages, noisy=estimator == "local-node")
    return tuple(manifest.graph(name) for name in names)


class RunFiles:
    """Gets the files one after another, out of the local store or from the server.

    Args:
        run: Names the manifest.
        retry_s: A block that has not come after this time is asked for again.
        parts: Builds manifest and masks; anew for every device unless it is told otherwise.

    Attributes:
        manifest: The artifact's description, once it is there.
    """

    def __init__(self, run: RunDocument, *, retry_s: float, parts: Parts | None = None) -> None:
        self.manifest: Manifest | None = None
        self._run = run
        self._parts = parts or Parts()
        self._blobs = BlobFetcher(retry_s=retry_s)
        self._wanted_mask = ""
        self._mask_data = b""

    @property
    def wakeup(self) -> float | None:
        """When something may have to be asked for again."""
        return self._blobs.wakeup

    def forget_requests(self) -> None:
        """After a reconnect: whatever was asked for may never come."""
        self._blobs.forget_requests()

    def add(self, block: BlobBlock) -> list[DeviceCommand]:
        """Take a block from the server."""
        return self._blobs.add(block)

    def found(self, event: BlobFound) -> None:
        """Take the local store's answer.

        Raises:
            ArtifactError: The manifest cannot be used.
        """
        self._blobs.found(event)
        name = event.sha256.hex()
        if event.present and name == self._run.manifest_sha256:
            self.manifest = self._parts.manifest(event.data)
        elif event.present and name == self._wanted_mask:
            self._mask_data = event.data

    def pull_manifest(self, now: float) -> list[DeviceCommand]:
        """The next step towards the manifest."""
        return self._blobs.fetch(bytes.fromhex(self._run.manifest_sha256), self._run.manifest_size, now, read=True)

    def pull_graphs(self, optional: Sequence[GraphFile], now: float) -> list[DeviceCommand] | None:
        """The next step towards the graphs; None when all of them are there, or given up.

        Args:
            optional: Graphs that the device would use besides those that it needs. One that the server does not have,
                does not send or that cannot be kept is given up.
            now: The time.
        """
        blobs = self._blobs
        for graph in needed_graphs(self.manifest, self._run.settings) if self.manifest else ():
            if not blobs.has(graph.sha256):
                return blobs.fetch(graph.sha256, graph.size, now, read=False)
        for graph in optional:
            if not blobs.has(graph.sha256) and not blobs.is_abandoned(graph.sha256):
                return blobs.fetch(graph.sha256, graph.size, now, read=False, optional=True)
        return None

    def pull_mask(self, head: Announcement, layout: Layout, now: float) -> list[DeviceCommand] | Mask:
        """The announced mask, or the next step towards it.

        Raises:
            ProtocolError: It is no mask of this layout, or its announced size is none that such a mask can have.
        """
        if not head.mask_sha256:
            return self._parts.mask(self._run, layout, b"")
        if self._wanted_mask != head.mask_sha256:
            # One bit an entry and what zlib adds when it gains nothing, or a number a layer.
            largest = layout.size // 7 + 4 * len(layout.parameters) + 1024
            if head.mask_size > largest:
                raise ProtocolError(f"the announced mask of {head.mask_size} bytes is over the limit of {largest}")
            self._wanted_mask, self._mask_data = head.mask_sha256, b""
        if not self._mask_data:
            return self._blobs.fetch(bytes.fromhex(head.mask_sha256), head.mask_size, now, read=True)
        return self._parts.mask(self._run, layout, self._mask_data)
