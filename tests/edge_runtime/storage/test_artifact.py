"""Artifact folders and blob stores: every damage is named, nothing damaged is handed out."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from fedzo.edge_runtime.storage.artifact import Artifact, BlobStore, load_artifact
from fedzo.protocol.artifact.manifest import MAX_MANIFEST_BYTES, Manifest
from fedzo.protocol.errors import ArtifactError, ConfigError

GRAPHS = ("probe.onnx", "predict.onnx", "saliency.onnx", "moments.onnx")


@pytest.fixture
def folder(tmp_path: Path, write_tiny_artifact: Any) -> Path:
    write_tiny_artifact(tmp_path / "model")
    return tmp_path / "model"


def test_intact_folder_loads(folder: Path) -> None:
    artifact = load_artifact(folder)
    assert artifact.digest == hashlib.sha256((folder / "manifest.json").read_bytes()).digest()
    for name in GRAPHS:
        assert artifact.read_graph(name) == (folder / name).read_bytes()
    with pytest.raises(ArtifactError, match=r"no other\.onnx"):
        artifact.read_graph("other.onnx")


@pytest.mark.parametrize("name", [*GRAPHS, "manifest.json"])
def test_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        load_artifact(folder)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "bytes, the manifest says"),
        (lambda data: b"", "0 bytes"),
        (lambda data: data + b"\0", "more than"),
        (lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:], "SHA-256"),
    ],
    ids=["truncated", "empty", "longer", "one-bit"],
)
def test_damaged_graph_is_named(folder: Path, name: str, damage: Any, message: str) -> None:
    path = folder / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ArtifactError, match=f"{name}.*{message}"):
        load_artifact(folder)


def test_graph_of_another_model_is_named(folder: Path) -> None:
    (folder / "predict.onnx").write_bytes((folder / "probe.onnx").read_bytes())
    with pytest.raises(ArtifactError, match=r"predict\.onnx"):
        load_artifact(folder)


def test_graph_changed_after_loading_is_not_handed_out(folder: Path) -> None:
    artifact = load_artifact(folder)
    (folder / "probe.onnx").write_bytes(b"x" * artifact.manifest.graph("probe.onnx").size)
    with pytest.raises(ArtifactError, match=r"probe\.onnx"):
        artifact.read_graph("probe.onnx")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"format": 99}', b"\xff\xfe", b" " * (MAX_MANIFEST_BYTES + 1)])
def test_bad_manifest_is_refused(folder: Path, data: bytes) -> None:
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(ArtifactError):
        load_artifact(folder)


def test_manifest_cannot_name_a_file_outside_the_folder(folder: Path) -> None:
    raw = json.loads((folder / "manifest.json").read_text())
    raw["graphs"]["../secret.onnx"] = raw["graphs"]["probe.onnx"]
    (folder / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match="secret"):
        load_artifact(folder)


def test_no_folder_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no artifact folder") as caught:
        load_artifact(tmp_path / "absent")
    assert "fedzo export" in caught.value.hint


def test_blob_round_trip_and_name(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "state" / "blobs")
    digest = hashlib.sha256(b"hello").digest()
    assert digest not in store
    path = store.put(b"hello", expected=digest)
    assert path.name == digest.hex()
    assert digest in store
    assert store.get(digest) == b"hello"
    assert store.put(b"hello") == path
    assert [p.name for p in store.folder.iterdir()] == [digest.hex()]


def test_blob_with_another_hash_than_announced_is_not_kept(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    with pytest.raises(ArtifactError, match="announced"):
        store.put(b"other", expected=hashlib.sha256(b"hello").digest())
    assert list(tmp_path.iterdir()) == []


def test_damaged_blob_counts_as_absent_and_is_replaced(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    path = store.put(b"hello")
    digest = hashlib.sha256(b"hello").digest()
    path.write_bytes(b"hellO")
    with pytest.raises(ArtifactError, match="damaged"):
        store.get(digest)
    assert digest not in store
    with pytest.raises(ArtifactError, match="missing"):
        store.get(digest)
    path.write_bytes(b"hel")
    store.put(b"hello")
    assert store.get(digest) == b"hello"


def test_interrupted_write_leaves_no_blob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    store = BlobStore(tmp_path)
    with pytest.raises(ConfigError, match=r"5 bytes.*No space left") as caught:
        store.put(b"hello")
    assert "free some space" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_store_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError):
        BlobStore(tmp_path / "file").put(b"hello")


def test_artifact_from_blobs(folder: Path, tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs")
    data = (folder / "manifest.json").read_bytes()
    manifest = Manifest.decode(data)
    assert [g.name for g in store.missing(manifest)] == [g.name for g in manifest.graphs]
    with pytest.raises(ArtifactError, match="missing"):
        Artifact.from_blobs(data, store)
    for name in GRAPHS:
        store.put((folder / name).read_bytes())
    assert store.missing(manifest) == []
    artifact = Artifact.from_blobs(data, store)
    assert artifact.digest == load_artifact(folder).digest
    assert artifact.read_graph("probe.onnx") == (folder / "probe.onnx").read_bytes()


def test_short_hash_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="32 bytes"):
        BlobStore(tmp_path).path(b"abc")
