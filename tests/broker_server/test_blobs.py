"""What devices may pull: the artifact's files and the run's masks, block by block."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest

from fedzo.broker_server.blobs import BlobServer
from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.protocol.artifact.graph_files import GraphFile, GraphVariant
from fedzo.protocol.artifact.manifest import GraphMemory, Manifest
from fedzo.protocol.wire.transfers import BlobBlock, BlobRequest
from tests.edge_runtime.conftest import write_artifact

VARIANT = b"a graph for particular machines" * 9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact with a variant."""
    manifest: Manifest = write_artifact(tmp_path)
    file = GraphFile("probe.nchwc8.onnx", hashlib.sha256(VARIANT).digest(), len(VARIANT))
    variant = GraphVariant(file, "probe.onnx", "x86_64", "1.32.0", 8, 400)
    memory = (*manifest.memory, GraphMemory(file.name, ((1, 1),)))
    changed = dataclasses.replace(manifest, variants=(variant,), memory=memory)
    (tmp_path / "manifest.json").write_bytes(changed.encode())
    (tmp_path / file.name).write_bytes(VARIANT)
    return tmp_path


def pull(server: BlobServer, data: bytes, length: int = 100) -> bytes:
    """The whole blob, in blocks."""
    sha256, got = hashlib.sha256(data).digest(), b""
    while len(got) < len(data):
        block = server.block(BlobRequest(sha256, len(got), length))
        assert block is not None
        assert (block.offset, block.total) == (len(got), len(data))
        got += block.data
    return got


def test_every_file_of_the_artifact_and_what_is_offered(folder: Path) -> None:
    server = BlobServer(load_artifact(folder), folder)
    for path in folder.iterdir():
        assert pull(server, path.read_bytes()) == path.read_bytes()
    mask = bytes(range(200))
    server.offer(hashlib.sha256(mask).digest(), mask)
    assert pull(server, mask) == mask
    assert server.block(BlobRequest(hashlib.sha256(mask).digest(), 200, 1)) is None


@pytest.mark.parametrize("fault", ["absent", "changed", "removed later"])
def test_a_variant_that_is_not_here_whole_is_not_offered(folder: Path, fault: str) -> None:
    path = folder / "probe.nchwc8.onnx"
    if fault == "absent":
        path.unlink()
    elif fault == "changed":
        path.write_bytes(VARIANT[:-1] + b"?")
    server = BlobServer(load_artifact(folder), folder)
    path.unlink(missing_ok=True)
    sha256 = hashlib.sha256(VARIANT).digest()
    assert server.block(BlobRequest(sha256, 0, 100)) == BlobBlock(sha256, 0, 0, b"")
    assert server.block(BlobRequest(sha256, 100, 100)) == BlobBlock(sha256, 0, 0, b"")


def test_a_hash_that_nobody_knows(folder: Path) -> None:
    server = BlobServer(load_artifact(folder), folder)
    assert server.block(BlobRequest(bytes(32), 0, 1)) == BlobBlock(bytes(32), 0, 0, b"")
