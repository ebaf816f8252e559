"""The user's own torch modules: what comes out, and what is refused."""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.storage.artifact import load_artifact
from fedzo.exporter.artifact import export_artifact
from fedzo.exporter.models.registry import build_forward
from fedzo.exporter.sessions import run_graph
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.artifact.manifest import golden_batch
from fedzo.protocol.errors import ConfigError
from fedzo.protocol.pruning.mask import Mask
from tests.exporter import user_models
from tests.exporter.text_graphs import dense_by_name

HERE = "tests.exporter.user_models"
RENAMED = {"w.parameter": "w", "counts.parameter": "counts"}


@pytest.mark.parametrize(
    ("function", "shape", "classes"),
    [
        ("mixed", (3, 16, 16), 10),
        ("recurrent", (4, 5), 3),
        ("attention", (9, 12), 6),
        ("mobile", (3, 16, 16), 10),
        ("equal", (4,), 2),
        ("bare", (2,), 2),
    ],
)
def test_the_graph_computes_what_the_module_computes(function: str, shape: tuple[int, ...], classes: int) -> None:
    graph = build_forward(f"{HERE}:{function}", shape, classes, 5)
    layout = graph.layout
    module = getattr(user_models, function)().eval()
    weights = initial_weights(layout, 5)
    parameters = dict(module.named_parameters())
    torch.manual_seed(5)
    frozen = dict(getattr(user_models, function)().named_parameters())
    with torch.no_grad():
        for name, value in frozen.items():
            parameters[name].copy_(value)  # what is not trained has the values of the seed
        for name, array in dense_by_name(layout, weights).items():
            parameters[RENAMED.get(name, name)].copy_(torch.from_numpy(array))
        for batch in (1, 4):
            x, _ = golden_batch(shape, classes, batch, batch)
            expected = module(torch.from_numpy(x)).numpy()
            logits = run_graph(graph.model, {**dense_by_name(layout, weights), "x": x})["logits"]
            np.testing.assert_allclose(logits, expected, atol=1e-5 * max(1.0, float(np.abs(expected).max())))


def test_layers_and_first_values() -> None:
    layout = build_forward(f"{HERE}:mixed", (3, 16, 16), 10, 5).layout
    by_name = {p.name: p for p in layout.parameters}
    assert list(by_name) == [
        *("first.weight", "first.bias", "group.weight", "group.bias", "second.weight", "second.bias"),
        *("instance.weight", "instance.bias", "tokens.weight", "tokens.bias", "layer.weight", "layer.bias"),
        *("last.weight", "last.bias"),
    ]
    torch.manual_seed(5)
    weight = user_models.mixed().get_parameter("first.weight").detach().numpy()
    assert by_name["first.weight"].initialiser.kind == "normal"
    assert by_name["first.weight"].initialiser.scale == pytest.approx(float(weight.astype(np.float64).std()), rel=1e-6)
    assert (by_name["group.weight"].initialiser.kind, by_name["group.weight"].initialiser.scale) == ("constant", 1.0)
    assert (by_name["layer.bias"].initialiser.kind, by_name["layer.bias"].initialiser.scale) == ("constant", 0.0)


def test_equal_tensors_are_not_tied() -> None:
    layout = build_forward(f"{HERE}:equal", (4,), 2, 0).layout
    assert [p.name for p in layout.parameters if p.name.endswith("bias")] == [f"{k}.bias" for k in range(5)]
    assert len(layout.parameters) == 10


def test_shared_unused_and_frozen_tensors() -> None:
    graph = build_forward(f"{HERE}:recurrent", (4, 5), 3, 0)
    names = [p.name for p in graph.layout.parameters]
    assert names[:2] == ["w.parameter", "counts.parameter"]
    assert names.count("twice.weight") == 1
    assert not [name for name in names if name.startswith(("unused", "frozen", "offset"))]
    constants = {tensor.name for tensor in graph.model.graph.initializer}
    assert "frozen.bias" in constants


def test_an_imported_model_becomes_an_artifact(tmp_path: Path) -> None:
    manifest = export_artifact(f"{HERE}:attention", (9, 12), 6, 0.8, 3, tmp_path / "a")
    assert [unit.parameter for unit in manifest.units if unit.is_output] == ["last.weight"]
    assert "encode.self_attn.in_proj_weight" in {unit.parameter for unit in manifest.units}
    assert {p.name for p in manifest.layout.parameters if p.maskable} == {unit.parameter for unit in manifest.units}
    artifact = load_artifact(tmp_path / "a")
    mask = Mask.dense(manifest.layout)
    x, y = golden_batch((9, 12), 6, 0, 5)
    with Engine(artifact, mask, micro_batch=2) as engine:
        assert engine.check_golden() < 1e-6
        weights = initial_weights(manifest.layout, 3)
        assert engine.loss(weights, x, y) > 0.0
        assert engine.moments(weights, x).shape == (manifest.n_moments,)
        assert engine.shifted_logits(weights, x, np.zeros(manifest.n_units, np.float32)).shape == (5, 6)
    text = b"".join(path.read_bytes() for path in (tmp_path / "a").iterdir())
    assert str(Path.cwd()).encode() not in text, "a path of this machine is in the artifact"


def test_two_imports_have_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.rand(3)  # the state of torch's generator does not matter, and is not changed
        state = torch.get_rng_state()
        export_artifact(f"{HERE}:mobile", (3, 16, 16), 10, 0.5, 3, tmp_path / name)
        assert torch.equal(torch.get_rng_state(), state)
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("a", "b"))
    assert a == b


def test_a_model_without_layers_to_prune(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no layer of the model can be pruned"):
        export_artifact(f"{HERE}:bare", (2,), 2, 0.5, 0, tmp_path / "a")
    manifest = export_artifact(f"{HERE}:bare", (2,), 2, 0.0, 0, tmp_path / "a")
    assert {graph.name for graph in manifest.graphs} == {"probe.onnx", "predict.onnx"}
    assert onnx.load(tmp_path / "a" / "predict.onnx").graph.input[0].name == "w"


@pytest.mark.parametrize(
    ("function", "shape", "classes", "message", "hint"),
    [
        ("nowhere", (4,), 2, "has no function 'nowhere'", ""),
        ("linar", (4,), 2, "has no function 'linar'", f"did you mean {HERE}:linear?"),
        ("NOT_A_FUNCTION", (4,), 2, "has no function 'NOT_A_FUNCTION'", ""),
        ("number", (4,), 2, "returned int, not a torch.nn.Module", ""),
        ("broken", (4,), 2, "broken failed: ZeroDivisionError: the user's own mistake", "without arguments"),
        ("batch_statistics", (3, 16, 16), 10, "is a BatchNorm2d with batch statistics", "use GroupNorm"),
        ("running_statistics", (3, 16, 16), 10, "is a InstanceNorm2d with batch statistics", "InstanceNorm without"),
        ("frozen", (4,), 2, "nothing to train", ""),
        ("double", (4,), 2, r"'weight' of .*:double is torch\.float64, not float32", ".float()"),
        ("shifted", (4,), 4, "starts around 5", "as a constant or as normals around 0"),
        ("infinite", (4,), 2, "values that are not finite", ""),
        ("linear", (5,), 2, r"cannot take a batch of shape \(3, 5\): RuntimeError", "--input"),
        ("linear", (4,), 3, r"returns \(2,\) a sample, not 3 logits", "--classes"),
        ("dependent", (4,), 2, "something else for a sample alone", "every sample must be processed on its own"),
        ("mixing", (4,), 2, "something else for a sample alone", "every sample must be processed on its own"),
        ("lazy", (4,), 2, "'1.weight' of .*:lazy has no shape yet", "call the module once"),
        ("token", (4,), 2, "takes its input for indices", "such as x.long().clamp(0, n - 1)"),
        ("float_token", (4,), 2, "takes its input for indices", "between -1 and 1"),
        ("position", (7,), 2, r"cannot take a batch of shape \(3, 7\): IndexError", "--input"),
        ("bilinear", (4,), 2, r"'aten::bilinear' .*, in layer 'blocks\.1'", "operations that torch's exporter has"),
        ("projected", (4, 5), 2, r"LSTMs with projections, in layer 'first'", "operations that torch's exporter has"),
        ("choosing", (4,), 4, r"the operator with a sub-graph: If \(at /2/If", "plain tensor operations"),
        ("baked", (4,), 2, r"does not compute what the module computes \(batch of 3\)", "as Python numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_what_cannot_be_imported(function: str, shape: tuple[int, ...], classes: int, message: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_forward(f"{HERE}:{function}", shape, classes, 0)
    assert hint in caught.value.hint


def test_indices_of_any_number(tmp_path: Path) -> None:
    """What the refusals advise; a mapping that only suits numbers under one fails on the known answer."""
    export_artifact(f"{HERE}:clamped_token", (4,), 2, 0.0, 0, tmp_path / "a")
    with pytest.raises(ConfigError, match=r"Name:'/rows/Gather'.*out of data bounds") as caught:
        export_artifact(f"{HERE}:scaled_token", (4,), 2, 0.0, 0, tmp_path / "b")
    assert "x.long().clamp(0, n - 1)" in caught.value.hint


def test_nothing_but_results_on_stdout(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """torch writes its graph there from C++ when it fails, and the user's module may print."""
    caplog.set_level(logging.DEBUG, "fedzo.exporter")
    sys.stdout.write("before\n")
    with pytest.raises(ConfigError):
        build_forward(f"{HERE}:bilinear", (4,), 2, 0)
    sys.stdout.write("after\n")
    ctypes.CDLL(None).fflush(None)
    captured = capfd.readouterr()
    assert captured.out == "before\nafter\n"
    assert "printed by the model" in captured.err
    assert "aten::bilinear" in caplog.text


def test_a_closed_stdout() -> None:
    """In a process of its own: file 1 is not there."""
    code = f"""
import os, sys
os.close(1)
from fedzo.exporter.models.registry import build_forward
sys.exit(build_forward("{HERE}:linear", (4,), 2, 0).layout.size)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 10


@pytest.mark.parametrize("reference", ["os.path:", ":build", "a b:build", "models.py:build()", "x:y:z"])
def test_references_that_are_none(reference: str) -> None:
    with pytest.raises(ConfigError, match=r"is not of the form package\.module:function"):
        build_forward(reference, (4,), 2, 0)


def test_modules_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    (tmp_path / "fedzo_test_own.py").write_text("from torch import nn\ndef build():\n    return nn.Linear(4, 2)\n")
    (tmp_path / "fedzo_test_wrong.py").write_text("import fedzo_test_missing\n")
    (tmp_path / "fedzo_test_syntax.py").write_text("def build(:\n")
    try:
        assert build_forward("fedzo_test_own:build", (4,), 2, 0).layout.size == 10
        with pytest.raises(ConfigError, match="No module named 'fedzo_test_missing'") as caught:
            build_forward("fedzo_test_wrong:build", (4,), 2, 0)
        assert caught.value.hint == ""
        with pytest.raises(ConfigError, match="No module named 'fedzo_test_absent'") as caught:
            build_forward("fedzo_test_absent:build", (4,), 2, 0)
        assert "run from the folder that holds it" in caught.value.hint
        with pytest.raises(ConfigError, match="importing fedzo_test_syntax failed: SyntaxError"):
            build_forward("fedzo_test_syntax:build", (4,), 2, 0)
    finally:
        sys.modules.pop("fedzo_test_own", None)
    assert sys.path == before


def test_the_module_is_put_into_evaluation_mode() -> None:
    assert isinstance(user_models.mixed(), nn.Module)
    first = build_forward(f"{HERE}:mixed", (3, 16, 16), 10, 5).model
    assert "Dropout" not in {node.op_type for node in first.graph.node}
