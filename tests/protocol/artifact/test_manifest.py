"""manifest.json: round trip and refusal of everything else."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from fedzo.protocol.artifact.golden_answer import GoldenPredictions
from fedzo.protocol.artifact.manifest import MAX_MANIFEST_BYTES, Manifest, golden_batch
from fedzo.protocol.errors import ArtifactError
from tests.protocol.builders import small_manifest


def test_round_trip() -> None:
    manifest = small_manifest()
    copy = Manifest.decode(manifest.encode())
    assert copy == manifest
    assert copy.encode() == manifest.encode()
    assert (copy.n_units, copy.n_moments) == (7, 54)


def test_largest_live_set_switches_with_the_batch() -> None:
    manifest = small_manifest()
    assert [manifest.live_bytes("probe.onnx", batch) for batch in (1, 25, 100)] == [1010, 1250, 3500]
    with pytest.raises(ArtifactError, match=r"saliency\.onnx"):
        manifest.live_bytes("saliency.onnx", 1)


def test_graphs_by_name() -> None:
    assert small_manifest().graph("probe.onnx").size == 1234
    with pytest.raises(ArtifactError, match=r"moments\.onnx"):
        small_manifest().graph("moments.onnx")


def _with_variant(**changes: Any) -> Manifest:
    entry = {"graph": "probe.onnx", "machine": "x86_64", "onnxruntime": "1.32.0", "block": 16, "weight_bytes": 64}
    entry |= {"sha256": "ab" * 32, "size": 99} | changes
    name = entry.pop("name", "probe.nchwc16.onnx")
    raw = small_manifest().to_json()
    raw["memory"] |= {entry.pop("planned", name): [[10, 20]]}
    raw["variants"] = {name: entry}
    return Manifest.decode(json.dumps(raw).encode())


def test_variants_are_optional_and_no_graphs() -> None:
    plain, manifest = small_manifest(), _with_variant()
    assert plain.variants == ()
    assert "variants" not in plain.to_json()
    assert Manifest.decode(manifest.encode()) == manifest
    assert manifest.graphs == plain.graphs
    (variant,) = manifest.variants
    assert (variant.file.name, variant.file.size, variant.block) == ("probe.nchwc16.onnx", 99, 16)
    assert manifest.live_bytes("probe.nchwc16.onnx", 3) == 70
    with pytest.raises(ArtifactError, match="nchwc16"):
        manifest.graph("probe.nchwc16.onnx")


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "probe.onnx"},
        {"name": "../probe.nchwc16.onnx"},
        {"name": "probe.nchwc16.onnx/x"},
        {"graph": "predict.onnx"},
        {"machine": "aarch64"},
        {"onnxruntime": ""},
        {"onnxruntime": "1.32.0\n"},
        {"onnxruntime": None},
        {"block": 4},
        {"block": "16"},
        {"weight_bytes": 0},
        {"weight_bytes": 1 << 40},
        {"sha256": "ab"},
        {"size": 0},
        {"size": 1 << 40},
        {"planned": "other"},
    ],
)
def test_impossible_variants(changes: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError):
        _with_variant(**changes)


@pytest.mark.parametrize("variants", [[], "x", 3, None, {"probe.nchwc16.onnx": None}])
def test_malformed_variants(variants: object) -> None:
    raw = small_manifest().to_json() | {"variants": variants}
    with pytest.raises(ArtifactError, match="malformed"):
        Manifest.decode(json.dumps(raw).encode())


def _set(*path: str | int, to: object) -> tuple[tuple[str | int, ...], object]:
    return path, to


@pytest.mark.parametrize(
    ("path", "value"),
    [
        _set("format", to=2),
        _set("format", to=None),
        _set("model", to=3),
        _set("model", to="x" * 257),
        _set("input_shape", to=[]),
        _set("input_shape", to=[0, 4]),
        _set("input_shape", to=[1 << 27]),
        _set("input_shape", to="4x5"),
        _set("n_classes", to=1),
        _set("n_classes", to=2.0),
        _set("seed", to=-1),
        _set("seed", to=1 << 64),
        _set("seed", to=True),
        _set("sparsity", to=1.0),
        _set("sparsity", to="0.5"),
        _set("layout", to=[]),
        _set("layout", 0, "scale", to=0.5),
        _set("layout_digest", to="0" * 64),
        _set("layout_digest", to=None),
        _set("units", to=None),
        _set("units", 0, "parameter", to="nothing"),
        _set("units", 0, "n_units", to=5),
        _set("units", 0, "groups", to=0),
        _set("units", 0, "groups", to=3),
        _set("units", 0, "n_moments", to=18),
        _set("units", 1, "shift_offset", to=3),
        _set("units", 1, "moment_offset", to=0),
        _set("graphs", to=[]),
        _set("graphs", to={}),
        _set("graphs", to={"probe.onnx": {"sha256": "0" * 64, "size": 5}}),
        _set("graphs", to={"predict.onnx": {"sha256": "0" * 64, "size": 5}}),
        _set("graphs", "probe.onnx", "sha256", to="zz"),
        _set("graphs", "probe.onnx", "sha256", to="A" * 64),
        _set("graphs", "probe.onnx", "size", to=0),
        _set("graphs", "../probe.onnx", to={"sha256": "0" * 64, "size": 5}),
        _set("memory", "probe.onnx", to=[[1]]),
        _set("memory", "probe.onnx", to=[[-1, 2]]),
        _set("golden", "mean_loss", to=float("nan")),
        _set("golden", "batch", to=-1),
        _set("golden", "batch", to=0),
        _set("golden", "seed", to=-1),
        _set("golden", to={}),
        _set("producer", to=None),
    ],
)
def test_malformed_fields_are_refused(path: tuple[str | int, ...], value: object) -> None:
    raw: Any = json.loads(small_manifest().encode())
    node = raw
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    with pytest.raises(ArtifactError):
        Manifest.decode(json.dumps(raw).encode())


@pytest.mark.parametrize("key", sorted(small_manifest().to_json()))
def test_missing_fields_are_refused(key: str) -> None:
    raw = json.loads(small_manifest().encode())
    del raw[key]
    with pytest.raises(ArtifactError):
        Manifest.decode(json.dumps(raw).encode())


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{", b"\xff\xfe", b"null", b"[" * 100_000, b" " * (MAX_MANIFEST_BYTES + 1), b'{"format": 1}'],
    ids=["empty", "list", "truncated", "not utf-8", "null", "deep", "large", "only format"],
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        Manifest.decode(data)


def test_a_manifest_checks_itself_when_made() -> None:
    with pytest.raises(ArtifactError, match="sparsity"):
        dataclasses.replace(small_manifest(), sparsity=-0.1)


def with_predictions(**changes: Any) -> Manifest:
    raw = small_manifest().to_json()
    raw["golden"]["predictions"] = {"classes": [0, 1, 2] * 2 + [1, 0], "logits": [0.5] * 8, "tolerance": 1e-4} | changes
    return Manifest.decode(json.dumps(raw).encode())


def test_golden_predictions_are_optional() -> None:
    assert small_manifest().golden.predictions is None
    assert "predictions" not in small_manifest().to_json()["golden"]
    manifest = with_predictions()
    assert Manifest.decode(manifest.encode()) == manifest
    assert manifest.golden.predictions == GoldenPredictions((0, 1, 2, 0, 1, 2, 1, 0), (0.5,) * 8, 1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": [0] * 7},
        {"classes": [0] * 7 + [3]},
        {"classes": [0] * 7 + [-1]},
        {"classes": [0] * 7 + [True]},
        {"classes": "00000000"},
        {"logits": [0.5] * 9},
        {"logits": [0.5] * 7 + [float("nan")]},
        {"logits": None},
        {"tolerance": None},
    ],
)
def test_malformed_predictions_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError):
        with_predictions(**changes)


def test_predictions_of_logits() -> None:
    logits = np.array([[0, 2, 1], [3, 2.5, -1]], dtype=np.float32)
    predictions = GoldenPredictions.of_logits(logits, 1e-4)
    assert predictions == GoldenPredictions((1, 0), (2.0, 3.0), 1e-4)
    assert predictions.difference(logits) == 0.0
    assert predictions.difference(logits + np.array([[0, 0, 0], [0.25, 0, 0]], np.float32)) == 0.25
    other_class = logits.copy()
    other_class[1, 1] = 4.0  # the stored logit is right, but another one is larger
    assert predictions.difference(other_class) == 0.5
    assert predictions.difference(logits[:1]) == math.inf
    logits[0, 1] = np.nan
    assert math.isnan(predictions.difference(logits))


def test_golden_batch() -> None:
    x, y = golden_batch((3, 2), 4, 7, 100)
    assert [x.dtype, y.dtype] == [np.float32, np.int64]
    assert [x.shape, y.shape] == [(100, 3, 2), (100,)]
    assert set(y.tolist()) == {0, 1, 2, 3}
    assert not np.array_equal(x, golden_batch((3, 2), 4, 8, 100)[0])
