"""Exported artifacts that several test files read; none of them may change one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedzo.exporter.artifact import export_artifact


@pytest.fixture(scope="session")
def lenet5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LeNet-5 on 1x32x32, 10 classes, sparsity 0.9, seed 7."""
    folder = tmp_path_factory.mktemp("artifacts") / "lenet5"
    export_artifact("lenet5", (1, 32, 32), 10, 0.9, 7, folder)
    return folder


@pytest.fixture(scope="session")
def resnet8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ResNet-8 on 3x16x16, 10 classes, sparsity 0.9, seed 7."""
    folder = tmp_path_factory.mktemp("artifacts") / "resnet8"
    export_artifact("resnet8", (3, 16, 16), 10, 0.9, 7, folder)
    return folder


@pytest.fixture(scope="session")
def lenet5_with_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LeNet-5 as above whose stages have heads of their own."""
    folder = tmp_path_factory.mktemp("artifacts") / "lenet5_with_heads"
    export_artifact("lenet5", (1, 32, 32), 10, 0.9, 7, folder, local_heads=True)
    return folder


@pytest.fixture(scope="session")
def cnn1d_with_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network over time on 9x128 with heads, 10 classes, sparsity 0.5, seed 7."""
    folder = tmp_path_factory.mktemp("artifacts") / "cnn1d_with_heads"
    export_artifact("cnn1d", (9, 128), 10, 0.5, 7, folder, local_heads=True)
    return folder
