"""Tiny artifacts without graphs, and an engine that answers tasks in numpy."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random

import numpy as np
from numpy.typing import NDArray

from fedzo.protocol.artifact.cut import Cut
from fedzo.protocol.artifact.dense_tail import DenseLayer, DenseTail
from fedzo.protocol.artifact.layout import Initialiser, Layout, Parameter
from fedzo.protocol.artifact.manifest import (
    CUT_GRAPHS,
    GRAPHS,
    TAIL_GRAPHS,
    Golden,
    GraphFile,
    GraphMemory,
    Manifest,
    UnitLayer,
)
from fedzo.protocol.device_side.device_events import Outcome, Task
from fedzo.protocol.perturbation.blocks import blocks_of, directions_of
from fedzo.protocol.perturbation.directions import Directions
from fedzo.protocol.perturbation.sketch import GradientSketch
from fedzo.protocol.pruning.mask import Mask
from fedzo.protocol.settings import EstimatorName, RunSettings
from fedzo.protocol.wire.documents import RunDocument
from fedzo.protocol.wire.framing import run_tag
from fedzo.protocol.wire.messages import ReportKind
from tests.protocol.builders import seeded_normals

TAG = run_tag("run-1")


@functools.cache
def fake_graphs() -> dict[str, bytes]:
    """Bytes that stand for graphs; the first one takes several blocks."""
    return {name: random.Random(name).randbytes(150_000 if i == 0 else 40 + i) for i, name in enumerate(GRAPHS)}


@functools.cache
def cut_graphs() -> dict[str, bytes]:
    """Bytes that stand for the graphs of a cut and of a dense tail."""
    return {name: random.Random(name).randbytes(50) for name in (*CUT_GRAPHS, *TAIL_GRAPHS)}


@functools.cache
def optional_graph() -> tuple[GraphFile, bytes]:
    """A graph that the manifest does not list and that a device can do without; it takes two blocks."""
    data = random.Random("optional").randbytes(70_000)
    return GraphFile("probe.nchwc16.onnx", hashlib.sha256(data).digest(), len(data)), data


@functools.cache
def tiny_manifest() -> Manifest:
    """Two linear layers: 40 parameters, 36 of them maskable."""
    graphs = fake_graphs()
    return Manifest(
        model="tiny",
        input_shape=(6,),
        n_classes=3,
        seed=3,
        sparsity=0.5,
        layout=Layout(
            (
                Parameter("hidden.weight", (4, 6), True, Initialiser("normal", 0.25)),
                Parameter("hidden.bias", (4,), False, Initialiser("constant", 0.0)),
                Parameter("output.weight", (3, 4), True, Initialiser("uniform", 0.5)),
            )
        ),
        units=(
            UnitLayer("hidden.weight", 4, 1, 0, 0, 6, False),
            UnitLayer("output.weight", 3, 1, 4, 6, 4, True),
        ),
        graphs=tuple(GraphFile(name, hashlib.sha256(data).digest(), len(data)) for name, data in graphs.items()),
        memory=tuple(GraphMemory(name, ((100, 10),)) for name in graphs),
        golden=Golden(1, 4, 1.1, 1e-5),
        producer="tests",
    )


@functools.cache
def cut_manifest() -> Manifest:
    """The same layers with a cut in front of the last one, which is a dense tail."""
    manifest, graphs = tiny_manifest(), cut_graphs()
    cut = Cut(2, (4,), 24, 12)
    return dataclasses.replace(
        manifest,
        graphs=(*manifest.graphs, *(GraphFile(n, hashlib.sha256(d).digest(), len(d)) for n, d in graphs.items())),
        memory=(*manifest.memory, *(GraphMemory(name, ((100, 10),)) for name in graphs)),
        cut=cut,
        tail=DenseTail(cut, (DenseLayer(2, None),)),
    )


def manifest_for(estimator: EstimatorName) -> Manifest:
    """The artifact of a run with that estimator."""
    return tiny_manifest() if estimator == "stein" else cut_manifest()


def run_document(settings: RunSettings, run: str = "run-1") -> RunDocument:
    """The document of a run over :func:`manifest_for` its estimator."""
    data = manifest_for(settings.training.estimator).encode()
    return RunDocument(run, hashlib.sha256(data).hexdigest(), len(data), settings)


class FakeEngine:
    """Answers tasks by a logistic regression over all 40 parameters, in float64; a function of name and task alone."""

    def __init__(self, name: str, samples: int = 12) -> None:
        self._name = name
        index = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        size = tiny_manifest().layout.size
        self.x = seeded_normals(1, index, samples * size).reshape(samples, size).astype(np.float64)
        self.y = np.sign(self.x @ seeded_normals(2, 0, size).astype(np.float64) + 0.5)

    def loss(self, mask: Mask, weights: NDArray[np.float64]) -> float:
        """Mean logistic loss."""
        return float(np.mean(np.logaddexp(0.0, -self.y * (self.x[:, mask.kept] @ weights))))

    def gradient(self, mask: Mask, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Its analytic gradient: ``float64[n_survivors]``."""
        x = self.x[:, mask.kept]
        return np.asarray(-(x.T @ (self.y / (1.0 + np.exp(self.y * (x @ weights))))) / self.y.size)

    def answer(self, run: RunDocument, mask: Mask, task: Task) -> Outcome:
        """What the device measures."""
        w, manifest = task.weights.astype(np.float64), manifest_for(run.training.estimator)
        if task.kind is ReportKind.SALIENCY:
            index = int.from_bytes(hashlib.sha256(f"{self._name} {task.round}".encode()).digest()[:4], "little")
            values = np.abs(seeded_normals(3, index, manifest.n_units + manifest.n_moments + 2)) + np.float32(0.01)
            parts = np.split(values, [manifest.n_units, manifest.n_units + manifest.n_moments])
            return Outcome(tuple(parts[: 3 if run.saliency.draws else 2]), 8)
        loss = self.loss(mask, w)
        if task.kind is ReportKind.EVALUATE:
            correct = int(np.sum(self.y * (self.x[:, mask.kept] @ w) > 0))
            counts = np.array([loss * self.y.size, correct, self.y.size], dtype=np.float32)
            return Outcome((counts,), self.y.size, loss)
        blocks, sigma, found = blocks_of(run.training, manifest, mask), task.sigma or run.training.sigma, []
        for block, positions in zip(blocks, task.positions, strict=True):
            part = slice(block.first, block.first + block.size)
            if block.kind == "sketch":  # without a residual: it would outlive the task
                gradient = self.gradient(mask, w)[part].astype(np.float32)
                found.append(GradientSketch(block.size, run.training.feedback).encode(gradient, positions))
                continue
            (basis,) = directions_of([block], run.settings.seed)
            assert isinstance(basis, Directions)
            buffer, scalars = np.empty(block.size, dtype=np.float32), []
            for position in positions.tolist():
                step = np.zeros(w.size)
                step[part] = sigma * basis.direction(task.round, position, buffer).astype(np.float64)
                if run.training.two_sided:
                    scalars.append((self.loss(mask, w + step) - self.loss(mask, w - step)) / (2 * sigma))
                else:
                    scalars.append((self.loss(mask, w + step) - loss) / sigma)
            found.append(np.array(scalars, dtype=np.float32))
        return Outcome(tuple(found), min(run.training.batch, self.y.size), loss)
