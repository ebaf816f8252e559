"""Data sets, metrics, exact gradients, shapes, and what the command line refuses."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedzo.experiments import shapes
from fedzo.experiments.__main__ import main
from fedzo.experiments.backprop import accuracy, directional_derivative, exact_gradient, trained
from fedzo.experiments.data import Images, digits, load_images
from fedzo.experiments.gradient_error import _estimates
from fedzo.experiments.lab import exported, gaussian_mask
from fedzo.experiments.metrics import cosine_squared, relative_error, slope, spearman
from fedzo.experiments.report import Report
from fedzo.protocol.artifact.layout import initial_weights
from fedzo.protocol.errors import ConfigError, DataError
from fedzo.protocol.perturbation.directions import Directions


@pytest.fixture(scope="module")
def images() -> Images:
    return digits()


def arrays(**changes: Any) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(6, 1, 16, 16)).astype(np.float32)
    return {"x": x, "y": np.arange(6), "xt": x[:3], "yt": np.arange(3), **changes}


def test_digits_are_the_same_for_everybody(images: Images) -> None:
    assert (images.x.shape, images.xt.shape) == ((1437, 1, 32, 32), (360, 1, 32, 32))
    assert images.x.dtype == np.float32
    assert (images.x.min(), images.x.max(), images.n_classes) == (-1.0, 1.0, 10)
    assert np.array_equal(digits().x, images.x)


def test_a_file_is_called_by_its_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", **arrays())
    (found,) = load_images([f"small_set={tmp_path / 'mine.npz'}"])
    assert (found.name, found.shape, found.n_classes) == ("small_set", (1, 16, 16), 6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": np.zeros((6, 1, 16, 16))}, "images are float64"),
        ({"x": np.zeros((6, 16, 16), np.float32)}, "images are float32"),
        ({"y": np.arange(5)}, "labels are int64"),
        ({"y": np.arange(6) - 1}, "labels are int64"),
        ({"y": np.arange(6) * 0.5}, "labels are float64"),
        ({"xt": np.zeros((3, 3, 16, 16), np.float32)}, "test images"),
    ],
)
def test_wrong_arrays_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", **arrays(**change))
    with pytest.raises(DataError, match=words):
        load_images([f"mine={tmp_path / 'mine.npz'}"])


def test_a_missing_array_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", x=arrays()["x"], y=arrays()["y"], xt=arrays()["xt"])
    with pytest.raises(DataError, match="'yt'"):
        load_images([f"mine={tmp_path / 'mine.npz'}"])


@pytest.mark.parametrize("entries", [["mnist"], ["A=b.npz"], ["=b.npz"], ["a="], ["digits", "digits"], []])
def test_wrong_names_are_refused(entries: list[str]) -> None:
    with pytest.raises(ConfigError):
        load_images(entries)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["wire-bytes", "--seeds", "0"], "number of seeds is 0"),
        (["wire-bytes", "--figure", "out.pdf"], "out.pdf"),
        (["wire-bytes", "--from", "no-such-file.json"], "no-such-file.json"),
        (["gradient-error", "--data", "mnist"], "'mnist'"),
        (["gradient-error", "--k", "8", "4"], "[8, 4]"),
        (["federation-error", "--devices", "0"], "must be 1 or more"),
        (["best-k", "--k", "0"], "must be 1 or more"),
        (["deeper-nets", "--models", "alexnet"], "'alexnet'"),
        (["saliency-inputs", "--splits", "dirichlet:-1"], "dirichlet:-1"),
    ],
)
def test_the_command_line_refuses(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 3
    error = capsys.readouterr()
    assert not error.out
    assert error.err.startswith("error: ")
    assert words in error.err


def test_another_file_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text("[1]", encoding="utf-8")
    assert main(["wire-bytes", "--from", str(tmp_path / "other.json")]) == 3
    assert "no result of an experiment" in capsys.readouterr().err


def test_without_matplotlib_a_figure_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["wire-bytes", "--figure", str(tmp_path / "f.png")]) == 3
    assert "pip install 'fedzo[experiments]'" in capsys.readouterr().err


def test_report_round_trip() -> None:
    report = Report.made({"seeds": [0]}, [{"a": 1 / 3, "b": None, "c": float("nan")}], {"x": 2 / 3})
    found = Report.decode(report.encode(), "r")
    assert found.rows == [{"a": 0.333333, "b": None, "c": None}]
    assert found.figures == {"x": 0.666667}
    assert found.settings["seeds"] == [0]
    with pytest.raises(DataError, match="no result"):
        Report.decode('{"rows": []}', "r")


def test_metrics() -> None:
    a, b = np.array([3.0, 0.0]), np.array([3.0, 4.0])
    assert relative_error(a, b) == pytest.approx(0.8)
    assert cosine_squared(a, b) == pytest.approx(0.36)
    assert cosine_squared(np.zeros(2), b) == 0.0
    assert spearman(np.array([1, 2, 3]), np.array([10, 30, 20])) == pytest.approx(0.5)
    assert slope([1.0, 4.0, 16.0], [3.0, 6.0, 12.0]) == pytest.approx(0.5)


def test_a_whole_basis_gives_the_gradient() -> None:
    directions = Directions("hadamard", 3, 64)
    gradient = np.random.default_rng(1).normal(size=64).astype(np.float32)
    positions = np.arange(64, dtype=np.int64)
    scalars = directions.project(0, positions, gradient).astype(np.float32)
    first, last = _estimates(directions, scalars, [16, 64])
    assert relative_error(last, gradient) < 1e-3  # coefficients have 13 bits
    assert 0.0 < cosine_squared(first, gradient) < 0.9


def test_exact_gradients(images: Images) -> None:
    x, y = images.x[:8], images.y[:8]
    with exported("lenet5", images.shape, 10, 0) as artifact:
        manifest = artifact.manifest
        dense = initial_weights(manifest.layout, 0)
        mask = gaussian_mask(artifact, dense, 0.8, 0, samples=4)
    gradient = exact_gradient(manifest, dense, x, y)
    direction = Directions("rademacher", 0, manifest.layout.size).direction(0, 0, np.empty_like(dense))
    assert directional_derivative(manifest, dense, direction, x, y) == pytest.approx(
        float(gradient @ direction), rel=1e-9
    )
    learnt = trained(manifest, mask, dense, images.x, images.y, steps=60, seed=0, rate=3e-3)
    assert not learnt[~mask.kept].any()
    assert accuracy(manifest, learnt, images.xt, images.yt) > 0.5
    assert np.array_equal(trained(manifest, mask, dense, x, y, steps=0, seed=0), np.where(mask.kept, dense, 0))


@pytest.mark.parametrize(("name", "parameters"), [("resnet50", 25_557_032), ("mobilenetv2", 3_504_872)])
def test_shapes_are_those_of_the_papers(name: str, parameters: int) -> None:
    module = getattr(shapes, name)()
    assert sum(p.numel() for p in module.parameters()) == parameters
    with torch.no_grad():
        assert module.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, shapes.N_CLASSES)
