"""What devices may pull, by hash: the artifact's manifest, graphs and their variants, and the run's masks."""

from __future__ import annotations

from pathlib import Path

from ..edge_runtime.storage.artifact import Artifact
from ..protocol.wire.transfers import MAX_BLOCK_BYTES, BlobBlock, BlobRequest

__all__ = ["BlobServer"]


class BlobServer:
    """Blocks out of files and of memory.

    Args:
        artifact: A verified artifact; its files are read block by block and never kept in memory.
        folder: Of the artifact.
    """

    def __init__(self, artifact: Artifact, folder: Path) -> None:
        manifest = artifact.manifest
        variants = [variant.file for variant in manifest.variants if artifact.holds(variant.file)]
        self._files = {graph.sha256: folder / graph.name for graph in (*manifest.graphs, *variants)}
        self._data: dict[bytes, bytes] = {artifact.digest: (folder / "manifest.json").read_bytes()}

    def offer(self, sha256: bytes, data: bytes) -> None:
        """Keep a small blob in memory."""
        self._data[sha256] = data

    def withdraw(self, sha256: bytes) -> None:
        """Forget a blob that was offered."""
        self._data.pop(sha256, None)

    def block(self, request: BlobRequest) -> BlobBlock | None:
        """The block that a device asked for.

        Returns:
            An empty block if there is no such blob; None if the offset is beyond its end.
        """
        length = min(request.length, MAX_BLOCK_BYTES)
        absent = BlobBlock(request.sha256, 0, 0, b"")
        if request.sha256 in self._data:
            data = self._data[request.sha256]
            part, total = data[request.offset : request.offset + length], len(data)
        elif request.sha256 in self._files:
            try:
                with self._files[request.sha256].open("rb") as file:
                    total = file.seek(0, 2)
                    file.seek(min(request.offset, total))
                    part = file.read(length)
            except OSError:
                return absent
        else:
            return absent
        return BlobBlock(request.sha256, request.offset, total, part) if part else None
