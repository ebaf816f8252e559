"""A network small enough to recompute in float64, written as an artifact by hand.

``x (2, 3)`` -> fc1 (5 units, tanh) -> fc2 (4 logits). It follows the graph contract but needs neither torch nor the
exporter, so the tests of the board runtime stay on the board's side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from fedzo.edge_runtime.inference.ort import LAYOUT_KEY
from fedzo.edge_runtime.storage.artifact import Artifact, load_artifact
from fedzo.protocol.artifact.golden_answer import GoldenPredictions
from fedzo.protocol.artifact.layout import Initialiser, Layout, Parameter, initial_weights
from fedzo.protocol.artifact.manifest import Golden, GraphFile, GraphMemory, Manifest, UnitLayer, golden_batch
from fedzo.protocol.pruning.mask import Mask

INPUT_SHAPE = (2, 3)
N_CLASSES = 4
HIDDEN = 5
LAYOUT = Layout(
    (
        Parameter("fc1.weight", (HIDDEN, 6), True, Initialiser("normal", 0.5)),
        Parameter("fc1.bias", (HIDDEN,), False, Initialiser("uniform", 0.25)),
        Parameter("fc2.weight", (N_CLASSES, HIDDEN), True, Initialiser("normal", 0.5)),
        Parameter("fc2.bias", (N_CLASSES,), False, Initialiser("constant", 0.0)),
    )
)
UNITS = (
    UnitLayer("fc1.weight", HIDDEN, 1, 0, 0, 6, False),
    UnitLayer("fc2.weight", N_CLASSES, 1, HIDDEN, 6, HIDDEN, True),
)
SEED = 11


@dataclass(frozen=True)
class Reference:
    """The same network in float64."""

    def split(self, dense: NDArray[Any]) -> list[NDArray[np.float64]]:
        return [dense[LAYOUT.slice_of(k)].astype(np.float64).reshape(p.shape) for k, p in enumerate(LAYOUT.parameters)]

    def logits(self, dense: NDArray[Any], x: NDArray[Any], shift: NDArray[Any] | None = None) -> NDArray[np.float64]:
        w1, b1, w2, b2 = self.split(dense)
        shift = np.zeros(HIDDEN + N_CLASSES) if shift is None else shift.astype(np.float64)
        hidden = np.tanh(x.reshape(len(x), -1).astype(np.float64) @ w1.T + b1 + shift[:HIDDEN])
        return np.asarray(hidden @ w2.T + b2 + shift[HIDDEN:])

    def loss(self, dense: NDArray[Any], x: NDArray[Any], y: NDArray[np.int64]) -> float:
        logits = self.logits(dense, x)
        logits -= logits.max(axis=1, keepdims=True)
        return float(np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y]))

    def gradient(self, dense: NDArray[Any], x: NDArray[Any], y: NDArray[np.int64]) -> NDArray[np.float64]:
        w1, b1, w2, _ = self.split(dense)
        flat = x.reshape(len(x), -1).astype(np.float64)
        hidden = np.tanh(flat @ w1.T + b1)
        logits = self.logits(dense, x)
        delta = np.exp(logits - logits.max(axis=1, keepdims=True))
        delta /= delta.sum(axis=1, keepdims=True)
        delta[np.arange(len(y)), y] -= 1.0
        delta /= len(y)
        inner = (delta @ w2) * (1.0 - hidden**2)
        parts = (inner.T @ flat, inner.sum(axis=0), delta.T @ hidden, delta.sum(axis=0))
        return np.concatenate([part.ravel() for part in parts])

    def moments(self, dense: NDArray[Any], x: NDArray[Any]) -> NDArray[np.float64]:
        w1, b1, _, _ = self.split(dense)
        flat = x.reshape(len(x), -1).astype(np.float64)
        hidden = np.tanh(flat @ w1.T + b1)
        return np.concatenate([(flat**2).mean(axis=0), (hidden**2).mean(axis=0)])


def _weights_nodes() -> tuple[list[Any], list[Any]]:
    nodes, constants = [], []
    names = [p.name for p in LAYOUT.parameters]
    nodes.append(helper.make_node("Split", ["w", "counts"], [f"{n}.w" for n in names], axis=0))
    nodes.append(helper.make_node("Split", ["index", "counts"], [f"{n}.i" for n in names], axis=0))
    for p in LAYOUT.parameters:
        constants.append(helper.make_tensor(f"{p.name}.shape", TensorProto.INT64, [len(p.shape)], p.shape))
        flat = f"{p.name}.w"
        if p.maskable:
            constants.append(helper.make_tensor(f"{p.name}.size", TensorProto.INT64, [1], [p.size]))
            zero = helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0])
            nodes.append(helper.make_node("ConstantOfShape", [f"{p.name}.size"], [f"{p.name}.zeros"], value=zero))
            flat = f"{p.name}.flat"
            nodes.append(helper.make_node("ScatterElements", [f"{p.name}.zeros", f"{p.name}.i", f"{p.name}.w"], [flat]))
        nodes.append(helper.make_node("Reshape", [flat, f"{p.name}.shape"], [p.name]))
    return nodes, constants


def build_graph(name: str, layout_digest: str = LAYOUT.digest.hex()) -> bytes:
    """The bytes of one graph of the contract."""
    value = helper.make_tensor_value_info
    nodes, constants = _weights_nodes()
    inputs = [
        value("w", TensorProto.FLOAT, ["survivors"]),
        value("index", TensorProto.INT32, ["survivors"]),
        value("counts", TensorProto.INT64, [len(LAYOUT.parameters)]),
        value("x", TensorProto.FLOAT, ["batch", *INPUT_SHAPE]),
    ]
    nodes.append(helper.make_node("Flatten", ["x"], ["flat"], axis=1))
    nodes.append(helper.make_node("Gemm", ["flat", "fc1.weight", "fc1.bias"], ["pre"], transB=1))
    hidden_in, logits = "pre", "logits"
    if name == "saliency.onnx":
        inputs.append(value("shift", TensorProto.FLOAT, [HIDDEN + N_CLASSES]))
        constants.append(helper.make_tensor("units", TensorProto.INT64, [2], [HIDDEN, N_CLASSES]))
        nodes.append(helper.make_node("Split", ["shift", "units"], ["shift1", "shift2"], axis=0))
        nodes.append(helper.make_node("Add", ["pre", "shift1"], ["shifted"]))
        hidden_in, logits = "shifted", "unshifted"
    nodes.append(helper.make_node("Tanh", [hidden_in], ["hidden"]))
    nodes.append(helper.make_node("Gemm", ["hidden", "fc2.weight", "fc2.bias"], [logits], transB=1))
    outputs = [value("logits", TensorProto.FLOAT, ["batch", N_CLASSES])]
    if name == "saliency.onnx":
        nodes.append(helper.make_node("Add", ["unshifted", "shift2"], ["logits"]))
    if name == "probe.onnx":
        inputs.append(value("y", TensorProto.INT64, ["batch"]))
        outputs = [value("loss_sum", TensorProto.DOUBLE, [])]
        constants.append(helper.make_tensor("one", TensorProto.INT64, [1], [1]))
        nodes += [
            helper.make_node("Cast", ["logits"], ["logits64"], to=TensorProto.DOUBLE),
            helper.make_node("LogSoftmax", ["logits64"], ["log_p"], axis=1),
            helper.make_node("Unsqueeze", ["y", "one"], ["y2"]),
            helper.make_node("GatherElements", ["log_p", "y2"], ["picked"], axis=1),
            helper.make_node("ReduceSum", ["picked"], ["negative"], keepdims=0),
            helper.make_node("Neg", ["negative"], ["loss_sum"]),
        ]
    if name == "moments.onnx":
        outputs = [value("moments", TensorProto.FLOAT, [6 + HIDDEN])]
        for source, part in (("flat", "m1"), ("hidden", "m2")):
            nodes.append(helper.make_node("Mul", [source, source], [f"{part}.sq"]))
            nodes.append(helper.make_node("ReduceMean", [f"{part}.sq"], [part], axes=[0], keepdims=0))
        nodes.append(helper.make_node("Concat", ["m1", "m2"], ["moments"], axis=0))
    graph = helper.make_graph(nodes, name, inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {LAYOUT_KEY: layout_digest})
    return bytes(model.SerializeToString())


def write_artifact(folder: Path, change: Callable[[dict[str, bytes]], None] | None = None) -> Manifest:
    """Write the artifact; ``change`` may replace graphs before they are hashed."""
    names = ("probe.onnx", "predict.onnx", "saliency.onnx", "moments.onnx")
    graphs = {name: build_graph(name) for name in names}
    if change is not None:
        change(graphs)
    x, y = golden_batch(INPUT_SHAPE, N_CLASSES, 5, 16)
    weights = initial_weights(LAYOUT, SEED)
    predictions = GoldenPredictions.of_logits(Reference().logits(weights, x).astype(np.float32), 1e-4)
    manifest = Manifest(
        model="tiny",
        input_shape=INPUT_SHAPE,
        n_classes=N_CLASSES,
        seed=SEED,
        sparsity=0.5,
        layout=LAYOUT,
        units=UNITS,
        graphs=tuple(GraphFile(n, hashlib.sha256(d).digest(), len(d)) for n, d in graphs.items()),
        memory=tuple(GraphMemory(n, ((400, 160), (300, 200))) for n in names),
        golden=Golden(5, 16, Reference().loss(weights, x, y), 1e-5, predictions),
        producer="tests",
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_bytes(manifest.encode())
    for name, data in graphs.items():
        (folder / name).write_bytes(data)
    return manifest


@dataclass(frozen=True)
class Tiny:
    """What a test needs of the small network."""

    folder: Path
    artifact: Artifact
    reference: Reference
    dense: Mask
    half: Mask
    weights: NDArray[np.float32]
    x: NDArray[np.float32]
    y: NDArray[np.int64]

    def expand(self, mask: Mask, weights: NDArray[Any]) -> NDArray[Any]:
        """The dense vector of the surviving ``weights``, in their type."""
        out = np.zeros(LAYOUT.size, dtype=weights.dtype)
        out[mask.survivors()] = weights
        return out

    def survivors(self, mask: Mask) -> NDArray[np.float32]:
        return self.weights[mask.survivors()]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    write_artifact(folder)
    kept = ~LAYOUT.maskable()
    kept[::2] = True
    x, y = golden_batch(INPUT_SHAPE, N_CLASSES, 7, 23)
    return Tiny(
        folder=folder,
        artifact=load_artifact(folder),
        reference=Reference(),
        dense=Mask.dense(LAYOUT),
        half=Mask(LAYOUT, kept),
        weights=initial_weights(LAYOUT, SEED),
        x=x,
        y=y,
    )


@pytest.fixture
def write_tiny_artifact() -> Callable[..., Manifest]:
    """:func:`write_artifact`, for tests that need a damaged or unusual artifact."""
    return write_artifact
