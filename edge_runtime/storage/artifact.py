"""Artifacts on a board: read a folder or a store of blobs, and trust nothing whose hash is not the named one.

An artifact is ``manifest.json`` plus ONNX graphs without weights. A graph is parsed by native code, so its bytes are
compared with the manifest's SHA-256 each time they are read, not only when the artifact is opened.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from ...protocol.artifact.manifest import MAX_GRAPH_BYTES, MAX_MANIFEST_BYTES, GraphFile, Manifest
from ...protocol.errors import ArtifactError, ConfigError
from .durable import write_durably

__all__ = ["MANIFEST_NAME", "Artifact", "BlobStore", "load_artifact"]

MANIFEST_NAME = "manifest.json"


class BlobStore:
    """Files named by the SHA-256 of their content, in one folder.

    Writing is atomic and durable: a blob is either absent or whole, also after a power cut.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def path(self, sha256: bytes) -> Path:
        """Where the blob with this hash lies or would lie."""
        if len(sha256) != 32:
            raise ArtifactError(f"a SHA-256 has 32 bytes, not {len(sha256)}")
        return self.folder / sha256.hex()

    def __contains__(self, sha256: bytes) -> bool:
        return self.path(sha256).is_file()

    def put(self, data: bytes, *, expected: bytes | None = None) -> Path:
        """Keep ``data`` under its hash.

        Args:
            data: The whole blob.
            expected: Its SHA-256 as announced by a peer; nothing is written when it differs.

        Returns:
            The file; its name is the SHA-256 in hexadecimal.

        Raises:
            ArtifactError: The hash is not ``expected``.
            ConfigError: The folder cannot be written or the disk is full.
        """
        digest = hashlib.sha256(data).digest()
        if expected is not None and digest != expected:
            raise ArtifactError(
                f"a blob of {len(data)} bytes has SHA-256 {digest.hex()[:16]}…, {expected.hex()[:16]}… was announced",
                hint="it is fetched again; if it happens each time, the server's artifact folder was changed",
            )
        path = self.path(digest)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if _matches(path, len(data), digest):
                return path
            write_durably(path, data)
        except OSError as error:
            raise ConfigError(
                f"cannot keep a blob of {len(data)} bytes in {self.folder}: {error.strerror or error}",
                hint="free some space there or give another state folder",
            ) from error
        return path

    def get(self, sha256: bytes) -> bytes:
        """The blob with this hash, checked.

        A blob that was damaged on the disk is removed, so that it counts as absent and is fetched again.

        Raises:
            ArtifactError: It is absent, unreadable or damaged.
        """
        path = self.path(sha256)
        data = _read(path, MAX_GRAPH_BYTES)
        if hashlib.sha256(data).digest() != sha256:
            path.unlink(missing_ok=True)
            raise ArtifactError(
                f"{path} was damaged ({len(data)} bytes with another SHA-256) and is removed",
                hint="it is fetched again at the next start; check the storage of this board",
            )
        return data

    def missing(self, manifest: Manifest) -> list[GraphFile]:
        """The graphs of ``manifest`` that still have to be fetched."""
        return [graph for graph in manifest.graphs if graph.sha256 not in self]


@dataclass(frozen=True)
class Artifact:
    """A checked artifact.

    Attributes:
        manifest: Its description.
        manifest_bytes: The bytes that were parsed.
        source: Folder or store, for messages.
    """

    manifest: Manifest
    manifest_bytes: bytes
    source: str
    _read: Callable[[GraphFile], bytes]

    @property
    def digest(self) -> bytes:
        """SHA-256 of the manifest: names every byte of the artifact, since the manifest holds the graphs' hashes."""
        return hashlib.sha256(self.manifest_bytes).digest()

    def read_graph(self, name: str) -> bytes:
        """The bytes of a graph, compared with the manifest.

        Args:
            name: File name, such as ``probe.onnx``, or a variant's.

        Raises:
            ArtifactError: The artifact has no such graph, or its bytes are not the ones that the manifest names.
        """
        files = {variant.file.name: variant.file for variant in self.manifest.variants}
        graph = files[name] if name in files else self.manifest.graph(name)
        return _verified(graph, self._read(graph), self.source)

    def holds(self, graph: GraphFile) -> bool:
        """Whether the bytes of ``graph`` are here and whole; variants for other machines need not be."""
        try:
            self.read_graph(graph.name)
        except ArtifactError:
            return False
        return True

    @classmethod
    def from_blobs(cls, manifest_bytes: bytes, store: BlobStore, names: Collection[str] | None = None) -> Artifact:
        """An artifact whose graphs were fetched into ``store``.

        Args:
            manifest_bytes: ``manifest.json``.
            store: Where the graphs are.
            names: Graphs that have to be there; all of them if None.

        Raises:
            ArtifactError: The manifest is malformed, or a graph is absent or damaged.
        """
        manifest = Manifest.decode(manifest_bytes)
        return _checked(cls(manifest, manifest_bytes, str(store.folder), lambda graph: store.get(graph.sha256)), names)


def load_artifact(folder: str | os.PathLike[str]) -> Artifact:
    """Open an artifact folder and compare every file with its hash and size.

    Args:
        folder: What ``fedzo export`` wrote.

    Raises:
        ArtifactError: A file is missing, truncated, changed, or belongs to another model; the message names it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ArtifactError(f"there is no artifact folder {root}", hint="make one with: fedzo export lenet5 -o FOLDER")
    data = _read(root / MANIFEST_NAME, MAX_MANIFEST_BYTES)
    try:
        manifest = Manifest.decode(data)
    except ArtifactError as error:
        hint = error.hint or "copy the artifact folder again or export it again"
        raise ArtifactError(f"{root / MANIFEST_NAME}: {error.message}", hint=hint) from error
    return _checked(Artifact(manifest, data, str(root), lambda graph: _read(root / graph.name, graph.size)))


def _checked(artifact: Artifact, names: Collection[str] | None = None) -> Artifact:
    for graph in artifact.manifest.graphs:
        if names is None or graph.name in names:
            artifact.read_graph(graph.name)
    return artifact


def _verified(graph: GraphFile, data: bytes, source: str) -> bytes:
    if len(data) != graph.size:
        found = f"{len(data)} bytes" if len(data) < graph.size else f"more than {graph.size} bytes"
        raise ArtifactError(
            f"{graph.name} in {source} has {found}, the manifest says {graph.size}",
            hint="copy the artifact folder again or export it again",
        )
    digest = hashlib.sha256(data).digest()
    if digest != graph.sha256:
        raise ArtifactError(
            f"{graph.name} in {source} has SHA-256 {digest.hex()[:16]}…, the manifest says {graph.sha256.hex()[:16]}…",
            hint="the file was changed or belongs to another model: export again",
        )
    return data


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size  # read(n) allocates n bytes, however short the file is
            return file.read(min(limit, size) + 1)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing", hint="copy the artifact again or export it again") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from error


def _matches(path: Path, size: int, digest: bytes) -> bool:
    try:
        return path.stat().st_size == size and hashlib.sha256(path.read_bytes()).digest() == digest
    except OSError:
        return False
