"""Devices get the graph that was made for their processors over MQTT too, and need not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fedzo.edge_runtime.inference.variants import matching_variant
from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.protocol.artifact.graph_files import GraphVariant
from tests.end_to_end.conftest import Finished, MakeFleet
from tests.end_to_end.fleet import agree


@pytest.fixture
def variant(artifact: Path) -> GraphVariant:
    found = matching_variant(load_artifact(artifact).manifest, "probe.onnx")
    if found is None:
        pytest.skip("onnxruntime has no blocked kernels on this machine")
    return found


def test_losses_are_computed_with_the_variant(undisturbed: Finished, variant: GraphVariant) -> None:
    assert [device["layout"] for device in undisturbed.devices] == ["blocked"] * 3
    for device in undisturbed.devices:
        assert (undisturbed.fleet.folder / f"state-{device['device']}" / "blobs" / variant.file.sha256.hex()).is_file()


def test_layouts_differ_and_weights_agree(fleets: MakeFleet, variant: GraphVariant) -> None:
    fleet = fleets(2)
    server = fleet.serve()
    boards = [fleet.device(0), fleet.device(1, rig="portable")]
    answer, answers = server.answer(), [board.answer() for board in boards]
    agree(answer, answers)
    assert [board["layout"] for board in answers] == ["blocked", "portable"]
    kept = [fleet.folder / f"state-board-{n}" / "blobs" / variant.file.sha256.hex() for n in range(2)]
    assert [path.exists() for path in kept] == [True, False]


def test_a_server_without_the_variant_changes_nothing_else(
    fleets: MakeFleet, artifact: Path, tmp_path: Path, variant: GraphVariant
) -> None:
    fleet = fleets(2)
    fleet.artifact = tmp_path / "artifact"
    shutil.copytree(artifact, fleet.artifact)
    (fleet.artifact / variant.file.name).unlink()
    server, boards = fleet.serve(), fleet.devices()
    answer, answers = server.answer(), [board.answer() for board in boards]
    agree(answer, answers)
    assert [board["layout"] for board in answers] == ["portable"] * 2
