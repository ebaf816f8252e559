"""The last step of a run: a plain inference model with the trained weights inside.

It needs nothing of fedzo: one input ``x``, one output, weights as constants. What the mask removed is 0, or its initial
value if the run trained that way.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, helper

from ..protocol.artifact.manifest import Manifest, golden_batch
from ..protocol.errors import ArtifactError, ConfigError
from ..protocol.pruning.mask import Mask
from .forward import BATCH, float_value
from .passes.fold_constants import FoldConstants
from .passes.fold_weights import FoldWeights
from .passes.infrastructure import Sequential
from .sessions import run_graph

__all__ = ["DeployReport", "InputValues", "deploy"]

TOLERANCE = 1e-4
"""Largest difference of an output, relative to the largest output (at least 1)."""


@dataclass(frozen=True, slots=True)
class InputValues:
    """What is known of the numbers that the model was evaluated on, and so of those that it wants.

    Attributes:
        mean: Subtracted from them, one number or one a channel; empty for none, None if nobody knows.
        std: What they were divided by then; likewise.
        pad: Whether smaller images were centred in zeros first.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    pad: bool = False

    def text(self, input_shape: Sequence[int]) -> str:
        """One line for people: the input's type and shape, and how its numbers came about."""
        shape = f"float32 {','.join(['N', *map(str, input_shape)])}"
        if self.mean is None or self.std is None:
            return f"{shape}: as the boards' --mean and --std made them, which the server does not know"
        steps = ["smaller images centred in zeros"] if self.pad else []
        steps.append("bytes / 255 (other numbers as they are)")
        steps += [f"minus mean {_listed(self.mean)}"] if self.mean else []
        steps += [f"by std {_listed(self.std)}"] if self.std else []
        return f"{shape}: {', '.join(steps)}, as the server's test set and so the boards' data"

    def properties(self, input_shape: Sequence[int]) -> dict[str, str]:
        """The same as metadata of an ONNX file: ``fedzo.input``, and lists as JSON if they are known."""
        known = {"mean": self.mean, "std": self.std}
        lists = {f"fedzo.input.{name}": json.dumps(list(value)) for name, value in known.items() if value is not None}
        return {"fedzo.input": self.text(input_shape), **lists}


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


@dataclass(frozen=True, slots=True)
class DeployReport:
    """What was written.

    Attributes:
        path: The model.
        size_bytes: Its length.
        sha256: Its hash, 32 bytes.
        output: Whether it yields logits or probabilities.
        parameters: Trainable entries of the dense model.
        nonzero: How many of them are not zero.
        largest_difference: Between the outputs of the model and those of the artifact's ``predict.onnx`` with the
            same weights, on the golden batch; the model ran as onnxruntime runs it by default.
        tolerance: What the difference was compared with.
    """

    path: Path
    size_bytes: int
    sha256: bytes
    output: Literal["logits", "softmax"]
    parameters: int
    nonzero: int
    largest_difference: float
    tolerance: float


def deploy(
    artifact_dir: Path,
    manifest: Manifest,
    mask: Mask,
    weights: NDArray[np.float32],
    out: Path,
    *,
    output: Literal["logits", "softmax"] = "logits",
    labels: Sequence[str] | None = None,
    facts: Mapping[str, str] | None = None,
    inputs: InputValues | None = None,
    overwrite: bool = False,
) -> DeployReport:
    """Write a plain inference model, and check it against the artifact.

    Args:
        artifact_dir: Folder of the artifact.
        manifest: Its description.
        mask: Which weights survived.
        weights: ``float32[n_survivors]``; only read.
        out: File to write, usually ``model.onnx``; it appears complete or not at all.
        output: ``logits``, or ``softmax`` for an output ``probabilities``.
        labels: Names of the classes, stored as JSON under ``fedzo.labels``.
        facts: Facts about the run (rounds, accuracy, ...), stored under ``fedzo.run.<key>``.
        inputs: What its input's numbers are, stored under ``fedzo.input``; by default nobody knows.
        overwrite: Replace ``out``.

    Raises:
        ConfigError: ``out`` exists or cannot be written, or there is not one label a class.
        ArtifactError: The weights do not fit or are not finite, ``predict.onnx`` is not the manifest's, or the model
            does not compute what the artifact computes.
    """
    if output not in ("logits", "softmax"):
        raise ConfigError(f"the output is {output!r}, it must be logits or softmax")
    if labels is not None and len(labels) != manifest.n_classes:
        raise ConfigError(f"there are {len(labels)} labels for {manifest.n_classes} classes")
    if mask.layout.digest != manifest.layout.digest:
        raise ArtifactError("the mask belongs to another layout than the artifact")
    if weights.shape != (mask.n_survivors,) or weights.dtype != np.float32:
        raise ArtifactError(
            f"the weights are {weights.dtype}{list(weights.shape)}, the mask keeps float32[{mask.n_survivors}]"
        )
    if not np.isfinite(weights).all():
        raise ArtifactError("the weights are not finite: the run diverged", hint="deploy an earlier checkpoint")
    if out.is_dir() or (out.exists() and not overwrite):
        raise ConfigError(f"{out} exists", hint="choose another file, or give --overwrite")

    predict = _read_predict(artifact_dir, manifest)
    layout = manifest.model_layout
    dense = mask.filled(weights, manifest.seed)[: layout.size]
    model = Sequential([FoldWeights(layout, dense), FoldConstants()])(predict).model
    if output == "softmax":
        _append_softmax(model, manifest.n_classes)
    model.graph.name = "model"
    properties = {f"fedzo.run.{key}": str(value) for key, value in (facts or {}).items()}
    properties |= {
        "fedzo.model": manifest.model,
        "fedzo.layout_digest": manifest.layout.digest.hex(),
        "fedzo.mask_digest": mask.digest.hex(),
        "fedzo.sparsity": repr(mask.sparsity),
        "fedzo.producer": manifest.producer,
        **(inputs or InputValues()).properties(manifest.input_shape),
    }
    if labels is not None:
        properties["fedzo.labels"] = json.dumps(list(labels), ensure_ascii=False)
    helper.set_model_props(model, dict(sorted(properties.items())))
    onnx.checker.check_model(model, full_check=True)
    data = bytes(model.SerializeToString(deterministic=True))
    difference, tolerance = _compare(data, predict, manifest, dense, output)
    if not difference <= tolerance:
        raise ArtifactError(
            f"the model differs from the artifact by {difference:.3g}, the tolerance is {tolerance:.3g}",
            hint="try another onnxruntime version: some releases compute wrong results on some processors",
        )
    _write(out, data)
    return DeployReport(
        path=out,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).digest(),
        output=output,
        parameters=layout.size,
        nonzero=int(np.count_nonzero(dense)),
        largest_difference=difference,
        tolerance=tolerance,
    )


def _read_predict(artifact_dir: Path, manifest: Manifest) -> ModelProto:
    path, graph = artifact_dir / "predict.onnx", manifest.graph("predict.onnx")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) != graph.size or hashlib.sha256(data).digest() != graph.sha256:
        raise ArtifactError(f"{path} is not the file that the manifest names", hint="export the artifact again")
    return onnx.load_from_string(data)


def _append_softmax(model: ModelProto, n_classes: int) -> None:
    model.graph.node.append(helper.make_node("Softmax", ["logits"], ["probabilities"], name="probabilities", axis=1))
    del model.graph.output[:]
    model.graph.output.append(float_value("probabilities", (BATCH, n_classes)))


def _compare(
    data: bytes, predict: ModelProto, manifest: Manifest, weights: NDArray[np.float32], output: str
) -> tuple[float, float]:
    """Largest difference of the outputs on the golden batch, and the largest allowed one."""
    golden = manifest.golden
    x, _ = golden_batch(manifest.input_shape, manifest.n_classes, golden.seed, golden.batch)
    every = Mask.dense(manifest.model_layout)
    feeds: dict[str, NDArray[np.generic]] = {"w": weights, "index": every.index(), "counts": every.counts(), "x": x}
    expected = run_graph(predict, feeds)["logits"].astype(np.float64)
    if output == "softmax":
        expected = np.exp(expected - expected.max(axis=1, keepdims=True))
        expected /= expected.sum(axis=1, keepdims=True)
    (actual,) = run_graph(data, {"x": x}, optimised=True).values()
    scale = max(1.0, float(np.abs(expected).max()))
    return float(np.abs(actual.astype(np.float64) - expected).max()), TOLERANCE * scale


def _write(out: Path, data: bytes) -> None:
    temporary: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(out)
    except OSError as error:
        raise ConfigError(
            f"the model cannot be written to {out}: {error.strerror or error}",
            hint="check the path, its permissions and the free disk space",
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
