"""The artifact folder: what is in it, and what happens when it cannot be written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.inference.golden_check import check_predictions
from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.exporter.artifact import export_artifact, verify_artifact
from fedzo.exporter.reference import forward
from fedzo.exporter.sessions import run_graph
from fedzo.protocol.artifact.layout import Layout, initial_weights
from fedzo.protocol.artifact.manifest import CUT_GRAPHS, GRAPHS, Manifest, golden_batch
from fedzo.protocol.artifact.stages import stage_graphs
from fedzo.protocol.errors import ArtifactError, ConfigError
from fedzo.protocol.pruning.mask import Mask, threshold
from tests.exporter.text_graphs import operators, signature

FLOAT, INT32, INT64, DOUBLE = (onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.INT64, 11)


def export(folder: Path, *, sparsity: float = 0.9, seed: int = 7, overwrite: bool = False) -> Manifest:
    return export_artifact("lenet5", (1, 32, 32), 10, sparsity, seed, folder, overwrite=overwrite)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_holds_the_graphs_and_a_manifest(lenet5: Path) -> None:
    manifest = verify_artifact(lenet5)
    variants = [variant.file for variant in manifest.variants]
    graphs = [*GRAPHS, *CUT_GRAPHS, "tail.onnx"]  # no body.onnx: the tail begins where the network is cut
    graphs += stage_graphs(manifest.stages, ("forward", "gradient"))
    assert set(contents(lenet5)) == {*graphs, *(file.name for file in variants), "manifest.json"}
    assert {graph.name for graph in manifest.graphs} == set(graphs)
    assert [plan.name for plan in manifest.memory] == [*graphs, *(file.name for file in variants)]
    for graph in (*manifest.graphs, *variants):
        data = (lenet5 / graph.name).read_bytes()
        assert (len(data), hashlib.sha256(data).digest()) == (graph.size, graph.sha256)
    assert [(u.parameter, u.n_units, u.n_moments, u.is_output) for u in manifest.units] == [
        ("conv1.weight", 6, 25, False),
        ("conv2.weight", 16, 150, False),
        ("fc1.weight", 120, 400, False),
        ("fc2.weight", 84, 120, False),
        ("fc3.weight", 10, 84, True),
    ]
    assert (lenet5.stat().st_mode & 0o777, manifest.producer.split()[0]) == (0o755, "fedzo")


@pytest.mark.parametrize(
    ("name", "inputs", "output"),
    [
        ("probe.onnx", ["w", "index", "counts", "x", "y"], ("loss_sum", DOUBLE, [])),
        ("predict.onnx", ["w", "index", "counts", "x"], ("logits", FLOAT, ["batch", 10])),
        ("saliency.onnx", ["w", "index", "counts", "x", "shift"], ("logits", FLOAT, ["batch", 10])),
        ("moments.onnx", ["w", "index", "counts", "x"], ("moments", FLOAT, [779])),
        ("prefix.onnx", ["w", "index", "counts", "x"], ("features", FLOAT, ["batch", 400])),
        ("suffix.onnx", ["w", "index", "counts", "features", "y"], ("loss_sum", DOUBLE, [])),
        ("tail.onnx", ["w", "index", "counts", "features", "noise", "y"], ("losses", DOUBLE, ["batch"])),
        ("stage2.onnx", ["w", "index", "counts", "features"], ("next_features", FLOAT, ["batch", 120])),
        ("stage2_gradient.onnx", ["w", "index", "counts", "features", "cotangent"], ("gradient", FLOAT, [48_120])),
    ],
)
def test_graphs_keep_the_contract(
    lenet5: Path, name: str, inputs: list[str], output: tuple[str, int, list[int | str]]
) -> None:
    model = onnx.load(lenet5 / name)
    types = {"w": FLOAT, "index": INT32, "counts": INT64, "x": FLOAT, "y": INT64, "shift": FLOAT}
    types |= {"features": FLOAT, "noise": FLOAT, "cotangent": FLOAT}
    n_parameters = {"prefix.onnx": 4, "suffix.onnx": 6, "tail.onnx": 6}.get(name, 2 if "stage" in name else 10)
    shapes = signature(model)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    assert model.ir_version == 8
    assert [value.name for value in model.graph.input] == inputs
    assert [value.type.tensor_type.elem_type for value in model.graph.input] == [types[key] for key in inputs]
    assert shapes["w"] == shapes["index"] == ["survivors"]
    assert shapes["counts"] == [n_parameters]
    assert shapes.get("x", ["batch", 1, 32, 32]) == ["batch", 1, 32, 32]
    assert shapes.get("features", ["batch", 400]) == ["batch", 400]
    assert shapes.get("y", ["batch"]) == ["batch"]
    assert shapes.get("shift", [236]) == [236]
    *others, result = model.graph.output
    assert [o.name for o in others] == (["logits", "inputs"] if name == "tail.onnx" else [])
    assert (shapes.get("noise", ["batch", 204]), shapes.get("inputs", ["batch", 204])) == (["batch", 204],) * 2
    assert (result.name, result.type.tensor_type.elem_type, shapes[result.name]) == output
    assert all(len(tensor.raw_data) < 1024 for tensor in model.graph.initializer), "weights do not belong in a graph"


def test_graphs_describe_themselves(lenet5: Path) -> None:
    manifest = verify_artifact(lenet5)
    for graph in manifest.graphs:
        properties = {item.key: item.value for item in onnx.load(lenet5 / graph.name).metadata_props}
        assert properties["fedzo.format"] == "1"
        assert properties["fedzo.graph"] == graph.name.removesuffix(".onnx")
        assert properties["fedzo.model"] == "lenet5"
        assert properties["fedzo.init_seed"] == "7"
        assert properties["fedzo.sparsity"] == "0.9"
        assert properties["fedzo.layout_digest"] == manifest.layout.digest.hex()
        assert Layout.from_json(json.loads(properties["fedzo.layout"])) == manifest.layout
        assert [u["parameter"] for u in json.loads(properties["fedzo.units"])] == [u.parameter for u in manifest.units]
        assert json.loads(properties["fedzo.golden"])["mean_loss"] == manifest.golden.mean_loss
        envelope = tuple(tuple(pair) for pair in json.loads(properties["fedzo.plan"]))
        assert envelope == next(plan.envelope for plan in manifest.memory if plan.name == graph.name)


def test_the_golden_loss_is_that_of_the_torch_description(lenet5: Path) -> None:
    manifest = verify_artifact(lenet5)
    golden = manifest.golden
    x, y = golden_batch((1, 32, 32), 10, golden.seed, golden.batch)
    z = forward("lenet5", manifest.layout, initial_weights(manifest.layout, manifest.seed), x)
    loss = float(np.mean(np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(y)), y]))
    assert golden.mean_loss == pytest.approx(loss, abs=1e-6)
    assert 1e-5 <= golden.tolerance <= 1e-4
    assert (golden.seed, golden.batch) == (7, 8)


def test_the_board_runtime_gets_the_golden_loss(lenet5: Path, resnet8: Path) -> None:
    for folder in (lenet5, resnet8):
        artifact = load_artifact(folder)
        with Engine(artifact, Mask.dense(artifact.manifest.layout), micro_batch=3) as engine:
            assert engine.check_golden() <= 1e-6
            difference = check_predictions(engine)
            assert difference is not None
            assert difference <= 1e-6


def test_a_mask_is_zeros_in_the_dense_network(lenet5: Path) -> None:
    manifest = verify_artifact(lenet5)
    dense = initial_weights(manifest.layout, 7)
    mask = threshold(manifest.layout, np.abs(dense), 0.9)
    x, _ = golden_batch((1, 32, 32), 10, 0, 4)
    predict = (lenet5 / "predict.onnx").read_bytes()
    everything = Mask.dense(manifest.layout)
    feeds: dict[str, NDArray[Any]] = {"index": everything.index(), "counts": everything.counts(), "x": x}
    expected = run_graph(predict, {**feeds, "w": np.where(mask.kept, dense, np.float32(0.0))})["logits"]
    feeds |= {"w": dense[mask.survivors()], "index": mask.index(), "counts": mask.counts()}
    assert np.array_equal(run_graph(predict, feeds)["logits"], expected)


def test_two_exports_have_the_same_bytes(tmp_path: Path) -> None:
    export(tmp_path / "a")
    export(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    export(tmp_path / "c", seed=8)
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_without_sparsity_there_is_no_scatter_and_no_index(tmp_path: Path) -> None:
    manifest = export(tmp_path / "dense", sparsity=0.0)
    assert manifest.layout.maskable_size == 0
    assert manifest.n_units == 236
    for graph in manifest.graphs:
        model = onnx.load(tmp_path / "dense" / graph.name)
        assert "index" not in signature(model)
        assert not {"ScatterElements", "ConstantOfShape"} & set(operators(model))
    artifact = load_artifact(tmp_path / "dense")
    with Engine(artifact, Mask.dense(artifact.manifest.layout)) as engine:
        assert engine.check_golden() <= 1e-6


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan"), float("inf")])
def test_sparsity_out_of_range(tmp_path: Path, sparsity: float) -> None:
    with pytest.raises(ConfigError, match="it must be at least 0 and below 1"):
        export(tmp_path / "a", sparsity=sparsity)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_seed_out_of_range(tmp_path: Path, seed: int) -> None:
    with pytest.raises(ConfigError, match="is not an unsigned 64-bit number"):
        export(tmp_path / "a", seed=seed)


def test_the_largest_seed(tmp_path: Path) -> None:
    assert export(tmp_path / "a", seed=(1 << 64) - 1).seed == (1 << 64) - 1
    verify_artifact(tmp_path / "a")


def test_an_existing_artifact_is_replaced_only_when_asked(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "er" / "artifact"
    export(folder, seed=1)
    before = contents(folder)
    with pytest.raises(ConfigError, match="exists") as caught:
        export(folder, seed=2)
    assert "--overwrite" in caught.value.hint
    assert contents(folder) == before
    assert export(folder, seed=2, overwrite=True).seed == 2
    assert verify_artifact(folder).seed == 2
    assert [path.name for path in folder.parent.iterdir()] == ["artifact"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    export(tmp_path / "empty")
    verify_artifact(tmp_path / "empty")


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_folders_files_and_links_are_never_touched(tmp_path: Path, overwrite: bool) -> None:
    folder, file, link = tmp_path / "home", tmp_path / "file", tmp_path / "link"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    file.write_text("a file")
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"holds 'thesis\.txt', which is no part of an artifact"):
        export(folder, overwrite=overwrite)
    for target in (file, link):
        with pytest.raises(ConfigError, match="exists and is no folder"):
            export(target, overwrite=overwrite)
    assert contents(folder) == {"thesis.txt": b"years of work"}
    assert file.read_text() == "a file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "home", "link"]


@pytest.mark.parametrize("call", [1, 3, 5, 6])
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_nothing_or_the_old_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, existing: bool
) -> None:
    folder = tmp_path / "artifact"
    if existing:
        export(folder, seed=1)
    before = contents(folder) if existing else {}
    flush, calls = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left on device") as caught:
        export(folder, seed=2, overwrite=True)
    assert "free disk space" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == (["artifact"] if existing else [])
    assert (contents(folder) if existing else {}) == before


def test_a_rename_that_fails_brings_the_old_artifact_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "artifact"
    export(folder, seed=1)
    before = contents(folder)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".new"):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ConfigError, match="Operation not permitted"):
        export(folder, seed=2, overwrite=True)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_a_path_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written|cannot be read"):
        export(tmp_path / "file" / "artifact")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("probe.onnx", lambda data: data[:-1], "is not the file that the manifest names"),
        ("moments.onnx", lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:], "is not the file"),
        ("manifest.json", lambda data: data[:-20], "the manifest is not JSON"),
        ("manifest.json", lambda data: data.replace(b"conv1.bias", b"conv9.bias", 1), "does not have the digest"),
        ("predict.onnx", None, "cannot be read: No such file"),
    ],
)
def test_a_damaged_artifact_is_found(tmp_path: Path, name: str, change: Any, message: str) -> None:
    export(tmp_path / "a")
    path = tmp_path / "a" / name
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ArtifactError, match=message):
        verify_artifact(tmp_path / "a")
