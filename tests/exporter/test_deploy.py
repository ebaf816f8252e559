"""The final model: plain, complete, and equal to the artifact with the trained weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from fedzo.exporter.artifact import verify_artifact
from fedzo.exporter.deploy import deploy
from fedzo.exporter.reference import forward
from fedzo.exporter.sessions import run_graph
from fedzo.protocol.artifact.layout import Initialiser, Layout, Parameter, initial_weights
from fedzo.protocol.artifact.manifest import Manifest, golden_batch
from fedzo.protocol.errors import ArtifactError, ConfigError
from fedzo.protocol.pruning.mask import Mask, threshold
from tests.exporter.text_graphs import numbers, operators, signature


def trained(folder: Path, sparsity: float = 0.9) -> tuple[Manifest, Mask, NDArray[np.float32]]:
    """A mask and weights that differ from the initial ones everywhere."""
    manifest = verify_artifact(folder)
    dense = initial_weights(manifest.layout, 1) + np.float32(0.05) * numbers(manifest.layout.size)
    mask = threshold(manifest.layout, np.abs(dense), sparsity)
    return manifest, mask, dense[mask.survivors()]


@pytest.mark.parametrize("model", ["lenet5", "resnet8"])
@pytest.mark.parametrize("output", ["logits", "softmax"])
def test_the_model_computes_what_the_trained_network_computes(
    model: str, output: Literal["logits", "softmax"], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(model)
    manifest, mask, weights = trained(folder)
    out = tmp_path / "new" / "model.onnx"
    report = deploy(folder, manifest, mask, weights, out, output=output)
    assert (report.path, report.output, report.parameters) == (out, output, manifest.layout.size)
    assert report.nonzero == np.count_nonzero(weights) <= mask.n_survivors
    assert report.size_bytes == out.stat().st_size
    assert report.sha256 == hashlib.sha256(out.read_bytes()).digest()
    assert 0.0 <= report.largest_difference <= report.tolerance < 1e-2
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    (source,), (target,) = session.get_inputs(), session.get_outputs()
    assert (source.name, source.shape) == ("x", ["batch", *manifest.input_shape])
    assert target.name == {"logits": "logits", "softmax": "probabilities"}[output]
    assert target.shape == ["batch", 10]
    dense = np.zeros(manifest.layout.size, np.float32)
    dense[mask.survivors()] = weights
    for batch in (1, 5):
        x, _ = golden_batch(manifest.input_shape, 10, batch, batch)
        expected = forward(manifest.model, manifest.layout, dense, x)
        if output == "softmax":
            expected = np.exp(expected)
            expected /= expected.sum(axis=1, keepdims=True)
        (actual,) = session.run(None, {"x": x})
        np.testing.assert_allclose(actual, expected, atol=1e-5 * max(1.0, float(np.abs(expected).max())))
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("model", ["lenet5", "cnn1d"])
def test_heads_of_stages_are_left_out(model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(f"{model}_with_heads")
    manifest, mask, weights = trained(folder)
    report = deploy(folder, manifest, mask, weights, tmp_path / "model.onnx")
    layout = manifest.model_layout
    assert report.parameters == layout.size < manifest.layout.size
    model_weights = weights[: int(mask.counts()[: len(layout.parameters)].sum())]
    assert report.nonzero == np.count_nonzero(model_weights)
    deployed = onnx.load(tmp_path / "model.onnx")
    assert {t.name for t in deployed.graph.initializer} == {p.name for p in layout.parameters}
    dense = mask.filled(weights, manifest.seed)[: layout.size]
    x, _ = golden_batch(manifest.input_shape, 10, 1, 5)
    expected = forward(manifest.model, layout, dense, x)
    np.testing.assert_allclose(run_graph(deployed, {"x": x})["logits"], expected, atol=1e-4)


def test_nothing_of_the_training_is_left(lenet5: Path, tmp_path: Path) -> None:
    manifest, mask, weights = trained(lenet5)
    deploy(lenet5, manifest, mask, weights, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert list(signature(model)) == ["x", "logits"]
    layer = ["Conv", "Relu", "AveragePool"]
    assert operators(model) == [*layer, *layer, "Flatten", "Gemm", "Relu", "Gemm", "Relu", "Gemm"]
    assert {t.name for t in model.graph.initializer} == {p.name for p in manifest.layout.parameters}
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    zeros = sum(int((onnx.numpy_helper.to_array(t) == 0.0).sum()) for t in model.graph.initializer)
    assert zeros == manifest.layout.size - np.count_nonzero(weights)


def test_facts_and_labels_are_in_the_metadata(lenet5: Path, tmp_path: Path) -> None:
    manifest, mask, weights = trained(lenet5)
    labels = [f"digit {k} ✓" for k in range(10)]
    facts = {"rounds": "12", "accuracy": "0.97"}
    deploy(lenet5, manifest, mask, weights, tmp_path / "a.onnx", labels=labels, facts=facts)
    properties = {item.key: item.value for item in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert json.loads(properties["fedzo.labels"]) == labels
    assert properties["fedzo.run.rounds"] == "12"
    assert properties["fedzo.run.accuracy"] == "0.97"
    assert properties["fedzo.model"] == "lenet5"
    assert properties["fedzo.mask_digest"] == mask.digest.hex()
    assert float(properties["fedzo.sparsity"]) == mask.sparsity
    deploy(lenet5, manifest, mask, weights, tmp_path / "b.onnx", labels=labels, facts=dict(reversed(facts.items())))
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def other_mask() -> Mask:
    return Mask.dense(Layout((Parameter("a", (3,), True, Initialiser("normal", 1.0)),)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": ["a"]}, ConfigError, "there are 1 labels for 10 classes"),
        ({"output": "argmax"}, ConfigError, "the output is 'argmax', it must be logits or softmax"),
        (
            {"weights": np.zeros(3, np.float32)},
            ArtifactError,
            r"the weights are float32\[3\], the mask keeps float32\[",
        ),
        ({"mask": other_mask()}, ArtifactError, "the mask belongs to another layout"),
    ],
)
def test_arguments_that_do_not_fit(
    lenet5: Path, tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    manifest, mask, weights = trained(lenet5)
    arguments: dict[str, Any] = {"mask": mask, "weights": weights, **change}
    with pytest.raises(error, match=message):
        deploy(lenet5, manifest, out=tmp_path / "model.onnx", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite(lenet5: Path, tmp_path: Path) -> None:
    manifest, mask, weights = trained(lenet5)
    weights[5] = np.nan
    with pytest.raises(ArtifactError, match="not finite: the run diverged"):
        deploy(lenet5, manifest, mask, weights, tmp_path / "model.onnx")
    with pytest.raises(ArtifactError, match="the weights are float64"):
        deploy(lenet5, manifest, mask, np.zeros(mask.n_survivors), tmp_path / "model.onnx")  # type: ignore[arg-type]


def test_an_existing_file_is_replaced_only_when_asked(lenet5: Path, tmp_path: Path) -> None:
    manifest, mask, weights = trained(lenet5)
    out = tmp_path / "model.onnx"
    out.write_text("precious")
    with pytest.raises(ConfigError, match="exists"):
        deploy(lenet5, manifest, mask, weights, out)
    assert out.read_text() == "precious"
    deploy(lenet5, manifest, mask, weights, out, overwrite=True)
    onnx.checker.check_model(str(out))
    with pytest.raises(ConfigError, match="exists"):
        deploy(lenet5, manifest, mask, weights, tmp_path, overwrite=True)
    with pytest.raises(ConfigError, match="cannot be written"):
        deploy(lenet5, manifest, mask, weights, out / "below.onnx")


def test_an_artifact_that_was_changed_is_refused(lenet5: Path, tmp_path: Path) -> None:
    manifest, mask, weights = trained(lenet5)
    (tmp_path / "predict.onnx").write_bytes((lenet5 / "predict.onnx").read_bytes() + b"\0")
    with pytest.raises(ArtifactError, match="is not the file that the manifest names"):
        deploy(tmp_path, manifest, mask, weights, tmp_path / "model.onnx")
    with pytest.raises(ArtifactError, match="cannot be read"):
        deploy(tmp_path / "nowhere", manifest, mask, weights, tmp_path / "model.onnx")


def test_a_model_that_differs_is_not_written(lenet5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, mask, weights = trained(lenet5)

    def wrong(model: Any, feeds: Any, *, optimised: bool = False) -> dict[str, NDArray[Any]]:
        return {name: value + 0.01 * optimised for name, value in run_graph(model, feeds, optimised=optimised).items()}

    monkeypatch.setattr("fedzo.exporter.deploy.run_graph", wrong)
    with pytest.raises(
        ArtifactError, match=r"the model differs from the artifact by 0\.01, the tolerance is"
    ) as caught:
        deploy(lenet5, manifest, mask, weights, tmp_path / "model.onnx")
    assert "another onnxruntime" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
