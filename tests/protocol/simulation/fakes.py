"""A tiny artifact without graphs, and an engine that answers tasks in numpy."""

from __future__ import annotations

import functools
import hashlib
import random

import numpy as np
from numpy.typing import NDArray

from fedzo.protocol.device_events import Outcome, Task
from fedzo.protocol.directions import Directions
from fedzo.protocol.documents import RunDocument
from fedzo.protocol.layout import Initialiser, Layout, Parameter
from fedzo.protocol.manifest import GRAPHS, Golden, GraphFile, GraphMemory, Manifest, UnitLayer
from fedzo.protocol.mask import Mask
from fedzo.protocol.messages import ReportKind
from fedzo.protocol.settings import RunSettings
from fedzo.protocol.wire import run_tag
from tests.protocol.builders import seeded_normals

TAG = run_tag("run-1")


@functools.cache
def fake_graphs() -> dict[str, bytes]:
    """Bytes that stand for graphs; the first one takes several blocks."""
    return {name: random.Random(name).randbytes(150_000 if i == 0 else 40 + i) for i, name in enumerate(GRAPHS)}


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


def run_document(settings: RunSettings, run: str = "run-1") -> RunDocument:
    """The document of a run over :func:`tiny_manifest`."""
    data = tiny_manifest().encode()
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
        w, manifest = task.weights.astype(np.float64), tiny_manifest()
        if task.kind is ReportKind.SALIENCY:
            index = int.from_bytes(hashlib.sha256(f"{self._name} {task.round}".encode()).digest()[:4], "little")
            values = np.abs(seeded_normals(3, index, manifest.n_units + manifest.n_moments + 2)) + np.float32(0.01)
            parts = np.split(values, [manifest.n_units, manifest.n_units + manifest.n_moments])
            return Outcome(tuple(parts[: 3 if run.saliency.draws else 2]), 8)
        loss = self.loss(mask, w)
        if task.kind is ReportKind.EVALUATE:
            correct = int(np.sum(self.y * (self.x[:, mask.kept] @ w) > 0))
            block = np.array([loss * self.y.size, correct, self.y.size], dtype=np.float32)
            return Outcome((block,), self.y.size, loss)
        directions, sigma = Directions(run.training.directions, run.settings.seed, w.size), run.training.sigma
        buffer, scalars = np.empty(w.size, dtype=np.float32), []
        for position in task.positions.tolist():
            step = sigma * directions.direction(task.round, position, buffer).astype(np.float64)
            if run.training.two_sided:
                scalars.append((self.loss(mask, w + step) - self.loss(mask, w - step)) / (2 * sigma))
            else:
                scalars.append((self.loss(mask, w + step) - loss) / sigma)
        return Outcome((np.array(scalars, dtype=np.float32),), min(run.training.batch, self.y.size), loss)
