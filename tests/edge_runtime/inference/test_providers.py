"""Execution providers: names, order, what a session really took, and the way from the command line to the engine."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from fedzo.edge_runtime.__main__ import main
from fedzo.edge_runtime.inference import ort
from fedzo.edge_runtime.inference.engine import Engine
from fedzo.edge_runtime.inference.providers import CPU, PROVIDER_OPTIONS, provider_names
from fedzo.protocol.errors import ConfigError

CUDA = "CUDAExecutionProvider"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("FEDZO_"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("written", "names"),
    [
        (["cpu"], (CPU,)),
        (["cuda,cpu"], (CUDA, CPU)),
        (["CUDA", "cpu", "cuda"], (CUDA, CPU)),
        ([" TensorrtExecutionProvider , cudaexecutionprovider"], ("TensorrtExecutionProvider", CUDA)),
        (["xnnpack"], ("XnnpackExecutionProvider",)),
    ],
)
def test_names(written: list[str], names: tuple[str, ...]) -> None:
    assert provider_names(written) == names


@pytest.mark.parametrize("written", [[], [""], ["cuda,,cpu"], ["gpu"], ["CPUExecutionProvider2"]])
def test_other_names_are_refused(written: list[str]) -> None:
    with pytest.raises(ConfigError):
        provider_names(written)


def test_names_are_onnxruntimes() -> None:
    known = ort.runtime().get_all_providers()
    for name in known:
        if name not in ("JsExecutionProvider", "WebNNExecutionProvider"):  # of browsers
            assert provider_names([name]) == (name,)
    assert set(PROVIDER_OPTIONS) <= set(known)


def test_the_one_in_use_is_known(tiny: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(ort, "_in_use", "")
    caplog.set_level(logging.INFO, "fedzo.edge_runtime.inference.ort")
    weights = tiny.weights
    with Engine(tiny.artifact, tiny.dense, providers=(CUDA, CPU)) as engine:
        engine.loss(weights, tiny.x, tiny.y)
        engine.logits(weights, tiny.x)
    assert ort.provider_in_use() == CPU
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert said == [("WARNING", f"graphs run on {CPU}, {CUDA} is not there or did not start")]


def test_a_provider_that_is_listed_but_does_not_start(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime lists what its build holds, and goes on with the CPU when a driver is missing."""
    real = ort.runtime().InferenceSession

    def session(model: bytes, options: Any, providers: list[tuple[str, dict[str, str]]]) -> Any:
        assert providers == [(CUDA, PROVIDER_OPTIONS[CUDA]), (CPU, {})]
        return real(model, options, providers=[CPU])

    monkeypatch.setattr(ort.runtime(), "InferenceSession", session)
    monkeypatch.setattr(ort, "available_providers", lambda: [CUDA, CPU])
    with Engine(tiny.artifact, tiny.dense, providers=(CUDA,)) as engine:
        engine.loss(tiny.weights, tiny.x, tiny.y)
    strict = Engine(tiny.artifact, tiny.dense, providers=(CUDA,), strict_providers=True)
    with pytest.raises(ConfigError, match=f"{CUDA} did not start, the session runs on {CPU}"):
        strict.loss(tiny.weights, tiny.x, tiny.y)


@pytest.mark.parametrize("source", ["flag", "repeated flag", "environment", "file"])
def test_every_source_sets_them(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["join", "mqtt://127.0.0.1", "--data", "x.npz", "--show-config", "--json"]
    if source == "flag":
        command += ["--provider", "cuda,cpu", "--strict-providers"]
    elif source == "repeated flag":
        command += ["--provider", "cuda", "--provider", "cpu", "--strict-providers"]
    elif source == "environment":
        monkeypatch.setenv("FEDZO_PROVIDERS", "cuda,cpu")
        monkeypatch.setenv("FEDZO_STRICT_PROVIDERS", "yes")
    else:
        path = tmp_path / "device.toml"
        path.write_text('providers = ["cuda", "cpu"]\nstrict_providers = true\n')
        command += ["--config", str(path)]
    assert main(command) == 0
    shown = json.loads(capsys.readouterr().out)
    assert provider_names(shown["providers"]["value"]) == (CUDA, CPU)
    assert shown["strict_providers"]["value"] is True
    assert shown["providers"]["origin"].startswith(source.rsplit(maxsplit=1)[-1])


def test_an_unknown_one_ends_with_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["join", "mqtt://127.0.0.1", "--data", "x.npz", "--provider", "gpu", "--show-config"]) == 3
    assert "'gpu' is no execution provider" in capsys.readouterr().err
