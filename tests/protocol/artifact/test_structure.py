"""The record of removed channels: round trip and refusal of everything else."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from fedzo.protocol.artifact.manifest import GraphMemory, Manifest
from fedzo.protocol.artifact.structure import NarrowedLayer, Structure
from fedzo.protocol.artifact.whole_network import whole_network
from fedzo.protocol.errors import ArtifactError
from tests.protocol.builders import small_manifest

STRUCTURE = Structure(
    "uniform",
    0.5,
    (NarrowedLayer("conv.weight", 8, 2, (0, 2, 5, 7)), NarrowedLayer("fc.weight", 3, 1, (0, 1, 2))),
    ((8, 4, 3, 3), (8,), (8,), (3, 36)),
    (GraphMemory("probe.onnx", ((2000, 20),)), GraphMemory("predict.onnx", ((1000, 20),))),
    {"probe.onnx": 4321, "predict.onnx": 99},
    12345,
)


def with_structure(*path: str | int, to: object) -> Manifest:
    """A manifest whose record has one value changed."""
    raw = small_manifest().to_json()
    raw["structure"] = json.loads(json.dumps(STRUCTURE.to_json()))
    if path:
        place: Any = raw["structure"]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to
    return Manifest.decode(json.dumps(raw).encode())


def test_round_trip_and_the_whole_network() -> None:
    manifest = with_structure(to=None)
    assert manifest.structure == STRUCTURE
    assert Manifest.decode(manifest.encode()) == manifest
    assert "structure" not in small_manifest().to_json()
    whole = whole_network(manifest)
    assert whole.layout.size == STRUCTURE.parameters == 8 * 36 + 16 + 108
    assert [(u.n_units, u.groups, u.shift_offset, u.n_moments) for u in whole.units] == [(8, 2, 0, 72), (3, 1, 8, 36)]
    assert whole.live_bytes("probe.onnx", 10) == 2200
    assert (whole.structure, whole.graph("probe.onnx").size) == (None, 4321)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("scores",), "best"),
        (("scores",), 3),
        (("keep",), 0.0),
        (("keep",), 1.0),
        (("keep",), float("nan")),
        (("keep",), "0.5"),
        (("keep",), True),
        (("layers",), []),
        (("layers",), None),
        (("layers", 0, "parameter"), "other.weight"),
        (("layers", 0, "n_units"), 7),
        (("layers", 0, "n_units"), 9),
        (("layers", 0, "groups"), 0),
        (("layers", 0, "kept"), [0, 2, 5]),
        (("layers", 0, "kept"), [0, 2, 2, 5]),
        (("layers", 0, "kept"), [5, 2, 0, 7]),
        (("layers", 0, "kept"), [0, 2, 5, 8]),
        (("layers", 0, "kept"), [0, 2, 5, -1]),
        (("layers", 0, "kept"), []),
        (("shapes",), []),
        (("shapes", 0), [8, 4, 3]),
        (("shapes", 0), [8, 1, 3, 3]),
        (("shapes", 0), [8, 4, 3, 1 << 50]),
        (("memory",), {}),
        (("memory",), {"other.onnx": [[1, 2]]}),
        (("graph_bytes",), {"probe.onnx": 4321}),
        (("graph_bytes", "probe.onnx"), -1),
        (("multiply_accumulates",), 1.5),
    ],
)
def test_impossible_records(path: tuple[str | int, ...], value: object) -> None:
    with pytest.raises(ArtifactError):
        with_structure(*path, to=value)


@pytest.mark.parametrize("record", [[], "x", 3, {}])
def test_malformed_records(record: object) -> None:
    raw = small_manifest().to_json() | {"structure": record}
    with pytest.raises(ArtifactError, match="malformed"):
        Manifest.decode(json.dumps(raw).encode())


def test_a_record_of_another_layout() -> None:
    layers = (dataclasses.replace(STRUCTURE.layers[0], kept=(0, 1)), STRUCTURE.layers[1])
    with pytest.raises(ArtifactError, match="does not match its layout"):
        dataclasses.replace(small_manifest(), structure=dataclasses.replace(STRUCTURE, layers=layers))
