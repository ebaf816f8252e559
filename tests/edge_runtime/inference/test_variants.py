"""Variants of the probe graph: chosen only where they fit, checked before use, and left out silently otherwise."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fedzo.edge_runtime.inference import engine as engine_of_board
from fedzo.edge_runtime.inference import variants
from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.inference.ort import LAYOUT_KEY, runtime_version
from fedzo.edge_runtime.planning.memory import TRAINING_GRAPHS, arena_bytes_of, plan
from fedzo.edge_runtime.storage.artifact import Artifact, BlobStore, load_artifact
from fedzo.protocol.artifact.graph_files import GraphFile, GraphVariant
from fedzo.protocol.artifact.layout import Layout
from fedzo.protocol.artifact.manifest import GraphMemory, Manifest
from fedzo.protocol.artifact.placement import PLACEMENTS_KEY, BlockedAxis, Placement, encode_placements
from fedzo.protocol.errors import ArtifactError, ConfigError, SelfTestError

from ..conftest import LAYOUT, Tiny, build_graph

NAME = "probe.nchwc16.onnx"
# fc1.weight (5, 6) transposed and padded to (6, 16); the others as they are.
PLACEMENTS = {"fc1.weight": Placement(96, (BlockedAxis(5, 0, 1), BlockedAxis(6, 0, 16)))}


def transposed_probe(placements: str | None = None, layout: Layout = LAYOUT) -> bytes:
    """``probe.onnx`` with weights as inputs of their own, the first one transposed and padded."""
    model = onnx.load_from_string(build_graph("probe.onnx"))
    graph = model.graph
    weights = {p.name for p in layout.parameters}
    nodes = [n for n in graph.node if n.output[0] not in weights and n.op_type not in ("Split", "ScatterElements")]
    nodes = [n for n in nodes if n.op_type != "ConstantOfShape"]
    (gemm,) = (n for n in nodes if "fc1.weight" in n.input)
    del gemm.attribute[:]
    gemm.input[1] = "cut"
    for name, value in (("from", [0]), ("to", [5]), ("axis", [1])):
        graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [1], value))
    inputs = [
        helper.make_tensor_value_info(p.name, TensorProto.FLOAT, (6, 16) if p.name == "fc1.weight" else p.shape)
        for p in layout.parameters
    ]
    inputs += [value for value in graph.input if value.name in ("x", "y")]
    del graph.node[:], graph.input[:]
    graph.node.append(helper.make_node("Slice", ["fc1.weight", "from", "to", "axis"], ["cut"]))
    graph.node.extend(nodes)
    graph.input.extend(inputs)
    onnx.checker.check_model(model)
    text = encode_placements(PLACEMENTS) if placements is None else placements
    helper.set_model_props(model, {LAYOUT_KEY: layout.digest.hex(), PLACEMENTS_KEY: text})
    return bytes(model.SerializeToString())


def add_variant(folder: Path, data: bytes, **changes: Any) -> Manifest:
    """Put a variant for this machine into an artifact folder, or one with ``changes``."""
    manifest = Manifest.decode((folder / "manifest.json").read_bytes())
    variant = GraphVariant(
        GraphFile(NAME, hashlib.sha256(data).digest(), len(data)),
        graph="probe.onnx",
        machine="x86_64",
        onnxruntime=runtime_version(),
        block=16,
        weight_bytes=4 * (96 + 5 + 20 + 4),
    )
    manifest = dataclasses.replace(
        manifest,
        variants=(dataclasses.replace(variant, **changes),),
        memory=(*manifest.memory, GraphMemory(NAME, ((300, 2000),))),
    )
    (folder / "manifest.json").write_bytes(manifest.encode())
    (folder / NAME).write_bytes(data)
    return manifest


@pytest.fixture(autouse=True)
def _this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variant above holds no blocked kernels, so that it can run anywhere: say that its machine is this one."""
    monkeypatch.setattr(variants, "machine_family", lambda: "x86_64")
    monkeypatch.setattr(variants, "block_size", lambda: 16)


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    copy = tmp_path / "artifact"
    shutil.copytree(tiny.folder, copy)
    return copy


@pytest.mark.parametrize("layout", ["auto", "blocked"])
@pytest.mark.parametrize("micro_batch", [1, 7, 32])
def test_losses(tiny: Tiny, folder: Path, layout: Any, micro_batch: int) -> None:
    add_variant(folder, transposed_probe())
    for mask in (tiny.half, tiny.dense):
        with Engine(load_artifact(folder), mask, layout=layout, micro_batch=micro_batch) as engine:
            assert engine.layout == "blocked"
            for scale in (1.0, -0.5, 1.0):
                weights = tiny.survivors(mask) * np.float32(scale)
                dense = tiny.expand(mask, weights)
                expected = tiny.reference.loss(dense, tiny.x, tiny.y)
                assert engine.loss(weights, tiny.x, tiny.y) == pytest.approx(expected, abs=2e-6)
                np.copyto(engine.weights_feed, weights)
                assert engine.loss(engine.weights_feed, tiny.x, tiny.y) == pytest.approx(expected, abs=2e-6)
                # Another graph, the portable one, in between.
                expected_logits = tiny.reference.logits(dense, tiny.x)
                np.testing.assert_allclose(engine.logits(weights, tiny.x), expected_logits, atol=2e-6)
            assert engine.layout == "blocked"
            assert engine.check_golden() <= engine.artifact.manifest.golden.tolerance


def test_a_batch_that_changes_is_read_again(tiny: Tiny, folder: Path) -> None:
    """The engine does not check and bind the same batch twice; other arrays, and other values, must be seen."""
    weights = tiny.survivors(tiny.half)
    x, y = tiny.x.copy(), tiny.y.copy()
    with Engine(tiny.artifact, tiny.half) as engine, Engine(tiny.artifact, tiny.half) as fresh:
        first = engine.loss(weights, x, y)
        assert engine.loss(weights, x, y) == first
        x[:] = -x
        assert engine.loss(weights, x, y) == fresh.loss(weights, -tiny.x, y) != first
        assert engine.loss(weights, x[:5], y[:5]) == fresh.loss(weights, -tiny.x[:5], y[:5])
        assert engine.loss(weights, tiny.x, y) == first
        engine.logits(weights, -tiny.x)
        del x
        other = [np.full_like(tiny.x, value) for value in range(3)]
        expected = [fresh.loss(weights, value, y) for value in other]
        assert [engine.loss(weights, value, y) for value in other] == expected
        assert engine.sample_passes == 7 * len(y) + 5 + len(y)


@pytest.mark.parametrize(
    "changes",
    [{"onnxruntime": "1.0.0"}, {"block": 8}],
)
def test_a_variant_for_another_machine(tiny: Tiny, folder: Path, changes: dict[str, Any]) -> None:
    add_variant(folder, transposed_probe(), **changes)
    artifact = load_artifact(folder)
    assert variants.matching_variant(artifact.manifest, "probe.onnx") is None
    assert Engine(artifact, tiny.half).layout == "portable"
    with pytest.raises(ConfigError, match="no graph for this processor"):
        Engine(artifact, tiny.half, layout="blocked")


def test_another_processor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = add_variant(folder, transposed_probe())
    assert variants.matching_variant(manifest, "probe.onnx") is not None
    assert variants.matching_variant(manifest, "predict.onnx") is None
    monkeypatch.setattr(variants, "machine_family", lambda: "aarch64")
    assert variants.matching_variant(manifest, "probe.onnx") is None


@pytest.mark.parametrize("fault", ["absent", "changed"])
def test_a_variant_that_is_not_here(tiny: Tiny, folder: Path, fault: str) -> None:
    add_variant(folder, transposed_probe())
    if fault == "absent":
        (folder / NAME).unlink()
    else:
        (folder / NAME).write_bytes(transposed_probe(placements="{}"))
    with Engine(load_artifact(folder), tiny.half) as engine:
        assert engine.layout == "portable"
        engine.loss(tiny.survivors(tiny.half), tiny.x, tiny.y)


def test_blobs_without_the_variant_are_enough(tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    manifest = add_variant(folder, transposed_probe())
    store = BlobStore(tmp_path / "blobs")
    for graph in manifest.graphs:
        store.put((folder / graph.name).read_bytes())
    assert store.missing(manifest) == []
    data = (folder / "manifest.json").read_bytes()
    assert Engine(Artifact.from_blobs(data, store), tiny.half).layout == "portable"
    store.put((folder / NAME).read_bytes())
    assert Engine(Artifact.from_blobs(data, store), tiny.half).layout == "blocked"


@pytest.mark.parametrize(
    "data",
    [
        transposed_probe(
            encode_placements({"fc1.weight": Placement(96, (BlockedAxis(5, 0, 2), BlockedAxis(6, 0, 16)))})
        ),
        transposed_probe("{}"),
        transposed_probe(""),
        build_graph("probe.onnx"),
        b"no graph",
    ],
    ids=["wrong places", "no places", "no rules", "portable", "garbage"],
)
def test_a_variant_with_another_answer_is_dropped(
    tiny: Tiny, folder: Path, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    add_variant(folder, data)
    weights = tiny.survivors(tiny.half)
    with Engine(tiny.artifact, tiny.half) as portable:
        expected = portable.loss(weights, tiny.x, tiny.y)
    for ask in ("loss", "golden"):
        caplog.clear()
        with Engine(load_artifact(folder), tiny.half) as engine, caplog.at_level(logging.INFO, logger="fedzo"):
            assert engine.layout == "blocked"
            if ask == "golden":
                engine.check_golden()
            assert engine.loss(weights, tiny.x, tiny.y) == expected
            after: str = engine.layout
            assert after == "portable"
            assert caplog.text.count("portable graph") == 1
    required = Engine(load_artifact(folder), tiny.half, layout="blocked")
    with required as engine, pytest.raises((SelfTestError, ArtifactError)):
        engine.loss(weights, tiny.x, tiny.y)


def test_a_variant_that_could_not_be_checked_is_not_used(
    tiny: Tiny, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Engine) -> None:
        raise MemoryError

    add_variant(folder, b"no graph")
    weights = tiny.survivors(tiny.half)
    with Engine(load_artifact(folder), tiny.half) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine_of_board, "wrong_answer", fails)
            for _ in range(2):
                with pytest.raises(MemoryError):
                    engine.loss(weights, tiny.x, tiny.y)
        assert np.isfinite(engine.loss(weights, tiny.x, tiny.y))  # checked after all, and dropped


def test_the_plan_counts_a_variant(tiny: Tiny, folder: Path) -> None:
    manifest = add_variant(folder, transposed_probe())
    artifact, n = load_artifact(folder), tiny.half.n_survivors
    common = {"budget_mib": 500.0, "batch": 32, "micro_batch": 32}
    portable = plan(manifest, n, graphs=TRAINING_GRAPHS, **common)  # type: ignore[arg-type]
    both = plan(manifest, n, graphs=(*TRAINING_GRAPHS, NAME), **common)  # type: ignore[arg-type]
    assert both.planned_peak_mib > portable.planned_peak_mib
    assert both.feeds_mib - portable.feeds_mib == pytest.approx((4 * 125 + 12 * n) / 2**20)
    assert (both.live_mib - portable.live_mib) * 2**20 == pytest.approx(300 + 2000 * 32 - (300 + 200 * 32 + 8 * n))
    assert arena_bytes_of(manifest, (NAME,), n, 32, 1) <= both.arena_bytes
    for limits, layout in ((portable, "portable"), (both, "blocked")):
        with Engine(artifact, tiny.half, micro_batch=32, arena_bytes=limits.arena_bytes) as engine:
            assert engine.layout == layout
            engine.loss(tiny.survivors(tiny.half), tiny.x, tiny.y)
            assert engine.layout == layout


def test_an_unknown_layout(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="auto, portable, blocked"):
        Engine(tiny.artifact, tiny.half, layout="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("model name\t: Xeon\nflags\t\t: fpu sse2 avx avx2 avx512f avx512bw\n", 16),
        ("flags\t\t: fpu sse2 avx avx2\n", 8),
        ("flags\t\t: fpu sse2\n", 0),
        ("Features\t: fp asimd\nCPU part\t: 0xd03\n", 0),
        ("", 0),
        (None, 0),
    ],
)
def test_block_size(tmp_path: Path, text: str | None, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    assert variants.block_size(path) == block
